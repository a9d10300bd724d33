"""Checkpoints of facebookresearch/flow_matching, examples/image (Lipman et al. 2412.06264)."""

from collections.abc import Mapping
from typing import Any

from fewstep.networks.foreign.config import ADMConfig
from fewstep.teachers.formats.base import Format, Found, Weights
from fewstep.teachers.formats.guided_diffusion import NOISE_TO_DATA, read_unet, recognises_unet

TITLE = "flow_matching"
PUBLISHED = (
    # CIFAR-10.
    ADMConfig(
        channel_mult=(2, 2, 2),
        num_res_blocks=4,
        use_new_attention_order=True,
        use_scale_shift_norm=True,
        conv_resample=False,
    ),
    # ImageNet.
    ADMConfig(
        model_channels=192,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=3,
        attention_levels=(1, 2, 3),
        num_heads=4,
        num_head_channels=64,
        use_new_attention_order=True,
        use_scale_shift_norm=True,
        resblock_updown=True,
    ),
)
"""The configs of its examples; it publishes no weights."""


def _read(weights: Weights, said: Mapping[str, Any]) -> Found:
    return read_unet(weights, said, title=TITLE, published=PUBLISHED, null_row=True)


FLOW_MATCHING = Format(
    name="flow_matching",
    title=TITLE,
    convention=NOISE_TO_DATA,
    recognises=recognises_unet,
    read=_read,
    guidance="excess",
)
