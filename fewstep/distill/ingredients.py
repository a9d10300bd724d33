"""From config to what objectives are made of: times, pairs of times, grids, weights, noise, guidance, derivatives."""

from collections.abc import Callable

from fewstep.distill.couplings import Noise, assignment, gaussian_noise, independent, paired_noise, sinkhorn
from fewstep.distill.flow_maps.config import GuidanceConfig, JvpMode
from fewstep.distill.flow_maps.guidance import GuidanceRange
from fewstep.distill.progressive.config import (
    CosineGrid,
    EdmWeightConfig,
    GridConfig,
    OptimisedGrid,
    ShiftedGrid,
    TimeWeightConfig,
)
from fewstep.distill.tangent import Derivative, central_difference, forward_derivative
from fewstep.distill.time_weights import TIME_WEIGHTS, TimeWeight, edm_weight
from fewstep.distill.times_config import (
    ClippedPairs,
    GapPairs,
    LogitNormalTimes,
    PairsConfig,
    SortedPairs,
    TimesConfig,
    TruncatedLogNormalTimes,
    TruncatedStudentTimes,
    UShapedTimes,
)
from fewstep.errors import UsageError
from fewstep.grids import Grid, check_grid, cosine_nodes, shifted_nodes, uniform_nodes
from fewstep.sources import SOURCES
from fewstep.teachers.config import AssignmentCoupling, NoiseConfig, SinkhornCoupling
from fewstep.teachers.guided import ClassContrast, WeakContrast
from fewstep.teachers.load import Teacher
from fewstep.times import (
    Pairs,
    Times,
    clipped_pairs,
    gap_pairs,
    logit_normal,
    shifted,
    sorted_pairs,
    truncated_log_normal,
    truncated_student,
    u_shaped,
    uniform,
)


def times_of(config: TimesConfig) -> Times:
    if isinstance(config, LogitNormalTimes):
        times = logit_normal(config.mean, config.std)
    elif isinstance(config, TruncatedLogNormalTimes):
        times = truncated_log_normal(config.mean, config.std, config.sigma_min, config.sigma_max)
    elif isinstance(config, TruncatedStudentTimes):
        times = truncated_student(config.degrees, config.scale, config.sigma_min, config.sigma_max)
    elif isinstance(config, UShapedTimes):
        times = u_shaped(config.sharpness)
    else:
        times = uniform
    return times if config.shift == 1 else shifted(times, config.shift)


def pairs_of(config: PairsConfig) -> Pairs:
    if isinstance(config, SortedPairs):
        return sorted_pairs(times_of(config.first), times_of(config.second))
    if isinstance(config, ClippedPairs):
        return clipped_pairs(times_of(config.start), times_of(config.end))
    if isinstance(config, GapPairs):
        return gap_pairs(times_of(config.gap), times_of(config.end))
    return sorted_pairs(times_of(config))


def noise_of(config: NoiseConfig) -> Noise:
    coupling = config.coupling
    if isinstance(coupling, AssignmentCoupling):
        pairs = assignment(config.group_size)
    elif isinstance(coupling, SinkhornCoupling):
        pairs = sinkhorn(config.group_size, coupling.epsilon)
    else:
        pairs = independent
    return paired_noise(SOURCES[config.source], pairs)


def teachers_noise(teacher: Teacher | None) -> Noise:
    """A student sees the noise, and the pairs, that its teacher was trained on."""
    return gaussian_noise if teacher is None else noise_of(teacher.noise)


def derivative_of(mode: JvpMode, step: float) -> Derivative:
    return forward_derivative if mode == "forward" else central_difference(step)


def grid_of(config: GridConfig, steps: int, optimised: Callable[[OptimisedGrid], Grid]) -> Grid:
    """The nodes of ``steps`` steps; ``optimised`` finds those that depend on a teacher. ``UsageError`` for nodes too
    close to each other."""
    if isinstance(config, ShiftedGrid):
        grid = shifted_nodes(steps, config.shift)
    elif isinstance(config, CosineGrid):
        grid = cosine_nodes(steps)
    elif isinstance(config, OptimisedGrid):
        grid = optimised(config)
    else:
        grid = uniform_nodes(steps)
    try:
        check_grid(grid)
    except ValueError as error:
        raise UsageError(f"objective.grid: {error}") from error
    return grid


def time_weight_of(config: TimeWeightConfig | EdmWeightConfig) -> TimeWeight:
    return edm_weight(config.sigma_data) if isinstance(config, EdmWeightConfig) else TIME_WEIGHTS[config.kind]


def contrast_of(teacher: Teacher) -> ClassContrast | WeakContrast:
    """The pair of velocities that guidance acts between; ``UsageError`` for a teacher that has none."""
    if teacher.contrast is None:
        raise UsageError(
            f"objective.guidance: the teacher {teacher.name} has neither classes nor a weaker one beside it"
        )
    return teacher.contrast


def range_of(config: GuidanceConfig) -> GuidanceRange:
    """What a student that is told its guidance hears."""
    return GuidanceRange(config.scale, config.low, config.high, config.largest, config.power, config.random_window)
