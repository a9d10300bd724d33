"""The smallest networks of each family of diffusers, conditions for them, and folders that hold them."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.condition import Condition, Embeddings
from fewstep.networks.foreign.config import DiffusersConfig
from fewstep.networks.foreign.diffusers import DiffusersNetwork, build, class_count
from fewstep.networks.foreign.diffusers_families import FAMILIES

SIDE, TOKENS = 8, 3

CONFIGS: dict[str, dict[str, Any]] = {
    "SD3Transformer2DModel": {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 10,
        "pos_embed_max_size": 8,
        "qk_norm": "rms_norm",
        "dual_attention_layers": [0],
    },
    "FluxTransformer2DModel": {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 10,
        "guidance_embeds": True,
        "axes_dims_rope": [2, 2, 4],
    },
    "SanaTransformer2DModel": {
        "sample_size": 8,
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 12,
        "timestep_scale": 0.5,
    },
    "Lumina2Transformer2DModel": {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 16,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 8,
        "axes_dim_rope": [2, 2, 4],
        "axes_lens": [16, 8, 8],
        "cap_feat_dim": 12,
    },
    "AuraFlowTransformer2DModel": {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pos_embed_max_size": 64,
    },
    "PixArtTransformer2DModel": {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 3,
        "cross_attention_dim": 24,
        "caption_channels": 12,
        "use_additional_conditions": True,
    },
    "DiTTransformer2DModel": {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "num_embeds_ada_norm": 5,
    },
    "UNet2DModel": {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "num_class_embeds": 6,
    },
}
FLOW = ("SD3Transformer2DModel", "FluxTransformer2DModel", "SanaTransformer2DModel", "Lumina2Transformer2DModel")
FLOW = (*FLOW, "AuraFlowTransformer2DModel")
TEXT = (*FLOW, "PixArtTransformer2DModel")


def config_of(family: str, **changes: Any) -> DiffusersConfig:
    said = {
        "family": family,
        "config": CONFIGS[family],
        "null_class": family == "UNet2DModel",
        "embedded_guidance": 3.5 if CONFIGS[family].get("guidance_embeds") else None,
    }
    return DiffusersConfig.model_validate({**said, **changes})


def shape_of(family: str) -> tuple[int, int, int]:
    return FAMILIES[config_of(family).family].channels(CONFIGS[family]), SIDE, SIDE


def network(family: str, **changes: Any) -> DiffusersNetwork:
    """A network all of whose weights matter, in evaluation mode."""
    config = config_of(family, **changes)
    torch.manual_seed(0)
    net = DiffusersNetwork(shape_of(family), config, class_count(config))
    randomise(net.net)
    return net.eval()


def randomise(net: torch.nn.Module) -> None:
    """Every weight gets a value, those that start at zero included, as after training."""
    generator = torch.Generator().manual_seed(5)
    for parameter in net.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)


def batch(family: str, size: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Condition]:
    """States, times from 0 to 1, and conditions, of which the last is that of no condition."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, *shape_of(family), generator=generator, dtype=dtype)
    t = torch.linspace(0.2, 0.9, size, dtype=dtype)
    lost = torch.arange(size) == size - 1
    if family not in TEXT:
        return x, t, torch.where(lost, 5, torch.arange(size) % 5)
    values, none = {}, {}
    for name, axes in wanted(family).items():
        sizes = [TOKENS if axis == "length" else axis for axis in axes]
        values[name] = torch.randn(size, *sizes, generator=generator, dtype=dtype)
        none[name] = torch.randn(1, *sizes, generator=generator, dtype=dtype)
        if "mask" in name:
            values[name] = torch.arange(TOKENS) < 1 + torch.arange(size)[:, None] % TOKENS
            none[name] = torch.arange(TOKENS)[None] < 1
    return x, t, Embeddings(values, none, lost)


@functools.cache
def wanted(family: str) -> dict[str, tuple[Any, ...]]:
    return network(family).wanted()


def pipeline(folder: Path, family: str, scheduler: dict[str, Any] | None, vae: dict[str, Any] | None = None) -> Path:
    """A folder as a pipeline is saved, with the weights of ``randomise``."""
    import json

    part = "unet" if family == "UNet2DModel" else "transformer"
    net = build(config_of(family))
    randomise(net)
    net.save_pretrained(folder / part)
    index: dict[str, Any] = {"_class_name": "SomePipeline", part: ["diffusers", family]}
    for name, file, said in (("scheduler", "scheduler_config.json", scheduler), ("vae", "config.json", vae)):
        if said is not None:
            index[name] = ["diffusers", said["_class_name"]]
            (folder / name).mkdir()
            (folder / name / file).write_text(json.dumps(said))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
