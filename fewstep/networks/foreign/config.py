"""Config of networks from elsewhere: what their weights do not say, and how to read them. Imports no torch."""

from typing import Any, Literal

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


DiffusersFamily = Literal[
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "SanaTransformer2DModel",
    "Lumina2Transformer2DModel",
    "AuraFlowTransformer2DModel",
    "PixArtTransformer2DModel",
    "DiTTransformer2DModel",
    "UNet2DModel",
]
"""The networks of diffusers that can be called, by their class there."""


class LoRAConfig(Block):
    """Low-rank adapters (2106.09685) of ``rank`` in the layers whose names end in one of ``targets``; everything else
    of the network stays as it is. They act with ``alpha / rank``; ``alpha`` is the rank unless it is said."""

    rank: int = Field(16, ge=1)
    alpha: float | None = Field(None, gt=0)
    targets: tuple[str, ...] = Field(("to_q", "to_k", "to_v", "to_out.0"), min_length=1)


class DiffusersConfig(ForeignBlock):
    """A network that diffusers defines: its class there, and that class's ``config`` as ``config.json`` has it.

    ``embedded_guidance`` is the scale that a guidance-distilled network is told (3.5 is usual for FLUX.1-dev).
    ``null_class``: the last class embedding of a ``UNet2DModel`` stands for no class. ``pixels`` is how many of them a
    latent has a side, which PixArt is told. ``lora`` trains adapters alone.
    """

    kind: Literal["diffusers"] = "diffusers"
    family: DiffusersFamily
    config: dict[str, Any]
    embedded_guidance: float | None = Field(None, ge=0)
    null_class: bool = False
    pixels: int = Field(8, ge=1)
    lora: LoRAConfig | None = None


ForeignConfig = DiTConfig | MinRFConfig | DiffusersConfig
"""Every network from elsewhere, by its ``kind``."""
