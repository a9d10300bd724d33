"""The lines of the table of objectives: what there is to measure, by name."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from fewstep.block import Block
from fewstep.distill.config import ObjectiveConfig
from fewstep.errors import UsageError, nearest

REFERENCE = "flow_matching"
TEXTBOOK = "meanflow-textbook"
COMPILED = " (compiled)"


@dataclass(frozen=True)
class Variant:
    """One line of the table: a kind of objective and what is set in its block."""

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}{COMPILED}" if self.compiled else self.name

    def ways(self, compiled: bool) -> tuple[bool, ...]:
        """Compiled or not: the lines it gets. The textbook's step is what it is."""
        return (False, True) if compiled and self.name != TEXTBOOK else (False,)


LATE: dict[str, dict[str, Any]] = {"modular_meanflow": {"end": 0.0}, "alpha_flow": {"alpha": 0.5}}
"""Methods that change over a training are measured as they are later on, not in their cheaper first steps."""


def variants() -> dict[str, Variant]:
    """Every objective there is, by name: from the data where it can learn from them (``-teacher``: from a teacher's
    velocity), with forward mode where it needs a derivative (``-finite-difference``: with differences)."""
    found = [Variant(REFERENCE, REFERENCE)]
    for kind, block in sorted(_blocks().items()):
        if kind == REFERENCE:
            continue
        velocity = block.model_fields.get("velocity")
        takes_data = velocity is not None and "data" in get_args(velocity.annotation)
        from_data = {**({"velocity": "data"} if takes_data else {}), **LATE.get(kind, {})}
        found.append(Variant(kind, kind, from_data))
        if "jvp" in block.model_fields:
            found.append(Variant(f"{kind}-finite-difference", kind, {**from_data, "jvp": "finite_difference"}))
            if "one_sided" in get_args(block.model_fields["jvp"].annotation):
                found.append(Variant(f"{kind}-one-sided", kind, {**from_data, "jvp": "one_sided"}))
        if takes_data:
            found.append(Variant(f"{kind}-teacher", kind, {**from_data, "velocity": "teacher"}))
        if kind == "meanflow":
            found.append(Variant(TEXTBOOK, kind, from_data))
    return {variant.name: variant for variant in found}


def chosen_variants(names: Sequence[str]) -> list[Variant]:
    """Those of the named kinds or lines, flow matching always among them; all where none is named."""
    known = variants()
    for name in names:
        if name not in known:
            raise UsageError(f"no objective '{name}'; {nearest(name, known)}")
    return [
        variant
        for variant in known.values()
        if not names or variant.name == REFERENCE or variant.name in names or variant.kind in names
    ]


def _blocks() -> dict[str, type[Block]]:
    """The config block of every kind of objective."""
    blocks = get_args(get_args(ObjectiveConfig)[0])
    return {block.model_fields["kind"].default: block for block in blocks}
