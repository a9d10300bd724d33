"""A model from elsewhere as a velocity field in the one convention, and the ways in which one is usually misread."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.condition import Condition
from fewstep.conventions import ConventionConfig
from fewstep.conversion import canonical_velocity

Model = Callable[[Tensor, Tensor, Condition | None], Tensor]
"""``(x [B, *D], time [B], label [B] or None) -> prediction [B, *D]``, all in the model's own convention."""


@dataclass(frozen=True)
class ConvertedField:
    """The canonical velocity ``e - x`` of a foreign ``model``: see ``canonical_velocity``."""

    model: Model
    convention: ConventionConfig
    nfe: int = 1

    def __call__(self, x: Tensor, t_B: Tensor, label_B: Condition | None = None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return canonical_velocity(self.convention, lambda z, tau: self.model(z, tau, label_B), x, t_B)


def variants(convention: ConventionConfig) -> dict[str, ConventionConfig]:
    """The declared convention and the ways in which it is usually wrong, by what would have to be changed.

    Of a prediction of noise or data the sign is not in doubt, but which of the two it is; a noise level is no time that
    could be reversed.
    """

    def changed(**fields: object) -> ConventionConfig:
        return ConventionConfig.model_validate({**convention.model_dump(), **fields})

    other_end = 1 - convention.noise_at
    found = {"as declared": convention}
    reversible = convention.path != "variance_exploding"
    if reversible:
        found[f"noise_at: {other_end}"] = changed(noise_at=other_end)
    if convention.prediction == "velocity":
        other_way = "data" if convention.velocity_to == "noise" else "noise"
        found[f"velocity_to: {other_way}"] = changed(velocity_to=other_way)
        found[f"noise_at: {other_end}, velocity_to: {other_way}"] = changed(noise_at=other_end, velocity_to=other_way)
    else:
        other = "noise" if convention.prediction != "noise" else "data"
        bounds = {"earliest": max(convention.earliest, 1e-3), "latest": min(convention.latest, 0.999)}
        found[f"prediction: {other}"] = changed(prediction=other, **bounds)
        if reversible:
            both = f"noise_at: {other_end}, prediction: {other}"
            found[both] = changed(noise_at=other_end, prediction=other, **bounds)
    usual = (1.0, 999.0) if convention.path == "betas" else (1.0, 1000.0)
    for scale in usual:
        if not 0.9 < scale / convention.time_scale < 1.1:  # 999 and 1000 are told apart by no loss
            found[f"time_scale: {scale:g}"] = changed(time_scale=scale)
    return found
