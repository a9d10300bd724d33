"""The networks of diffusers that can be called, and all that differs between them: one entry of a literal table each.

Facts are those of diffusers 0.42.1, of its networks and of the pipelines that call them.

Shapes: B batch, L tokens of text, C channels, H and W pixels of the sample.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.networks.foreign.config import DiffusersConfig, DiffusersFamily
from fewstep.uploads import numbers

Call = Callable[[Any, DiffusersConfig, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""``(net, config, x [B, C, H, W], tau [B], condition by name) -> output [B, at least C, H, W]``."""


@dataclass(frozen=True)
class Family:
    """How one class of networks is built, told the time and what to sample, and called.

    ``embedder`` is the place of the layers that its embedding of time ends in, for every block its own where there is a
    ``*``, and ``waves`` that of the sinusoids before them, which see ``tau * wave_scale``. ``told`` names the tensors
    of ``Embeddings`` that it wants with their shapes behind the batch, in numbers or as keys of its config; it is empty
    where classes are what is told. Sides of a sample are multiples of ``multiple(config)``.

    ``flow_scale(steps, config)`` is the network's time for pure noise under a flow-matching scheduler of ``steps``
    training steps. Networks with ``noise_at = 0`` run the other way, and their velocity points to data.
    """

    load: Callable[[], Any]
    embedder: str
    waves: str
    call: Call
    told: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    multiple: Callable[[Mapping[str, Any]], int] = lambda config: int(config["patch_size"])
    flow_scale: Callable[[int, Mapping[str, Any]], float] = lambda steps, config: float(steps)
    noise_at: Literal[0, 1] = 1
    wave_scale: float = 1.0
    guidance: tuple[str, str] | None = None
    """The places of embedder and sinusoids of guidance, where there are networks of the family that are told it."""
    packed: int = 1
    """How many channels of the network one channel of a sample becomes."""
    adapters: bool = True
    """Whether diffusers loads LoRA weights into it."""

    def channels(self, config: Mapping[str, Any]) -> int:
        """C."""
        return int(config["in_channels"]) // self.packed


def _plain(net: Any, config: DiffusersConfig, x: Tensor, tau_B: Tensor, told: Mapping[str, Tensor]) -> Tensor:
    return net(x, timestep=tau_B, **told, return_dict=False)[0]


def _pixart(net: Any, config: DiffusersConfig, x: Tensor, tau_B: Tensor, told: Mapping[str, Tensor]) -> Tensor:
    """The larger PixArt-alpha is told the size of the image and its height over its width."""
    size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if net.use_additional_conditions:
        height, width = (config.pixels * side for side in x.shape[-2:])
        size["resolution"] = numbers((height, width), x.device, x.dtype).expand(len(x), 2)
        size["aspect_ratio"] = numbers((height / width,), x.device, x.dtype).expand(len(x), 1)
    return net(x, timestep=tau_B, **told, added_cond_kwargs=size, return_dict=False)[0]


def _flux(net: Any, config: DiffusersConfig, x: Tensor, tau_B: Tensor, told: Mapping[str, Tensor]) -> Tensor:
    """Squares of 2 x 2 latents are its tokens; it is told the row and the column of each."""
    size, height, width = len(x), x.shape[-2] // 2, x.shape[-1] // 2
    tokens = x.reshape(size, -1, height, 2, width, 2).permute(0, 2, 4, 1, 3, 5).reshape(size, height * width, -1)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3).to(x)
    output = net(
        tokens,
        timestep=tau_B,
        **told,
        img_ids=places,
        txt_ids=places.new_zeros(told["encoder_hidden_states"].shape[1], 3),
        return_dict=False,
    )[0]
    squares = output.reshape(size, height, width, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(size, -1, 2 * height, 2 * width)


def _load_sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel


def _load_flux() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel


def _load_sana() -> Any:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel


def _load_lumina2() -> Any:
    from diffusers import Lumina2Transformer2DModel

    return Lumina2Transformer2DModel


def _load_auraflow() -> Any:
    from diffusers import AuraFlowTransformer2DModel

    return AuraFlowTransformer2DModel


def _load_pixart() -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel


def _load_dit() -> Any:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel


def _load_unet() -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel


FAMILIES: dict[DiffusersFamily, Family] = {
    "SD3Transformer2DModel": Family(
        load=_load_sd3,
        embedder="time_text_embed.timestep_embedder",
        waves="time_text_embed.time_proj",
        call=_plain,
        told={
            "encoder_hidden_states": ("length", "joint_attention_dim"),
            "pooled_projections": ("pooled_projection_dim",),
        },
    ),
    "FluxTransformer2DModel": Family(
        load=_load_flux,
        embedder="time_text_embed.timestep_embedder",
        waves="time_text_embed.time_proj",
        call=_flux,
        told={
            "encoder_hidden_states": ("length", "joint_attention_dim"),
            "pooled_projections": ("pooled_projection_dim",),
        },
        multiple=lambda config: 2,
        flow_scale=lambda steps, config: steps / 1000,
        wave_scale=1000.0,
        guidance=("time_text_embed.guidance_embedder", "time_text_embed.time_proj"),
        packed=4,
    ),
    "SanaTransformer2DModel": Family(
        load=_load_sana,
        embedder="time_embed*.timestep_embedder",
        waves="time_embed*.time_proj",
        call=_plain,
        told={
            "encoder_hidden_states": ("length", "caption_channels"),
            "encoder_attention_mask": ("length",),
        },
        flow_scale=lambda steps, config: steps * float(config.get("timestep_scale", 1.0)),
        guidance=("time_embed.guidance_embedder", "time_embed.guidance_condition_proj"),
    ),
    "Lumina2Transformer2DModel": Family(
        load=_load_lumina2,
        embedder="time_caption_embed.timestep_embedder",
        waves="time_caption_embed.time_proj",
        call=_plain,
        told={
            "encoder_hidden_states": ("length", "cap_feat_dim"),
            "encoder_attention_mask": ("length",),
        },
        flow_scale=lambda steps, config: 1.0,
        noise_at=0,
    ),
    "AuraFlowTransformer2DModel": Family(
        load=_load_auraflow,
        embedder="time_step_proj",
        waves="time_step_embed",
        call=_plain,
        told={"encoder_hidden_states": ("length", "joint_attention_dim")},
        flow_scale=lambda steps, config: steps / 1000,
    ),
    "PixArtTransformer2DModel": Family(
        load=_load_pixart,
        embedder="adaln_single.emb.timestep_embedder",
        waves="adaln_single.emb.time_proj",
        call=_pixart,
        adapters=False,
        told={
            "encoder_hidden_states": ("length", "caption_channels"),
            "encoder_attention_mask": ("length",),
        },
    ),
    "DiTTransformer2DModel": Family(
        load=_load_dit,
        embedder="transformer_blocks.*.norm1.emb.timestep_embedder",
        waves="transformer_blocks.*.norm1.emb.time_proj",
        call=_plain,
        adapters=False,
    ),
    "UNet2DModel": Family(
        load=_load_unet,
        embedder="time_embedding",
        waves="time_proj",
        call=_plain,
        multiple=lambda config: 2 ** (len(config["block_out_channels"]) - 1),
        adapters=False,
    ),
}
