"""The methods of the family: which ingredients each puts into the regression. One function per method."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fewstep.distill.couplings import Noise
from fewstep.distill.flow_maps.config import (
    AdaptivePowerConfig,
    AlignYourFlowConfig,
    AlphaFlowConfig,
    CauchyConfig,
    DerivativeBlock,
    FlowMapConfig,
    FreeFlowConfig,
    GuidanceConfig,
    HuberConfig,
    ImprovedMeanFlowConfig,
    LikelihoodConfig,
    MeanFlowConfig,
    ModularMeanFlowConfig,
    NormalisedConfig,
    RegressionBlock,
    ShortcutConfig,
    SoFlowConfig,
    SplitMeanFlowConfig,
    TerminalVelocityConfig,
    TrajectoryConfig,
    WeightConfig,
)
from fewstep.distill.flow_maps.free_flow import FreeFlow
from fewstep.distill.flow_maps.objective import Done, FlowMapMatching
from fewstep.distill.flow_maps.rules import Discrete, Eulerian, Lagrangian, Modulated, Rule, Split
from fewstep.distill.flow_maps.schedules import Constant, Exponential, Ramp, Sigmoid
from fewstep.distill.flow_maps.trajectory import TrajectoryRegression
from fewstep.distill.flow_maps.velocity import (
    ContrastedVelocity,
    SelfGuided,
    TeacherVelocity,
    Velocity,
    conditional,
    diagonal,
)
from fewstep.distill.flow_maps.weights import (
    AdaptivePower,
    Cauchy,
    Likelihood,
    NormalisedTangent,
    PseudoHuber,
    Weight,
    plain,
)
from fewstep.distill.ingredients import contrast_of, pairs_of, range_of, times_of
from fewstep.distill.objective import Objective
from fewstep.distill.tangent import (
    Derivative,
    EndDerivative,
    OneSidedDifference,
    PathDerivative,
    central_difference,
    end_derivative,
    end_difference,
    forward_derivative,
    path_derivative,
    path_difference,
)
from fewstep.errors import UsageError
from fewstep.teachers.load import Teacher
from fewstep.times import dyadic_pairs, with_diagonal


@dataclass(frozen=True)
class Given:
    """What a method finds: the network to train, the teacher if there is one, the noise, the number of classes, whether
    the student is told its guidance, and how far a step is in the training."""

    student: nn.Module
    teacher: Teacher | None
    noise: Noise
    classes: int
    guidance_input: bool
    done: Done


def objective_of(config: FlowMapConfig, given: Given) -> Objective:
    """The objective that a config asks for. What does not fit the data or the teacher is a ``UsageError``."""
    return METHODS[config.kind](config, given)


def _meanflow(config: MeanFlowConfig, given: Given) -> Objective:
    return _matching(config, given, Eulerian(), derivative=derivative_of(config))


def _improved_meanflow(config: ImprovedMeanFlowConfig, given: Given) -> Objective:
    return _matching(config, given, Eulerian(tangent=diagonal), derivative=derivative_of(config))


def _modular_meanflow(config: ModularMeanFlowConfig, given: Given) -> Objective:
    rule = Modulated(_through_path(config), Ramp(0.0, config.modulation, config.begin, config.end))
    return _matching(config, given, rule, derivative=derivative_of(config))


def _alpha_flow(config: AlphaFlowConfig, given: Given) -> Objective:
    alpha = Sigmoid(config.begin, config.end) if config.alpha is None else Constant(config.alpha)
    return _matching(config, given, Discrete(alpha, config.clip), derivative=derivative_of(config))


def _soflow(config: SoFlowConfig, given: Given) -> Objective:
    return _matching(config, given, Discrete(Exponential(config.first, config.last)))


def _split_meanflow(config: SplitMeanFlowConfig, given: Given) -> Objective:
    return _matching(config, given, Split(config.split), target_decay=config.target_decay)


def _shortcut(config: ShortcutConfig, given: Given) -> Objective:
    guidance = config.guidance
    return FlowMapMatching(
        given.student,
        rule=Split("half", config.clip, finest=2.0 ** (1 - config.levels)),
        pairs=dyadic_pairs(config.levels),
        jump_fraction=config.jump_fraction,
        target_decay=config.target_decay,
        **_common(config, guidance, given),
    )


def _terminal_velocity(config: TerminalVelocityConfig, given: Given) -> Objective:
    return _matching(config, given, Lagrangian(_through_end(config)), target_decay=config.target_decay)


def _align_your_flow(config: AlignYourFlowConfig, given: Given) -> Objective:
    rule: Rule
    if config.identity == "lagrangian":
        rule = Lagrangian(_through_end(config), velocity=_velocity(config.velocity, config.guidance, given))
    else:
        rule = Eulerian(factor=Ramp(0.0, config.largest, 0.0, config.warmup))
    return _matching(config, given, rule, derivative=derivative_of(config))


def _free_flow(config: FreeFlowConfig, given: Given) -> Objective:
    teacher = _teacher_of(config.kind, given)
    if config.correction and teacher.noise.source != "gaussian":
        raise UsageError(
            f"objective.correction needs Gaussian noise, the teacher's is {teacher.noise.source}: set it to 0"
        )
    return FreeFlow(
        given.student,
        teacher=teacher.field,
        ends=times_of(config.times),
        derivative=end_derivative if config.jvp == "forward" else end_difference(config.jvp_step),
        correction=config.correction,
        correction_weight=config.correction_weight,
        renoise=times_of(config.renoise_times),
        weight=weight_of(config.weight),
        noise=given.noise,
    )


def _trajectory(config: TrajectoryConfig, given: Given) -> Objective:
    return TrajectoryRegression(
        given.student,
        teacher=_teacher_of(config.kind, given).field,
        solver=config.solver,
        nodes=config.nodes,
        weight=weight_of(config.weight),
        noise=given.noise,
    )


METHODS: dict[str, Callable[[Any, Given], Objective]] = {
    "meanflow": _meanflow,
    "improved_meanflow": _improved_meanflow,
    "modular_meanflow": _modular_meanflow,
    "alpha_flow": _alpha_flow,
    "soflow": _soflow,
    "split_meanflow": _split_meanflow,
    "shortcut": _shortcut,
    "terminal_velocity": _terminal_velocity,
    "align_your_flow": _align_your_flow,
    "free_flow": _free_flow,
    "trajectory": _trajectory,
}


def _matching(
    config: RegressionBlock,
    given: Given,
    rule: Rule,
    *,
    derivative: Derivative | None = None,
    target_decay: float = 0.0,
) -> FlowMapMatching:
    pairs = pairs_of(config.times)
    return FlowMapMatching(
        given.student,
        rule=rule,
        pairs=pairs if config.diagonal_times is None else with_diagonal(pairs, times_of(config.diagonal_times)),
        jump_fraction=config.jump_fraction,
        derivative=derivative,
        target_decay=target_decay,
        **_common(config, config.guidance, given),
    )


def _common(config: RegressionBlock | ShortcutConfig, guidance: GuidanceConfig | None, given: Given) -> dict[str, Any]:
    """What every regression over pairs of times is given in the same way."""
    told = range_of(guidance) if given.guidance_input and guidance is not None else None
    drops = guidance is not None and config.velocity == "data"
    return {
        "velocity": _velocity(config.velocity, guidance, given),
        "weight": weight_of(config.weight),
        "noise": given.noise,
        "guidance": told,
        "label_dropout": guidance.label_dropout if guidance is not None and drops else 0.0,
        "null_label": given.classes,
        "done": given.done,
    }


def _velocity(source: str, guidance: GuidanceConfig | None, given: Given) -> Velocity:
    if source == "data":
        if guidance is None:
            return conditional
        if not given.classes:
            raise UsageError("objective.guidance with velocity data needs classes, and the data have none")
        return SelfGuided(given.classes, (guidance.scale, guidance.low, guidance.high), guidance.mix)
    teacher = _teacher_of("velocity teacher", given)
    if guidance is None:
        return TeacherVelocity(teacher.field)
    return contrasted_velocity(teacher, guidance)


def contrasted_velocity(teacher: Teacher, guidance: GuidanceConfig) -> ContrastedVelocity:
    """The teacher's guided velocity. ``UsageError`` for one with nothing to be guided by."""
    return ContrastedVelocity(contrast_of(teacher), (guidance.scale, guidance.low, guidance.high))


def weight_of(config: WeightConfig) -> Weight:
    if isinstance(config, AdaptivePowerConfig):
        return AdaptivePower(config.power, config.offset)
    if isinstance(config, HuberConfig):
        return PseudoHuber(config.scale)
    if isinstance(config, NormalisedConfig):
        return NormalisedTangent(config.offset)
    if isinstance(config, LikelihoodConfig):
        return Likelihood()
    if isinstance(config, CauchyConfig):
        return Cauchy(config.offset)
    return plain


def derivative_of(config: DerivativeBlock) -> Derivative:
    if config.jvp == "one_sided":
        return OneSidedDifference(config.jvp_step)
    return forward_derivative if config.jvp == "forward" else central_difference(config.jvp_step)


def _through_path(config: DerivativeBlock) -> PathDerivative:
    return path_derivative if config.jvp == "forward" else path_difference(config.jvp_step)


def _through_end(config: DerivativeBlock) -> EndDerivative:
    return end_derivative if config.jvp == "forward" else end_difference(config.jvp_step)


def _teacher_of(what: str, given: Given) -> Teacher:
    if given.teacher is None:
        raise UsageError(f"{what} needs a teacher block")
    return given.teacher
