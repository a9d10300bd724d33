"""Source and target moved by learned, class-dependent shifts (CAR-Flow, Chen et al. 2509.19300, its shift-only form).

That method trains on the path between ``x + mu_x(y)`` and ``e + mu_e(y)``. Shifts commute with everything that is
linear here, so it is the plain method with another network, and nothing else has to know: not the sampler, not the
coupling, not a student.
"""

import torch
from torch import Tensor, nn

from fewstep.flow import expand


class ConditionShift(nn.Module):
    """``u(x, t, r, y) = net(x + (1 - t) mu_x(y) + t mu_e(y), t, r, y) - (mu_e(y) - mu_x(y))``.

    The state that ``net`` sees lies on the shifted path, and its velocity, instantaneous or averaged, differs by the
    constant that is taken off again. Scales are left out: with them the paper's objective can be lowered by letting
    source and target collapse. Both tables ``[num_classes + 1, D]`` start at zero, the last row is the null label's.
    """

    def __init__(self, net: nn.Module, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.net = net
        self.num_classes = num_classes
        self.data_shift = nn.Parameter(torch.zeros(num_classes + 1, *shape))
        self.noise_shift = nn.Parameter(torch.zeros(num_classes + 1, *shape))

    def forward(
        self,
        x: Tensor,
        t_B: Tensor,
        r_B: Tensor,
        label_B: Tensor | None = None,
        guidance_B3: Tensor | None = None,
    ) -> Tensor:
        row_B = torch.full((len(x),), self.num_classes, device=x.device) if label_B is None else label_B
        mu_x, mu_e = self.data_shift[row_B].to(x.dtype), self.noise_shift[row_B].to(x.dtype)
        t = expand(t_B, x).to(x.dtype)
        return self.net(x + (1 - t) * mu_x + t * mu_e, t_B, r_B, label_B, guidance_B3) - (mu_e - mu_x)
