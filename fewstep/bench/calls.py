"""Which networks a training step calls, on how many rows and for what: observed, not listed.

An objective is made as training makes it, from its config, around networks of a few weights, and takes a step; what it
asks of them does not depend on their size. Shapes: B batch, D dimensions of a sample.
"""

import contextlib
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fewstep.bench.outline import Outline
from fewstep.data.dataset import Batch, Dataset
from fewstep.distill.objective import Objective
from fewstep.distill.plan import plan
from fewstep.distill.progressive.config import ProgressiveConfig, UniformGrid
from fewstep.distill.reflow.config import ReflowConfig
from fewstep.distill.stage import Stage, first_steps
from fewstep.errors import UsageError
from fewstep.keys import Key
from fewstep.networks.build import build_network
from fewstep.networks.config import FloTConfig, MLPConfig
from fewstep.teachers.guided import ClassContrast, GuidedField, WeakContrast
from fewstep.teachers.load import Teacher
from fewstep.teachers.network import NetworkField, freeze

Kind = Literal["forward", "gradient", "path", "end", "path_gradient", "end_gradient"]
"""A plain evaluation; one that a backward pass follows; the derivative along the path, or in the end of the jump, alone
or with a backward pass through it."""
Role = Literal["student", "companion", "target", "teacher", "weak", "previous"]
"""A companion is a network of the student's kind that an objective trains for itself."""

MOMENTS = (0.125, 0.375, 0.625, 0.875)
"""Shares of a stage at which its step is observed: some methods change while they train."""


@dataclass(frozen=True)
class Call:
    """One call of a network on ``rows``; ``autocast`` says whether it ran under autocast."""

    role: Role
    kind: Kind
    rows: int
    autocast: bool


@dataclass(frozen=True)
class StageCalls:
    """The calls of a stage's microbatch in order: a few ways it may go, each with its share of the stage's steps.
    ``held`` is what it holds beside the student and the teacher, all of the student's size: companions that are trained
    too, targets that are moved by hand, the student of the stage before."""

    name: str
    steps: int
    ways: tuple[tuple[float, tuple[Call, ...]], ...]
    held: tuple[Role, ...]


def stage_calls(case: Outline, rows: int) -> tuple[StageCalls, ...]:
    """Observe every stage of a run on microbatches of ``rows`` samples. What a training would refuse of the config is
    its ``UsageError``."""
    config = case.config
    objective = config.objective
    if isinstance(objective, ProgressiveConfig):  # another grid has other nodes and the same calls
        objective = objective.model_copy(update={"grid": UniformGrid()})
    if isinstance(objective, ReflowConfig):
        objective = objective.model_copy(update={"pairs": objective.pairs.model_copy(update={"path": None})})
    small = config.model_copy(update={"objective": objective})
    shape = (case.shape[0], 4, 4) if len(case.shape) == 3 else case.shape
    seen: list[Call] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nets = _Stand(case, shape, seen)
        teacher = nets.teacher()
        data = Dataset("plan", torch.zeros(1, *shape), None, case.classes, kind="points")
        stages = plan(small, teacher, data)
        starts = first_steps(stages)
        found = []
        for number, stage in enumerate(stages):
            previous = freeze(nets.student("previous")) if number else None
            built = stage.build(nets.student("student"), previous)
            copies = nets.name_copies(built)
            ways = Counter(
                _observed(built, stage, starts[number] + int(share * stage.steps), rows, shape, case, seen)
                for share in MOMENTS
            )
            found.append(
                StageCalls(
                    name=stage.name,
                    steps=stage.steps,
                    ways=tuple((count / len(MOMENTS), calls) for calls, count in ways.items()),
                    held=(*copies, *(("previous",) if number else ())),
                )
            )
    return tuple(found)


def _observed(
    objective: Objective, stage: Stage, step: int, rows: int, shape: tuple[int, ...], case: Outline, seen: list[Call]
) -> tuple[Call, ...]:
    """The calls of one forward pass of an objective."""
    seen.clear()
    label = torch.arange(rows) % case.classes if case.classes else None
    noise = torch.randn(rows, *shape) if stage.pairs is not None else None
    batch = Batch(torch.randn(rows, *shape), label, torch.arange(rows), None, noise)
    mixed = case.config.train.precision == "bf16"
    with torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext():
        try:
            objective(batch, Key(0, step))
        except (RuntimeError, ValueError) as error:
            raise UsageError(f"a microbatch of {rows} samples: {error}") from error
    return tuple(seen)


class _Stand:
    """Small networks in the places of a run's, which note who calls them. ``roles`` tells them apart."""

    def __init__(self, case: Outline, shape: tuple[int, ...], seen: list[Call]) -> None:
        self._case, self._shape, self._seen = case, shape, seen
        self.roles: dict[nn.Module, Role] = {}

    def __deepcopy__(self, memo: object) -> "_Stand":
        """A copied network is a target's: it has the hook, and is noted in the same place."""
        return self

    def student(self, role: Role) -> nn.Module:
        settings = self._case.config.student
        return self._net(role, two_times=settings.two_times, split=settings.split, guidance=settings.guidance_input)

    def teacher(self) -> Teacher | None:
        config, case = self._case.config.teacher, self._case
        if config is None:
            return None
        field = NetworkField(freeze(self._net("teacher", two_times=False)))
        contrast: ClassContrast | WeakContrast | None = None
        if case.weak is not None:
            contrast = WeakContrast(field, NetworkField(freeze(self._net("weak", two_times=False))))
        elif case.classes:
            contrast = ClassContrast(field, case.classes)
        guidance = config.guidance
        if guidance != 1 and contrast is None:
            raise UsageError(f"teacher.guidance {guidance:g} needs classes, or a weaker teacher")
        return Teacher(
            name="plan",
            field=field if guidance == 1 or contrast is None else GuidedField(contrast, guidance),
            net=field.net if isinstance(field.net, nn.Module) else None,
            network=None,
            guidance=guidance,
            digest="",
            params=0,
            noise=case.noise,
            contrast=contrast,
        )

    def name_copies(self, objective: Objective) -> list[Role]:
        """The roles of the copies of the student that an objective has made: they have its hook."""
        found: list[Role] = []
        for target in objective.targets():
            self.roles[target] = "target"
            found.append("target")
        for module in objective.modules():
            if module not in self.roles and self._note in module._forward_pre_hooks.values():
                self.roles[module] = "companion"
                found.append("companion")
        return found

    def _net(self, role: Role, **options: Any) -> nn.Module:
        image = len(self._shape) == 3
        config = FloTConfig(width=8, depth=2, heads=2) if image else MLPConfig(width=8, depth=2)
        net = build_network(config, self._shape, self._case.classes, **options)
        self.roles[net] = role
        net.register_forward_pre_hook(self._note)
        return net

    def _note(self, net: nn.Module, arguments: tuple[Any, ...]) -> None:
        x, t_B, r_B = arguments[:3]
        self._seen.append(Call(self.roles[net], _kind(net, x, t_B, r_B), len(x), torch.is_autocast_enabled("cpu")))


def _kind(net: nn.Module, x: Tensor, t_B: Tensor, r_B: Tensor) -> Kind:
    trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in net.parameters())
    if _has_tangent(x) or _has_tangent(t_B):
        return "path_gradient" if trained else "path"
    if _has_tangent(r_B):
        return "end_gradient" if trained else "end"
    return "gradient" if trained else "forward"


def _has_tangent(value: Tensor) -> bool:
    with contextlib.suppress(RuntimeError):  # no forward-mode differentiation is going on
        return forward_ad.unpack_dual(value).tangent is not None
    return False
