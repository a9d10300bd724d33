"""The training loop: a generator of typed states. accelerate lives here and nowhere else.

``train`` knows nothing of methods, files or terminals. What is prepared for distributed training is the objective, so
that whatever it does inside ``forward`` (a Jacobian-vector product, a target) is synchronised.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fewstep.checkpoint import Tensors
from fewstep.data.dataset import BatchSource
from fewstep.distill.config import TrainConfig
from fewstep.distill.ema import EMA
from fewstep.distill.objective import Objective
from fewstep.errors import FewstepError
from fewstep.keys import Key


@dataclass(frozen=True)
class TrainState:
    """What ``train`` yields after an optimiser step.

    ``step`` counts finished steps of this call, ``metrics`` are scalars on the device, ``seconds`` is the time spent in
    this call. ``snapshot()`` gives every tensor a restart needs, by group.
    """

    step: int
    metrics: dict[str, Tensor]
    lr: float
    seconds: float
    student: nn.Module
    emas: tuple[EMA, ...]
    snapshot: Callable[[], dict[str, Tensors]]


class NonFiniteError(FewstepError):
    """A loss or gradient became infinite or NaN. Nothing is replaced by zero: the run stops."""


def make_accelerator(config: TrainConfig) -> Accelerator:
    """One process or one of several (torchrun, accelerate launch); a GPU where there is one."""
    return Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision="no" if config.precision == "fp32" else config.precision
    )


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
    return config.lr


def train(
    objective: Objective,
    source: BatchSource,
    config: TrainConfig,
    accelerator: Accelerator,
    *,
    seed: int,
    steps: int,
    first_step: int = 0,
    start: dict[str, Tensors] | None = None,
    done: int = 0,
) -> Iterator[TrainState]:
    """Train ``objective.student`` up to ``steps`` optimiser steps, yielding after each.

    ``first_step`` offsets the keys of the random draws and of the batches (later stages go on where earlier ones
    ended). ``start`` with ``done`` continues from a snapshot taken after ``done`` steps, with the same bits as a run
    that was never interrupted.

    Raises ``NonFiniteError`` before a non-finite gradient reaches the weights.
    """
    objective.to(accelerator.device)
    student = objective.student
    emas = tuple(EMA(student, decay) for decay in config.ema)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    if start is not None:
        _restore(start, done, objective, emas, optimizer)
    prepared, prepared_optimizer = accelerator.prepare(objective, optimizer)

    def snapshot() -> dict[str, Tensors]:
        groups = {"student": dict(student.state_dict()), "optimizer": _optimizer_tensors(optimizer)}
        groups |= {f"ema-{ema.decay:g}": ema.state() for ema in emas}
        if extra := objective.extra_state():
            groups["objective"] = extra
        return groups

    parameters = list(student.parameters())
    began = time.perf_counter()
    for step in range(done, steps):
        lr = learning_rate(config, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = source.batch(first_step + step)
        output = prepared(batch, Key(seed, first_step + step))
        loss = output.per_sample_B.mean()
        accelerator.backward(loss)
        norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
        # One read of the device per step, shared by the loss (a non-finite loss has non-finite gradients).
        if not math.isfinite(float(norm)):
            raise NonFiniteError(
                f"the gradient is not finite at step {first_step + step + 1} (loss {float(loss.detach()):g})"
            )
        prepared_optimizer.step()
        prepared_optimizer.zero_grad()
        objective.after_step()
        for ema in emas:
            ema.update()
        yield TrainState(
            step=step + 1,
            metrics={"loss": loss.detach(), "grad_norm": norm.detach(), **output.metrics},
            lr=lr,
            seconds=time.perf_counter() - began,
            student=student,
            emas=emas,
            snapshot=snapshot,
        )
    accelerator.free_memory()


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """Adam's state as flat tensors ``"<parameter>.<name>"``."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, entry in state.items() for name, value in entry.items()}


def _restore(
    groups: dict[str, Tensors], done: int, objective: Objective, emas: tuple[EMA, ...], optimizer: torch.optim.Optimizer
) -> None:
    objective.student.load_state_dict(groups["student"])
    objective.load_extra_state(groups.get("objective", {}))
    for ema in emas:
        ema.net.load_state_dict(groups[f"ema-{ema.decay:g}"])
        ema.updates = done
    entries: dict[int, Tensors] = {}
    for name, value in groups["optimizer"].items():
        parameter, _, entry = name.partition(".")
        entries.setdefault(int(parameter), {})[entry] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
