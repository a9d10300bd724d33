"""The U-Net of guided-diffusion in the weights of projects that took it over."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.conventions import ConventionConfig
from fewstep.networks.foreign.config import ADMConfig
from fewstep.teachers.formats.base import Found, Weights
from fewstep.teachers.formats.shapes import settled, shape_of

NOISE_TO_DATA = ConventionConfig(noise_at=0, velocity_to="data")
"""Time from noise at 0 to data at 1, and a velocity that points there: torchcfm and flow_matching alike."""

HEADS = ("num_heads", "num_head_channels", "num_heads_upsample")
ORDER = "use_new_attention_order"
"""What no name and no shape says: into how many heads the channels of attention divide, and how they lie."""


def recognises_unet(weights: Weights) -> bool:
    wanted = {"time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight", "out.2.weight"}
    return wanted <= set(weights)


def read_unet(
    weights: Weights, said: Mapping[str, Any], *, title: str, published: Sequence[ADMConfig], null_row: bool
) -> Found:
    """What the weights say, and what the project's ``published`` configs say of weights like these.

    ``null_row``: the last row of the project's tables of classes stands for none of them, unless a user says otherwise.
    ``ValueError`` where weights are missing, and where a user has to say more.
    """
    channels, inferred = _architecture(weights, title)
    own = next((dict(each) for each in published if dict(each) | inferred == dict(each)), None)
    known: dict[str, Any] = {}
    if not {"num_heads", "num_head_channels"} & said.keys():
        if own is None:
            raise ValueError(
                f"the weights are no published {title} network's and do not say how many heads attend: "
                "declare num_heads or num_head_channels"
            )
        known |= {name: own[name] for name in HEADS}
    if own is not None:
        known[ORDER] = own[ORDER]
    num_classes = 0
    if "label_emb.weight" in weights:
        rows, _ = shape_of(weights, "label_emb.weight", 2, title)
        inferred["null_row"] = bool(said.get("null_row", null_row))
        num_classes = rows - inferred["null_row"]
    inferred["convention"] = NOISE_TO_DATA
    config = settled(ADMConfig, inferred, {**known, **said})
    if ORDER not in {**known, **said} and _several_heads(config):
        raise ValueError(f"the weights do not say in which order the channels of their heads lie: declare {ORDER}")
    return Found(config, channels, None, num_classes, dict(weights))


def _several_heads(config: ADMConfig) -> bool:
    levels = {*config.attention_levels, len(config.channel_mult) - 1}
    return any(config.heads(level, up=up) > 1 for level in levels for up in (False, True))


def _architecture(weights: Weights, title: str) -> tuple[int, dict[str, Any]]:
    """Channels of an image, and the fields of the config that names and shapes say."""
    condition, model_channels = shape_of(weights, "time_embed.0.weight", 2, title)
    enter, channels, *_ = shape_of(weights, "input_blocks.0.0.weight", 4, title)
    leave, *_ = shape_of(weights, "out.2.weight", 4, title)
    if condition != 4 * model_channels:
        raise ValueError(f"time_embed.0.weight is {condition} x {model_channels}: it is no {title} checkpoint's")
    if leave not in (channels, 2 * channels):
        hint = ", as with_fourier_features or low-resolution inputs have them, which are not supported"
        raise ValueError(f"the network makes {leave} channels of {channels}{hint if leave < channels else ''}")
    period, resblock_updown, conv_resample = _levels(weights, title)
    blocks = _numbers(weights, "output_blocks")
    firsts = [f"input_blocks.{first}" for first in range(1, len(blocks), period)]
    widths = [shape_of(weights, f"{first}.0.out_layers.0.weight", 1, title)[0] for first in firsts]
    inferred: dict[str, Any] = {
        "model_channels": model_channels,
        "channel_mult": tuple(width / model_channels for width in widths),
        "num_res_blocks": period - 1,
        "attention_levels": tuple(k for k, first in enumerate(firsts) if f"{first}.1.qkv.weight" in weights),
        "use_scale_shift_norm": shape_of(weights, "input_blocks.1.0.emb_layers.1.weight", 2, title)[0] == 2 * widths[0],
        "resblock_updown": resblock_updown,
        "learn_sigma": leave == 2 * channels,
    }
    if not resblock_updown and len(widths) > 1:
        inferred["conv_resample"] = conv_resample
    if enter != widths[0]:
        raise ValueError(f"input_blocks.0.0.weight makes {enter} channels, where {widths[0]} are taken")
    return channels, inferred


def _levels(weights: Weights, title: str) -> tuple[int, bool, bool]:
    """Blocks per level, with the one that ends it; whether residual blocks, and whether convolutions do that."""
    inputs, outputs = _numbers(weights, "input_blocks"), _numbers(weights, "output_blocks")
    count = len(outputs)
    convs = {k for k in inputs if f"input_blocks.{k}.0.op.weight" in weights}
    # Down the way a residual block that halves looks like any other; up the way it comes second.
    ups = re.compile(r"output_blocks\.(\d+)\.[12]\.in_layers\.0\.weight")
    residual = {int(found[1]) + 1 for name in weights if (found := ups.fullmatch(name))}
    gaps = set(range(count)) - inputs
    ends = convs or residual or gaps
    period = min(ends, default=count)
    whole = outputs == set(range(count)) and max(inputs, default=0) == count - 1
    if not whole or period < 2 or count % period or ends != set(range(period, count, period)):
        raise ValueError(f"input_blocks and output_blocks do not fit together: it is not a whole {title} checkpoint")
    return period, bool(residual), bool(convs)


def _numbers(weights: Weights, prefix: str) -> set[int]:
    return {int(name.split(".")[1]) for name in weights if re.match(rf"{prefix}\.\d+\.", name)}
