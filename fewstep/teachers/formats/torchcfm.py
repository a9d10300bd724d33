"""Checkpoints of torchcfm (Tong et al. 2302.00482).

Networks that it trained on its trigonometric path (``si``) are told from the others by nothing in their weights: their
convention has ``path: cosine``.
"""

from collections.abc import Mapping
from typing import Any

from fewstep.networks.foreign.config import ADMConfig
from fewstep.teachers.formats.base import Format, Found, Weights
from fewstep.teachers.formats.guided_diffusion import NOISE_TO_DATA, read_unet, recognises_unet

TITLE = "torchcfm"
PUBLISHED = (ADMConfig(num_heads=4, num_head_channels=64),)
"""Its networks for CIFAR-10."""


def _read(weights: Weights, said: Mapping[str, Any]) -> Found:
    return read_unet(weights, said, title=TITLE, published=PUBLISHED, null_row=False)


TORCHCFM = Format(
    name="torchcfm",
    title=TITLE,
    convention=NOISE_TO_DATA,
    recognises=recognises_unet,
    read=_read,
    license="MIT",
)
