"""What one of several processes does for ``test_ranks.py``: ``torchrun tests/distill/ranks.py FILE``.

Every task is a function of an accelerator that gives named tensors; the first process writes those of all to FILE.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tiny
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.data.dataset import BatchSource, Dataset
from fewstep.data.load import digits
from fewstep.distill import train as trainer
from fewstep.distill.config import TrainConfig
from fewstep.distill.couplings import assignment, paired_noise
from fewstep.distill.curvature import CurvatureWeighting
from fewstep.distill.flow_matching import FlowMatching
from fewstep.distill.objective import Objective
from fewstep.distill.shards import full, local
from fewstep.distill.tangent import central_difference
from fewstep.distill.train import NonFiniteError, UnsynchronisedError, make_accelerator
from fewstep.errors import EnvironmentFault
from fewstep.flow import COSINE
from fewstep.keys import Key
from fewstep.sources import laplace
from fewstep.times import logit_normal

STEPS = 6
MISSING = "not with this torch"


def teaching() -> Objective:
    """Flow matching with everything that looks beyond a sample: pairs within groups of four, a contrast within them,
    and weights that come from what all processes have seen."""
    net = tiny.network(two_times=False)
    return FlowMatching(
        net,
        times=logit_normal(0.0, 1.0),
        label_dropout=0.1,
        null_label=10,
        path=COSINE,
        noise=paired_noise(laplace, assignment(4)),
        contrast=0.05,
        group=4,
        weighting=CurvatureWeighting(net, power=1.0, warmup_steps=5, probed=0.5, derivative=central_difference(5e-3)),
    )


ALIKE = (
    "consistency_training",
    "improved_consistency",
    "easy_consistency",
    "continuous_consistency",
    "continuous_consistency_flow",
    "phased_consistency",
    "consistency_flow_matching",
    "self_corrected",
    "improved_meanflow",
    "soflow",
    "split_meanflow",
    "align_your_flow",
    "align_your_flow_lagrangian",
    "trajectory",
    "two_rectified",
    "piecewise_reflow",
)
"""Nothing in these that the others do not have: each rule is there once, a target network, one more network that is
trained, one that is frozen, and a weight that learns."""
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    **{name: build for name, build in tiny.OBJECTIVES.items() if name not in ALIKE},
    "teaching": teaching,
}


def settings(parallel: str = "ddp", **changes: object) -> TrainConfig:
    return TrainConfig.model_validate({**tiny.CONFIG.model_dump(), "parallel": parallel, **changes})


def gradients(objective: Objective, config: TrainConfig, accelerator: Accelerator) -> dict[str, Tensor]:
    """Gradients of one step as the optimiser would find them, whole."""
    sharded = config.parallel == "fsdp2" and accelerator.num_processes > 1
    prepared = trainer._distribute(objective, accelerator, sharded=sharded)
    source = BatchSource(
        tiny.paired_digits(),
        config.batch_size,
        tiny.SEED,
        device=accelerator.device,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    trainer._backward(prepared, source.batch(4), Key(tiny.SEED, 4), config, accelerator)
    return {name: full(p.grad) for name, p in objective.student.named_parameters() if p.grad is not None}


def trained(
    objective: Objective, config: TrainConfig, accelerator: Accelerator, steps: int = STEPS
) -> dict[str, Tensor]:
    """Losses of some steps, and everything a checkpoint would hold after the last."""
    losses = []
    for state in tiny.run(objective, steps, config=config, accelerator=accelerator):
        losses.append(state.loss)
    groups = state.snapshot(True)
    tensors = {f"{group}.{name}": value for group, tensors in groups.items() for name, value in tensors.items()}
    return {"losses": torch.tensor(losses, dtype=torch.float64), **tensors}


class BareNetwork(Accelerator):
    """Prepares the network inside the objective instead of the objective, and lets the objective call what it wraps:
    what a Jacobian-vector product through ``ddp.module`` comes to."""

    def prepare(self, objective: Objective) -> Objective:
        wrapped: nn.Module = super().prepare(objective.student)
        objective.student = wrapped.module
        return objective


def unsynchronised(accelerator: Accelerator) -> dict[str, Tensor]:
    """The step and the words at which training with a bare network is caught."""
    seen = 0
    try:
        for state in tiny.run(tiny.meanflow(), 5, accelerator=BareNetwork(cpu=True)):
            seen = state.step
    except UnsynchronisedError:
        return {"caught_after": torch.tensor(seen)}
    return {"caught_after": torch.tensor(-1)}


def non_finite(accelerator: Accelerator) -> dict[str, Tensor]:
    """One NaN in an image that the second process alone gets, at its second step: what the first one says of it."""

    def source(data: Dataset, rank: int) -> BatchSource:
        return BatchSource(data, 32, tiny.SEED, device=accelerator.device, rank=rank, world=accelerator.num_processes)

    row = int(source(digits(), rank=1).batch(1).row[0])
    x = digits().x.clone()
    x[row, 0, 3, 4] = float("nan")
    batches = source(replace(digits(), x=x), accelerator.process_index)
    seen = 0
    try:
        for state in trainer.train(tiny.flow_matching(), batches, settings(), accelerator, seed=tiny.SEED, steps=5):
            seen = state.step
    except NonFiniteError as error:
        named = error.samples and f"for 1 of 32 samples: rows {row} of the data" in str(error)
        return {"caught_after": torch.tensor(seen), "named": torch.tensor(named)}
    return {"caught_after": torch.tensor(-1)}


def deferred(task: Callable[[Accelerator], dict[str, Tensor]], accelerator: Accelerator) -> dict[str, Tensor]:
    """A task with steps looked at one step later, as on GPUs."""
    plain = trainer._passes_over
    trainer._passes_over = lambda optimizer, accelerator: True
    try:
        return task(accelerator)
    finally:
        trainer._passes_over = plain


def asked(accelerator: Accelerator) -> dict[str, Tensor]:
    """The steps after which this process is to stop, where the second one alone was asked at its third step."""
    calls = iter(range(9))

    def ask() -> bool:
        return next(calls) == 2 and accelerator.process_index == 1

    states = trainer.train(
        tiny.flow_matching(),
        BatchSource(digits(), 32, tiny.SEED, device=accelerator.device, rank=accelerator.process_index, world=2),
        settings(),
        accelerator,
        seed=tiny.SEED,
        steps=5,
        asked=ask,
    )
    return {"stops": torch.tensor([state.stop for state in states])}


def resumed(objective: Objective, config: TrainConfig, accelerator: Accelerator) -> dict[str, Tensor]:
    """Half of the steps, then the rest from a snapshot by a new student: as ``trained`` all at once, to the bit."""
    groups = {}
    for state in tiny.run(objective, STEPS, config=config, accelerator=accelerator):
        if state.step == STEPS // 2:
            groups = {
                group: {name: value.clone() for name, value in tensors.items()}
                for group, tensors in state.snapshot(True).items()
            }
            break
    other = tiny.OBJECTIVES["consistency"]()
    for parameter in other.student.parameters():
        parameter.data.add_(1.0)
    *_, state = tiny.run(other, STEPS, config=config, accelerator=accelerator, start=groups, done=STEPS // 2)
    groups = state.snapshot(True)
    return {f"{group}.{name}": value for group, tensors in groups.items() for name, value in tensors.items()}


def shares(accelerator: Accelerator) -> dict[str, Tensor]:
    """What this process holds of student, target, average and moments under FSDP2, as a share of the whole."""
    objective = tiny.consistency()
    *_, state = tiny.run(objective, 1, config=settings("fsdp2"), accelerator=accelerator)
    whole = sum(parameter.numel() for parameter in tiny.student().parameters())
    held = {
        "student": [local(parameter) for parameter in objective.student.parameters()],
        "target": [local(parameter) for parameter in objective.targets()[0].parameters()],
        "average": state.emas[0]._shadows,
    }
    found = {name: torch.tensor(sum(t.numel() for t in tensors) / whole) for name, tensors in held.items()}
    unwanted = len(state.snapshot(False)) + len(state.emas[0].state(keep=False))
    return {**found, "unwanted": torch.tensor(unwanted)}


def tasks() -> dict[str, Callable[[Accelerator], dict[str, Tensor]]]:
    found = {
        "unsynchronised": unsynchronised,
        "non-finite": non_finite,
        "deferred non-finite": lambda a: deferred(non_finite, a),
        "deferred meanflow ddp": lambda a: deferred(lambda b: trained(tiny.meanflow(), settings(), b), a),
        "asked": asked,
        "deferred asked": lambda a: deferred(asked, a),
        "shares": shares,
        "resumed consistency fsdp2": lambda a: resumed(tiny.consistency(), settings("fsdp2"), a),
        "accumulated meanflow ddp": lambda a: trained(tiny.meanflow(), settings(gradient_accumulation_steps=4), a, 3),
        "accumulated meanflow fsdp2": lambda a: trained(
            tiny.meanflow(), settings("fsdp2", gradient_accumulation_steps=4), a, 3
        ),
        "accumulated teaching ddp": lambda a: trained(teaching(), settings(gradient_accumulation_steps=4), a, 8),
        "accumulated teaching fsdp2": lambda a: trained(
            teaching(), settings("fsdp2", gradient_accumulation_steps=4), a, 8
        ),
    }
    for name, build in OBJECTIVES.items():
        for parallel in ("ddp", "fsdp2"):
            config = settings(parallel)
            found[f"gradients {name} {parallel}"] = lambda a, b=build, c=config: gradients(b(), c, a)
            found[f"trained {name} {parallel}"] = lambda a, b=build, c=config: trained(b(), c, a)
    return found


def main(file: Path) -> None:
    torch.set_num_threads(1)
    accelerator = make_accelerator()
    tensors = {}
    for task, run in tasks().items():
        try:
            found = run(accelerator)
        except EnvironmentFault:  # older versions of torch shard less
            found = {MISSING: torch.ones(1)}
        tensors |= {f"{task}: {name}": value for name, value in found.items()}
    if accelerator.is_main_process:
        tensors["world"] = torch.tensor(accelerator.num_processes)
        save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
