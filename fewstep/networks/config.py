"""Config of networks. Imports no torch."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fewstep.block import Block
from fewstep.errors import nearest
from fewstep.networks.foreign.config import ForeignConfig


class NetworkBlock(Block):
    """``condition_shift`` lets source and target be moved by learned shifts of each class (CAR-Flow)."""

    condition_shift: bool = False


class MLPConfig(NetworkBlock):
    """A residual MLP of ``depth`` blocks of ``width`` channels with hidden layers of ``expansion * width``.

    ``max_frequency`` bounds how fast it can change in time (radians per unit of ``t``). It is low on purpose, since
    objectives that differentiate in time see every feature multiplied by its frequency. From 60 to 3 a digits teacher
    loses 6 % at 64 steps and its MeanFlow student gains 34 % at one step (``benchmarks/ledger``).
    """

    kind: Literal["mlp"] = "mlp"
    width: int = Field(128, ge=8)
    depth: int = Field(3, ge=1)
    expansion: int = Field(2, ge=1)
    max_frequency: float = Field(3.0, ge=1)


class FloTConfig(NetworkBlock):
    """A flow transformer: images cut into patches of ``patch`` pixels a side, ``depth`` blocks of ``width`` channels.

    ``max_frequency`` is that of ``MLPConfig``, and low for the same reason.
    """

    kind: Literal["flot"] = "flot"
    patch: int = Field(2, ge=1)
    width: int = Field(384, ge=8)
    depth: int = Field(10, ge=1)
    heads: int = Field(6, ge=1)
    expansion: int = Field(4, ge=1)
    max_frequency: float = Field(3.0, ge=1)

    @model_validator(mode="after")
    def _heads_rotate(self) -> "FloTConfig":
        # Pairs of channels rotate, half of the pairs with the row and half with the column.
        if self.width % (4 * self.heads):
            raise ValueError(f"width {self.width} has to be a multiple of 4 x heads, here {4 * self.heads}")
        return self


class UNetConfig(NetworkBlock):
    """A U-Net of ``blocks`` stages at each of several resolutions, ``channels`` times one of ``multipliers`` wide.

    Levels whose longer side has one of ``attention`` pixels have attention in every stage, and so has the middle
    whatever its size; a side that no level has is nobody's. ``dropout`` acts in training alone. ``max_frequency`` is
    that of ``MLPConfig``, and low for the same reason.
    """

    kind: Literal["unet"] = "unet"
    channels: int = Field(128, ge=32, multiple_of=32)
    multipliers: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 2, 2, 2), min_length=1)
    blocks: int = Field(2, ge=1)
    attention: tuple[Annotated[int, Field(ge=1)], ...] = (16,)
    head_channels: int = Field(64, ge=1)
    dropout: float = Field(0.0, ge=0, le=0.9)
    max_frequency: float = Field(3.0, ge=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> "UNetConfig":
        if self.channels % self.head_channels:
            raise ValueError(f"channels {self.channels} have to be a multiple of head_channels {self.head_channels}")
        return self


SIZES: dict[str, MLPConfig | FloTConfig | UNetConfig] = {
    "mlp-tiny": MLPConfig(width=128, depth=5),
    "flot-tiny": FloTConfig(width=88, depth=4, heads=2),
    "flot-mini": FloTConfig(width=192, depth=7, heads=6),
    "flot-small": FloTConfig(width=384, depth=10, heads=6),
    "flot-base": FloTConfig(width=512, depth=15, heads=8),
    # Width, depth and heads of DiT-L and DiT-XL (2212.09748).
    "flot-large": FloTConfig(width=1024, depth=24, heads=16),
    "flot-xl": FloTConfig(width=1152, depth=28, heads=16),
    "unet-tiny": UNetConfig(channels=32, multipliers=(1, 1), attention=(4,), head_channels=32),
    "unet-mini": UNetConfig(channels=32, multipliers=(1, 2, 4), attention=(8,), head_channels=32),
    "unet-small": UNetConfig(channels=96, head_channels=32),
    "unet-base": UNetConfig(multipliers=(2, 2, 2), blocks=4, dropout=0.1),
    # torchcfm's for CIFAR-10: its 35.7 million weights, and 2.5 million for scales from the condition.
    "unet-cifar": UNetConfig(dropout=0.1),
}
"""Networks with a name: ``network: {size: flot-small}``.

Those that share a last word have the same number of parameters within 5 %: on 8 x 8 images of one channel where that is
``tiny``, on 32 x 32 images of three otherwise.
"""

LARGE = ("flot-large", "flot-xl")
"""Those for several GPUs: what goes through all sizes leaves them out."""


def _named(value: Any) -> Any:
    """A block with a ``size`` as that network's whole block; what else it says changes the network it names."""
    if not isinstance(value, Mapping) or "size" not in value:
        return value
    changes = {name: given for name, given in value.items() if name != "size"}
    size = str(value["size"])
    if size not in SIZES:
        raise ValueError(f"no network of size '{size}'; {nearest(size, SIZES)}")
    named = SIZES[size]
    if changes.get("kind", named.kind) not in {each.kind for each in SIZES.values()}:
        return changes  # which says that there is no such kind
    if changes.get("kind", named.kind) != named.kind:
        raise ValueError(f"size {size} is a network of kind {named.kind}, not {changes['kind']}")
    return {**named.model_dump(), **changes}


NetworkConfig = Annotated[
    MLPConfig | FloTConfig | UNetConfig | ForeignConfig, Field(discriminator="kind"), BeforeValidator(_named)
]
