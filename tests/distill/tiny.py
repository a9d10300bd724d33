"""Tiny training runs on the shipped digits, shared by the tests of the trainer and of the golden losses."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import family
import torch
from accelerate import Accelerator
from torch import nn

from fewstep.block import ProductsName
from fewstep.checkpoint import Tensors
from fewstep.data.dataset import BatchSource, Dataset
from fewstep.data.load import digits
from fewstep.distill.config import TrainConfig
from fewstep.distill.consistency.config import ConsistencyFamilyConfig, TruncatedConsistencyConfig
from fewstep.distill.consistency.methods import Given as ConsistencyGiven
from fewstep.distill.consistency.methods import consistency_objective, truncated_stage
from fewstep.distill.couplings import gaussian_noise
from fewstep.distill.flow_maps.config import FlowMapConfig
from fewstep.distill.flow_maps.methods import Given, objective_of
from fewstep.distill.flow_matching import FlowMatching
from fewstep.distill.objective import Objective
from fewstep.distill.progressive.objective import ProgressiveStage, SolverMap
from fewstep.distill.reflow.objective import PseudoHuber, Reflow
from fewstep.distill.reflow.windows import PiecewiseReflow
from fewstep.distill.train import TrainState, make_accelerator, train
from fewstep.flow import VelocityField
from fewstep.grids import uniform_nodes
from fewstep.keys import Key
from fewstep.networks.build import build_network
from fewstep.networks.config import MLPConfig
from fewstep.teachers.guided import guided
from fewstep.teachers.load import Teacher
from fewstep.teachers.network import NetworkField, freeze
from fewstep.times import logit_normal, u_shaped

CONFIG = TrainConfig(
    batch_size=32, lr=2e-3, lr_schedule="cosine", warmup_steps=3, weight_decay=0.5, grad_clip=0.5, ema=(0.9, 0.5)
)
SEED = 7


def network(*, two_times: bool, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = build_network(MLPConfig(width=16, depth=1), (1, 8, 8), 10, two_times=two_times)
    # Layers that start at zero would hide half of the network from the first losses.
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return net


def teacher_field() -> VelocityField:
    """A guided random teacher: as good as any to check that a loss is what it was."""
    return guided(NetworkField(freeze(network(two_times=False, seed=1))), w=1.5, null_label=10)


def student() -> nn.Module:
    """Not a copy of the teacher: a loss of small differences would carry fewer digits."""
    return network(two_times=True)


def flow_matching() -> Objective:
    net = network(two_times=False)
    return FlowMatching(net, times=logit_normal(0.0, 1.0), label_dropout=0.1, null_label=10)


def meanflow() -> Objective:
    return family.meanflow(student(), teacher_field(), times=logit_normal(-0.4, 1.0))


def meanflow_from_data() -> Objective:
    return family.meanflow(student(), jump_fraction=0.25, weight_power=0.75)


def progressive() -> Objective:
    return ProgressiveStage(student(), teacher=SolverMap(teacher_field(), "heun"), teacher_grid=uniform_nodes(8))


CONSISTENCY = {config.model_fields["kind"].default: config for config in get_args(ConsistencyFamilyConfig)}
"""The configs of the consistency family."""


def consistency_given(student: nn.Module) -> ConsistencyGiven:
    return ConsistencyGiven(student, Teacher("random", teacher_field(), None, None, 1.5, "", 0), gaussian_noise, 20)


def consistency_method(kind: str, **settings: Any) -> Objective:
    """A method of the consistency family from its config, over a training of twenty steps."""
    return consistency_objective(
        CONSISTENCY[kind].model_validate({"kind": kind, **settings}), consistency_given(student())
    )


def consistency() -> Objective:
    return consistency_method("consistency", nodes=16, start_nodes=4, target_decay=0.9, huber=1.0)


def truncated_consistency() -> Objective:
    """The second stage, with another network frozen below the boundary."""
    previous = freeze(network(two_times=True, seed=2))
    return truncated_stage(TruncatedConsistencyConfig(stages=3), consistency_given(student()), previous)


def reflow() -> Objective:
    return Reflow(network(two_times=False), times=logit_normal(0.0, 1.0))


def two_rectified() -> Objective:
    return Reflow(network(two_times=False), times=u_shaped(4.0), loss=PseudoHuber(0.00054), falling=True)


def piecewise_reflow() -> Objective:
    net = network(two_times=False)
    return PiecewiseReflow(net, teacher=teacher_field(), windows=4, solver="heun", substeps=2, direction=0.1)


def paired_digits() -> Dataset:
    """The digits with a noise for each, for those objectives that train on pairs; the others do not look at it."""
    data = digits()
    return replace(data, noise=Key(SEED).normal("pairs", torch.arange(len(data.x)), data.shape))


KINDS = {config.model_fields["kind"].default: config for config in get_args(FlowMapConfig)}
"""The configs of the flow-map family."""


def flow_map(kind: str, **settings: Any) -> Objective:
    """A method of the flow-map family from its config, over a training of twenty steps."""
    teacher = Teacher("random", teacher_field(), None, None, 1.5, "", 0)
    given = Given(student(), teacher, gaussian_noise, 10, guidance_input=False, done=lambda step: step / 20)
    return objective_of(KINDS[kind].model_validate({"kind": kind, **settings}), given)


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "flow_matching": flow_matching,
    "meanflow": meanflow,
    "meanflow_from_data": meanflow_from_data,
    "progressive": progressive,
    "consistency": consistency,
    "consistency_training": partial(
        consistency_method,
        "consistency",
        velocity="data",
        schedule="square_root",
        target_decay=0.9,
        target_follows_nodes=True,
    ),
    "improved_consistency": partial(consistency_method, "improved_consistency", start_nodes=5, nodes=20),
    "easy_consistency": partial(consistency_method, "easy_consistency", stages=4),
    "continuous_consistency": partial(consistency_method, "continuous_consistency", velocity="teacher", warmup_steps=5),
    "continuous_consistency_flow": partial(
        consistency_method, "continuous_consistency", form="flow", warmup_steps=0, weight={"kind": "none"}
    ),
    "truncated_consistency": truncated_consistency,
    "phased_consistency": partial(consistency_method, "phased_consistency", segments=(1, 2, 3), nodes=8, shrink=0.2),
    "consistency_flow_matching": partial(consistency_method, "consistency_flow_matching", length=0.05),
    "self_corrected": partial(consistency_method, "self_corrected"),
    "reflow": reflow,
    "two_rectified": two_rectified,
    "piecewise_reflow": piecewise_reflow,
    "improved_meanflow": partial(flow_map, "improved_meanflow"),
    "modular_meanflow": partial(flow_map, "modular_meanflow"),
    "alpha_flow": partial(flow_map, "alpha_flow"),
    "soflow": partial(flow_map, "soflow"),
    "split_meanflow": partial(flow_map, "split_meanflow"),
    "shortcut": partial(flow_map, "shortcut", jump_fraction=0.5),
    "terminal_velocity": partial(flow_map, "terminal_velocity"),
    "align_your_flow": partial(flow_map, "align_your_flow"),
    "align_your_flow_lagrangian": partial(
        flow_map, "align_your_flow", identity="lagrangian", jump_fraction=0.5, weight={"kind": "none"}
    ),
    "free_flow": partial(flow_map, "free_flow"),
    "trajectory": partial(flow_map, "trajectory", nodes=4),
    "guided_and_weighted": partial(
        flow_map, "meanflow", velocity="data", guidance={"scale": 2.0}, weight={"kind": "cauchy"}
    ),
}


def move(thing: object, device: torch.device, seen: set[int] | None = None) -> None:
    """Every network that an objective holds, however deep, to a device: a teacher is none of its submodules."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, nn.Module):
        thing.to(device)
    for each in thing if isinstance(thing, tuple) else getattr(thing, "__dict__", {}).values():
        move(each, device, seen)


def run(
    objective: Objective,
    steps: int,
    *,
    config: TrainConfig = CONFIG,
    first_step: int = 0,
    start: dict[str, Tensors] | None = None,
    done: int = 0,
    accelerator: Accelerator | None = None,
    float32: ProductsName | None = None,
) -> Iterator[TrainState]:
    accelerator = accelerator or make_accelerator()
    if accelerator.device.type != "cpu":
        move(objective, accelerator.device)
    source = BatchSource(
        paired_digits(),
        config.batch_size,
        SEED,
        device=accelerator.device,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    return train(
        objective,
        source,
        config,
        accelerator,
        seed=SEED,
        steps=steps,
        first_step=first_step,
        start=start,
        done=done,
        float32=float32,
    )
