"""Config of data sets. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from fewstep.block import Block


class DigitsConfig(Block):
    """The shipped UCI handwritten digits: 1,797 grey images of 8x8 pixels in ten classes."""

    kind: Literal["digits"] = "digits"


class ToyConfig(Block):
    """A toy distribution in one or two dimensions, ``count`` points of it drawn with ``seed``."""

    kind: Literal["toy"] = "toy"
    name: Literal["checkerboard", "two_moons", "eight_gaussians", "mixture", "mixture_1d"]
    count: int = Field(20_000, ge=100)
    seed: int = 0


DataConfig = Annotated[DigitsConfig | ToyConfig, Field(discriminator="kind")]
