"""Plans on paper against what this machine measures: `python benchmarks/plan_check.py [--rounds 9] [--ledger FILE]`.

Memory: the most a training step holds and what stays between steps, predicted and counted, for some networks and two
objectives. Time: the share of the matrix ceiling that a step reaches is fitted at one point, and times at the others
are predicted with it; a large product, a copy and the steps take turns, and processor time counts. FSDP2: bytes of
parameters and of a step's peak in each of two gloo processes. Everything on one thread.
"""

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.bench.accelerators import Accelerator
from fewstep.bench.measure import append_row, in_turns, ledger_row
from fewstep.bench.memory import peak_bytes
from fewstep.bench.outline import outline
from fewstep.bench.plan import Plan, make_plan
from fewstep.bench.train import bare_training
from fewstep.bench.variants import variants
from fewstep.bench.workshop import Workshop
from fewstep.config import RunConfig, check_config
from fewstep.data.dataset import BatchSource, Dataset
from fewstep.distill.plan import plan as stages_of
from fewstep.distill.shards import local
from fewstep.distill.train import make_accelerator, train
from fewstep.networks.build import build_network

CPU = torch.device("cpu")
SHAPE, CLASSES = (3, 32, 32), 10
POINTS = (
    ("flot-mini", 8, "flow_matching"),
    ("flot-mini", 8, "meanflow"),
    ("flot-small", 4, "flow_matching"),
    ("flot-small", 4, "meanflow"),
    ("unet-mini", 8, "flow_matching"),
    ("unet-mini", 8, "meanflow"),
)
FITTED = POINTS[0]
SHARED = ("flot-small", 4, "flow_matching")


@dataclass(frozen=True)
class Checked:
    """One point: bytes of the step's peak and of what stays, milliseconds of processor time of a step; both predicted
    and measured. ``efficiency`` is the share of the ceiling that was reached."""

    size: str
    batch_size: int
    objective: str
    peak_predicted: int
    peak_measured: int
    resident_predicted: int
    resident_measured: int
    ms_predicted: float
    ms_measured: float
    efficiency: float


@dataclass(frozen=True)
class PlanCheck:
    """All points, the machine's ceiling, and under FSDP2 the bytes of parameters and of a step's peak in each of two
    processes."""

    ceiling_gflops: float
    copy_gb_per_s: float
    fitted: tuple[str, int, str]
    points: tuple[Checked, ...]
    fsdp2: tuple[str, int, str]
    fsdp2_predicted: tuple[int, int]
    fsdp2_measured: tuple[tuple[int, ...], ...]


class Point:
    """A training step as the bench of objectives makes it, and the config that a plan is made from."""

    def __init__(self, folder: Path, size: str, batch: int, objective: str) -> None:
        workshop = Workshop(folder, size, SHAPE, CLASSES, batch, CPU)
        variant = variants()[objective]
        self.config: RunConfig = workshop.config(variant)
        self.objective = workshop.objective(variant)
        self.steps = bare_training(self.objective, workshop.source().batch, self.config.train, seed=0)
        for _ in range(2):
            next(self.steps)

    def resident(self) -> int:
        """Bytes of weights and Adam's moments (the bare loop keeps no average), and of teachers."""
        held = [*self.objective.student.parameters(), *_moments(self.steps)]
        return sum(each.numel() * each.element_size() for each in held)


def _moments(steps: object) -> list[torch.Tensor]:
    optimizer: torch.optim.Optimizer = steps.gi_frame.f_locals["optimizer"]  # type: ignore[attr-defined]
    return [value for state in optimizer.state.values() for value in state.values() if value.ndim]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ledger", type=Path)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.rank:
        _rank()
        return
    with tempfile.TemporaryDirectory() as folder:
        points = {point: Point(Path(folder) / "-".join(map(str, point)), *point) for point in POINTS}
        peaks = {point: peak_bytes(each.steps, CPU) for point, each in points.items()}
        side = 1024
        a, b = torch.randn(side, side), torch.randn(side, side)
        source = torch.zeros(2**23)
        works = {
            "ceiling": functools.partial(torch.matmul, a, b),
            "copy": functools.partial(torch.empty_like(source).copy_, source),
            **{point: functools.partial(next, each.steps) for point, each in points.items()},
        }
        # Medians of processor time, of works that have met the same disturbances.
        found = in_turns(works, options.rounds, CPU)
        seconds = {name: 1e-3 * statistics.median(time.cpu for time in times) for name, times in found.items()}
        accelerator = Accelerator(
            name="cpu",
            memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
            bf16=1e-12,  # not asked for
            tf32=1e-12,
            fp32=1e-12 * 2 * side**3 / seconds["ceiling"],
            bandwidth=1e-9 * 2 * source.nbytes / seconds["copy"],
            link=1.0,
        )

        def reached(point: tuple[str, int, str]) -> float:
            """The share of the ceiling with which the plan of a point would be right."""
            stage = _plan(points[point].config, accelerator, 1.0).stages[0]
            return stage.products_s / (seconds[point] - stage.traffic_s - stage.optimiser_s)

        efficiency = reached(FITTED)
        checked = []
        for point, each in points.items():
            plan = _plan(each.config, accelerator, efficiency)
            memory = plan.memory
            checked.append(
                Checked(
                    *point,
                    peak_predicted=memory.gradients + memory.activations,
                    peak_measured=peaks[point],
                    resident_predicted=memory.weights + memory.moments,
                    resident_measured=each.resident(),
                    ms_predicted=1e3 * plan.stages[0].step_s,
                    ms_measured=1e3 * seconds[point],
                    efficiency=reached(point),
                )
            )
    shared = _plan(_sharded("fsdp2"), accelerator, efficiency, gpus=2).memory
    check = PlanCheck(
        ceiling_gflops=1e3 * accelerator.fp32,
        copy_gb_per_s=accelerator.bandwidth,
        fitted=FITTED,
        points=tuple(checked),
        fsdp2=SHARED,
        fsdp2_predicted=(shared.weights, shared.gradients + shared.exchange + shared.activations),
        fsdp2_measured=_two_processes(),
    )
    print(f"ceiling {check.ceiling_gflops:.1f} GFLOP/s, copy {check.copy_gb_per_s:.1f} GB/s; predicted over measured:")
    print("| network, batch | objective | peak of a step | between steps | time | share of the ceiling |")
    print("|:--|:--|--:|--:|--:|--:|")
    for each in check.points:
        ratios = (
            each.peak_predicted / each.peak_measured,
            each.resident_predicted / each.resident_measured,
            each.ms_predicted / each.ms_measured,
        )
        cells = " | ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"| {each.size}, {each.batch_size} | {each.objective} | {cells} | {each.efficiency:.2f} |")
    print(f"FSDP2, {SHARED}: bytes of parameters and peak {check.fsdp2_predicted}, measured {check.fsdp2_measured}")
    if options.ledger is not None:
        append_row(options.ledger, ledger_row("plan-check", check))


def _plan(config: RunConfig, accelerator: Accelerator, efficiency: float, gpus: int = 1) -> Plan:
    case = outline(config, SHAPE, CLASSES)
    return make_plan(case, gpus, accelerator, efficiency=efficiency, cpu=True, search=False)


def _sharded(parallel: str) -> RunConfig:
    """Flow matching shared by processes."""
    size, batch, _ = SHARED
    return check_config(
        {
            "name": "shared",
            "data": {"kind": "digits"},  # their shape is given
            "student": {"kind": "velocity", "init": "scratch", "network": {"size": size}},
            "objective": {"kind": "flow_matching"},
            "train": {"batch_size": batch, "parallel": parallel},
        },
        "shared",
    )


def _rank() -> None:
    """What one of two processes holds: prints the bytes of its parameters, and of a step's peak beyond what stays."""
    config = _sharded("fsdp2")
    rows = torch.arange(2 * SHARED[1])
    data = Dataset("random", torch.zeros(len(rows), *SHAPE, dtype=torch.uint8), rows % CLASSES, CLASSES, kind="image")
    accelerator = make_accelerator()
    torch.manual_seed(0)
    assert config.student.network is not None
    net = build_network(config.student.network, SHAPE, CLASSES, two_times=False)
    (stage,) = stages_of(config, None, data)
    rank, world = accelerator.process_index, accelerator.num_processes
    source = BatchSource(data, config.train.batch_size, 0, device=CPU, rank=rank, world=world)
    objective = stage.build(net, None)
    steps = train(objective, source, config.train, accelerator, seed=0, steps=10)
    for _ in range(4):  # the first ones compare the processes
        next(steps)
    print(
        sum(local(each).untyped_storage().nbytes() for each in objective.student.parameters()), peak_bytes(steps, CPU)
    )
    accelerator.end_training()


def _two_processes() -> tuple[tuple[int, ...], ...]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__, "--rank"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return tuple(tuple(map(int, line.split())) for line in done.stdout.splitlines())


if __name__ == "__main__":
    main()
