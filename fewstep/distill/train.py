"""The training loop: a generator of typed states. accelerate lives in this package and nowhere else.

``train`` knows nothing of methods, files or terminals. What is prepared for distributed training is the objective, so
that whatever it does inside ``forward`` (a Jacobian-vector product, a target) is synchronised.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fewstep.block import ProductsName, products_of
from fewstep.checkpoint import Tensors
from fewstep.data.dataset import Batch, BatchSource
from fewstep.distill.compiled import compile_objective
from fewstep.distill.config import TrainConfig
from fewstep.distill.ema import EMA
from fewstep.distill.objective import LossOutput, Objective
from fewstep.distill.optimise import build_optimizer, learning_rate
from fewstep.distill.reading import Reading
from fewstep.distill.shards import full, gathered, shard, shard_like
from fewstep.errors import EnvironmentFault, FewstepError, UsageError
from fewstep.keys import Key
from fewstep.precision import products

CHECKED_STEPS = 3
"""First steps after which the processes compare their gradient norms."""


@dataclass(frozen=True)
class TrainState:
    """What ``train`` yields after an optimiser step.

    ``step`` counts finished steps of this call, ``loss`` and ``grad_norm`` are of all processes together, ``outputs``
    (detached) of the microbatches of this one, ``seconds`` is the time spent in this call. ``snapshot(keep)`` gives
    every tensor a restart needs, whole, by group; under FSDP2 all processes call it, and those with ``keep=False`` get
    nothing.

    A GPU may still be busy with the step: to ask for ``loss`` or ``grad_norm`` is to wait for it, and so is
    ``snapshot``, which gives nothing of a step that failed. Any of them raises the ``NonFiniteError`` of the step, of
    which all processes speak together: where there are several, all of them have to ask.

    ``stop`` says that a process has been asked to stop; all see it after the same step.
    """

    step: int
    reading: Reading
    outputs: list[LossOutput]
    lr: float
    seconds: float
    student: nn.Module
    emas: tuple[EMA, ...]
    stop: bool
    snapshot: Callable[[bool], dict[str, Tensors]]

    @property
    def loss(self) -> float:
        return self.reading.values()[0]

    @property
    def grad_norm(self) -> float:
        return self.reading.values()[1]


class NonFiniteError(FewstepError):
    """A loss or gradient became infinite or NaN. Nothing is replaced by zero: the run stops.

    ``samples`` says whether single samples were at fault, and not the training as a whole.
    """

    def __init__(self, message: str, *, samples: bool = False) -> None:
        super().__init__(message)
        self.samples = samples


class UnsynchronisedError(FewstepError):
    """Processes that should share every gradient computed different ones."""


def make_accelerator() -> Accelerator:
    """One process or one of several (torchrun, accelerate launch); a GPU where there is one.

    What somebody's accelerate config says of precision or compilation is overruled: a run is what its own config says.
    Other ways of sharding than ``train.parallel`` are a ``UsageError``.
    """
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1", "yes"):
            raise UsageError(
                f"accelerate is configured for {name}: launch without it, and shard the student by train.parallel=fsdp2"
            )
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no", dynamo_backend="no")


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
    asked: Callable[[], bool] = lambda: False,
    float32: ProductsName | None = None,
) -> Iterator[TrainState]:
    """Train ``objective.student`` up to ``steps`` optimiser steps, yielding after each.

    ``first_step`` offsets the keys of the random draws and of the batches (later stages go on where earlier ones
    ended). ``start`` with ``done`` continues from a snapshot taken after ``done`` steps, with the same bits as a run
    that was never interrupted. Under FSDP2 the student is sharded in place and stays so. ``asked()`` says, once a step,
    whether this process has been asked to stop. ``float32`` is how float32 is multiplied within a step, where that is
    not as ``config.precision`` has it; between steps the caller's own choice holds.

    On a GPU the host does not wait for it within a step: loss and norm of a step are looked at when the next one has
    its gradients, and until then the device itself keeps what is not finite from the weights. The last step is looked
    at before it is yielded. Elsewhere, with shards, and for optimisers that cannot pass over an update on the device,
    every step is looked at before it changes anything.

    Raises ``NonFiniteError`` before a non-finite gradient reaches the weights, and ``UnsynchronisedError`` if the
    processes do not share their gradients.
    """
    if start is not None:
        objective.student.load_state_dict(start["student"])
        objective.load_extra_state(start.get("objective", {}))
    sharded = config.parallel == "fsdp2" and accelerator.num_processes > 1
    if not sharded:
        objective.to(accelerator.device)
    float32 = float32 or products_of(config.precision)
    if config.compile:
        with products(float32):  # graphs are made for the flags of their first call
            compile_objective(objective, source.batch(first_step + done))
    prepared = _distribute(objective, accelerator, sharded=sharded)
    student = objective.student
    parameters = [*student.parameters(), *objective.own_parameters().values()]  # the student's first, for checkpoints
    emas = tuple(EMA(student, average) for average in config.ema)
    optimizer = build_optimizer(parameters, config)
    if start is not None:
        _restore(start, done, emas, optimizer, parameters)

    deferred = not sharded and _passes_over(optimizer, accelerator)
    reading: Reading | None = None

    def snapshot(keep: bool = True) -> dict[str, Tensors]:
        if reading is not None:
            reading.values()  # raises, rather than save what a failed step has left
        groups = {"student": student.state_dict(), "optimizer": _optimizer_tensors(optimizer)}
        if extra := objective.extra_state():
            groups["objective"] = extra
        groups = {group: gathered(tensors, keep) for group, tensors in groups.items()}
        groups |= {f"ema-{ema.name}": ema.state(keep) for ema in emas}
        return groups if keep else {}

    began = time.perf_counter()
    for step in range(done, steps):
        lr = learning_rate(config, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        key = Key(seed, first_step + step)
        batch = source.batch(first_step + step)
        with products(float32):
            outputs, mean = _backward(prepared, batch, key, config, accelerator)
        norm = gradient_norm(parameters)
        # One exchange among the processes: they have to agree on what follows.
        numbers = [mean, full(norm)]
        stop = asked()
        if accelerator.num_processes > 1:
            numbers.append(torch.full_like(mean, stop))
        both = torch.stack(numbers)
        if accelerator.num_processes > 1:
            both = over_processes(both, accelerator) / accelerator.num_processes
        before, reading = reading, Reading(both, partial(_non_finite, outputs, _rows(batch), key, accelerator))
        if before is not None:
            before.values()  # known already, or else on a device that has this step's gradients to go on with
        if deferred:
            optimizer.found_inf = reading.not_finite()  # type: ignore[attr-defined]
        else:
            reading.values()
        if accelerator.num_processes > 1:
            known = before if deferred else reading
            stop = known is not None and known.values()[2] > 0
        if step - done < CHECKED_STEPS:
            _check_synchronised(full(norm), accelerator)
        # The factor grad_clip / (norm + 1e-6), at most one: below the bound there is nothing to multiply.
        if config.grad_clip and (deferred or reading.values()[1] + 1e-6 > config.grad_clip):
            nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, norm)
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step()
        for ema in emas:
            ema.update()
        if step + 1 == steps:
            reading.values()
        yield TrainState(
            step=step + 1,
            reading=reading,
            outputs=outputs,
            lr=lr,
            seconds=time.perf_counter() - began,
            student=student,
            emas=emas,
            stop=stop,
            snapshot=snapshot,
        )
    accelerator.free_memory()


def _distribute(objective: Objective, accelerator: Accelerator, *, sharded: bool) -> nn.Module:
    """The objective as every process calls it: itself, wrapped by DDP, or sharded with its target networks."""
    if sharded:
        for target in objective.targets():
            shard(target, accelerator.device)
        shard(objective, accelerator.device)
        return objective
    return accelerator.prepare(objective)


def _backward(
    prepared: nn.Module, batch: Batch, key: Key, config: TrainConfig, accelerator: Accelerator
) -> tuple[list[LossOutput], Tensor]:
    """Losses of the microbatches and their mean, detached; gradients, shared by the processes after the last one."""
    parts = batch.split(config.gradient_accumulation_steps)
    outputs, means = [], []
    for number, part in enumerate(parts, start=1):
        with _synchronised(prepared, accelerator, number == len(parts)):
            with _autocast(config, accelerator):
                output: LossOutput = _forward(prepared, part, key)
            mean = output.per_sample_B.mean()
            (mean if len(parts) == 1 else mean / len(parts)).backward()
        outputs.append(replace(output, per_sample_B=output.per_sample_B.detach()))
        means.append(mean.detach())
    return outputs, means[0] if len(means) == 1 else torch.stack(means).mean()


def _forward(prepared: nn.Module, batch: Batch, key: Key) -> LossOutput:
    """``EnvironmentFault`` where torch does not gather the shards of a network within a forward derivative."""
    try:
        output: LossOutput = prepared(batch, key)
    except NotImplementedError as error:
        if not isinstance(prepared, FSDPModule) or "TensorWrapper" not in str(error):
            raise
        raise EnvironmentFault(
            f"train.parallel=fsdp2: torch {torch.__version__} does not gather shards within a forward derivative (2.13 "
            "does): set objective.jvp=finite_difference or train.parallel=ddp"
        ) from error
    return output


def _passes_over(optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> bool:
    """Whether the device itself can leave an update out, so that the host need not look first: fused Adam does where
    its ``found_inf`` is 1, the step count included."""
    return accelerator.device.type == "cuda" and bool(optimizer.defaults.get("fused"))


def _rows(batch: Batch) -> Tensor:
    """What an error names samples by."""
    return batch.index if batch.row is None else batch.row


def _autocast(config: TrainConfig, accelerator: Accelerator) -> contextlib.AbstractContextManager[Any]:
    if config.precision != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(accelerator.device.type, torch.bfloat16)


def _synchronised(prepared: nn.Module, accelerator: Accelerator, yes: bool) -> contextlib.AbstractContextManager[Any]:
    """The context of a backward pass that shares its gradients, or only adds to what this process holds."""
    if isinstance(prepared, FSDPModule):
        prepared.set_requires_gradient_sync(yes)
        return contextlib.nullcontext()
    return contextlib.nullcontext() if yes else accelerator.no_sync(prepared)


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """``nn.utils.get_total_norm`` without its sorting by device and type, which costs as much again."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def over_processes(value: Tensor, accelerator: Accelerator) -> Tensor:
    """The sum over all processes, in all of them."""
    return value if accelerator.num_processes == 1 else accelerator.reduce(value, "sum")


def _check_synchronised(norm: Tensor, accelerator: Accelerator) -> None:
    if accelerator.num_processes == 1:
        return
    norms = accelerator.gather(norm.reshape(1))
    if float(norms.max() - norms.min()) > 1e-5 * float(norms.max()):
        listed = ", ".join(f"{value:.6g}" for value in norms.tolist())
        raise UnsynchronisedError(
            f"the processes have different gradients (norms {listed}): some part of the loss is computed outside the "
            "prepared objective, where nothing sums gradients over processes"
        )


def _non_finite(
    outputs: list[LossOutput], row: Tensor, key: Key, accelerator: Accelerator, loss: float
) -> NonFiniteError:
    """What is known of a step that failed: loss or gradient, the keys of its draws, the samples at fault."""
    per_sample = torch.cat([output.per_sample_B.detach() for output in outputs])
    rows = sorted(gather_object(row[~per_sample.isfinite()].tolist()))
    keys = f"draws and batch keyed by seed {key.seed}, step {key.step}"
    if rows:
        count = len(per_sample) * accelerator.num_processes
        message = f"the loss is not finite at step {key.step + 1}, for {len(rows)} of {count} samples"
        if len(rows) > count / 2:  # the training, not the data
            return NonFiniteError(f"{message} ({keys})")
        named = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        return NonFiniteError(f"{message}: rows {named} of the data ({keys})", samples=True)
    what = "gradient" if math.isfinite(loss) else "loss"
    return NonFiniteError(f"the {what} is not finite at step {key.step + 1} (loss {loss:.4g}; {keys})")


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """Adam's state as flat tensors ``"<parameter>.<name>"``."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, entry in state.items() for name, value in entry.items()}


def _restore(
    groups: dict[str, Tensors],
    done: int,
    emas: tuple[EMA, ...],
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
) -> None:
    for ema in emas:
        ema.load(groups[f"ema-{ema.name}"], done)
    entries: dict[int, Tensors] = {}
    for name, value in groups["optimizer"].items():
        number, _, entry = name.partition(".")
        like = parameters[int(number)]
        # Moments have their parameter's shape and are sharded with it; the step count is a plain scalar.
        entries.setdefault(int(number), {})[entry] = shard_like(value, like) if value.shape == like.shape else value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
