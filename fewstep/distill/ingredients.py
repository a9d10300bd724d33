"""From config to what objectives are made of: times, pairs of times, noise, derivatives."""

from fewstep.distill.couplings import Noise, assignment, gaussian_noise, independent, paired_noise, sinkhorn
from fewstep.distill.flow_maps.config import JvpMode
from fewstep.distill.tangent import Derivative, central_difference, forward_derivative
from fewstep.distill.times_config import (
    ClippedPairs,
    GapPairs,
    LogitNormalTimes,
    PairsConfig,
    SortedPairs,
    TimesConfig,
    TruncatedLogNormalTimes,
    UShapedTimes,
)
from fewstep.sources import SOURCES
from fewstep.teachers.config import AssignmentCoupling, NoiseConfig, SinkhornCoupling
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
    u_shaped,
    uniform,
)


def times_of(config: TimesConfig) -> Times:
    if isinstance(config, LogitNormalTimes):
        times = logit_normal(config.mean, config.std)
    elif isinstance(config, TruncatedLogNormalTimes):
        times = truncated_log_normal(config.mean, config.std, config.sigma_min, config.sigma_max)
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
