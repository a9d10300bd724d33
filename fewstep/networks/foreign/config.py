"""Config of networks from elsewhere: what their weights do not say, and how to read them. Imports no torch."""

from typing import Literal

from pydantic import Field, model_validator

from fewstep.block import Block
from fewstep.conventions import ConventionConfig


class ForeignBlock(Block):
    """``convention`` is how the network counts time and what it says."""

    convention: ConventionConfig = ConventionConfig()


class DiTConfig(ForeignBlock):
    """DiT, SiT or REPA: images cut into patches of ``patch`` pixels a side, ``depth`` blocks of ``width`` channels.

    ``learn_sigma``: it was trained to say a variance too, or has room for one. ``qk_norm`` normalises queries and keys.
    ``null_row``: its table of classes has a row more, for none; one trained without dropping classes has not.
    """

    kind: Literal["dit"] = "dit"
    patch: int = Field(ge=1)
    width: int = Field(ge=4, multiple_of=4)
    depth: int = Field(ge=1)
    heads: int = Field(ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    learn_sigma: bool = True
    qk_norm: bool = False
    null_row: bool = True

    @model_validator(mode="after")
    def _heads_divide(self) -> "DiTConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} has to be a multiple of heads {self.heads}")
        return self


class MinRFConfig(ForeignBlock):
    """minRF's transformer: as ``DiTConfig`` says, with feed-forwards ``hidden`` channels wide."""

    kind: Literal["minrf"] = "minrf"
    patch: int = Field(ge=1)
    width: int = Field(ge=64, multiple_of=64)
    depth: int = Field(ge=1)
    heads: int = Field(ge=1)
    hidden: int = Field(ge=1)
    null_row: bool = True

    @model_validator(mode="after")
    def _heads_rotate(self) -> "MinRFConfig":
        # Pairs of a head's channels rotate.
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} has to be a multiple of 2 x heads, here {2 * self.heads}")
        return self
