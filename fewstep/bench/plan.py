"""What a run would cost on given GPUs, on paper: arithmetic, memory by part, time. Nothing is started.

Operations, traffic and activations are those of ``dry.dry_step``, weights and what belongs to them are counted, and
times add up what products take at a share of the peak and what the kernels between them take to read and write.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from fewstep.bench.accelerators import Accelerator
from fewstep.bench.assumptions import assumptions
from fewstep.bench.calls import Call, Role, StageCalls, stage_calls
from fewstep.bench.dry import DryStep, dry_step
from fewstep.bench.network import forward_flops
from fewstep.bench.outline import Outline
from fewstep.bench.plan_memory import GIB, Memory, Sizes, memory_of, sizes_of, trained_bytes
from fewstep.distill.config import TrainConfig
from fewstep.errors import UsageError
from fewstep.networks.build import build_network, parameter_count
from fewstep.networks.config import NetworkConfig
from fewstep.networks.embeddings import to_bfloat16
from fewstep.teachers.config import ForeignTeacher, RunTeacher
from fewstep.teachers.network import freeze

EFFICIENCY = 0.5
"""Share of the peak that products are taken to reach until somebody has measured it: they alone, not the whole step."""
RESERVE = 0.1
"""Share of a GPU's memory that is left to its context, to libraries and to gaps between tensors."""
LAUNCH_S = 6e-6
"""What an operation takes to be launched on a GPU, however small it is: eager mode's usual few microseconds."""


@dataclass(frozen=True)
class StageCost:
    """An optimiser step of one stage on every GPU, in seconds: of products; of the memory traffic between them, where
    one kernel follows the other; of launches, which go on beside both; of the exchange that these do not hide; of
    optimiser and averages; and in all. ``flops`` is per sample."""

    name: str
    steps: int
    flops: float
    products_s: float
    traffic_s: float
    launches_s: float
    exchange_s: float
    optimiser_s: float
    step_s: float
    memory: Memory


@dataclass(frozen=True)
class Plan:
    """A run on ``gpus`` of a kind. ``forward_flops`` is of one sample through the student; ``microbatch`` what a GPU
    takes at once, and ``largest`` how many samples it could (None: not looked for)."""

    name: str
    objective: str
    accelerator: Accelerator
    gpus: int
    parallel: str
    precision: str
    efficiency: float
    shape: tuple[int, ...]
    classes: int
    params: int
    forward_flops: int
    batch_size: int
    microbatch: int
    largest: int | None
    stages: tuple[StageCost, ...]
    assumptions: tuple[str, ...]

    @property
    def memory(self) -> Memory:
        """Of the stage that takes most."""
        return max((stage.memory for stage in self.stages), key=lambda each: each.total)

    @property
    def capacity(self) -> int:
        """Bytes of a GPU."""
        return int(self.accelerator.memory_gib * GIB)

    @property
    def fits(self) -> bool:
        return self.memory.total <= (1 - RESERVE) * self.capacity

    @property
    def hours(self) -> float:
        return sum(stage.steps * stage.step_s for stage in self.stages) / 3600

    @property
    def utilisation(self) -> float:
        """Share of the GPUs' peak that the whole run reaches, every operation at that of the run's precision."""
        kinds = {"fp32": self.accelerator.fp32, "tf32": self.accelerator.tf32, "bf16": self.accelerator.bf16}
        peak = kinds[self.precision]
        flops = sum(stage.steps * stage.flops * self.batch_size for stage in self.stages)
        return flops / (3600 * self.hours * self.gpus * 1e12 * peak)

    @property
    def samples_per_s(self) -> float:
        steps = sum(stage.steps for stage in self.stages)
        return steps * self.batch_size / (3600 * self.hours)

    def to_json(self) -> dict[str, Any]:
        """With what follows from it."""
        derived = {
            "memory_bytes": {**asdict(self.memory), "total": self.memory.total},
            "capacity_bytes": self.capacity,
            "fits": self.fits,
            "samples_per_s": self.samples_per_s,
            "utilisation": self.utilisation,
            "hours": self.hours,
            "gpu_hours": self.hours * self.gpus,
        }
        return {"bench": "plan", **asdict(self), **derived}


def make_plan(
    case: Outline,
    gpus: int,
    accelerator: Accelerator,
    *,
    efficiency: float = EFFICIENCY,
    cpu: bool = False,
    search: bool = True,
) -> Plan:
    """Plan a run on ``gpus`` accelerators of one node; ``cpu`` if the accelerator is one, whose kernels are others.
    With ``search`` the largest microbatch that fits is looked for, which takes most of the time.

    ``UsageError`` for a batch that does not divide among the GPUs, and for several GPUs without a link.
    """
    train = case.config.train
    shares = gpus * train.gradient_accumulation_steps
    if train.batch_size % shares:
        raise UsageError(f"train.batch_size {train.batch_size} does not divide into {shares} microbatches")
    if gpus > 1 and accelerator.link is None:
        raise UsageError(f"{gpus} GPUs, and the link of a {accelerator.name} is not known: give --link")
    work = _Work(case, gpus, accelerator, efficiency, cpu)
    rows = train.batch_size // shares
    observed = stage_calls(case, rows)
    stages = tuple(work.stage(stage, rows) for stage in observed)
    fullest = max(range(len(stages)), key=lambda number: stages[number].memory.total)
    student = work.networks(observed[0].held)["student"]
    with work.fake:
        flops = forward_flops(student, case.shape)
    return Plan(
        name=case.config.name,
        objective=case.config.objective.kind,
        accelerator=accelerator,
        gpus=gpus,
        parallel=train.parallel if gpus > 1 else "none",
        precision=train.precision,
        efficiency=efficiency,
        shape=case.shape,
        classes=case.classes,
        params=parameter_count(student),
        forward_flops=flops,
        batch_size=train.batch_size,
        microbatch=rows,
        largest=work.largest(observed[fullest], rows) if search else None,
        stages=stages,
        assumptions=assumptions(case, accelerator, gpus, efficiency=efficiency, reserve=RESERVE, cpu=cpu),
    )


class _Work:
    """A run on some GPUs: how its stages' costs are found."""

    def __init__(self, case: Outline, gpus: int, accelerator: Accelerator, efficiency: float, cpu: bool) -> None:
        self.case, self.gpus, self.accelerator, self.efficiency = case, gpus, accelerator, efficiency
        self.tf32, self.cpu = case.config.products == "tf32", cpu
        self.train: TrainConfig = case.config.train
        self.sharded = self.train.parallel == "fsdp2" and gpus > 1
        self.fake = FakeTensorMode()
        self._nets: dict[tuple[Role, ...], dict[Role, nn.Module]] = {}
        self._dry: dict[Any, DryStep] = {}

    def networks(self, held: tuple[Role, ...]) -> dict[Role, nn.Module]:
        """The run's networks, of fake tensors."""
        if held not in self._nets:
            with self.fake:
                self._nets[held] = self._made(held)
        return self._nets[held]

    def sizes(self, held: tuple[Role, ...]) -> dict[Role, Sizes]:
        """Of the run's networks."""
        return {role: sizes_of(net, self.gpus) for role, net in self.networks(held).items()}

    def _made(self, held: tuple[Role, ...]) -> dict[Role, nn.Module]:
        case, student, teacher = self.case, self.case.config.student, self.case.config.teacher

        def net(config: NetworkConfig, **options: Any) -> nn.Module:
            return build_network(config, case.shape, case.classes, **options)

        own = {"two_times": student.two_times, "split": student.split, "guidance": student.guidance_input}
        nets: dict[Role, nn.Module] = {"student": net(case.student, **own)}
        for role in held:
            nets[role] = net(case.student, **own)
            if role != "companion":
                freeze(nets[role])
        taught: dict[Role, NetworkConfig | None] = {"teacher": case.teacher, "weak": case.weak}
        for role, config in taught.items():
            if config is not None:
                nets[role] = freeze(net(config, two_times=False))
                if isinstance(teacher, RunTeacher | ForeignTeacher) and teacher.precision == "bf16":
                    with unset_fake_temporarily(), torch.device("meta"):
                        halved = to_bfloat16(net(config, two_times=False))
                    _retype(nets[role], halved)
        return nets

    def dry(self, calls: tuple[Call, ...], held: tuple[Role, ...], rows: int, microbatch: int) -> DryStep:
        """The step of a microbatch of ``rows``, where ``calls`` were observed with ``microbatch``."""
        key = (calls, held, rows)
        if key not in self._dry:
            known = tuple(
                call for call in calls if call.role not in ("teacher", "weak") or self.case.teacher is not None
            )
            self._dry[key] = dry_step(
                self.networks(held),
                known,
                self.case.shape,
                self.case.classes,
                rows=lambda call: math.ceil(call.rows * rows / microbatch),
                mixed=self.train.precision == "bf16",
                gpu=not self.cpu,
                kept=not self.sharded,
                microbatches=min(2, self.train.gradient_accumulation_steps),
                fake=self.fake,
            )
        return self._dry[key]

    def stage(self, stage: StageCalls, rows: int) -> StageCost:
        """The cost of an optimiser step: its arithmetic a mean over the stage, its memory that of its fullest step."""
        gpu, accumulated = self.accelerator, self.train.gradient_accumulation_steps
        ways = [(share, calls, self.dry(calls, stage.held, rows, rows)) for share, calls in stage.ways]

        def mean(value: Mapping[int, float]) -> float:
            return accumulated * sum(share * value[number] for number, (share, _, _) in enumerate(ways))

        steps = [step for _, _, step in ways]
        products = mean(
            {
                number: sum(count / gpu.peak(dtype, tf32=self.tf32) for dtype, count in step.flops.items())
                for number, step in enumerate(steps)
            }
        )
        moved = mean({n: step.product_traffic for n, step in enumerate(steps)}) / (1e9 * gpu.bandwidth)
        products = max(products / self.efficiency, moved)
        between = mean({n: step.traffic - step.product_traffic for n, step in enumerate(steps)})
        # A compiler fuses what lies between products into them.
        traffic = 0.0 if self.train.compile else between / (1e9 * gpu.bandwidth)
        launches = 0.0 if self.cpu else mean({n: step.kernels for n, step in enumerate(steps)}) * LAUNCH_S
        busy = max(products + traffic, launches)
        backward = sum(share * step.backward_share for share, _, step in ways)
        sizes = self.sizes(stage.held)
        exchange = self._exchange(sizes, ways, busy, backward)
        optimiser = self._optimiser_bytes(sizes) / (1e9 * gpu.bandwidth)
        return StageCost(
            name=stage.name,
            steps=stage.steps,
            flops=mean({n: sum(step.flops.values()) for n, step in enumerate(steps)}) / (accumulated * rows),
            products_s=products,
            traffic_s=traffic,
            launches_s=launches,
            exchange_s=exchange,
            optimiser_s=optimiser,
            step_s=busy + exchange + optimiser,
            memory=self._memory(sizes, max(step.peak for step in steps)),
        )

    def largest(self, stage: StageCalls, rows: int) -> int:
        """The largest microbatch that fits. Activations grow in a straight line with it, measured between two sizes."""
        room = (1 - RESERVE) * self.accelerator.memory_gib * GIB

        def total(rows_: int) -> int:
            peak = max(self.dry(calls, stage.held, rows_, rows).peak for _, calls in stage.ways)
            return self._memory(sizes, peak).total

        sizes = self.sizes(stage.held)
        few, many = rows * 8, rows * 16  # where gradients no longer are what is largest
        each = (total(many) - total(few)) / (many - few)
        fixed = total(few) - each * few
        return max(0, math.floor((room - fixed) / each))

    def _memory(self, sizes: Mapping[Role, Sizes], peak: int) -> Memory:
        return memory_of(
            sizes,
            peak,
            gpus=self.gpus,
            sharded=self.sharded,
            averages=len(self.train.ema),
            microbatches=self.train.gradient_accumulation_steps,
        )

    def _exchange(
        self,
        sizes: Mapping[Role, Sizes],
        ways: list[tuple[float, tuple[Call, ...], DryStep]],
        busy: float,
        backward: float,
    ) -> float:
        """Seconds of exchange that the arithmetic does not hide.

        DDP: one ring all-reduce of the gradients, behind the backward pass. FSDP2: a call gathers its network, the
        backward pass once more, and gradients are reduced and scattered once; behind everything.
        """
        if self.gpus == 1:
            return 0.0
        assert self.accelerator.link is not None
        around, link = (self.gpus - 1) / self.gpus, 1e9 * self.accelerator.link
        trained: list[Role] = [role for role in sizes if role in ("student", "companion")]
        gradients = sum(sizes[role].trained for role in trained)
        if not self.sharded:
            return max(0.0, 2 * around * gradients / link - backward * busy)
        gathered = 0.0
        for share, calls, _ in ways:
            for call in calls:
                if call.role in ("student", "companion", "target"):
                    times = 2 if call.kind.endswith("gradient") else 1
                    gathered += share * times * sizes[call.role].whole
        gathered *= self.train.gradient_accumulation_steps
        return max(0.0, around * (gathered + gradients) / link - busy)

    def _optimiser_bytes(self, sizes: Mapping[Role, Sizes]) -> float:
        """Bytes that norm, Adam, averages and targets read and write: gradients once for the norm; then weights,
        gradients and two moments, of which all but the gradients are written; and of each average three."""
        own = sizes["student"]
        alone = own.trained_shard if self.sharded else own.trained
        averages = len(self.train.ema) + sum(role == "target" for role in sizes)
        return 8 * trained_bytes(sizes, sharded=self.sharded) + 3 * averages * alone


def _retype(net: nn.Module, like: nn.Module) -> None:
    """Give fake parameters the types of others: they cannot be converted themselves."""
    for path, parameter in like.named_parameters():
        module, _, name = path.rpartition(".")
        made = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)
        net.get_submodule(module).register_parameter(name, made)
