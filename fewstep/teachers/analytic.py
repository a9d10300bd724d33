"""Teachers whose velocity is known in closed form: a Gaussian and a Gaussian mixture on the linear path.

With data ``x ~ p`` and noise ``e ~ N(0, I)`` a component N(m, s^2) of ``p`` spreads along the path as
N(mu_t, sd_t^2), ``mu_t = (1-t) m``, ``sd_t^2 = (1-t)^2 s^2 + t^2``. These teachers separate the error of a distillation
from the error of a teacher: they have none, and where ``flow_map`` exists it is the exact student.

Shapes: B samples, D coordinates (any ``[B, *D]`` is flattened inside), K components. Parameters may be given in any
precision; everything is computed in the dtype of ``x``, and at least in float32.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fewstep.condition import Condition, Embeddings
from fewstep.data.toys import MixtureSpec, draw_mixture
from fewstep.flow import TimeDomain, check_jumps, expand
from fewstep.keys import Key


@dataclass(frozen=True, eq=False)
class GaussianTeacher:
    """The velocity of data ~ N(mean, Sigma), with its exact flow map and average velocity. Labels are ignored.

    ``mean`` is ``[*D]`` or one number for all coordinates. ``std`` is one number, or ``[D]`` per coordinate. For a full
    covariance use ``from_covariance``: then ``basis [D, D]`` holds the eigenvectors in its columns and ``std`` belongs
    to them. Noise is isotropic, so the flow never mixes eigenvectors and every map is affine with one gain for each.
    """

    mean: Tensor | float
    std: Tensor | float
    basis: Tensor | None = None
    nfe: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        if not bool((torch.as_tensor(self.std) > 0).all()):
            raise ValueError("a Gaussian teacher needs a positive std (a positive definite covariance)")

    @staticmethod
    def from_covariance(mean: Tensor | float, cov: Tensor) -> "GaussianTeacher":
        """The teacher of N(mean, cov), ``cov [D, D]`` symmetric positive definite, else ``ValueError``."""
        if not torch.allclose(cov, cov.mT):
            raise ValueError("a covariance is symmetric")
        variances, basis = torch.linalg.eigh(cov.double())
        # A singular matrix comes out of eigh with eigenvalues of either sign at rounding level.
        if not bool(variances[0] > 1e-14 * variances[-1]):
            raise ValueError(f"a covariance is positive definite, got the eigenvalue {variances[0]:g}")
        return GaussianTeacher(mean, variances.sqrt(), basis)

    def __call__(self, x: Tensor, t_B: Tensor, label_B: Condition | None = None) -> Tensor:
        """``v = -m + [t - (1-t) s^2] / sd_t^2 (x - mu_t)``."""
        t, s = _column(t_B, x), _like(self.std, x).reshape(-1)
        return self._affine(x, t, gain=(t - (1 - t) * s**2) / _sd(t, s) ** 2, shift=-1)

    def flow_map(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None = None) -> Tensor:
        """``X = mu_r + (sd_r / sd_t) (x - mu_t)``, for r on either side of t."""
        t, r, s = _column(t_B, x), _column(r_B, x), _like(self.std, x).reshape(-1)
        return self._affine(x, t, gain=_sd(r, s) / _sd(t, s), shift=1 - r)

    def average_velocity(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None = None) -> Tensor:
        """``u = -m + k / sd_t (x - mu_t)``, ``k = [(t+r) + s^2 (t+r-2)] / (sd_t + sd_r)``.

        This is ``(x - X) / (t - r)`` with the factor ``t - r`` divided out of ``sd_t^2 - sd_r^2``, so nothing cancels
        as r approaches t, and ``r = t`` gives the velocity.
        """
        t, r, s = _column(t_B, x), _column(r_B, x), _like(self.std, x).reshape(-1)
        k = (t + r + s**2 * (t + r - 2)) / (_sd(t, s) + _sd(r, s))
        return self._affine(x, t, gain=k / _sd(t, s), shift=-1)

    def sample(self, key: Key, index_B: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Exact data ``[B, *shape]`` float32, row ``b`` belonging to sample ``index_B[b]`` alone."""
        noise = key.normal("gaussian/noise", index_B, shape)
        zero = torch.zeros(len(index_B), device=noise.device)
        return self.flow_map(noise, zero + 1, zero)

    def _affine(self, x: Tensor, t: Tensor, gain: Tensor, shift: Tensor | float) -> Tensor:
        """``shift m + gain (x - mu_t)``: ``t [B, 1]``, and ``gain [B, 1 or D]`` acts on the eigenvectors."""
        mean = _like(self.mean, x).reshape(-1)
        flat = _flat(x)
        for size in (mean.numel(), gain.shape[1]):
            if size not in (1, flat.shape[1]):
                raise ValueError(f"this Gaussian has {size} dimensions, x has {flat.shape[1]}")
        y = flat - (1 - t) * mean
        if self.basis is None:
            y = gain * y
        else:
            basis = _like(self.basis, x)
            y = (gain * (y @ basis)) @ basis.mT
        return (y + shift * mean).reshape(x.shape).to(x.dtype)


@dataclass(frozen=True, eq=False)
class MixtureTeacher:
    """The velocity of data ~ ``sum_k weights[k] N(means[k], stds[k]^2 I)``; in one dimension also its flow map.

    ``weights [K]`` are positive, of any sum; ``means [K, D]``; ``stds [K]`` are positive. With ``component_label
    [K]`` (classes from 0) a label selects its components; None and the null label, ``num_classes``, select all of
    them; any other label is a ``ValueError``. Without ``component_label`` labels are ignored.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor
    component_label: Tensor | None = None
    nfe: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        K = len(self.weights)
        if self.means.ndim != 2 or len(self.means) != K or self.stds.shape != (K,):
            raise ValueError(
                "a mixture has weights [K], means [K, D] and stds [K], got "
                f"{tuple(self.weights.shape)}, {tuple(self.means.shape)}, {tuple(self.stds.shape)}"
            )
        if not bool((self.weights > 0).all() and (self.stds > 0).all()):
            raise ValueError("the weights and stds of a mixture are positive")
        if self.component_label is not None and (
            self.component_label.shape != (K,) or bool((self.component_label < 0).any())
        ):
            raise ValueError("component_label [K] holds one class from 0 on for each component")

    @staticmethod
    def from_spec(spec: MixtureSpec) -> "MixtureTeacher":
        """The exact teacher of a toy."""
        component_label = torch.tensor(spec.component_label) if spec.component_label else None
        return MixtureTeacher(*spec.tensors(), component_label)

    @property
    def num_classes(self) -> int:
        """How many classes there are, which is also the null label; 0 without classes."""
        return 0 if self.component_label is None else int(self.component_label.max()) + 1

    def __call__(self, x: Tensor, t_B: Tensor, label_B: Condition | None = None) -> Tensor:
        """``v = sum_k g_k(x, t) v_k(x, t)``: the components' Gaussian velocities under their posterior weights.

        The softmax of log densities keeps the weights finite arbitrarily far out. Every ``sd_t`` is positive, so
        t = 0, where ``v = -x``, and t = 1, where ``v = x - E[data]``, are ordinary points.
        """
        means, stds, flat, t = _like(self.means, x), _like(self.stds, x), _flat(x), _column(t_B, x)
        if flat.shape[1] != means.shape[1]:
            raise ValueError(f"this mixture has {means.shape[1]} dimensions, x has {flat.shape[1]}")
        y_BKD = flat[:, None] - (1 - t)[..., None] * means
        variance_BK = _sd(t, stds) ** 2
        log_density_BK = -0.5 * (y_BKD.square().sum(-1) / variance_BK + means.shape[1] * variance_BK.log())
        posterior_BK = (self._log_weights(x, label_B) + log_density_BK).softmax(dim=-1)
        gain_BK = (t - (1 - t) * stds**2) / variance_BK
        v = (posterior_BK[..., None] * (gain_BK[..., None] * y_BKD - means)).sum(dim=1)
        return v.reshape(x.shape).to(x.dtype)

    def flow_map(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None = None) -> Tensor:
        """``X = F_r^-1(F_t(x))`` with ``F_t`` the distribution function at t: in one dimension the flow is monotone
        and carries quantiles to quantiles. More dimensions have no closed form and are a ``ValueError``.

        The equation is solved for the logarithm of whichever tail of x is lighter, which neither rounds to one nor
        underflows. The error is the rounding of ``F`` over the density at X: about 1e-15 in float64 where there is
        mass, more inside a gap that the data avoid. First derivatives in x, t and r are exact.
        """
        means, stds, flat = _like(self.means, x), _like(self.stds, x), _flat(x)
        if means.shape[1] != 1 or flat.shape[1] != 1:
            raise ValueError(
                "the flow map of a mixture is known in 1 dimension only: "
                f"this mixture has {means.shape[1]}, x has {flat.shape[1]}"
            )
        means, t, r = means[:, 0], _column(t_B, x), _column(r_B, x)
        log_weights = self._log_weights(x, label_B)

        def log_tail(z_BK: Tensor, side: Tensor) -> Tensor:
            """Log of the mass below (side 1) or above (side -1) the standardised points, ``[B, 1]``, unnormalised."""
            return (log_weights + torch.special.log_ndtr(side * z_BK)).logsumexp(dim=-1, keepdim=True)

        z_BK = (flat - (1 - t) * means) / _sd(t, stds)
        one = torch.ones_like(t)
        side = torch.where(log_tail(z_BK, one) <= log_tail(z_BK, -one), one, -one)
        target = log_tail(z_BK, side)

        # Each component alone carries x to where its own F matches; the mixture's answer lies between these points.
        mu_r, sd_r = (1 - r) * means, _sd(r, stds)
        alone_BK = (mu_r + sd_r * z_BK).detach()
        low, high = alone_BK.amin(dim=-1, keepdim=True), alone_BK.amax(dim=-1, keepdim=True)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            too_high = side * (log_tail(((middle - mu_r) / sd_r).detach(), side) - target.detach()) > 0
            low, high = torch.where(too_high, low, middle), torch.where(too_high, middle, high)

        # The root is a constant so far. The step that Newton would take next is zero, but has the right derivatives:
        # those of the implicit function theorem.
        root = (low + high) / 2
        z_BK = (root - mu_r) / sd_r
        reached = log_tail(z_BK, side)
        log_density = (log_weights - 0.5 * z_BK**2 - (sd_r * _SQRT_2PI).log()).logsumexp(dim=-1, keepdim=True)
        slope = (reached - log_density).detach().clamp(max=80).exp()  # an empty gap would overflow
        step = -side * (reached - target) * slope
        X = root + (step - step.detach())
        return X.reshape(x.shape).to(x.dtype)

    def average_velocity(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None = None) -> Tensor:
        """``u = (x - X) / (t - r)``, and the velocity at r = t. Its error is that of X over ``t - r``."""
        gap = expand(t_B - r_B, x)
        apart = gap != 0
        u = (x - self.flow_map(x, t_B, r_B, label_B)) / torch.where(apart, gap, torch.ones_like(gap))
        return torch.where(apart, u, self(x, t_B, label_B)).to(x.dtype)

    def sample(self, key: Key, index_B: Tensor, label_B: Condition | None = None) -> Tensor:
        """Exact data ``[B, D]`` float32, row ``b`` belonging to sample ``index_B[b]`` alone."""
        means = self.means.to(index_B.device, torch.float64)
        weights = self._log_weights(means.new_zeros(len(index_B)), label_B).exp()
        x, _ = draw_mixture(weights, means, self.stds.to(means), key, index_B)
        return x.float()

    def _log_weights(self, x: Tensor, label_B: Condition | None) -> Tensor:
        """Log weights up to a constant, ``[K]`` or, under labels, ``[B, K]`` with -inf where not selected."""
        if isinstance(label_B, Embeddings):
            raise ValueError("a mixture knows classes, no embeddings")
        log_weights = _like(self.weights, x).log()
        if self.component_label is not None and label_B is not None:
            selected_BK = label_B[:, None] == self.component_label.to(label_B.device)
            selected_BK = selected_BK | (label_B[:, None] == self.num_classes)
            known_B = selected_BK.any(dim=-1)
            if not bool(known_B.all()):
                raise ValueError(f"no component has the label {int(label_B[~known_B][0])}")
            log_weights = torch.where(selected_BK, log_weights, -torch.inf)
        return log_weights


class ExactFlow(Protocol):
    """A teacher that knows its own flow: ``flow_map`` and ``average_velocity`` of ``(x, t [B], r [B], label)``."""

    def flow_map(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None = None) -> Tensor: ...

    def average_velocity(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None = None) -> Tensor: ...


@dataclass(frozen=True)
class ExactMap:
    """The perfect student of a teacher that knows its own flow, as a ``FlowMap``: samplers and objectives run on it."""

    teacher: ExactFlow
    domain: TimeDomain = field(default=TimeDomain("any"), init=False)
    nfe: int = field(default=1, init=False)

    def __call__(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None = None) -> Tensor:
        """The exact state at r."""
        check_jumps(self.domain, t_B, r_B)
        return self.teacher.flow_map(x, t_B, r_B, label_B)

    def average_velocity(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None = None) -> Tensor:
        """The exact average velocity between r and t."""
        return self.teacher.average_velocity(x, t_B, r_B, label_B)


_HALVINGS = 60  # brings a bracket of order one down to the spacing of float64
_SQRT_2PI = (2 * torch.pi) ** 0.5


def _sd(t: Tensor, s: Tensor) -> Tensor:
    """``sd_t``, the standard deviation at t of a component that has s in the data."""
    return ((1 - t) ** 2 * s**2 + t**2).sqrt()


def _precision(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _like(value: Tensor | float, x: Tensor) -> Tensor:
    """A parameter on the device of ``x`` in the precision that ``x`` is computed in."""
    return torch.as_tensor(value, dtype=_precision(x), device=x.device)


def _flat(x: Tensor) -> Tensor:
    """``[B, *D] -> [B, D]``, also of no rows."""
    return x.to(_precision(x)).reshape(len(x), math.prod(x.shape[1:]))


def _column(t_B: Tensor, x: Tensor) -> Tensor:
    """Times as ``[B, 1]``, to broadcast against coordinates or components."""
    return t_B.to(_precision(x))[:, None]
