"""Flow matching (Lipman et al. 2210.02747): how teachers are trained here."""

from torch import nn

from fewstep.data.dataset import Batch
from fewstep.distill.objective import LossOutput, Objective, drop_labels, mean_square, root_mean_square
from fewstep.flow import LINEAR
from fewstep.keys import Key
from fewstep.times import Times, sample_times


class FlowMatching(Objective):
    """``L = E || v(x_t, t) - (e - x) ||^2 / D`` with ``t`` from ``times``; its minimiser is the marginal velocity.

    ``label_dropout`` is the share of samples trained under the null label, for classifier-free guidance.
    """

    def __init__(self, student: nn.Module, *, times: Times, label_dropout: float, null_label: int) -> None:
        super().__init__()
        self.student = student
        self.times = times
        self.label_dropout = label_dropout
        self.null_label = null_label

    def forward(self, batch: Batch, key: Key) -> LossOutput:
        x = batch.x
        e = key.normal("noise", batch.index, tuple(x.shape[1:]))
        t = sample_times(self.times, key, "time", batch.index)
        label = drop_labels(batch.label, key, batch.index, self.label_dropout, self.null_label)

        point = LINEAR.sample(x, e, t)
        v = self.student(point.x_t, t, t, label)
        loss = mean_square(v - point.v)
        return LossOutput(loss, loss.detach(), t, {"v_norm": root_mean_square(v)})
