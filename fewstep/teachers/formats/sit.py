"""Checkpoints of SiT (2401.08740), DiT (2212.09748) and REPA (2410.06940): one network in three conventions.

The weights of SiT and DiT are alike in every name and shape, so a user has to say which of the two they are.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fewstep.conventions import BetaSchedule, ConventionConfig
from fewstep.networks.foreign.config import DiTConfig
from fewstep.teachers.formats.base import Format, Found, Weights
from fewstep.teachers.formats.shapes import classes, numbered, root, settled, shape_of

HEADS = {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1152, 28): 16}
"""Of the published sizes S, B, L and XL, by width and depth."""

KNOWN_BY = ("attn.qkv.weight", "mlp.fc1.weight", "adaLN_modulation.1.weight")
"""Weights of every block; no other project's blocks have all of them."""

HEAD = "projectors."
LEGACY = re.compile(r"decoder_blocks\.(\d+)\.")
"""REPA's last blocks in its early checkpoints, counted from where the features for its projectors are taken."""


def _transformer(weights: Weights) -> bool:
    return all(f"blocks.0.{name}" in weights for name in KNOWN_BY)


def _of_repa(weights: Weights) -> bool:
    """Has what REPA alone has."""
    return any(name.startswith(HEAD) or LEGACY.match(name) or ".q_norm." in name for name in weights)


def _plain(weights: Weights) -> bool:
    return _transformer(weights) and not _of_repa(weights)


def _repa(weights: Weights) -> bool:
    """By what it alone has; without that, by a last layer that has no room for a variance."""
    if not _transformer(weights):
        return False
    if _of_repa(weights):
        return True
    patches, last = weights.get("x_embedder.proj.weight"), weights.get("final_layer.linear.weight")
    return patches is not None and last is not None and last.shape[:1] == (patches.shape[1:].numel(),)


def _read(title: str, convention: ConventionConfig, weights: Weights, said: Mapping[str, Any]) -> Found:
    width, channels, patch, other = shape_of(weights, "x_embedder.proj.weight", 4, title)
    if patch != other:
        raise ValueError(f"x_embedder.proj.weight has patches of {patch} x {other}, which are no squares")
    side = patch * root(shape_of(weights, "pos_embed", 3, title)[1], "places in pos_embed")
    depth = numbered(weights, "blocks", title)
    hidden, entered = shape_of(weights, "blocks.0.mlp.fc1.weight", 2, title)
    said_channels, last_width = shape_of(weights, "final_layer.linear.weight", 2, title)
    if entered != width or last_width != width:
        raise ValueError(
            f"the patches are {width} wide, the first block {entered} and the last layer {last_width}: "
            f"it is no {title} checkpoint"
        )
    if said_channels not in (patch**2 * channels, 2 * patch**2 * channels):
        raise ValueError(
            f"final_layer.linear.weight says {said_channels} numbers of a patch that has {patch**2 * channels}: "
            f"it is no {title} checkpoint"
        )
    num_classes, null_row = classes(shape_of(weights, "y_embedder.embedding_table.weight", 2, title)[0], said)
    inferred: dict[str, Any] = {
        "convention": convention,
        "patch": patch,
        "width": width,
        "depth": depth,
        "mlp_ratio": hidden / width,
        "learn_sigma": said_channels == 2 * patch**2 * channels,
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        "null_row": null_row,
    }
    if inferred["qk_norm"]:
        inferred["heads"] = width // shape_of(weights, "blocks.0.attn.q_norm.weight", 1, title)[0]
    elif (width, depth) in HEADS and "heads" not in said:
        inferred["heads"] = HEADS[width, depth]
    elif "heads" not in said:
        raise ValueError(
            f"the weights of {depth} blocks {width} wide are of no published size, and do not say how many heads "
            "they have: declare heads"
        )
    return Found(settled(DiTConfig, inferred, said), channels, side, num_classes, dict(weights))


def _read_plain(title: str, convention: ConventionConfig, weights: Weights, said: Mapping[str, Any]) -> Found:
    foreign = next((name for name in weights if name.startswith(HEAD) or LEGACY.match(name)), None)
    if foreign is not None:
        raise ValueError(f"the checkpoint has {foreign}, which REPA's have and {title}'s have not: declare repa")
    return _read(title, convention, weights, said)


def _read_repa(title: str, convention: ConventionConfig, weights: Weights, said: Mapping[str, Any]) -> Found:
    kept: dict[str, Tensor] = {name: weight for name, weight in weights.items() if not name.startswith(HEAD)}
    if any(LEGACY.match(name) for name in kept):
        first = numbered(kept, "blocks", title)
        numbered(kept, "decoder_blocks", title)
        kept = {
            LEGACY.sub(lambda match: f"blocks.{int(match[1]) + first}.", name): weight for name, weight in kept.items()
        }
    found = _read(title, convention, kept, said)
    heads = tuple(name for name in weights if name.startswith(HEAD))
    return Found(found.network, found.channels, found.side, found.num_classes, found.weights, heads)


SIT_CONVENTION = ConventionConfig(noise_at=0, velocity_to="data")
"""Noise at 0, and the velocity ``data - noise``."""

DIT_CONVENTION = ConventionConfig(
    path="betas", betas=BetaSchedule(), prediction="noise", time_scale=999.0, latest=0.999
)
"""A diffusion of 1000 steps, 0 to 999 to the network, at which it is asked for the noise. The last of them lies at
0.994, before the latest time said."""

REPA_CONVENTION = ConventionConfig()
"""fewstep's own."""

SIT = Format(
    name="sit",
    title="SiT",
    convention=SIT_CONVENTION,
    recognises=_plain,
    read=lambda weights, said: _read_plain("SiT", SIT_CONVENTION, weights, said),
    guided_channels=3,
    license="MIT",
)

DIT = Format(
    name="dit",
    title="DiT",
    convention=DIT_CONVENTION,
    recognises=_plain,
    read=lambda weights, said: _read_plain("DiT", DIT_CONVENTION, weights, said),
    guided_channels=3,
    license="CC-BY-NC-4.0",
)

REPA = Format(
    name="repa",
    title="REPA",
    convention=REPA_CONVENTION,
    recognises=_repa,
    read=lambda weights, said: _read_repa("REPA", REPA_CONVENTION, weights, said),
    license="MIT",
)
