"""Flow matching (Lipman et al. 2210.02747): how teachers are trained here."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewstep.data.dataset import Batch
from fewstep.distill.couplings import Noise, gaussian_noise
from fewstep.distill.curvature import CurvatureWeighting
from fewstep.distill.objective import LossOutput, Objective, drop_labels, mean_square, root_mean_square
from fewstep.flow import LINEAR, Interpolant
from fewstep.keys import Key
from fewstep.networks.dropout import keyed_dropout
from fewstep.times import Times


class FlowMatching(Objective):
    """``L = E w(t) || v(x_t, t) - (e - x) ||^2 / D`` with ``t`` from ``times``; its minimiser is the marginal velocity.

    - ``path``: ``times`` are of this path, and the loss is that of the regression of its velocity. The network works on
      the linear path all the same, where the same regression has the weight ``path.velocity_scale(t)^2``.
    - ``noise`` draws ``e`` and pairs it with the data.
    - ``contrast``: contrastive flow matching (Stoica et al. 2506.05350, equation 4) subtracts ``contrast`` times the
      distance to the velocity of another sample, the next one in its ``group``. That biases the minimiser: it is
      ``(v + contrast E[x]) / (1 - contrast)`` for a source of mean zero, and has to be corrected before it teaches.
    - ``weighting``: a weight by curvature, which costs more evaluations.
    - ``label_dropout`` is the share of samples trained under the null label, for classifier-free guidance.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        times: Times,
        label_dropout: float,
        null_label: int,
        path: Interpolant = LINEAR,
        noise: Noise = gaussian_noise,
        contrast: float = 0.0,
        group: int = 1,
        weighting: CurvatureWeighting | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.times = times
        self.label_dropout = label_dropout
        self.null_label = null_label
        self.path = path
        self.noise = noise
        self.contrast = contrast
        self.group = group
        self.weighting = weighting

    def forward(self, batch: Batch, key: Key) -> LossOutput:
        x = batch.x
        e = self.noise(batch, key)
        u = key.uniform("time", batch.index)
        time = self.times(u)
        t = (time if self.path is LINEAR else self.path.linear_time(time)).to(torch.float32)
        label = drop_labels(batch.label, key, batch.index, self.label_dropout, self.null_label)

        point = LINEAR.sample(x, e, t)
        with keyed_dropout(self.student, key, batch.index):
            v = self.student(point.x_t, t, t, label)
        residual = mean_square(v - point.v)
        loss = residual
        if self.contrast:
            loss = loss - self.contrast * mean_square(v - next_in_group(point.v, self.group))
        if self.path is not LINEAR:
            loss = loss * self.path.velocity_scale(time).square().float()
        diagnostics = {"v_norm": root_mean_square(v)}
        if self.weighting is not None:
            weight = self.weighting.weight(u, key.step)
            loss = loss * weight
            diagnostics["weight"] = weight
            self.weighting.observe(point.x_t, t, u, label, batch.index, batch.first)
        return LossOutput(loss, residual.detach(), t, diagnostics)

    def after_step(self) -> None:
        if self.weighting is not None:
            self.weighting.after_step(self.student)

    def targets(self) -> tuple[nn.Module, ...]:
        return () if self.weighting is None else (self.weighting.net,)

    def extra_state(self) -> dict[str, Tensor]:
        return {} if self.weighting is None else self.weighting.state()

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        if self.weighting is None:
            super().load_extra_state(state)
        else:
            self.weighting.load_state(state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FlowMatching":
        """What ``.to()`` calls: the weighting's average goes where the student goes."""
        if self.weighting is not None:
            self.weighting.net._apply(fn)
        return super()._apply(fn, recurse)


def next_in_group(value: Tensor, group: int) -> Tensor:
    """Row ``i + 1`` in the place of row ``i`` within groups of consecutive rows, the first in that of the last."""
    return value.reshape(-1, group, *value.shape[1:]).roll(-1, dims=1).reshape(value.shape)
