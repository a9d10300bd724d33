"""Exponential moving averages of a network's weights."""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from fewstep.checkpoint import Tensors
from fewstep.distill.config import ConstantEMA, EMAConfig, PowerEMA
from fewstep.distill.shards import gathered, local, shard_like, sharded_like

WIDEST = 12**-0.5
"""The relative standard deviation of a uniform profile, ``gamma = 0``."""


def relative_std(gamma: float) -> float:
    """Standard deviation of the profile ``p(tau) ~ tau^gamma`` on ``[0, t]``, divided by ``t``:
    ``(gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^(-1/2)`` (Karras et al. 2312.02696, section 3.1)."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


@lru_cache
def power_exponent(std: float) -> float:
    """The ``gamma >= 0`` whose ``relative_std`` is ``std``: a root of ``(g + 2)^2 (g + 3) = (g + 1) / std^2``."""
    if not 0 < std <= WIDEST:
        raise ValueError(f"the relative_std of a power function lies above 0 and up to {WIDEST:.4f}, got {std:g}")
    # All three roots are real; the others are below zero, where the width falls again.
    return max(0.0, float(np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max()))


def decay_at(config: EMAConfig, k: int) -> float:
    """``d_k`` of update ``k = 1, 2, ...``.

    Constant: ``min(decay, (1 + k) / (10 + k))``. Power: ``(1 - 1 / k)^(gamma + 1)``, so that update ``k`` leaves the
    weights of step ``tau`` with ``(tau^(gamma + 1) - (tau - 1)^(gamma + 1)) / k^(gamma + 1)`` (2312.02696, section
    3.1) and the initial weights with nothing. Half-life: ``0.5^(1 / min(half_life_steps, ramp k))`` (2206.00364,
    appendix F.1).
    """
    if isinstance(config, ConstantEMA):
        return min(config.decay, (1 + k) / (10 + k))
    if isinstance(config, PowerEMA):
        return float((1 - 1 / k) ** (power_exponent(config.relative_std) + 1))
    half_life = min(config.half_life_steps, config.ramp * k) if config.ramp else config.half_life_steps
    return float(0.5 ** (1 / half_life))


class EMA:
    """``shadow <- shadow + (1 - d_k) (weights - shadow)`` at update ``k``, from the weights at construction on.

    Buffers are copied, and parameters without gradient are the network's own. Under FSDP2 it is made after sharding and
    every process averages its own shards.

    Shadows have the type of their parameters, and rounding stops them at a distance: in float32, up to
    ``6e-8 / (1 - d_k)`` of the size of weights that stand still. Measured, relative: 9e-6 for a decay of 0.999 and
    4e-4 for 0.9999. Weights that move by more than that distance at every step are followed to 5e-7 and to 2e-6.
    """

    def __init__(self, net: nn.Module, config: EMAConfig) -> None:
        self.config = config
        self.name = config.name
        self.updates = 0
        # By way of the state: it has the names and their order, and FSDP2 reshards what it gathered before giving it.
        self._live: Tensors = dict(net.state_dict(keep_vars=True))
        # Two names of one tensor (tied weights) share one shadow.
        tensors = {id(tensor): tensor for tensor in self._live.values()}
        # What is not trained is not averaged, and needs no second copy (adapters leave most of a network as it is).
        trained = {key for key, tensor in tensors.items() if isinstance(tensor, nn.Parameter) and tensor.requires_grad}
        still = {key for key, tensor in tensors.items() if isinstance(tensor, nn.Parameter)} - trained
        kept = {
            key: local(tensor).detach() if key in still else local(tensor).detach().clone()
            for key, tensor in tensors.items()
        }
        self._kept = {name: kept[id(tensor)] for name, tensor in self._live.items()}
        # Listed once: walking the module tree costs more than the update itself on small networks.
        self._parameters = [tensor for key, tensor in tensors.items() if key in trained]
        self._shadows = [kept[id(tensor)] for tensor in self._parameters]
        self._buffers = [(kept[key], each) for key, each in tensors.items() if not isinstance(each, nn.Parameter)]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the present weights of the network given at construction."""
        self.updates += 1
        # Local parts are asked for anew: FSDP2 promises the parameter, not the tensor inside it.
        weights = [local(parameter) for parameter in self._parameters]
        torch._foreach_lerp_(self._shadows, weights, 1 - decay_at(self.config, self.updates))
        for kept, value in self._buffers:
            kept.copy_(value)

    @torch.no_grad()
    def state(self, keep: bool = True) -> Tensors:
        """Whole tensors by their names in ``state_dict()``. Where parameters are sharded every process has to ask, and
        those with ``keep=False`` get nothing.

        Tensors that are not sharded are live: the next update changes them.
        """
        return gathered({name: sharded_like(self._kept[name], like) for name, like in self._live.items()}, keep)

    @torch.no_grad()
    def load(self, state: Tensors, updates: int) -> None:
        """Take back what ``state()`` gave after that many updates; the same whole tensors in every process."""
        if state.keys() != self._live.keys():
            odd = ", ".join(sorted(state.keys() ^ self._live.keys()))
            raise ValueError(f"the average {self.name} and the network differ in {odd}")
        for name, whole in state.items():
            like = self._live[name]
            if whole.shape != like.shape:
                raise ValueError(f"{name} has shape {tuple(like.shape)}, its average {self.name} {tuple(whole.shape)}")
            self._kept[name].copy_(local(shard_like(whole, like)))
        self.updates = updates
