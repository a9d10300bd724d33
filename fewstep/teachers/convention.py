"""A model from elsewhere as a velocity field in the one convention: its path, its clock, its sign, what it predicts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.flow import LINEAR, PATHS, expand
from fewstep.teachers.config import ConventionConfig

Model = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``(x [B, *D], time [B], label [B] or None) -> prediction [B, *D]``, all in the model's own convention."""


@dataclass(frozen=True)
class ConvertedField:
    """The canonical velocity ``e - x`` of a foreign ``model``.

    At the linear state ``x_t`` and time ``t`` the model's path has the state ``scale x_t`` at its own time ``tau``,
    where noise and data are in the same proportion. From what the model says there follow data and noise; the velocity
    is their difference. (The conversions of ``Interpolant``, solved for the linear path.)
    """

    model: Model
    convention: ConventionConfig
    nfe: int = 1

    def __call__(self, x: Tensor, t_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        said = self.convention
        path = PATHS[said.path]
        t_B = t_B.clamp(said.earliest, said.latest)
        tau_B = path.time_at(t_B)
        state = expand(path.scale(tau_B), x).to(x) * x
        clock = tau_B if said.noise_at == 1 else 1 - tau_B
        with torch.autocast(x.device.type, enabled=False):
            found = self.model(state, said.time_scale * clock, label_B).to(x)
        if said.prediction == "data":
            return LINEAR.velocity_from_data(x, found, t_B)
        if said.prediction == "noise":
            return LINEAR.velocity_from_noise(x, found, t_B)
        # Its velocity is the change of its state towards noise, per unit of a clock that runs to 1 either way.
        towards_noise = found if said.velocity_to == "noise" else -found
        return path.linear_from_velocity(state, towards_noise, tau_B)


def variants(convention: ConventionConfig) -> dict[str, ConventionConfig]:
    """The declared convention and the ways in which it is usually wrong, by what would have to be changed.

    Of a prediction of noise or data the sign is not in doubt, but which of the two it is.
    """

    def changed(**fields: object) -> ConventionConfig:
        return ConventionConfig.model_validate({**convention.model_dump(), **fields})

    other_end = 1 - convention.noise_at
    found = {"as declared": convention, f"noise_at: {other_end}": changed(noise_at=other_end)}
    if convention.prediction == "velocity":
        other_way = "data" if convention.velocity_to == "noise" else "noise"
        found[f"velocity_to: {other_way}"] = changed(velocity_to=other_way)
        found[f"noise_at: {other_end}, velocity_to: {other_way}"] = changed(noise_at=other_end, velocity_to=other_way)
    else:
        other = "data" if convention.prediction == "noise" else "noise"
        bounds = {"earliest": max(convention.earliest, 1e-3), "latest": min(convention.latest, 0.999)}
        found[f"prediction: {other}"] = changed(prediction=other, **bounds)
        found[f"noise_at: {other_end}, prediction: {other}"] = changed(noise_at=other_end, prediction=other, **bounds)
    for scale in (1.0, 1000.0):
        if not 0.9 < scale / convention.time_scale < 1.1:  # 999 and 1000 are told apart by no loss
            found[f"time_scale: {scale:g}"] = changed(time_scale=scale)
    return found
