"""The config tree: a recipe or a YAML file, plus dotted overrides, checked before anything starts. Imports no torch."""

import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from reprlib import Repr
from typing import Any, NoReturn

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from fewstep.block import Block, ProductsName, products_of
from fewstep.data.config import DataConfig
from fewstep.distill.config import ObjectiveConfig, TrainConfig
from fewstep.distill.consistency.config import ConsistencyBlock, ConsistencyFlowMatchingConfig
from fewstep.distill.flow_maps.config import EulerianBlock, FlowMapBlock, RegressionBlock, ShortcutConfig
from fewstep.distill.progressive.config import ProgressiveConfig
from fewstep.distill.reflow.config import PiecewiseReflowConfig, ReflowConfig
from fewstep.errors import UsageError, nearest
from fewstep.evaluation.config import EvaluateConfig
from fewstep.students.config import StudentConfig
from fewstep.teachers.config import TeacherConfig

TRAINS = {
    "flow_matching": "velocity",
    "progressive": "average_velocity",
    "consistency": "consistency",
    "improved_consistency": "consistency",
    "easy_consistency": "consistency",
    "continuous_consistency": "consistency",
    "truncated_consistency": "consistency",
    "phased_consistency": "average_velocity",
    "consistency_flow_matching": "average_velocity",
    "self_corrected": "consistency",
    "reflow": "velocity",
    "piecewise_reflow": "velocity",
    "meanflow": "average_velocity",
    "improved_meanflow": "average_velocity",
    "modular_meanflow": "average_velocity",
    "alpha_flow": "average_velocity",
    "soflow": "average_velocity",
    "split_meanflow": "average_velocity",
    "shortcut": "average_velocity",
    "terminal_velocity": "average_velocity",
    "align_your_flow": "average_velocity",
    "free_flow": "average_velocity",
    "trajectory": "average_velocity",
}
"""The kind of student each objective trains."""

_GUIDED = RegressionBlock | ShortcutConfig | ProgressiveConfig
"""The objectives that guidance can be folded into."""


_NO_WEIGHTS = {
    "analytic": "an analytic teacher has no weights",
    "python": "a python teacher's weights fit no network of fewstep",
}
"""Why a student cannot start from some teachers."""


class RunConfig(Block):
    """Everything that determines a run. ``seed`` keys every random draw."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0, lt=2**63)
    data: DataConfig
    teacher: TeacherConfig | None = None
    student: StudentConfig
    objective: ObjectiveConfig
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> "RunConfig":
        kind = self.objective.kind
        if self.student.kind != TRAINS[kind]:
            raise ValueError(f"objective {kind} trains a student of kind {TRAINS[kind]}, not {self.student.kind}")
        if self.student.init == "scratch" and self.student.network is None:
            raise ValueError("student.init scratch needs student.network")
        if self.student.init == "teacher" and self.teacher is None:
            raise ValueError("student.init teacher needs a teacher block")
        if self.teacher is not None and self.teacher.kind in _NO_WEIGHTS and self.student.init == "teacher":
            raise ValueError(f"{_NO_WEIGHTS[self.teacher.kind]}: use student.init scratch and give student.network")
        from_data = (
            isinstance(self.objective, RegressionBlock | ShortcutConfig | ConsistencyBlock)
            and self.objective.velocity == "data"
        )
        warm = isinstance(self.objective, FlowMapBlock) and self.objective.warm_start is not None
        needs_teacher = kind != "flow_matching" and (warm or not from_data)
        if needs_teacher and self.teacher is None:
            raise ValueError(f"objective {kind} needs a teacher block")
        segments = isinstance(self.objective, ConsistencyFlowMatchingConfig)
        if (warm or self._has_stages()) and self.train.ema_snapshot_every:
            staged = "a warm start" if warm else f"objective {kind}"
            raise ValueError(f"train.ema_snapshot_every has no meaning over the stages of {staged}")
        if kind == "flow_matching" and self.teacher is not None:
            raise ValueError("objective flow_matching trains a teacher and takes no teacher block")
        if from_data and not warm and self.teacher is not None and self.teacher.guidance != 1:
            raise ValueError("teacher.guidance has no effect with objective.velocity data: use velocity teacher")
        guided = self.objective if isinstance(self.objective, _GUIDED) else None
        guidance = None if guided is None else guided.guidance
        if guidance is not None and self.teacher is not None and self.teacher.guidance != 1:
            raise ValueError("objective.guidance and teacher.guidance exclude each other: one of them guides")
        one_sided = isinstance(self.objective, EulerianBlock) and self.objective.jvp == "one_sided"
        given = self.train.precision
        if one_sided and given != "fp32":
            raise ValueError(
                f"objective.jvp one_sided needs train.precision fp32, not {given}: it is a difference of outputs"
            )
        if segments and given != "fp32":
            raise ValueError(
                f"objective {kind} needs train.precision fp32, not {given}: it compares points that are close"
            )
        if self._takes_differences() and given == "tf32":
            raise ValueError(
                "objective.jvp finite_difference needs train.precision fp32 or bf16, which leave its difference of "
                "outputs in true float32: TF32 has 10 bits for either"
            )
        if self.student.guidance_input and guidance is None:
            raise ValueError(
                "student.guidance_input needs objective.guidance: what the student is to be told"
                if guided is not None
                else f"student.guidance_input: objective {kind} knows no guidance that a student could be told"
            )
        if self.student.guidance_input and self.train.compile:
            raise ValueError("train.compile with student.guidance_input has not been shown to work: choose one")
        if guidance is not None and guidance.largest is not None and not self.student.guidance_input:
            raise ValueError("objective.guidance.largest draws scales, which needs student.guidance_input true")
        two_stages = isinstance(self.objective, ProgressiveConfig) and self.objective.guidance_stages == "two"
        if two_stages and not self.student.guidance_input:
            raise ValueError("objective.guidance_stages two trains a student of all scales: set student.guidance_input")
        for place, value in _leaves(self.model_dump()):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{place} is {value}: numbers have to be finite")
        return self

    @property
    def products(self) -> ProductsName:
        """How a GPU may multiply what is float32 in training: truly where derivatives are differences of outputs."""
        return "fp32" if self._takes_differences() else products_of(self.train.precision)

    def _takes_differences(self) -> bool:
        """Whether the objective has a derivative that is a difference of two outputs."""
        return getattr(self.objective, "jvp", "forward") != "forward"

    def _has_stages(self) -> bool:
        """Whether training is several stages by itself, without a warm start."""
        objective = self.objective
        if isinstance(objective, ReflowConfig):
            return objective.rounds > 1 or objective.distil_steps is not None
        if isinstance(objective, PiecewiseReflowConfig):
            return len(objective.windows) > 1
        if isinstance(objective, ConsistencyFlowMatchingConfig):
            return objective.straight_steps > 0
        return objective.kind in ("progressive", "truncated_consistency")


def recipe_names() -> list[str]:
    """Names of the recipes of one run each that ship with the package."""
    return [name for name, text in _shipped().items() if not _COMPARES.search(text)]


def comparison_names() -> list[str]:
    """Names of the recipes that ship for `fewstep compare`: a teacher and several students each."""
    return [name for name, text in _shipped().items() if _COMPARES.search(text)]


def _shipped() -> dict[str, str]:
    """Name and text of every recipe, by name."""
    found = sorted(files("fewstep.recipes").iterdir(), key=lambda path: path.name)
    return {path.name.removesuffix(".yaml"): path.read_text() for path in found if path.name.endswith(".yaml")}


def recipe_text(name: str) -> str:
    """A recipe's YAML; an unknown name is a ``UsageError`` with the nearest one."""
    texts = _shipped()
    if name not in texts:
        raise UsageError(f"no recipe or file called '{name}'; {nearest(name, texts)}")
    return texts[name]


def load_config(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A recipe name or a YAML file, with ``a.b=value`` overrides, as a checked config. Errors are ``UsageError``."""
    tree = read_tree(source)
    if "students" in tree and "objective" not in tree:
        raise UsageError(
            f"{source} is a comparison of several runs: use `{shlex.join(['fewstep', 'compare', source])}`"
        )
    # What makes a block another one comes first, in whatever order it is written: other overrides may change it.
    for override in sorted(overrides, key=_rank):
        apply_override(tree, override)
    return check_config(tree, source)


def read_tree(source: str) -> dict[str, Any]:
    """A recipe name or a YAML file as plain values, not checked yet."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or os.path.isfile(source):
        return _parse(_read(path), source)
    return _parse(recipe_text(source), source)


def command_of(config: RunConfig) -> str:
    """The command that a config is for: ``teach`` or ``distill``."""
    return "teach" if config.objective.kind == "flow_matching" else "distill"


def read_config(run: Path) -> RunConfig:
    """The config a run was trained with, from its ``config.yaml``."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UsageError(f"no run at {run} (no config.yaml there)")
    return check_config(_parse(_read(path), str(path)), str(path))


def check_config(tree: Mapping[str, Any], source: str) -> RunConfig:
    """Validate a tree of plain values; the first fault becomes one sentence with its dotted path."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        explain(error, source)


def config_yaml(config: RunConfig) -> str:
    """The resolved config as YAML; loading it gives the same config."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False, allow_unicode=True)


def config_changes(old: RunConfig, new: RunConfig) -> list[str]:
    """What differs, as ``train.steps was 30 and is 40``."""
    before, after = (dict(_leaves(config.model_dump(mode="json"))) for config in (old, new))
    return [
        f"{place} was {before.get(place)} and is {after.get(place)}"
        for place in {**before, **after}
        if before.get(place) != after.get(place)
    ]


def _leaves(node: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything in a tree of dictionaries and sequences."""
    if isinstance(node, Mapping):
        for name, child in node.items():
            yield from _leaves(child, f"{place}.{name}" if place else str(name))
    elif isinstance(node, (list, tuple)):
        for number, child in enumerate(node):
            yield from _leaves(child, f"{place}.{number}")
    else:
        yield place, node


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"no config file {path}") from error
    except OSError as error:
        raise UsageError(f"cannot read the config file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text file in UTF-8: {error.reason} at byte {error.start}") from error


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date such as 2020-13-01
        raise UsageError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{source} is not a mapping of config keys")
    return tree


def apply_override(tree: dict[str, Any], override: str, root: type[BaseModel] = RunConfig) -> None:
    """Set one dotted key of the tree in place. A block that the tree leaves out starts from its default in ``root``."""
    dotted, equals, value = override.partition("=")
    if not equals or not dotted:
        raise UsageError(f"'{override}' is not an override; write key=value, for example train.steps=100")
    *parents, last = dotted.split(".")
    node = tree
    block: type[BaseModel] | None = root
    for name in parents:
        if node.get(name) is None:
            default = block.model_fields[name].default if block and name in block.model_fields else None
            chosen = [*parents, "kind"] == dotted.split(".")
            node[name] = default.model_dump(mode="json") if isinstance(default, BaseModel) and not chosen else {}
        node = node[name]
        if not isinstance(node, dict):
            raise UsageError(f"override {dotted}: {name} is a value, not a block")
        block = _TAGGED.get((name, str(node.get("kind")))) or (block and _block_of(block, name))
    if override.startswith(_SIZE):
        node.clear()  # the network it names replaces the one of the file
    node[last] = parse_value(dotted, value)
    if last == "kind" and parents and (chosen_block := _TAGGED.get((parents[-1], str(node[last])))) is not None:
        for name in set(node) - set(chosen_block.model_fields):
            del node[name]  # the file's, for a kind that has it


def parse_value(dotted: str, value: str) -> Any:
    """The value of an override, as YAML has it."""
    try:
        return yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"override {dotted}: '{value}' is not a YAML value") from error


def _rank(override: str) -> int:
    """Names of networks, then kinds, then the rest."""
    return 0 if override.startswith(_SIZE) else 1 if override.partition("=")[0].endswith(".kind") else 2


def explain(error: ValidationError, source: str, root: type[BaseModel] = RunConfig) -> NoReturn:
    """The first fault of a tree as one sentence with its dotted path in the block ``root``."""
    # An unknown key often causes further faults: it is reported first.
    faults = sorted(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
    fault = faults[0]
    place, block = _locate(fault["loc"], root)
    if fault["type"] == "extra_forbidden":
        message = f"unknown key; {nearest(str(fault['loc'][-1]), block.model_fields)}"
    elif fault["type"] == "missing":
        message = "is required"
    elif fault["type"] == "union_tag_invalid":
        allowed = [tag.strip(" '") for tag in fault["ctx"]["expected_tags"].split(",")]
        place += ".kind"
        message = f"unknown kind '{fault['ctx']['tag']}'; {nearest(str(fault['ctx']['tag']), allowed)}"
    elif fault["type"] == "union_tag_not_found":
        message = "needs a kind or a size" if place == "student.network" else "needs a kind"
    elif fault["type"] == "value_error":
        message = str(fault["ctx"]["error"])
    else:
        message = f"{fault['msg'][0].lower()}{fault['msg'][1:]}, got {_SHORT.repr(fault['input'])}"
    raise UsageError(f"{source}: {place + ': ' if place else ''}{message}") from error


def _locate(location: tuple[int | str, ...], root: type[BaseModel]) -> tuple[str, type[BaseModel]]:
    """A fault's dotted path as the user wrote it (union tags removed), and the block it lies in."""
    block = root
    path: list[str] = []
    last_tagged = 0  # a tag follows its field at once: what comes after it is a key, though it be called like a tag
    for part in location:
        found = _block_of(block, str(part))
        if found is not None:
            block = found
            path.append(str(part))
        elif len(path) > last_tagged and (tagged := _TAGGED.get((_field(path), str(part)))) is not None:
            block, last_tagged = tagged, len(path)
        else:
            path.append(str(part))
    return ".".join(path), block


def _field(path: list[str]) -> str:
    """The last name on a path, places in a list left out."""
    return next((part for part in reversed(path) if not part.isdigit()), "")


def _block_of(block: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The block a field holds, if it holds exactly one kind of block; its parent for a union (until the tag comes)."""
    field = block.model_fields.get(name)
    if field is None:
        return None
    blocks = _blocks_in(field.annotation)
    return blocks[0] if len(blocks) == 1 else (block if blocks else None)


def _blocks_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in getattr(annotation, "__args__", ()) for found in _blocks_in(argument)]


def _tags(block: type[BaseModel]) -> dict[tuple[str, str], type[BaseModel]]:
    """(field name, kind) -> block, over the whole tree."""
    found: dict[tuple[str, str], type[BaseModel]] = {}
    for name, field in block.model_fields.items():
        for inner in _blocks_in(field.annotation):
            if "kind" in inner.model_fields:
                for kind in inner.model_fields["kind"].annotation.__args__:  # type: ignore[union-attr]
                    found[name, kind] = inner
            found |= _tags(inner)
    return found


_TAGGED = _tags(RunConfig)
_SIZE = "student.network.size="
_COMPARES = re.compile(r"^students:", re.MULTILINE)
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 80
