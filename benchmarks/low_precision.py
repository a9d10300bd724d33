"""What TF32 and bfloat16 cost in numbers: the tables of `docs/training.md`.

`python benchmarks/low_precision.py TEACHER STUDENT [--n 10000]`, for runs of the recipes digits-teacher and
digits-meanflow, or of others with images. TF32 is emulated (`fewstep/bench/tf32.py`): any machine gives the table.
"""

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fewstep.bench.tf32 import EmulatedTF32
from fewstep.config import read_config
from fewstep.data.dataset import Dataset
from fewstep.data.load import load_data
from fewstep.distill.jumps import jump_target, solve
from fewstep.distill.tangent import central_difference, forward_derivative
from fewstep.evaluation.features import build_extractor, extract
from fewstep.evaluation.frechet import frechet_distance, moments
from fewstep.evaluation.quantise import to_uint8
from fewstep.evaluation.sweep import draw
from fewstep.flow import LINEAR
from fewstep.keys import Key
from fewstep.precision import PreciseNetwork, in_precision
from fewstep.sampling import MapSampler, OdeSampler, sample_ode, uniform_times
from fewstep.students.load import load_model
from fewstep.students.maps import AverageVelocityMap

CPU = torch.device("cpu")
HOW = ("fp32", "tf32", "bf16")
ROWS = 512


def under(how: str) -> contextlib.AbstractContextManager[object]:
    return EmulatedTF32() if how == "tf32" else contextlib.nullcontext()


def quantities(teacher: OdeSampler, student: MapSampler, data: Dataset) -> dict[str, Callable[[str], Tensor]]:
    """What training and sampling compute with networks, each as a function of the precision."""
    index = torch.arange(ROWS)
    x, label = data.samples(index), None if data.label is None else data.label[index]
    e = Key(0).normal("noise", index, data.shape)
    t = Key(0).uniform("t", index).float() * 0.98 + 0.01
    r = t * Key(0).uniform("r", index).float()
    x_t, v = LINEAR.state(x, e, t), e - x
    maps = student.maps[0]
    assert isinstance(maps, AverageVelocityMap)

    def net(how: str) -> Callable[..., Tensor]:
        return PreciseNetwork(maps.net, "bf16") if how == "bf16" else maps.net

    def field(how: str) -> OdeSampler:
        return in_precision(teacher, "bf16" if how == "bf16" else "fp32")

    at = (x_t, v, t, r, label)
    gap = (t - r).reshape(-1, 1, 1, 1)
    fine, s = torch.full_like(t, 0.5), torch.full_like(t, 0.5 - 1 / 32)
    return {
        "velocity of the teacher": lambda how: field(how).field(x_t, t, label),
        "du/dt, forward mode": lambda how: forward_derivative(net(how), *at),
        "du/dt, central difference": lambda how: central_difference(5e-3)(net(how), *at),
        "target of MeanFlow": lambda how: v - gap * forward_derivative(net(how), *at),
        "target of MeanFlow, central difference": lambda how: v - gap * central_difference(5e-3)(net(how), *at),
        "target of progressive distillation, 64 -> 32 steps": lambda how: jump_target(
            x_t, solve(field(how).field, "euler", x_t, fine, s, label, substeps=2), fine, s
        ),
        "sample of 64 Euler steps": lambda how: sample_ode(field(how).field, e, uniform_times(64), label).x,
    }


@torch.no_grad()
def errors(quantity: Callable[[str], Tensor]) -> dict[str, float]:
    """Relative errors (norms) in TF32 and bfloat16, of float32's value."""
    wanted = quantity("fp32")
    found = {}
    for how in HOW[1:]:
        with under(how):
            value = quantity(how)
        found[how] = float((value - wanted).norm() / wanted.norm())
    return found


def distance(sampler: OdeSampler | MapSampler, data: Dataset, n: int, steps: int, *, seed: int, how: str) -> float:
    """The Fréchet distance on pixels to the data."""
    lowered = in_precision(sampler, "bf16" if how == "bf16" else "fp32")
    with under(how):
        x = draw(lowered, steps, data, n=n, batch_size=1000, seed=seed, device=CPU).x
    pixels = build_extractor("pixels")
    real = data.samples(torch.arange(len(data.x)))
    return frechet_distance(*(moments(extract(pixels, to_uint8(images))) for images in (real, x)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("student", type=Path)
    parser.add_argument("--n", type=int, default=10_000, help="samples per distance (0: none)")
    options = parser.parse_args()
    data = load_data(read_config(options.teacher).data)
    samplers = [load_model(run, CPU).sampler for run in (options.teacher, options.student)]
    teacher, student = samplers
    assert isinstance(teacher, OdeSampler)
    assert isinstance(student, MapSampler)
    print("| relative error of | TF32 | bfloat16 | ratio |\n|---|--:|--:|--:|")
    for name, quantity in quantities(teacher, student, data).items():
        found = errors(quantity)
        print(
            f"| {name} | {found['tf32']:.1e} | {found['bf16']:.1e} | 1/{found['bf16'] / found['tf32']:.0f} |",
            flush=True,
        )
    if not options.n:
        return
    print(
        f"\n| fd_pixels, n = {options.n:,} | float32 | TF32 | bfloat16 | float32, another seed |\n|---|--:|--:|--:|--:|"
    )
    for name, sampler, steps in (("student", student, 4), ("teacher", teacher, 4), ("teacher", teacher, 64)):
        asked = [(how, 0) for how in HOW] + [("fp32", 1)]
        found = [distance(sampler, data, options.n, steps, seed=seed, how=how) for how, seed in asked]
        print(f"| {name}, {steps} steps | {' | '.join(f'{value:.5f}' for value in found)} |", flush=True)


if __name__ == "__main__":
    main()
