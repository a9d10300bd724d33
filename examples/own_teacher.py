"""Distil your own teacher: any function ``(x, t, label) -> v`` is one.

Here the teacher is a Gaussian mixture's exact velocity written out by hand, and the data are a tensor. Run it with
``python examples/own_teacher.py``; it takes about a minute on a CPU.

The convention: t = 0 is data, t = 1 is noise, x_t = (1 - t) x + t e, v = e - x.
"""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from fewstep.data.dataset import BatchSource, Dataset
from fewstep.distill.config import TrainConfig
from fewstep.distill.flow_maps.objective import FlowMapMatching
from fewstep.distill.flow_maps.rules import Eulerian
from fewstep.distill.flow_maps.velocity import TeacherVelocity
from fewstep.distill.tangent import forward_derivative
from fewstep.distill.train import train
from fewstep.evaluation.config import EvaluateConfig
from fewstep.evaluation.features import build_extractor
from fewstep.evaluation.sweep import Candidate, sweep
from fewstep.networks.build import build_network, parameter_count
from fewstep.networks.config import MLPConfig
from fewstep.sampling import MapSampler, OdeSampler
from fewstep.students.maps import AverageVelocityMap
from fewstep.times import sorted_pairs, uniform

MEANS = torch.tensor([[-0.8, -0.8], [0.8, -0.8], [0.0, 0.9]])
STD = 0.15


@dataclass(frozen=True)
class MyTeacher:
    """The marginal velocity of three Gaussians of one width. ``nfe``: network evaluations per call."""

    nfe: int = 1

    def __call__(self, x: Tensor, t_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        t = t_B[:, None, None]
        variance = (1 - t) ** 2 * STD**2 + t**2
        offset = x[:, None, :] - (1 - t) * MEANS  # [B, 3, 2]
        velocity = -MEANS + (t - (1 - t) * STD**2) / variance * offset
        posterior = (-offset.square().sum(-1, keepdim=True) / (2 * variance)).softmax(dim=1)
        return (posterior * velocity).sum(dim=1)


def main(steps: int = 3000, n: int = 5000) -> list[float]:
    """Train for ``steps``, measure with ``n`` samples, and return the Fréchet distances at 1, 2 and 4 steps."""
    generator = torch.Generator().manual_seed(0)
    x = MEANS[torch.arange(6000) % 3] + STD * torch.randn(6000, 2, generator=generator)
    data = Dataset("three Gaussians", x, label=None, num_classes=0, kind="points")
    teacher = MyTeacher()

    torch.manual_seed(0)
    student = build_network(MLPConfig(width=64, depth=3), data.shape, data.num_classes, two_times=True)
    objective = FlowMapMatching(  # MeanFlow from a teacher
        student,
        rule=Eulerian(),
        velocity=TeacherVelocity(teacher),
        pairs=sorted_pairs(uniform),
        jump_fraction=0.5,
        derivative=forward_derivative,
    )
    accelerator = Accelerator(cpu=True)
    config = TrainConfig(steps=steps, batch_size=256, lr=2e-3, ema=(0.995,))
    source = BatchSource(data, config.batch_size, seed=0, device=accelerator.device)
    for state in train(objective, source, config, accelerator, seed=0, steps=steps):
        if state.step % 500 == 0:
            print(f"step {state.step}: loss {state.loss:.4f}")

    student.load_state_dict(state.emas[0].state())
    sampler = MapSampler({0: AverageVelocityMap(student.eval())}, "jumps")
    params = parameter_count(student)
    candidates = [
        Candidate("mine", "teacher", "exact", OdeSampler(teacher), (1, 4, 64), 1.0, "by hand", 0),
        Candidate("student", "student", "meanflow", sampler, (1, 2, 4), 1.0, "", params),
    ]
    settings = EvaluateConfig(n=n, features=("identity",))
    rows, _ = sweep(candidates, data, [build_extractor("identity")], settings, seed=0, device=accelerator.device)
    for row in rows:
        metrics = row.metrics
        print(
            f"{row.model:8} {row.steps:3} steps, NFE {row.nfe:3}: fd_identity {metrics['fd_identity'].value:.4f}, "
            f"recall {metrics['recall_identity'].value:.3f}, {row.latency_ms:.2f} ms"
        )
    return [row.metrics["fd_identity"].value for row in rows if row.role == "student"]


if __name__ == "__main__":
    main()
