"""Config of students. Imports no torch."""

from typing import Literal

from fewstep.block import Block
from fewstep.networks.config import NetworkConfig


class StudentConfig(Block):
    """What is trained: a ``velocity`` (a teacher), an ``average_velocity`` map or a ``consistency`` map.

    ``init: teacher`` copies the teacher's weights and takes its network; ``init: scratch`` needs ``network``.
    """

    kind: Literal["velocity", "average_velocity", "consistency"]
    init: Literal["teacher", "scratch"] = "teacher"
    network: NetworkConfig | None = None
    guidance_input: bool = False
