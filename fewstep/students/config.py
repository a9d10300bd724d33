"""Config of students. Imports no torch."""

from typing import Literal

from pydantic import Field, model_validator

from fewstep.block import Block
from fewstep.networks.config import NetworkConfig
from fewstep.networks.foreign.config import LoRAConfig

EARLY_LAYERS = 0.7
"""About that of decoupled MeanFlow (2510.24474), which gives 20 of 28 blocks the first time."""


class StudentConfig(Block):
    """What is trained: a ``velocity`` (a teacher), an ``average_velocity`` map or a ``consistency`` map.

    ``init: teacher`` copies the teacher's weights and takes its network; ``init: scratch`` needs ``network``.

    A map sees its second time through an embedding of the ``gap``, or in its later ``layers``: then the first
    ``early_layers`` of them, a share, see ``t`` and the others ``r``. ``guidance_input`` makes the guidance scale and
    the window of times in which it acts inputs of the map's network, to be chosen when it samples. ``lora`` trains
    low-rank adapters of a diffusers teacher, and what is new to it, instead of all of its weights.
    """

    kind: Literal["velocity", "average_velocity", "consistency"]
    init: Literal["teacher", "scratch"] = "teacher"
    network: NetworkConfig | None = None
    second_time: Literal["gap", "layers"] = "gap"
    early_layers: float = Field(EARLY_LAYERS, gt=0, lt=1)
    guidance_input: bool = False
    lora: LoRAConfig | None = None

    @property
    def two_times(self) -> bool:
        return self.kind != "velocity"

    @property
    def split(self) -> float | None:
        """The share of the blocks that see ``t`` and not ``r``; None where all see both."""
        return self.early_layers if self.second_time == "layers" else None

    @model_validator(mode="after")
    def _inputs_fit(self) -> "StudentConfig":
        if self.second_time == "layers" and not self.two_times:
            raise ValueError("second_time layers is for students: a teacher (kind velocity) has one time")
        if self.guidance_input and not self.two_times:
            raise ValueError("guidance_input is for students: a teacher (kind velocity) is guided as it samples")
        if self.early_layers != EARLY_LAYERS and self.second_time == "gap":
            raise ValueError("early_layers has no effect with second_time gap: use second_time layers")
        if self.lora is not None and self.init != "teacher":
            raise ValueError("lora adapts a teacher's network: it needs init teacher")
        return self
