"""How models from elsewhere count time, and what they say: config. Imports no torch."""

from typing import Literal

from pydantic import Field, model_validator

from fewstep.block import Block, PathName

Prediction = Literal["velocity", "noise", "data", "score", "v_prediction"]
"""What a model says: the change of its state, the noise, the data, the gradient of the log density, or ``alpha e -
sigma x``, which diffusion models call v."""


class BetaSchedule(Block):
    """The variances of a diffusion of ``steps`` steps (Ho et al. 2006.11239): ``beta_k`` from ``start`` to ``end``,
    evenly (``linear``), evenly in their square roots (``scaled_linear``), or those of a squared cosine
    (Nichol and Dhariwal 2102.09672). ``zero_terminal`` rescales them so that the last state is all noise (Lin et al.
    2305.08891). ``continuous`` is that of a diffusion without steps, ``beta(t)`` evenly from ``start`` to ``end``, 0.1
    and 20 unless said otherwise (Song et al. 2011.13456, equation 33; the path VP of SiT)."""

    kind: Literal["linear", "scaled_linear", "squared_cosine", "continuous"] = "linear"
    start: float = Field(default_factory=lambda said: 0.1 if said["kind"] == "continuous" else 1e-4, gt=0)
    end: float = Field(default_factory=lambda said: 20.0 if said["kind"] == "continuous" else 0.02, gt=0)
    steps: int = Field(1000, ge=2)
    zero_terminal: bool = False

    @model_validator(mode="after")
    def _variances(self) -> "BetaSchedule":
        if self.kind != "continuous" and max(self.start, self.end) >= 1:
            raise ValueError(f"betas of a {self.kind} schedule lie below 1, got {self.start:g} and {self.end:g}")
        if self.kind == "continuous" and self.zero_terminal:
            raise ValueError("zero_terminal is for schedules of steps")
        return self


class ConventionConfig(Block):
    """How a model from elsewhere counts time, and what it says.

    ``path``: the one it was trained on. On ``variance_exploding`` its time is the noise level ``sigma``; on ``betas``,
    the place in a table of variances, from 0 to 1. ``prediction``: see ``Prediction``. ``noise_at``: the end of its
    time where noise is; ``velocity_to``: where its velocity points. ``time_scale``: its time is that many times the one
    that runs from 0 to 1. ``earliest`` and ``latest`` bound the times, in fewstep's count (0 data, 1 noise), at which
    it is asked: before the first its velocity of then is used, after the last its data prediction.
    """

    path: PathName | Literal["variance_exploding", "betas"] = "linear"
    betas: BetaSchedule | None = None
    prediction: Prediction = "velocity"
    noise_at: Literal[0, 1] = 1
    velocity_to: Literal["noise", "data"] = "noise"
    time_scale: float = Field(1.0, gt=0)
    earliest: float = Field(0.0, ge=0, lt=1)
    latest: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _determined(self) -> "ConventionConfig":
        if self.earliest >= self.latest:
            raise ValueError(f"earliest {self.earliest:g} is not before latest {self.latest:g}")
        if (self.betas is not None) != (self.path == "betas"):
            raise ValueError("betas belong to path betas, and it to them")
        if self.path == "variance_exploding" and (self.latest == 1 or self.noise_at == 0):
            raise ValueError("variance_exploding has noise at large sigma: noise_at 1, and latest below 1")
        steps = self.betas is not None and self.betas.kind != "continuous"
        if (steps or self.path == "variance_exploding") and self.prediction == "velocity":
            raise ValueError(f"path {self.path} has no velocity of its own: prediction is noise, data or v_prediction")
        if self.prediction == "noise" and self.latest == 1:
            raise ValueError("noise alone says nothing of the data at t = 1: set latest below 1, for example 0.999")
        if self.prediction == "score" and self.latest == 1:
            raise ValueError("a score says nothing of the data at t = 1: set latest below 1, for example 0.999")
        if self.prediction == "data" and self.earliest == 0:
            raise ValueError("data alone say nothing of the noise at t = 0: set earliest above 0, for example 0.001")
        if self.prediction != "velocity" and self.velocity_to != "noise":
            raise ValueError(f"velocity_to has no meaning for prediction {self.prediction}")
        return self


GuidanceForm = Literal["scale", "excess"]
"""``scale``: ``u + w (c - u)``, off at 1. ``excess``: ``c + w (c - u)``, off at 0."""


def canonical_guidance(value: float, form: GuidanceForm) -> float:
    """The scale, which is fewstep's count: 1 for no guidance.

    DiT, SiT, minRF and most pipelines of diffusers count so too. Excess is counted by flow_matching (there
    ``(1 + w) c - w u``), by the scripts of latent consistency models and by Z-Image.
    """
    return value if form == "scale" else 1 + value
