"""MeanFlow as the tests of other parts use it: an objective that takes a derivative along the path."""

from torch import nn

from fewstep.distill.flow_maps.objective import FlowMapMatching
from fewstep.distill.flow_maps.rules import Eulerian
from fewstep.distill.flow_maps.velocity import TeacherVelocity, conditional
from fewstep.distill.flow_maps.weights import AdaptivePower, plain
from fewstep.distill.tangent import Derivative, forward_derivative
from fewstep.flow import VelocityField
from fewstep.times import Times, sorted_pairs, uniform


def meanflow(
    student: nn.Module,
    velocity: VelocityField | None = None,
    *,
    times: Times = uniform,
    jump_fraction: float = 0.5,
    weight_power: float = 0.0,
    weight_offset: float = 1e-2,
    derivative: Derivative = forward_derivative,
) -> FlowMapMatching:
    """MeanFlow from a teacher's velocity, or from the data's where that is None."""
    return FlowMapMatching(
        student,
        rule=Eulerian(),
        velocity=conditional if velocity is None else TeacherVelocity(velocity),
        pairs=sorted_pairs(times),
        jump_fraction=jump_fraction,
        weight=AdaptivePower(weight_power, weight_offset) if weight_power else plain,
        derivative=derivative,
    )
