"""Is a teacher read right? Its regression loss as declared beside that of the usual mistakes, and its samples."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.data.dataset import Dataset
from fewstep.flow import LINEAR, VelocityField, uniform_grid
from fewstep.keys import Key
from fewstep.networks.foreign.converted import ForeignNetwork
from fewstep.sampling import sample_ode
from fewstep.sources import SOURCES
from fewstep.teachers.convention import ConvertedField, variants
from fewstep.teachers.load import Teacher
from fewstep.teachers.network import NetworkField

DECLARED = "as declared"
STEPS = 20
SAME = 1.02
"""Losses nearer than this ratio do not tell two readings apart."""
WIDTHS, SPREADS = 0.5, (0.6, 1.5)
"""How far, in deviations of the data, the mean of samples may be off, and within which ratios their deviation lies."""


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation over samples and coordinates."""

    mean: float
    std: float

    @classmethod
    def of(cls, x: Tensor) -> "Moments":
        return cls(float(x.double().mean()), float(x.double().std()))


@dataclass(frozen=True)
class TeacherCheck:
    """``losses``: ``E || v(x_t, t) - (e - x) ||^2 / D`` by reading, as declared first; ``silent``: that of a velocity
    of zero, which a teacher that knows the data is far below. ``samples``: those of 20 Euler steps,
    beside the ``data``.
    """

    teacher: str
    losses: Mapping[str, float]
    silent: float
    samples: Moments
    data: Moments
    count: int

    @property
    def best(self) -> str:
        """The reading of least loss; the declared one unless another is clearly below."""
        finite = {name: loss for name, loss in self.losses.items() if math.isfinite(loss)}
        least = min(finite, key=lambda name: finite[name], default=DECLARED)
        declared = self.losses[DECLARED]
        return DECLARED if finite.get(least, math.inf) * SAME > declared else least

    @property
    def samples_fit(self) -> bool:
        """Whether samples are where the data are, and about as wide."""
        near = abs(self.samples.mean - self.data.mean) <= WIDTHS * self.data.std
        return near and SPREADS[0] <= self.samples.std / self.data.std <= SPREADS[1]

    @property
    def says_something(self) -> bool:
        """Whether the least loss is below that of saying nothing."""
        return self.losses[self.best] * SAME < self.silent

    @property
    def alike(self) -> list[str]:
        """Readings that fit as well as the declared one: between them this look cannot decide."""
        declared = self.losses[DECLARED]
        return [name for name, loss in self.losses.items() if name != DECLARED and loss < declared * SAME]

    @property
    def right(self) -> bool:
        return self.best == DECLARED and self.says_something and not self.alike and self.samples_fit

    def says(self) -> str:
        """What was found, in a sentence."""
        declared, samples, data = self.losses[DECLARED], self.samples, self.data
        if not self.says_something:
            return (
                f"{self.teacher} says nothing of these data in any reading: its loss is {self.losses[self.best]:.4g} "
                f"at best, and {self.silent:.4g} without any velocity; samples have mean {samples.mean:.3g} and "
                f"deviation {samples.std:.3g}, the data {data.mean:.3g} and {data.std:.3g}: is it trained, are these "
                "its data, is their scale right?"
            )
        if self.best != DECLARED:
            least = self.losses[self.best]
            found = f"the loss is {least:.4g} with {self.best}, and {declared:.4g} as declared"
            return f"{self.teacher} is read wrongly: {found}"
        if self.alike:
            return (
                f"{self.teacher} cannot be told from {' or '.join(self.alike)} on these data: the loss is "
                f"{declared:.4g} either way; look at more samples (--n) or at other data"
            )
        if not self.samples_fit:
            return (
                f"{self.teacher} has the least loss as it is declared, but samples of mean {samples.mean:.3g} and "
                f"deviation {samples.std:.3g}, where the data have {data.mean:.3g} and {data.std:.3g}: look at its "
                "range of values, its scale of latents, and whether it belongs to these data"
            )
        return f"{self.teacher} is read right: least loss as declared, samples as wide as the data"

    def to_json(self) -> dict[str, Any]:
        return {
            "teacher": self.teacher,
            "right": self.right,
            "best": self.best,
            "losses": dict(self.losses),
            "silent": self.silent,
            "samples": vars(self.samples),
            "data": vars(self.data),
            "n": self.count,
            "says": self.says(),
        }


@torch.no_grad()
def check_teacher(
    teacher: Teacher, data: Dataset, *, n: int = 512, seed: int = 0, batch_size: int = 64
) -> TeacherCheck:
    """Measure ``n`` samples of the data; the same noise and times for every reading."""
    n = min(n, len(data.x))
    key = Key(seed)
    rows = torch.linspace(0, len(data.x) - 1, n, dtype=torch.float64).long()
    losses = {name: 0.0 for name in readings(teacher)}
    seen, drawn, silent = [], [], 0.0
    for index in torch.arange(n).split(batch_size):
        x = data.samples(rows[index]).to(teacher.device)
        at = index.to(teacher.device)
        condition = data.condition(rows[index])
        label = None if condition is None else condition.to(teacher.device)
        e = SOURCES[teacher.noise.source](key, "noise", at, tuple(x.shape[1:]))
        # Away from both ends, where some predictions say nothing.
        t = (0.02 + 0.96 * key.uniform("time", at)).float()
        point = LINEAR.sample(x, e, t)
        silent += float(point.v.double().square().flatten(1).mean(dim=1).sum()) / n
        for name, field in readings(teacher).items():
            found = field(point.x_t, t, label)
            losses[name] += float((found - point.v).double().square().flatten(1).mean(dim=1).sum()) / n
        seen.append(x.cpu())
        drawn.append(sample_ode(teacher.field, e, uniform_grid(STEPS), label).x.cpu())
    return TeacherCheck(teacher.name, losses, silent, Moments.of(torch.cat(drawn)), Moments.of(torch.cat(seen)), n)


def readings(teacher: Teacher) -> dict[str, Callable[..., Tensor]]:
    """The unguided teacher as it is declared, and with each of the usual mistakes."""
    field = _unguided(teacher)
    if isinstance(field, ConvertedField):
        model = field.model
        return {name: ConvertedField(model, said) for name, said in variants(field.convention).items()}
    if isinstance(field, NetworkField) and isinstance(field.net, ForeignNetwork):
        raw = field.net.net
        return {name: ConvertedField(raw, said) for name, said in variants(field.net.convention).items()}
    return {
        DECLARED: field,
        "its time reversed": lambda x, t, label: field(x, 1 - t, label),
        "its sign turned": lambda x, t, label: -field(x, t, label),
        "its time reversed and its sign turned": lambda x, t, label: -field(x, 1 - t, label),
        "its time a thousandth": lambda x, t, label: field(x, t / 1000, label),
    }


def _unguided(teacher: Teacher) -> VelocityField:
    contrast = teacher.contrast
    if contrast is None or teacher.guidance == 1:
        return teacher.field
    return contrast.field
