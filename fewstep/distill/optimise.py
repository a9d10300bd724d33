"""Optimisers by name, and the learning rate of a step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from fewstep.distill.config import TrainConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser a config names; its rate is set anew at every step."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
    if config.optimizer == "adam":
        return torch.optim.Adam(
            parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
    if config.optimizer == "radam":
        # Not fused anywhere. By default all tensors at once on a GPU, and one by one on a CPU, where that is faster.
        return torch.optim.RAdam(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    raise ValueError(f"unknown optimizer {config.optimizer}")


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The rate of step ``step`` (from 0) of ``steps``: linear warm-up, then the schedule over what remains."""
    warmup = min(config.warmup_steps, steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if config.lr_schedule == "linear":
        return config.lr * (1 - progress)
    if config.lr_schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * progress)) / 2
    if config.lr_schedule == "inverse_sqrt":
        reference = config.lr_reference_steps or max(1, warmup)
        return config.lr / math.sqrt(max(1.0, (step + 1) / reference))
    return config.lr
