"""What a format has to say of a checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fewstep.conventions import ConventionConfig, GuidanceForm
from fewstep.networks.foreign.config import ForeignConfig

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Found:
    """What weights are, as far as they say so.

    ``network`` is the config of the network they fit; ``channels`` and ``side`` (pixels; None where any will do) are
    those of one sample, ``num_classes`` does not count "no class" and is 0 for an unconditional network. ``weights``
    are under the names of that network, all of them and no others if the checkpoint is whole. ``left_out`` are names
    that no sampling needs, such as heads that served training alone.
    """

    network: ForeignConfig
    channels: int
    side: int | None
    num_classes: int
    weights: dict[str, Tensor]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """A project's checkpoints. ``name`` is the ``kind`` that a config says.

    ``recognises`` looks at the names of weights. ``read`` infers the network from their shapes; ``said`` has what a
    user declares beyond them (fields of the network's config), and what can neither be inferred nor is said is a
    ``ValueError`` with one sentence that names the field. ``guidance`` is the project's own count: ``scale`` is off at
    1, ``excess`` at 0. ``guided_channels`` is how many leading channels the project guides, None for all.
    ``license`` is that of published weights, where there are any.
    """

    name: str
    title: str
    convention: ConventionConfig
    recognises: Callable[[Weights], bool]
    read: Callable[[Weights, Mapping[str, Any]], Found]
    guidance: GuidanceForm = "scale"
    guided_channels: int | None = None
    license: str = "unknown"
