"""From a config to the stages of training: which objective, for how long, and which step counts its student serves."""

from torch import nn

from fewstep.config import RunConfig
from fewstep.data.dataset import Dataset
from fewstep.distill.config import CurvatureConfig, FlowMatchingConfig
from fewstep.distill.consistency.plan import (
    consistency_flow_matching_stages,
    consistency_stages,
    phased_consistency_stages,
    truncated_consistency_stages,
)
from fewstep.distill.curvature import CurvatureWeighting
from fewstep.distill.flow_maps.plan import flow_map_stages
from fewstep.distill.flow_matching import FlowMatching
from fewstep.distill.ingredients import derivative_of, noise_of, times_of
from fewstep.distill.objective import Objective
from fewstep.distill.progressive.plan import progressive_stages
from fewstep.distill.reflow.plan import piecewise_reflow_stages, reflow_stages
from fewstep.distill.stage import Stage
from fewstep.flow import PATHS
from fewstep.teachers.load import Teacher


def plan(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
    """The stages of a run, in order."""
    return PLANS[config.objective.kind](config, teacher, data)


def flow_matching_stages(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
    objective = config.objective
    assert isinstance(objective, FlowMatchingConfig)
    weighting = objective.weighting

    def build(student: nn.Module, previous: nn.Module | None) -> Objective:
        return FlowMatching(
            student,
            times=times_of(objective.times),
            label_dropout=objective.label_dropout,
            null_label=data.num_classes,
            path=PATHS[objective.path],
            noise=noise_of(objective.noise),
            contrast=objective.contrast,
            group=objective.noise.group_size,
            weighting=CurvatureWeighting(
                student,
                power=weighting.power,
                warmup_steps=weighting.warmup_steps,
                probed=weighting.probed,
                derivative=derivative_of(weighting.jvp, weighting.jvp_step),
            )
            if isinstance(weighting, CurvatureConfig)
            else None,
        )

    return (Stage("flow matching", config.train.steps, 0, build),)


PLANS = {
    "flow_matching": flow_matching_stages,
    "progressive": progressive_stages,
    "consistency": consistency_stages,
    "improved_consistency": consistency_stages,
    "easy_consistency": consistency_stages,
    "continuous_consistency": consistency_stages,
    "truncated_consistency": truncated_consistency_stages,
    "phased_consistency": phased_consistency_stages,
    "consistency_flow_matching": consistency_flow_matching_stages,
    "self_corrected": consistency_stages,
    "reflow": reflow_stages,
    "piecewise_reflow": piecewise_reflow_stages,
    "meanflow": flow_map_stages,
    "improved_meanflow": flow_map_stages,
    "modular_meanflow": flow_map_stages,
    "alpha_flow": flow_map_stages,
    "soflow": flow_map_stages,
    "split_meanflow": flow_map_stages,
    "shortcut": flow_map_stages,
    "terminal_velocity": flow_map_stages,
    "align_your_flow": flow_map_stages,
    "free_flow": flow_map_stages,
    "trajectory": flow_map_stages,
}
