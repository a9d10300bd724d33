"""Loss weights from the curvature of the flow, estimated while it is being learned ("adaptive flow matching").

A path bends where ``Dv/Dt = d_t v + (v . grad) v`` is large, and there an Euler step errs by ``h^2 / 2 Dv/Dt``. The
weight follows ``kappa(t) = sqrt(E ||Dv/Dt||^2 / D)`` of an average of the network. A weight that depends on ``t`` alone
leaves the minimiser of flow matching where it is and moves a network's effort.
"""

import copy

import torch
from torch import Tensor, nn

from fewstep.condition import Condition
from fewstep.distill.objective import mean_square
from fewstep.distill.shards import local
from fewstep.distill.tangent import Derivative
from fewstep.precision import products
from fewstep.times import jumps_last

BINS = 32


class CurvatureWeighting:
    """``w(t) = clip((kappa / mean kappa)^power, 1/5, 5)``, scaled to mean one over the training times.

    Bins are quantiles of the time distribution, so each has the same share of the draws and the mean is a plain one.
    ``kappa`` comes from the share ``probed`` of each batch: three evaluations without gradient of an average of the
    student (``net``, of the given ``decay``), its square averaged over some ``1 / (1 - smoothing)`` steps. The power
    grows from zero during the first ``warmup_steps``: the first estimates are of a network that knows nothing.

    Not a module: an objective that holds it must not train or prepare the average.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        power: float,
        warmup_steps: int,
        probed: float,
        derivative: Derivative,
        decay: float = 0.999,
        smoothing: float = 0.99,
    ) -> None:
        self.net = copy.deepcopy(student).requires_grad_(False).eval()
        self.power = power
        self.warmup_steps = warmup_steps
        self.probed = probed
        self.derivative = derivative
        self.decay = decay
        self.smoothing = smoothing
        self.square = torch.zeros(BINS, dtype=torch.float64)
        """Running sums of ``||Dv/Dt||^2 / D`` and of the samples they come from, per bin."""
        self.count = torch.zeros(BINS, dtype=torch.float64)
        self._seen = torch.zeros(2, BINS, dtype=torch.float64)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        average = {f"average.{name}": value for name, value in self.net.state_dict().items()}
        return {"square": self.square, "count": self.count, **average}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` gave."""
        self.square, self.count = state["square"].clone(), state["count"].clone()
        prefix = "average."
        self.net.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def weight(self, u_B: Tensor, step: int) -> Tensor:
        """The weight ``[B]`` of samples whose times are at the quantiles ``u [B]``, from the steps before this one."""
        self.square, self.count, self._seen = (each.to(u_B.device) for each in (self.square, self.count, self._seen))
        return self.weights(step)[bin_of(u_B)]

    def weights(self, step: int) -> Tensor:
        """The weight of every bin, ``[32]``, of mean one. A bin that has no estimate yet has the mean curvature."""
        kappa = (self.square / self.count.clamp_min(1e-12)).sqrt()
        known = self.count > 0
        kappa = torch.where(known, kappa, kappa.sum() / known.sum().clamp_min(1))
        power = self.power * min(1.0, step / self.warmup_steps if self.warmup_steps else 1.0)
        mean = kappa.mean()
        relative = torch.where(mean > 0, kappa / mean.clamp_min(1e-300), torch.ones_like(kappa))
        weight = (relative**power).clamp(0.2, 5)
        return (weight / weight.mean()).float()

    @torch.no_grad()
    def observe(
        self,
        x_t: Tensor,
        t_B: Tensor,
        u_B: Tensor,
        label_B: Condition | None,
        index_B: Tensor,
        first: int | None = None,
    ) -> None:
        """Add the curvature at a part of the batch to what ``after_step`` will take up; ``first`` as in a batch."""
        order, others = jumps_last(index_B, self.probed, first)
        rows = order[others:]
        counted = len(rows) > 0
        if not counted:  # under FSDP2 all processes evaluate, or those that do would wait for the others for ever
            rows = torch.zeros(1, dtype=torch.int64, device=x_t.device)
        x, t, u = x_t[rows], t_B[rows], u_B[rows]
        label = None if label_B is None else label_B[rows]
        # Ten bits of TF32 would be most of a difference of two outputs that are close; the rows are few.
        with torch.autocast(x.device.type, enabled=False), products("fp32"):
            v = self.net(x, t, t, label)
            square = mean_square(self.derivative(self.net, x, v, t, t, label)).double()
        if not counted:
            return
        # A product, for the order of summation of a scatter is not fixed on GPUs, and bits would be others every time.
        inside = (bin_of(u)[:, None] == torch.arange(BINS, device=u.device)).to(torch.float64)
        self._seen += torch.stack((square, torch.ones_like(square))) @ inside

    @torch.no_grad()
    def after_step(self, student: nn.Module) -> None:
        """Take up what all processes have observed, and let the average follow the student."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._seen)
        self.square.mul_(self.smoothing).add_(self._seen[0], alpha=1 - self.smoothing)
        self.count.mul_(self.smoothing).add_(self._seen[1], alpha=1 - self.smoothing)
        self._seen.zero_()
        for average, current in zip(self.net.parameters(), student.parameters(), strict=True):
            local(average).lerp_(local(current).to(average.dtype), 1 - self.decay)


def bin_of(u_B: Tensor) -> Tensor:
    """The bin of each quantile in (0, 1), int64 ``[B]``."""
    return (u_B * BINS).long().clamp(max=BINS - 1)
