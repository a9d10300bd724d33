"""What a scheduler of diffusers says of the network beside it: how that counts time, and what it predicts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fewstep.conventions import BetaSchedule, ConventionConfig, Prediction
from fewstep.errors import UsageError
from fewstep.networks.foreign.config import DiffusersFamily
from fewstep.networks.foreign.diffusers_families import FAMILIES

FLOW_MATCHING = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")

DIFFUSION = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
)
"""Those of a table of variances, whose networks count its rows."""

SCHEDULES: dict[str, Literal["linear", "scaled_linear", "squared_cosine"]] = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "squared_cosine",
}

PREDICTIONS: dict[str, Prediction] = {"epsilon": "noise", "sample": "data", "v_prediction": "v_prediction"}

NEAR = 1e-3
"""How near the end where a prediction says nothing a network is asked."""


@dataclass(frozen=True)
class Scheduler:
    """The facts of a ``scheduler_config.json``.

    ``shift`` is what flow-matching grids are moved by, ``s -> shift s / (1 + (shift - 1) s)``; ``dynamic`` if that
    depends on the size of the image. It is no part of the convention: the network is given the moved time itself.

    ``set_timesteps(N)`` of ``FlowMatchEulerDiscreteScheduler`` moves its last time twice (with a shift of 3, from
    0.0010 to 0.0030 to 0.0089) and spends its last step there: grids are better given to it as ``sigmas``. Solvers of
    diffusions, where they are used for flow matching, cut the times that they give a network to whole numbers; here
    they are what they are.
    """

    name: str
    steps: int
    shift: float
    dynamic: bool
    convention: ConventionConfig

    @property
    def shifts_twice(self) -> bool:
        return self.name == "FlowMatchEulerDiscreteScheduler" and not self.dynamic and self.shift != 1


def read_scheduler(
    said: Mapping[str, Any], family: DiffusersFamily, network: Mapping[str, Any], where: str
) -> Scheduler:
    """From what the file ``where`` says, for a network of ``family`` with that config. ``UsageError``, asking for
    ``teacher.convention``, where it does not settle how the network is to be read."""
    name = str(said.get("_class_name"))
    if name not in FLOW_MATCHING + DIFFUSION:
        raise unsettled(where, f"is of {name}, which says nothing that is known here of the network")
    flow = name in FLOW_MATCHING or said.get("prediction_type") == "flow_prediction"
    for key in ("num_train_timesteps", *(() if flow else ("beta_start", "beta_end", "beta_schedule"))):
        if key not in said:
            raise unsettled(where, f"has no {key}")
    try:
        steps = int(said["num_train_timesteps"])
        if not flow:
            return Scheduler(name, steps, 1.0, False, _diffusion(said, steps, family, network, where))
        if said.get("invert_sigmas"):
            raise unsettled(where, "has invert_sigmas")
        if name in DIFFUSION and not said.get("use_flow_sigmas"):
            raise unsettled(where, "has a flow_prediction and no use_flow_sigmas")
        shift = said.get("shift" if name in FLOW_MATCHING else "flow_shift")
        return Scheduler(
            name,
            steps,
            shift=1.0 if shift is None else float(shift),
            dynamic=bool(said.get("use_dynamic_shifting")),
            convention=_flow(steps, family, network),
        )
    except (TypeError, ValueError) as error:
        raise unsettled(where, f"has a number that is none ({' '.join(str(error).split())})") from error


def unsettled(where: str, why: str) -> UsageError:
    return UsageError(f"{where} {why}: say in teacher.convention how the network counts time and what it predicts")


def _flow(steps: int, family: DiffusersFamily, network: Mapping[str, Any]) -> ConventionConfig:
    """The schedulers' own convention is the canonical one; the pipelines turn it round for some networks."""
    facts = FAMILIES[family]
    return ConventionConfig(
        noise_at=facts.noise_at,
        velocity_to="noise" if facts.noise_at == 1 else "data",
        time_scale=facts.flow_scale(steps, network),
    )


def _diffusion(
    said: Mapping[str, Any], steps: int, family: DiffusersFamily, network: Mapping[str, Any], where: str
) -> ConventionConfig:
    schedule, predicted = said["beta_schedule"], said.get("prediction_type", "epsilon")
    facts = FAMILIES[family]
    if facts.noise_at == 0 or facts.flow_scale(steps, network) != steps:
        raise unsettled(where, f"is of a diffusion, whose steps are no times of a {family}")
    if schedule not in SCHEDULES or said.get("trained_betas") is not None:
        raise unsettled(where, f"has variances that are not known here ({schedule})")
    if predicted not in PREDICTIONS:
        raise unsettled(where, f"has the unknown prediction_type {predicted}")
    if said.get("timestep_type", "discrete") != "discrete":
        raise unsettled(where, f"has timestep_type {said['timestep_type']}")
    prediction = PREDICTIONS[predicted]
    if said.get("predict_epsilon") is False:  # of before there was prediction_type
        prediction = "data"
    return ConventionConfig(
        path="betas",
        betas=BetaSchedule(
            kind=SCHEDULES[schedule],
            start=said["beta_start"],
            end=said["beta_end"],
            steps=steps,
            zero_terminal=bool(said.get("rescale_betas_zero_snr")),
        ),
        prediction=prediction,
        time_scale=steps - 1,
        earliest=NEAR if prediction == "data" else 0.0,
        latest=1 - NEAR if prediction == "noise" else 1.0,
    )
