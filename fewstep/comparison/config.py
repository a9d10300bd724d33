"""A comparison recipe: which teacher, which students, at what budget, over which seeds. Imports no torch."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from fewstep.block import Block
from fewstep.config import RunConfig, apply_override, command_of, explain, load_config, parse_value, read_tree
from fewstep.errors import UsageError, nearest
from fewstep.evaluation.config import EvaluateConfig

Overrides = Mapping[str, Any]
"""Dotted key -> value, as KEY=VALUE on the line of `fewstep distill`."""

_RESERVED = {
    "name": "a run is named by its recipe",
    "seed": "the seeds are those of the comparison",
    "teacher.path": "students learn from the teacher of the comparison",
    "evaluate": "how all runs are measured is said in the evaluate block of the comparison",
}


class Comparison(Block):
    """A teacher and its students by recipe name or YAML file, trained once per seed and measured side by side.

    ``set`` holds overrides for every student, ``set_for`` further ones by student (methods with several stages count
    their steps differently), ``set_teacher`` those of the teacher. ``evaluate`` replaces the runs' own block.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    teacher: str
    students: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field((0,), min_length=1)
    set: dict[str, Any] = Field(default_factory=dict)
    set_for: dict[str, dict[str, Any]] = Field(default_factory=dict)
    set_teacher: dict[str, Any] = Field(default_factory=dict)
    evaluate: EvaluateConfig = EvaluateConfig()

    @field_validator("students", "seeds")
    @classmethod
    def _once(cls, listed: tuple[Any, ...]) -> tuple[Any, ...]:
        twice = next((entry for i, entry in enumerate(listed) if entry in listed[:i]), None)
        if twice is not None:
            raise ValueError(f"{twice} is listed twice")
        return listed

    @model_validator(mode="after")
    def _overrides_are_of_runs(self) -> "Comparison":
        blocks = {"set": self.set, "set_teacher": self.set_teacher}
        blocks |= {f"set_for.{student}": overrides for student, overrides in self.set_for.items()}
        for place, overrides in blocks.items():
            for key, value in overrides.items():
                for reserved, why in _RESERVED.items():
                    if key == reserved or key.startswith(f"{reserved}."):
                        raise ValueError(f"{place}.{key} has no place here: {why}")
                if "." not in key and isinstance(value, Mapping):
                    inner = next(iter(value), "KEY")
                    raise ValueError(f"{place}.{key} would replace the whole block: write {key}.{inner}")
        return self


@dataclass(frozen=True)
class Budget:
    """What training a run takes: optimiser steps over all its stages, and samples seen."""

    name: str
    steps: int
    samples: int


def load_comparison(source: str, overrides: Sequence[str] = ()) -> Comparison:
    """A comparison recipe's name or a YAML file, with ``KEY=VALUE`` overrides, checked. Errors are ``UsageError``."""
    tree = read_tree(source)
    if "objective" in tree and "students" not in tree:
        command = command_of(load_config(source))
        raise UsageError(f"{source} is one run, no comparison: use `{shlex.join(['fewstep', command, source])}`")
    students = _listed(tree)
    for override in sorted(overrides, key=lambda override: not override.startswith("students=")):
        _apply(tree, override, students)
        students += _listed(tree)
    comparison = check_comparison(tree, source)
    for student in comparison.set_for:
        if student not in students:
            raise UsageError(f"{source}: set_for.{student}: no such student; {nearest(student, students)}")
    # A line that names fewer students leaves those of the others behind.
    kept = {student: found for student, found in comparison.set_for.items() if student in comparison.students}
    return comparison.model_copy(update={"set_for": kept})


def check_comparison(tree: Mapping[str, Any], source: str) -> Comparison:
    """Validate a tree of plain values; the first fault becomes one sentence with its dotted path."""
    try:
        return Comparison.model_validate(tree)
    except ValidationError as error:
        explain(error, source, Comparison)


def comparison_yaml(comparison: Comparison) -> str:
    """The resolved comparison as YAML; loading it gives the same one."""
    return yaml.safe_dump(comparison.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def run_config(source: str, overrides: Overrides, further: Sequence[str] = ()) -> RunConfig:
    """The config of one run: its recipe or file, the comparison's overrides, and ``KEY=VALUE`` ones after them."""
    return load_config(source, [*(f"{key}={_as_yaml(value)}" for key, value in overrides.items()), *further])


def _listed(tree: Mapping[str, Any]) -> list[str]:
    students = tree.get("students")
    return [str(student) for student in students] if isinstance(students, list) else []


def _apply(tree: dict[str, Any], override: str, students: Sequence[str]) -> None:
    """Set one key in place. What follows ``set.`` and its like is a key of a run, and stays one with its dots."""
    dotted, equals, value = override.partition("=")
    block, _, key = dotted.partition(".")
    path = [block]
    if block == "set_for":
        named = [student for student in students if key.startswith(f"{student}.")]
        if not named:
            raise UsageError(
                f"override {dotted}: set_for takes a student and a key, as in set_for.NAME.train.steps=100"
            )
        path.append(max(named, key=len))
        key = key.removeprefix(f"{path[-1]}.")
    if not (equals and key and block in ("set", "set_for", "set_teacher")):
        apply_override(tree, override, Comparison)
        return
    node = tree
    for name in path:
        found = node.get(name) or {}
        if not isinstance(found, dict):
            raise UsageError(f"override {dotted}: {name} is a value, not a block")
        node[name] = found
        node = found
    node[key] = parse_value(dotted, value)


def _as_yaml(value: Any) -> str:
    """A plain value on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=2**30).removesuffix("...\n").strip()
