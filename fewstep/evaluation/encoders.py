"""Image encoders of the transformers library, from local folders of safetensors: DINOv2 and CLIP.

Images are resized to a square by bicubic filtering with antialiasing, from grey levels to floats, neither clipped nor
quantised, and then normalised. FD-DINOv2 (Stein et al. 2306.04675) is measured on DINOv2's class token, CMMD
(Jayasumana et al. 2401.09603) on CLIP's image embeddings of unit norm. transformers is imported where it is used.

Shapes: N images, H by W pixels, P by P patches, D features.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.compat import prepare_torchvision
from fewstep.errors import EnvironmentFault
from fewstep.evaluation.extractor import as_colour, extractor_digest, tensors_digest
from fewstep.evaluation.weights import WeightsFolder, find_folder
from fewstep.files import digest

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class Encoder:
    """A published encoder: its family, the width of its features, its patch and the size that images get, in pixels,
    and the repository that a local folder is a copy of."""

    family: Literal["dinov2", "clip"]
    dim: int
    patch: int
    size: int
    repository: str


ENCODERS: Mapping[str, Encoder] = {
    "dinov2": Encoder("dinov2", 1024, 14, 224, "facebook/dinov2-large"),
    "dinov2_small": Encoder("dinov2", 384, 14, 224, "facebook/dinov2-small"),
    "dinov2_base": Encoder("dinov2", 768, 14, 224, "facebook/dinov2-base"),
    "dinov2_giant": Encoder("dinov2", 1536, 14, 224, "facebook/dinov2-giant"),
    "clip": Encoder("clip", 768, 14, 336, "openai/clip-vit-large-patch14-336"),
    "clip_b32": Encoder("clip", 512, 32, 224, "openai/clip-vit-base-patch32"),
}


@dataclass(frozen=True)
class Encoded:
    """Features of a frozen encoder: the class token behind the last norm, or the image embedding of unit norm."""

    device: torch.device
    network: nn.Module
    encoder: Encoder
    name: str
    digest: str
    facts: Mapping[str, Any]
    takes: Literal["uint8", "float"] = "uint8"

    @property
    def dim(self) -> int | None:
        return self.encoder.dim

    def __call__(self, images: Tensor) -> Tensor:
        pixels = normalised(as_colour(images.to(self.device), self.name), self.encoder)
        output = self.network(pixel_values=pixels)
        if self.encoder.family == "dinov2":
            return output.last_hidden_state[:, 0].float()
        return F.normalize(output.image_embeds.float(), dim=1)


def normalised(images: Tensor, encoder: Encoder) -> Tensor:
    """uint8 images ``[N, 3, H, W]`` -> the network's input ``[N, 3, size, size]`` float32."""
    mean, std = (torch.tensor(each, device=images.device)[:, None, None] for each in _normalisation(encoder))
    size = (encoder.size, encoder.size)
    resized = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False)
    return (resized / 255 - mean) / std


def _normalisation(encoder: Encoder) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return IMAGENET if encoder.family == "dinov2" else OPENAI


def load_encoder(
    name: str, device: torch.device, weights: Path | None, encoders: Mapping[str, Encoder] = ENCODERS
) -> Encoded:
    """One of ``encoders`` from its folder in ``weights`` or ``$FEWSTEP_WEIGHTS``. An absent folder, another network in
    it, missing tensors or no transformers library are an ``EnvironmentFault``."""
    encoder = encoders[name]
    folder = find_folder(WeightsFolder(name, encoder.repository), weights)
    network = _load(folder, name, encoder)
    if encoder.family == "dinov2":
        resample_positions(network, encoder.size // encoder.patch)
    network = network.eval().requires_grad_(False)
    config = network.config
    mean, std = _normalisation(encoder)
    text = f"{encoder.family}: bicubic antialias {encoder.size}, unclipped, u / 255 - {mean} over {std}"
    built = {"heads": config.num_attention_heads, "activation": config.hidden_act, "eps": config.layer_norm_eps}
    found = extractor_digest(f"{text}, {json.dumps(built)}", stored_digest(folder).encode())
    facts = {"preprocessing": text, "weights": encoder.repository}
    return Encoded(device, network.to(device), encoder, name, found, facts)


def stored_digest(folder: Path) -> str:
    """SHA-256 in hex over the tensors in the safetensors files of a folder, however they are spread over these.

    Of the files, not of the network: the library's names for its tensors change from version to version.
    """
    digests = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                digests[name] = tensors_digest({name: file.get_tensor(name)})
    return digest(json.dumps(digests, sort_keys=True).encode())


def resample_positions(network: Any, patches: int) -> None:
    """Give a DINOv2 of transformers position embeddings for ``patches`` by ``patches``, made as the original does.

    The published network learnt 37 by 37. For 224 pixels the original code resamples them bicubically by the factor
    (16 + 0.1) / 37, transformers by 16 / 37. Published distances are of the former.
    """
    positions = network.embeddings.position_embeddings
    old = round((positions.shape[1] - 1) ** 0.5)
    if old == patches:
        return
    grid = positions[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
    factor = (patches + 0.1) / old
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic", align_corners=False)
    resampled = torch.cat((positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)
    network.embeddings.position_embeddings = nn.Parameter(resampled.detach(), requires_grad=False)


def _load(folder: Path, name: str, encoder: Encoder) -> Any:
    """The network in ``folder`` with float32 weights, all of which have to be there."""
    prepare_torchvision()
    try:
        from transformers import CLIPVisionModelWithProjection, Dinov2Model
        from transformers.utils import logging
    except Exception as error:  # a broken torchvision raises RuntimeError, not ImportError
        said = " ".join(str(error).split())[:160]
        raise EnvironmentFault(f"{name} needs transformers ({said}): pip install 'fewstep[encoders]'") from error
    kind = Dinov2Model if encoder.family == "dinov2" else CLIPVisionModelWithProjection
    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # a list of the text tower's tensors, which nobody asked for
    logging.disable_progress_bar()
    try:
        declared = json.loads((folder / "config.json").read_text())
        if not str(declared.get("model_type", "")).startswith(encoder.family):
            raise ValueError(f"its config.json says {declared.get('model_type')!r}")
        if "vision_config" in declared:  # of a whole CLIP, which says the width of both embeddings once
            declared = {**declared["vision_config"], "projection_dim": declared["projection_dim"]}
        config = kind.config_class.from_dict(declared)
        network, found = kind.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        width = config.hidden_size if encoder.family == "dinov2" else config.projection_dim
        if (width, config.patch_size) != (encoder.dim, encoder.patch):
            raise ValueError(f"it has {width} features and patches of {config.patch_size}")
        if encoder.family == "clip" and config.image_size != encoder.size:
            raise ValueError(f"it takes images of {config.image_size}")
        lost = [*found["missing_keys"], *found["mismatched_keys"]]
        if lost:
            raise ValueError(f"{len(lost)} tensors are missing or of another shape, the first is {lost[0]}")
    except Exception as error:  # what the library raises depends on what is broken
        raise EnvironmentFault(
            f"{folder} is not {name}, a copy of {encoder.repository} with {encoder.dim} features: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()
    return network
