"""Small networks of EDM and EDM2 with weights by a formula, which the projects' own code was given as well."""

import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.networks.foreign.config import EDM2Config, EDMConfig


@dataclass(frozen=True)
class Case:
    """``kwargs`` are what the project's class ``class_name`` is given, ``config`` is what ours is."""

    class_name: str
    kwargs: dict[str, Any]
    config: EDMConfig | EDM2Config
    classes: int = 5
    shape: tuple[int, int, int] = field(default=(3, 8, 8))


SONG = {"model_type": "SongUNet", "model_channels": 16, "num_blocks": 1, "attn_resolutions": [4], "augment_dim": 9}
DDPMPP = {**SONG, "embedding_type": "positional", "encoder_type": "standard", "channel_mult": [1, 2]}
NCSNPP = {
    **SONG,
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
    "channel_mult": [2, 1, 2],
}
ADM = {"model_type": "DhariwalUNet", "model_channels": 64, "channel_mult": [1, 2], "num_blocks": 1}
UNET = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]}

CASES = {
    "ddpmpp": Case(
        "EDMPrecond",
        DDPMPP,
        EDMConfig(arch="ddpmpp", channels=16, multipliers=(1, 2), blocks=1, attention=(4,), augment_dim=9),
    ),
    "ddpmpp-vp": Case(
        "VPPrecond",
        DDPMPP,
        EDMConfig(
            arch="ddpmpp", precond="vp", channels=16, multipliers=(1, 2), blocks=1, attention=(4,), augment_dim=9
        ),
    ),
    "ncsnpp": Case(
        "EDMPrecond",
        NCSNPP,
        EDMConfig(arch="ncsnpp", channels=16, multipliers=(2, 1, 2), blocks=1, attention=(4,), augment_dim=9),
    ),
    "ncsnpp-ve": Case(
        "VEPrecond",
        {**NCSNPP, "augment_dim": 0},
        EDMConfig(arch="ncsnpp", precond="ve", channels=16, multipliers=(2, 1, 2), blocks=1, attention=(4,)),
        classes=0,
    ),
    "adm": Case(
        "EDMPrecond",
        {**ADM, "attn_resolutions": [4], "augment_dim": 9, "sigma_data": 0.7},
        EDMConfig(arch="adm", channels=64, multipliers=(1, 2), blocks=1, attention=(4,), augment_dim=9, sigma_data=0.7),
    ),
    "edm2": Case(
        "Precond",
        {**UNET, "channels_per_head": 16},
        EDM2Config(channels=32, multipliers=(1, 2), blocks=1, attention=(8,), head_channels=16),
        shape=(4, 8, 8),
    ),
    "edm2-unusual": Case(
        "Precond",
        {
            **UNET,
            "channels_per_head": 16,
            "channel_mult_noise": 2,
            "channel_mult_emb": 3,
            "concat_balance": 0.3,
            "res_balance": 0.4,
            "attn_balance": 0.2,
            "clip_act": 1.5,
            "resample_filter": [1, 3, 3, 1],
            "logvar_channels": 8,
            "sigma_data": 0.7,
        },
        EDM2Config(
            channels=32,
            multipliers=(1, 2),
            blocks=1,
            attention=(8,),
            head_channels=16,
            noise_channels=64,
            embedding_channels=96,
            concat_balance=0.3,
            res_balance=0.4,
            attn_balance=0.2,
            clip=1.5,
            resample_filter=(1, 3, 3, 1),
            logvar_channels=8,
            sigma_data=0.7,
        ),
        classes=0,
    ),
}

SIGMAS = (0.05, 0.6, 20.0)
LABELS = (3, 0, 5)
"""The last is none of the five classes."""


def formula(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers that fill (-1, 1) evenly, other ones for each name; as small as a layer's inputs are many, but for those
    of norms (around 1), gains (around 1/2), frequencies and phases."""
    slope = 0.6180339887498949 * (1 + zlib.crc32(name.encode()) / 2**32)
    even = 2 * ((np.arange(1, int(np.prod(shape)) + 1) * slope) % 1.0) - 1
    if len(shape) > 1:
        even = even * (3 / np.prod(shape[1:])) ** 0.5
    elif name.endswith("gain"):
        even = 0.5 + 0.2 * even
    elif "norm" in name and name.endswith("weight"):
        even = 1 + 0.3 * even
    elif name.endswith(("freqs", "phases")):
        even = 3 * even
    return torch.from_numpy(even).reshape(shape)


def filled(net: torch.nn.Module) -> torch.nn.Module:
    """A network whose weights are those of the formula. Filters of a resampling stay as they are."""
    held = net.state_dict()
    new = {name: formula(name, tuple(value.shape)).to(value) for name, value in held.items() if "filter" not in name}
    net.load_state_dict({**held, **new})
    return net


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """States ``[3, *shape]`` as large as their noise, its levels, labels."""
    sigma = torch.tensor(SIGMAS, dtype=dtype)
    x = formula("x", (3, int(np.prod(case.shape)))).reshape(3, *case.shape)
    x = x / x.std() * (0.25 + sigma.double().square()).sqrt()[:, None, None, None]
    return x.to(dtype), sigma, torch.tensor(LABELS)
