"""The two counts of classifier-free guidance."""

from typing import Literal

GuidanceForm = Literal["scale", "excess"]
"""``scale``: ``u + w (c - u)``, off at 1. ``excess``: ``c + w (c - u)``, off at 0."""


def canonical_guidance(value: float, form: GuidanceForm) -> float:
    """The scale, which is fewstep's count: 1 for no guidance.

    DiT, SiT, minRF and most pipelines of diffusers count so too. Excess is counted by flow_matching (there
    ``(1 + w) c - w u``), by the scripts of latent consistency models and by Z-Image.
    """
    return value if form == "scale" else 1 + value
