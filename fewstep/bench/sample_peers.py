"""How other packages sample, around the same network: each in its own words, where it is installed.

torchcfm has no sampler: its examples integrate with torchdiffeq. The ``LCMScheduler`` of diffusers is for noise
predictions on a variance-preserving path; the one for flows is ``FlowMatchLCMScheduler``.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from fewstep.bench.sample_ways import EULER, Inputs, Net, Sampling, Way

TOLERANCE = 1e-4
"""Of float32 sums in another order, and of times that were multiplied and divided by 1000."""


def peer_ways(inputs: Inputs) -> tuple[list[Way], list[str]]:
    """The ways of the packages that are here, and the names of those that are not."""
    found: list[Way] = []
    missing: list[str] = []
    for package, ways in (("diffusers", _diffusers), ("torchdiffeq", _torchdiffeq)):
        try:
            name = f"{package} {version(package)}"
        except PackageNotFoundError:
            missing.append(package)
        else:
            found += ways(name, inputs)
    return found, missing


def _diffusers(package: str, inputs: Inputs) -> list[Way]:
    """The loop of its pipelines: timesteps set for every sampling, a step of the scheduler after every call, and the
    progress bar disabled."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

    def euler(net: Net) -> Sampling:
        scheduler = FlowMatchEulerDiscreteScheduler()
        return lambda: _pipeline(scheduler, lambda x, t_B: net(x, t_B, t_B, inputs.label), inputs, {})

    def lcm(net: Net) -> Sampling:
        scheduler = FlowMatchLCMScheduler()

        def velocity(x: Tensor, t_B: Tensor) -> Tensor:
            return net(x, t_B, torch.zeros_like(t_B), inputs.label)

        return lambda: _pipeline(scheduler, velocity, inputs, {"generator": inputs.generator()})

    return [
        Way("FlowMatchEuler scheduler", package, euler, inputs.steps, EULER, TOLERANCE),
        Way("FlowMatchLCM scheduler", package, lcm, inputs.steps, "renoise, torch.randn", TOLERANCE),
    ]


@torch.no_grad()
def _pipeline(
    scheduler: Any, velocity: Callable[[Tensor, Tensor], Tensor], inputs: Inputs, options: dict[str, Any]
) -> Tensor:
    from tqdm.auto import tqdm

    x = inputs.noise
    scheduler.set_timesteps(sigmas=list(inputs.nodes[:-1]), device=x.device)
    with tqdm(total=inputs.steps, disable=True) as bar:
        for t in scheduler.timesteps:
            v = velocity(x, t.expand(len(x)) / scheduler.config.num_train_timesteps)
            x = scheduler.step(v, t, x, return_dict=False, **options)[0]
            bar.update()
    return x


def _torchdiffeq(package: str, inputs: Inputs) -> list[Way]:
    """``odeint`` on our grid, as torchcfm's examples call it."""
    from torchdiffeq import odeint

    def way(name: str, method: str, calls: int, like: str) -> Way:
        def build(net: Net) -> Sampling:
            @torch.no_grad()
            def work() -> Tensor:
                def field(t: Tensor, x: Tensor) -> Tensor:
                    t_B = t.expand(len(x))
                    return net(x, t_B, t_B, inputs.label)

                times = torch.tensor(inputs.nodes, device=inputs.noise.device)
                return odeint(field, inputs.noise, times, method=method)[-1]

            return work

        return Way(name, package, build, calls, like, TOLERANCE)

    return [
        way("odeint, euler", "euler", inputs.steps, EULER),
        way("odeint, midpoint", "midpoint", 2 * inputs.steps, "midpoint"),
        way("odeint, heun2", "heun2", 2 * inputs.steps, "Heun"),
    ]
