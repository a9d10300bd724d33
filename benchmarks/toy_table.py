"""Every method of the flow-map family on three Gaussians on the line, against the exact map.

    python benchmarks/toy_table.py [METHOD ...] --seeds 0 --ledger benchmarks/ledger/NAME.jsonl
    python benchmarks/toy_table.py --summary benchmarks/ledger/NAME.jsonl
    python benchmarks/toy_table.py --alpha-optimum 0.5

The teacher is the exact velocity of ``mixture_1d``; each student is an MLP of 3 blocks of 128 channels, trained for
3,000 steps of 128 with Adam, 1e-3 under a cosine, average 0.995. Measured against the closed form: the mean square
error of ``u`` over pairs of times from the triangle and of its diagonal, and the 2-Wasserstein distance of 1, 2 and 4
jumps from 1,000 quantiles of the noise to the quantiles of the data. One JSON row per method and seed.
"""

import argparse
import datetime
import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.checkpoint import RunDirectory, read_model
from fewstep.config import RunConfig, check_config
from fewstep.data.toys import MIXTURE_1D
from fewstep.distill.run import run_training
from fewstep.environment import describe_environment
from fewstep.flow import uniform_grid
from fewstep.keys import Key
from fewstep.networks.build import network_from_card
from fewstep.teachers.analytic import MixtureTeacher
from fewstep.teachers.network import freeze

UNIFORM = {"kind": "uniform"}
DATA = {"velocity": "data", "times": UNIFORM, "jump_fraction": 0.5}
TEACHER = {**DATA, "velocity": "teacher"}

METHODS: dict[str, dict[str, Any]] = {
    "MeanFlow": {"kind": "meanflow", **DATA},
    "MeanFlow from a teacher": {"kind": "meanflow", **TEACHER},
    "MeanFlow, adaptive p = 1": {"kind": "meanflow", **DATA, "weight": {"kind": "power", "power": 1.0}},
    "improved MeanFlow": {"kind": "improved_meanflow", **DATA},
    "Modular MeanFlow": {"kind": "modular_meanflow", **DATA},
    "Modular MeanFlow from a teacher": {"kind": "modular_meanflow", **TEACHER},
    "alpha-Flow": {"kind": "alpha_flow", **DATA},
    "alpha-Flow, alpha = .1 fixed": {"kind": "alpha_flow", **DATA, "alpha": 0.1},
    "alpha-Flow, alpha = .5 fixed": {"kind": "alpha_flow", **DATA, "alpha": 0.5},
    "SoFlow": {"kind": "soflow", **DATA, "diagonal_times": None},
    "Split": {"kind": "split_meanflow", **DATA},
    "Split from a teacher": {"kind": "split_meanflow", **TEACHER},
    "Shortcut": {"kind": "shortcut", "velocity": "data", "jump_fraction": 0.5, "target_decay": 0.9},
    "LSD": {"kind": "terminal_velocity", **DATA, "target_decay": 0.0},
    "LSD from a teacher (LMD)": {
        "kind": "align_your_flow",
        **TEACHER,
        "identity": "lagrangian",
        "weight": {"kind": "none"},
    },
    "TVM": {"kind": "terminal_velocity", **DATA},
    "AYF-EMD": {"kind": "align_your_flow", **TEACHER},
    "FreeFlow, prediction only": {"kind": "free_flow", "correction": 0.0},
    "FreeFlow": {"kind": "free_flow"},
    "trajectory regression": {"kind": "trajectory"},
}


def config_of(objective: dict[str, Any], seed: int, steps: int, batch_size: int) -> RunConfig:
    return check_config(
        {
            "name": "toy",
            "seed": seed,
            "data": {"kind": "toy", "name": "mixture_1d", "count": 200_000, "classes": False},
            "teacher": {"kind": "analytic"},
            "student": {
                "kind": "average_velocity",
                "init": "scratch",
                "network": {"kind": "mlp", "width": 128, "depth": 3},
            },
            "objective": objective,
            "train": {
                "steps": steps,
                "batch_size": batch_size,
                "optimizer": "adam",
                "lr": 1e-3,
                "warmup_steps": 0,
                "ema": [0.995],
                "threads": 1,
                "checkpoint_every": steps,
            },
        },
        "toy table",
    )


def errors(net: nn.Module) -> dict[str, float]:
    """Deviations of a trained network from the closed form, unconditional."""
    teacher = MixtureTeacher.from_spec(MIXTURE_1D)
    index = torch.arange(20_000)
    ends = Key(11).uniform("times", index, (2,)).float()
    t, r = ends.max(dim=1).values, ends.min(dim=1).values
    noise = Key(11).normal("noise", index, (1,))
    x_t = teacher.flow_map(noise.double(), torch.ones_like(t).double(), t.double()).float()

    def error(r: Tensor) -> float:
        with torch.no_grad():
            found = net(x_t, t, r)
        exact = teacher.average_velocity(x_t.double(), t.double(), r.double())
        return float((found.double() - exact).square().mean())

    found = {"mse_u": error(r), "mse_v": error(t)}
    quantiles = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    start = torch.special.ndtri(quantiles)[:, None]
    one = torch.ones(1000, dtype=torch.float64)
    wanted = teacher.flow_map(start, one, 0 * one)
    for steps in (1, 2, 4):
        x = start.float()
        grid = uniform_grid(steps).tolist()
        for a, b in pairwise(grid):
            with torch.no_grad():
                x = x - (a - b) * net(x, torch.full((1000,), a), torch.full((1000,), b))
        gap = x.double().sort(dim=0).values - wanted.sort(dim=0).values
        found[f"w2_{steps}"] = float(gap.square().mean().sqrt())
    return found


def measure(method: str, seed: int, steps: int, batch_size: int) -> dict[str, Any]:
    config = config_of(METHODS[method], seed, steps, batch_size)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder) / "toy")
        for _ in run_training(config, run, resume=False, overwrite=False):
            pass
        exported = read_model(run.path)
        _, net = network_from_card(exported.card)
        net.load_state_dict(exported.weights())
    return {
        "date": datetime.date.today().isoformat(),
        "method": method,
        "seed": seed,
        "steps": steps,
        "batch_size": batch_size,
        **errors(freeze(net)),
        "train_s": round(time.perf_counter() - began, 1),
        "environment": describe_environment(),
    }


def alpha_optimum(alpha: float) -> float:
    """The 2-Wasserstein distance of one jump of a fixed alpha's *optimum*: what no training of that objective removes.

    At ``r = 0`` its minimiser is ``f(x, t) = E[f(x_q, q) | x_t = x]`` with ``q = (1 - alpha) t`` on the same line, and
    ``f(x, 0) = x``: conditional expectations under a mixture of Gaussians, by quadrature, from ``t = 1e-4`` up to 1.
    """
    w, m, s = (torch.tensor(each, dtype=torch.float64).flatten() for each in (
        MIXTURE_1D.weights, MIXTURE_1D.means, MIXTURE_1D.stds
    ))  # fmt: skip
    nodes, mass = (torch.tensor(each) for each in np.polynomial.hermite_e.hermegauss(40))
    x = torch.linspace(-7, 7, 4001, dtype=torch.float64)

    def at(f: Tensor, points: Tensor) -> Tensor:
        place = ((points - x[0]) / (x[1] - x[0])).clamp(0, len(x) - 1.0001)
        left = place.long()
        return torch.lerp(f[left], f[left + 1], place - left)

    t = 1.0
    times = [t] + [t := t * (1 - alpha) for _ in range(math.ceil(math.log(1e-4) / math.log(1 - alpha)))]
    f = x
    for t, q in reversed([*pairwise(times)]):
        variance = ((1 - t) * s) ** 2 + t**2
        off = x[:, None] - (1 - t) * m
        component = torch.softmax(w.log() - variance.log() / 2 - off**2 / (2 * variance), dim=1)
        data = (m + (1 - t) * s**2 / variance * off)[..., None] + (s * t / variance.sqrt())[None, :, None] * nodes
        x_q = (1 - q / t) * data + q / t * x[:, None, None]
        f = (component * (at(f, x_q) * mass / mass.sum()).sum(dim=-1)).sum(dim=-1)
    start = torch.special.ndtri((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    one = torch.ones(1000, dtype=torch.float64)
    wanted = MixtureTeacher.from_spec(MIXTURE_1D).flow_map(start[:, None], one, 0 * one)[:, 0]
    return float((at(f, start).sort().values - wanted.sort().values).square().mean().sqrt())


def summarise(ledger: Path) -> None:
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in ledger.read_text().splitlines():
        row = json.loads(line)
        rows[f"{row['method']}, batches of {row['batch_size']}"].append(row)
    columns = ("mse_u", "mse_v", "w2_1", "w2_2", "w2_4")
    print(f"| method | seeds | {' | '.join(columns)} |\n|:--|--:|{'--:|' * len(columns)}")
    for method, found in rows.items():
        cells = []
        for name in columns:
            values = [row[name] for row in found]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}")
        print(f"| {method} | {len(found)} | {' | '.join(cells)} |")


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", choices=[*METHODS, []], metavar="METHOD")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--ledger", type=Path)
    parser.add_argument("--summary", type=Path)
    parser.add_argument("--alpha-optimum", type=float)
    given = parser.parse_args(arguments)
    if given.alpha_optimum:
        found = alpha_optimum(given.alpha_optimum)
        print(f"alpha = {given.alpha_optimum:g} fixed: W2 of one jump at the optimum {found:.4f}")
        return
    if given.summary:
        summarise(given.summary)
        return
    for seed in map(int, given.seeds.split(",")):
        for method in given.methods or METHODS:
            row = measure(method, seed, given.steps, given.batch_size)
            if given.ledger:
                with given.ledger.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            shown = "  ".join(f"{name} {row[name]:.4f}" for name in ("mse_u", "mse_v", "w2_1", "w2_2", "w2_4"))
            print(f"{method:30} seed {seed}  {shown}  ({row['train_s']} s)", flush=True)


if __name__ == "__main__":
    main()
