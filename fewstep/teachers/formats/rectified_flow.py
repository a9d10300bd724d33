"""Checkpoints of RectifiedFlow (Liu et al. 2209.03003)."""

import re
from collections.abc import Mapping
from typing import Any

from fewstep.conventions import ConventionConfig
from fewstep.networks.foreign.config import NCSNPPConfig
from fewstep.teachers.formats.base import Format, Found, Weights
from fewstep.teachers.formats.shapes import settled, shape_of

TITLE = "RectifiedFlow"
CONVENTION = ConventionConfig(noise_at=0, velocity_to="data", time_scale=999, latest=0.999)
"""Its times end at 0.001, never nearer to the noise."""

CIFAR = NCSNPPConfig()
LARGE = NCSNPPConfig(
    ch_mult=(1, 1, 2, 2, 2, 2, 2),
    num_res_blocks=2,
    attention_levels=(4,),
    embedding_type="fourier",
    progressive="output_skip",
    progressive_input="input_skip",
    fir=True,
    scale_by_sigma=True,
    num_scales=2000,
)
UNSEEN = ("fir", "skip_rescale", "scale_by_sigma", "centered")
"""What no name and no shape says."""
PUBLISHED = ((CIFAR, UNSEEN), (LARGE, ("fir", "skip_rescale", "scale_by_sigma")))
"""With what the project's configs settle of that: of its networks for images of 256 pixels, those of faces are
``centered`` and those of LSUN are not."""


def _recognises(weights: Weights) -> bool:
    return {"sigmas", "all_modules.1.weight"} <= set(weights)


def _read(weights: Weights, said: Mapping[str, Any]) -> Found:
    channels, inferred = _architecture(weights)
    known: dict[str, Any] = {}
    for own, settles in ((dict(config), settles) for config, settles in PUBLISHED):
        if own | inferred | {"num_scales": own["num_scales"]} == own:
            known = {name: own[name] for name in settles}
    if inferred["embedding_type"] == "positional":
        known["scale_by_sigma"] = False
    known |= said
    missing = [name for name in UNSEEN if name not in known]
    if missing:
        raise ValueError(f"the weights do not say everything of this {TITLE} network: declare {', '.join(missing)}")
    config = settled(NCSNPPConfig, {**inferred, "convention": CONVENTION}, known)
    return Found(config, channels, None, 0, dict(weights))


def _architecture(weights: Weights) -> tuple[int, dict[str, Any]]:
    """Channels of an image, and the fields of the config that names and shapes say.

    The modules lie in one list. Written as a letter each (see ``_kind``), their order says what they are for.
    """
    (num_scales,) = shape_of(weights, "sigmas", 1, TITLE)
    names = _modules(weights)
    kinds = "".join(_kind(weights, number, own) for number, own in enumerate(names))
    head = re.match("W?LLC", kinds)
    if head is None:
        raise ValueError(
            f"the modules do not begin with an embedding of time and a convolution: it is no whole {TITLE} checkpoint"
        )
    fourier, start = kinds[0] == "W", head.end()
    condition, features = shape_of(weights, f"all_modules.{start - 3}.weight", 2, TITLE)
    nf = features // 2 if fourier else features
    enter, channels, *_ = shape_of(weights, f"all_modules.{start - 1}.weight", 4, TITLE)

    between = [match.start() for match in re.finditer("U", kinds)]
    levels = len(between) // 2 + 1
    firsts = [kinds.find("R", at) for at in (start, *between[: levels - 1])]
    blocks = kinds[start : between[0]].count("R") if between else (kinds.count("R") - 3) // 2
    inferred: dict[str, Any] = {
        "nf": nf,
        "num_res_blocks": blocks,
        "attention_levels": tuple(level for level, first in enumerate(firsts) if kinds[first + 1 : first + 2] == "A"),
        "embedding_type": "fourier" if fourier else "positional",
        "progressive": "output_skip" if levels > 1 and kinds.count("NC") == levels else "none",
        "progressive_input": "input_skip" if "I" in kinds else "none",
        "num_scales": num_scales,
    }
    if blocks < 1 or -1 in firsts or condition != 4 * nf or enter != nf or kinds != _expected(levels, inferred):
        raise ValueError(f"the modules do not follow each other as in a U-Net: it is not a whole {TITLE} checkpoint")
    widths = [shape_of(weights, f"all_modules.{first}.Conv_0.weight", 4, TITLE)[0] for first in firsts]
    if any(width % nf for width in widths):
        raise ValueError(f"the levels have {widths} channels, which are no multiples of {nf}")
    inferred["ch_mult"] = tuple(width // nf for width in widths)
    return channels, inferred


def _expected(levels: int, inferred: Mapping[str, Any]) -> str:
    """The letters of a network of that many levels."""
    blocks, attention = inferred["num_res_blocks"], inferred["attention_levels"]
    skip = "I" if inferred["progressive_input"] == "input_skip" else ""
    down = [("RA" if level in attention else "R") * blocks for level in range(levels)]
    up = [
        "R" * (blocks + 1)
        + ("A" if level in attention else "")
        + ("NC" if inferred["progressive"] == "output_skip" or level == 0 else "")
        for level in reversed(range(levels))
    ]
    head = "WLLC" if inferred["embedding_type"] == "fourier" else "LLC"
    return head + f"U{skip}".join(down) + "RAR" + "U".join(up)


def _modules(weights: Weights) -> list[set[str]]:
    """The names within each module of the list."""
    found: dict[int, set[str]] = {}
    for name in weights:
        if match := re.fullmatch(r"all_modules\.(\d+)\.(.+)", name):
            found.setdefault(int(match[1]), set()).add(match[2])
    for number in range(max(found, default=0) + 1):
        if number not in found:
            raise ValueError(f"the checkpoint has no all_modules.{number}: it is not a whole {TITLE} checkpoint")
    return [found[number] for number in sorted(found)]


def _kind(weights: Weights, number: int, names: set[str]) -> str:
    """One letter for a module: W frequencies, L linear, C convolution, N norm, R residual block, U one that changes the
    resolution, A attention, I the image beside what was made of it."""
    if "GroupNorm_1.weight" in names:
        if "NIN_0.W" in names:
            raise ValueError("the network has residual blocks of resblock_type ddpm: only biggan is supported")
        leave, enter, *_ = shape_of(weights, f"all_modules.{number}.Conv_0.weight", 4, TITLE)
        # Every other block with a convolution around it takes more channels than it gives, or fewer.
        return "U" if enter == leave and "Conv_2.weight" in names else "R"
    if "NIN_0.W" in names:
        return "A"
    if "Conv_0.weight" in names:
        return "I"
    if "W" in names:
        return "W"
    if "weight" in names:
        return {1: "N", 2: "L", 4: "C"}.get(weights[f"all_modules.{number}.weight"].ndim, "?")
    return "?"


RECTIFIED_FLOW = Format(name="rectified_flow", title=TITLE, convention=CONVENTION, recognises=_recognises, read=_read)
