"""Checkpoints of EDM and EDM2: denoisers of data seen at a noise level ``sigma``.

What they are called by in their pickles, the arguments of their classes, may be said as well as the fields of our
configs: what weights do not show is taken from either, and the rest of the arguments is of no use for sampling.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from fewstep.conventions import ConventionConfig
from fewstep.networks.foreign.config import EDM2Config, EDMConfig
from fewstep.teachers.formats.base import Format, Found, Weights
from fewstep.teachers.formats.shapes import settled, shape_of

CONVENTION = ConventionConfig(path="variance_exploding", prediction="data", earliest=0.002 / 1.002, latest=80.0 / 81.0)
"""From ``sigma = 0.002`` to ``sigma = 80``, the levels between which both projects sample."""

ARGUMENTS = {
    "model_channels": "channels",
    "channel_mult": "multipliers",
    "num_blocks": "blocks",
    "attn_resolutions": "attention",
    "channel_mult_emb": "embedding",
    "channels_per_head": "head_channels",
    "clip_act": "clip",
}
"""Arguments of theirs by our names, where those differ."""

UNUSED = {
    *("img_resolution", "img_channels", "label_dim", "use_fp16", "dropout", "label_dropout", "sigma_min", "sigma_max"),
    *("epsilon_t", "model_type", "embedding_type", "encoder_type", "decoder_type", "channel_mult_noise"),
}
"""Arguments that weights show, or that sampling has no use for."""

PRECONDS = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve"}

VP = {"beta_d": 19.9, "beta_min": 0.1, "M": 1000}
"""Arguments of the variance-preserving preconditioner, of which no other values are in use."""


def _read_edm(weights: Weights, said: Mapping[str, Any]) -> Found:
    side, levels = _sides(weights, "model")
    sides = [side >> level for level in range(levels)]
    first = shape_of(weights, f"model.enc.{side}x{side}_conv.weight", 4, "EDM")
    condition, features = shape_of(weights, "model.map_layer0.weight", 2, "EDM")
    arch = "ncsnpp" if "model.map_noise.freqs" in weights else "ddpmpp"
    end = f"model.dec.{side}x{side}_aux_conv.weight"
    if "model.out_conv.weight" in weights:
        arch, end = "adm", "model.out_conv.weight"
    channels = {"adm": features, "ncsnpp": features // 2, "ddpmpp": features}[arch]
    if "u" in weights or shape_of(weights, end, 4, "EDM")[0] != first[1]:
        raise ValueError("its network predicts a variance too, as those of iDDPMPrecond do, which are not read")
    if arch != "adm" and first[0] != channels:
        raise ValueError(f"{features} features of time for {first[0]} channels: only DDPM++, NCSN++ and ADM are read")
    taps = {4 if arch == "ncsnpp" else 2}
    if {weights[name].shape[-1] for name in weights if name.endswith("resample_filter")} - taps:
        raise ValueError("its resample_filter is not that of its architecture: only DDPM++, NCSN++ and ADM are read")
    widths = [shape_of(weights, f"model.enc.{each}x{each}_block0.conv0.weight", 4, "EDM")[0] for each in sides]
    augment = "model.map_augment.weight"
    inferred: dict[str, Any] = {
        "convention": CONVENTION,
        "arch": arch,
        "channels": channels,
        "multipliers": _multiples(widths, channels),
        "blocks": _count(weights, f"model.enc.{side}x{side}_block"),
        "attention": tuple(each for each in sides if f"model.enc.{each}x{each}_block0.qkv.weight" in weights),
        "embedding": _multiples([condition], channels)[0],
        "augment_dim": shape_of(weights, augment, 2, "EDM")[1] if augment in weights else 0,
    }
    told = _told(said, {"resample_filter", "class_name", *VP}, sides)
    if "class_name" in said:
        name = str(said["class_name"]).rpartition(".")[2]
        if name not in PRECONDS:
            raise ValueError(f"checkpoints of {name} are not read: only those of {', '.join(PRECONDS)}")
        inferred["precond"] = PRECONDS[name]
    changed = [name for name, usual in VP.items() if said.get(name, usual) != usual]
    if changed:
        raise ValueError(f"{changed[0]} {said[changed[0]]} is not read: only {VP[changed[0]]}")
    network = settled(EDMConfig, inferred, told)
    classes = "model.map_label.weight"
    num_classes = shape_of(weights, classes, 2, "EDM")[1] if classes in weights else 0
    return Found(network, first[1], side, num_classes, dict(weights))


def _read_edm2(weights: Weights, said: Mapping[str, Any]) -> Found:
    side, levels = _sides(weights, "unet")
    sides = [side >> level for level in range(levels)]
    entered = shape_of(weights, f"unet.enc.{side}x{side}_conv.weight", 4, "EDM2")[1]
    widths = [shape_of(weights, f"unet.enc.{each}x{each}_block0.conv_res0.weight", 4, "EDM2")[0] for each in sides]
    condition, features = shape_of(weights, "unet.emb_noise.weight", 2, "EDM2")
    told = _told(said, {"class_name", "channel_mult_emb"}, sides)
    channels = told.get("channels", widths[0])
    if any(width % channels for width in widths):
        channels = math.gcd(*widths)
    attention = tuple(each for each in sides if f"unet.enc.{each}x{each}_block0.attn_qkv.weight" in weights)
    inferred = {
        "convention": CONVENTION,
        "channels": channels,
        "multipliers": _multiples(widths, channels),
        "blocks": _count(weights, f"unet.enc.{side}x{side}_block"),
        "attention": attention,
        "noise_channels": features if features != widths[0] else None,
        "embedding_channels": condition if condition != max(widths) else None,
        "logvar_channels": shape_of(weights, "logvar_linear.weight", 2, "EDM2")[1],
    }
    network = settled(EDM2Config, inferred, told)
    attending = [width for each, width in zip(sides, widths, strict=True) if each in attention]
    if any(width % network.head_channels for width in (*attending, widths[-1])):
        raise ValueError(
            f"attention among {[*attending, widths[-1]]} channels does not divide into heads of "
            f"{network.head_channels}: declare head_channels"
        )
    classes = "unet.emb_label.weight"
    num_classes = shape_of(weights, classes, 2, "EDM2")[1] if classes in weights else 0
    return Found(network, entered - 1, side, num_classes, dict(weights))


def _told(said: Mapping[str, Any], beside: set[str], sides: list[int]) -> dict[str, Any]:
    """The fields of a config among what was said, under our names; without ``beside``, which the caller reads. Of the
    sides with attention those that no level has are nobody's."""
    told = {ARGUMENTS.get(name, name): value for name, value in said.items() if name not in UNUSED | beside}
    told = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    if isinstance(told.get("attention"), tuple):
        told["attention"] = tuple(side for side in sides if side in told["attention"])
    return told


def _sides(weights: Weights, prefix: str) -> tuple[int, int]:
    """The pixels of a side of the data, and how many levels there are of half the sides of the one before."""
    pattern = re.compile(rf"{prefix}\.enc\.(\d+)x\1_(conv\.weight|block0\.)")
    found = [match for name in weights if (match := pattern.match(name))]
    tops = {int(match[1]) for match in found if match[2] == "conv.weight"}
    if len(tops) != 1:
        raise ValueError(f"the checkpoint has no {prefix}.enc.*_conv.weight: it is not a whole one")
    side, sides = tops.pop(), {int(match[1]) for match in found}
    levels = len(sides)
    missing = [side >> level for level in range(levels) if side >> level not in sides]
    if missing:
        raise ValueError(f"the checkpoint has no {prefix}.enc.{missing[0]}x{missing[0]}_block0: it is not a whole one")
    return side, levels


def _count(weights: Weights, prefix: str) -> int:
    """How many blocks carry a number at the first level."""
    pattern = re.compile(rf"{re.escape(prefix)}(\d+)\.")
    return len({match[1] for name in weights if (match := pattern.match(name))})


def _multiples(widths: list[int], channels: int) -> tuple[int, ...]:
    uneven = [width for width in widths if width % channels]
    if uneven:
        raise ValueError(f"{uneven[0]} channels are no multiple of {channels}: it is no checkpoint of theirs")
    return tuple(width // channels for width in widths)


def _is_edm(weights: Weights) -> bool:
    return any(re.fullmatch(r"model\.enc\.(\d+)x\1_conv\.weight", name) for name in weights)


def _is_edm2(weights: Weights) -> bool:
    return any(re.fullmatch(r"unet\.enc\.(\d+)x\1_conv\.weight", name) for name in weights)


EDM = Format(
    name="edm", title="EDM", convention=CONVENTION, recognises=_is_edm, read=_read_edm, license="CC-BY-NC-SA-4.0"
)

EDM2 = Format(
    name="edm2", title="EDM2", convention=CONVENTION, recognises=_is_edm2, read=_read_edm2, license="CC-BY-NC-SA-4.0"
)
