"""Images through somebody's autoencoder, once and for all: latents as moments, and those of the mirrored images.

Shapes: B images, C channels, H and W pixels; latents have C channels as well, of their own number.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.compat import prepare_torchvision
from fewstep.data.config import DataConfig, FilesConfig
from fewstep.data.dataset import LatentScale
from fewstep.data.encoded import Reported, unreported
from fewstep.data.paths import expanded
from fewstep.data.prepare import check_out, write_shards
from fewstep.data.stream import Run, Stream, stream
from fewstep.errors import EnvironmentFault, UsageError
from fewstep.precision import products

WEIGHTS = "diffusion_pytorch_model.safetensors"
_BATCH = 16


def prepare_latents(
    config: DataConfig,
    encoder: Path,
    out: Path,
    *,
    device: torch.device,
    shard_size: int | None,
    overwrite: bool,
    report: Reported = unreported,
) -> dict[str, Any]:
    """Write the latents of a config's images as shards to ``out``; see ``data.prepare``.

    ``encoder`` is the folder of an ``AutoencoderKL`` as diffusers saves it. Its scale and shift go into the shards.
    """
    if not isinstance(config, FilesConfig):
        raise UsageError(f"data.kind {config.kind} needs no shards: fewstep makes these data itself")
    check_out(out, expanded(config.path), overwrite)
    network = load_encoder(encoder).to(device)
    data = latents(stream(config, report), network, encoder, device)
    return write_shards(data, out, config.path, shard_size=shard_size)


def load_encoder(folder: Path) -> Any:
    """An ``AutoencoderKL`` from its folder, frozen. Nothing is fetched, and nothing unpickled."""
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise UsageError(f"{folder} is no autoencoder as diffusers saves one: it has no {name}")
    prepare_torchvision()
    try:
        from diffusers import AutoencoderKL
    except (ImportError, RuntimeError) as error:
        raise EnvironmentFault(
            "encoding images needs the package diffusers: pip install 'fewstep[diffusers]'"
        ) from error
    try:
        network = AutoencoderKL.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except Exception as error:  # from diffusers, safetensors, or torch, whatever is wrong
        raise UsageError(f"{folder} holds no AutoencoderKL: {' '.join(str(error).split())[:160]}") from error
    return network.eval().requires_grad_(False)


def latents(data: Stream, network: Any, folder: Path, device: torch.device) -> Stream:
    """The stream of the latents of a stream of images: mean and standard deviation, stacked on the channels."""
    if data.key != "images":
        raise UsageError(f"{data.where} holds {data.key}: an autoencoder takes images")
    config = network.config

    def runs() -> Iterator[Run]:
        for run in data.runs:
            if not len(run.x):
                yield run
                continue
            if run.x.shape[1] != config.in_channels:
                raise UsageError(
                    f"{folder} takes images of {config.in_channels} channels, and {data.where} has {run.x.shape[1]}: "
                    f"set --channels {config.in_channels}"
                )
            yield replace(run, x=_moments(network, run.x, device), mirrored=_moments(network, run.x.flip(-1), device))

    with (folder / WEIGHTS).open("rb") as file:
        sha = hashlib.file_digest(file, "sha256").hexdigest()
    facts = {"autoencoder": {"name": folder.resolve().name, "digest": sha}}
    return replace(data, key="latents", runs=runs(), latent=_scale(config), has_mirrored=True, facts=facts)


@torch.no_grad()
def _moments(network: Any, images: Tensor, device: torch.device) -> Tensor:
    """``[B, 2 C, H, W]`` float32 on the CPU."""
    found = []
    with products("fp32"):
        for batch in images.split(_BATCH):
            distribution = network.encode(batch.to(device).float() / 127.5 - 1).latent_dist
            found.append(torch.cat((distribution.mean, distribution.std), dim=1).float().cpu())
    return torch.cat(found)


def _scale(config: Any) -> LatentScale:
    """diffusers' two ways to bring latents to unit size: one factor and shift, or a mean and deviation per channel."""
    channels = config.latent_channels
    shift = config.latents_mean or [config.shift_factor or 0.0] * channels
    std = config.latents_std or [1.0] * channels
    return LatentScale.of_channels(list(shift), [config.scaling_factor / value for value in std], "std")
