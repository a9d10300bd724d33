"""Config of networks from elsewhere: what their weights do not say, and how to read them. Imports no torch."""

from typing import Annotated, Any, Literal

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


Level = Annotated[int, Field(ge=0)]
"""A resolution of a U-Net: 0 is that of the images, and each further one half of the one before."""


class ADMConfig(ForeignBlock):
    """The U-Net of guided-diffusion (Dhariwal and Nichol 2105.05233), which torchcfm and flow_matching use, under the
    names of its options.

    ``channel_mult`` times ``model_channels`` are the channels of each level, ``attention_levels`` those with attention
    (the middle always has it). ``num_head_channels`` -1 stands for ``num_heads`` heads whatever the channels, and
    ``num_heads_upsample`` -1 for as many on the way up. ``null_row``: the table of classes has a row for "no class".
    ``learn_sigma``: the output has as many channels again, which are left out.
    """

    kind: Literal["adm"] = "adm"
    model_channels: int = Field(128, ge=2, multiple_of=2)
    channel_mult: tuple[Annotated[float, Field(gt=0)], ...] = Field((1.0, 2.0, 2.0, 2.0), min_length=1)
    num_res_blocks: int = Field(2, ge=1)
    attention_levels: tuple[Level, ...] = (1,)
    num_heads: int = Field(1, ge=1)
    num_head_channels: int = Field(-1, ge=-1)
    num_heads_upsample: int = Field(-1, ge=-1)
    use_new_attention_order: bool = False
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    conv_resample: bool = True
    null_row: bool = True
    learn_sigma: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(round(mult * self.model_channels) for mult in self.channel_mult)

    def heads(self, level: int, *, up: bool = False) -> int:
        """How many heads attend at a level, on the way down or up."""
        if self.num_head_channels > 0:
            return self.widths[level] // self.num_head_channels
        return self.num_heads_upsample if up and self.num_heads_upsample > 0 else self.num_heads

    @model_validator(mode="after")
    def _fits(self) -> "ADMConfig":
        if 0 in (self.num_head_channels, self.num_heads_upsample):
            raise ValueError("num_head_channels and num_heads_upsample are -1 or at least 1")
        deepest = len(self.channel_mult) - 1
        if any(level > deepest for level in self.attention_levels):
            raise ValueError(f"attention_levels {list(self.attention_levels)}: the last level is {deepest}")
        if any(width % 32 for width in self.widths):
            raise ValueError(f"model_channels times channel_mult have to be multiples of 32, not {list(self.widths)}")
        for level in {*self.attention_levels, deepest}:
            if self.num_head_channels > 0 and self.widths[level] % self.num_head_channels:
                raise ValueError(f"{self.widths[level]} channels are no multiple of {self.num_head_channels} a head")
            for up in (False, True):
                if self.widths[level] % self.heads(level, up=up):
                    raise ValueError(f"{self.widths[level]} channels do not divide into {self.heads(level, up=up)}")
        return self


class NCSNPPConfig(ForeignBlock):
    """The U-Net of score_sde (NCSN++ and DDPM++, Song et al. 2011.13456) as RectifiedFlow's configs use it, under the
    names of its options: residual blocks of BigGAN, which also change the resolution, and one head of attention.

    ``ch_mult`` times ``nf`` are the channels of each level, ``attention_levels`` those with attention (the middle
    always has it). ``fir``: resolutions change through the filter 1 3 3 1, not by repeating and averaging pixels.
    ``skip_rescale``: sums of branches are divided by the root of two. ``scale_by_sigma``: the output is divided by the
    network's time. ``centered``: images are in [-1, 1]; those in [0, 1] the network stretches to that itself.
    """

    kind: Literal["ncsnpp"] = "ncsnpp"
    nf: int = Field(128, ge=8, multiple_of=4)
    ch_mult: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 2, 2, 2), min_length=1)
    num_res_blocks: int = Field(4, ge=1)
    attention_levels: tuple[Level, ...] = (1,)
    embedding_type: Literal["positional", "fourier"] = "positional"
    progressive: Literal["none", "output_skip"] = "none"
    progressive_input: Literal["none", "input_skip"] = "none"
    fir: bool = False
    skip_rescale: bool = True
    scale_by_sigma: bool = False
    centered: bool = True
    num_scales: int = Field(1000, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "NCSNPPConfig":
        if any(level >= len(self.ch_mult) for level in self.attention_levels):
            raise ValueError(f"attention_levels {list(self.attention_levels)}: the last is {len(self.ch_mult) - 1}")
        if self.scale_by_sigma and self.embedding_type == "positional":
            raise ValueError("scale_by_sigma belongs to embedding_type fourier: a place in a table has no size")
        return self


Side = Annotated[int, Field(ge=1)]


class EDMConfig(ForeignBlock):
    """A U-Net of EDM (Karras et al. 2206.00364) inside its preconditioner: its time is ``sigma``.

    ``arch`` is DDPM++ or NCSN++ (Song et al. 2011.13456), there ``SongUNet``, or ADM (Dhariwal and Nichol 2105.05233),
    ``DhariwalUNet``. ``precond`` scales what goes in and comes out: EDM's own, for data whose standard deviation is
    ``sigma_data``, or those of the variance-preserving and the variance-exploding diffusion. Levels are ``channels``
    times one of ``multipliers`` wide and have ``blocks`` blocks; those whose side is in ``attention`` have it. The
    embedding of time is ``embedding`` times ``channels`` wide. ``augment_dim`` is how many numbers told of augmented
    data in training: zeros since.
    """

    kind: Literal["edm"] = "edm"
    arch: Literal["ddpmpp", "ncsnpp", "adm"]
    precond: Literal["edm", "vp", "ve"] = "edm"
    channels: int = Field(ge=8)
    multipliers: tuple[Side, ...] = Field(min_length=1)
    blocks: int = Field(ge=1)
    attention: tuple[Side, ...] = (16,)
    embedding: int = Field(4, ge=1)
    augment_dim: int = Field(0, ge=0)
    sigma_data: float = Field(0.5, gt=0)


class EDM2Config(ForeignBlock):
    """The magnitude-preserving U-Net of EDM2 (Karras et al. 2312.02696) inside its preconditioner: its time is
    ``sigma``.

    Levels are ``channels`` times one of ``multipliers`` wide and have ``blocks`` blocks; those whose side is in
    ``attention`` have it, in heads of ``head_channels``. ``noise_channels`` and ``embedding_channels`` are the widths
    of the features and of the embedding of time; None is that of the first and of the widest level. The balances share
    a sum or a concatenation between its first part (0) and its second (1): of time and class, of skips, of residuals
    and of attention. ``clip`` bounds activations. ``logvar_channels`` belong to a head that served training alone.
    """

    kind: Literal["edm2"] = "edm2"
    channels: int = Field(ge=1)
    multipliers: tuple[Side, ...] = Field((1, 2, 3, 4), min_length=1)
    blocks: int = Field(3, ge=1)
    attention: tuple[Side, ...] = (16, 8)
    head_channels: int = Field(64, ge=1)
    noise_channels: int | None = Field(None, ge=1)
    embedding_channels: int | None = Field(None, ge=1)
    logvar_channels: int = Field(128, ge=1)
    label_balance: float = Field(0.5, ge=0, le=1)
    concat_balance: float = Field(0.5, gt=0, lt=1)
    res_balance: float = Field(0.3, ge=0, le=1)
    attn_balance: float = Field(0.3, ge=0, le=1)
    clip: float | None = Field(256.0, gt=0)
    resample_filter: tuple[float, ...] = Field((1.0, 1.0), min_length=2)
    sigma_data: float = Field(0.5, gt=0)


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


ForeignConfig = DiTConfig | MinRFConfig | ADMConfig | NCSNPPConfig | EDMConfig | EDM2Config | DiffusersConfig
"""Every network from elsewhere, by its ``kind``."""


def knows_none(network: ForeignConfig) -> bool:
    """Whether a network can be asked without a condition: one that was trained with a class always cannot."""
    if isinstance(network, DiTConfig | MinRFConfig | ADMConfig):
        return network.null_row
    return not isinstance(network, DiffusersConfig) or network.family != "UNet2DModel" or network.null_class
