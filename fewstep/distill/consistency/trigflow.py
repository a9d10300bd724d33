"""TrigFlow (Lu and Song 2410.11081, section 3) around a flow network: the same consistency function in an angle.

``tan phi = t / (s (1 - t))`` with ``s`` the data's standard deviation. The state ``z = c x_t``, ``c = cos phi + s sin
phi``, is ``cos phi x + s sin phi e``, and the network ``G`` behind ``f = cos phi z - sin phi G`` is an affine function
of the flow's ``F`` behind ``f = x_t - t F``, as velocities ``dz/dphi`` are of ``v``::

    G = (s cos phi - sin phi) x_t + (s / c) F,      dt/dphi = s / c^2
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.flow import expand


@dataclass(frozen=True)
class Angle:
    """The angle of a time, by its sine and cosine; every number ``[B, 1, ...]``, to broadcast against samples."""

    data_std: float
    sin: Tensor
    cos: Tensor

    @classmethod
    def at(cls, t_B: Tensor, x: Tensor, data_std: float) -> "Angle":
        t = expand(t_B, x)
        phi = torch.atan2(t, data_std * (1 - t))
        return cls(data_std, phi.sin(), phi.cos())

    @property
    def scale(self) -> Tensor:
        """``c``: how much larger ``z`` is than ``x_t``."""
        return self.cos + self.data_std * self.sin

    @property
    def slope(self) -> Tensor:
        """``dc/dphi``."""
        return self.data_std * self.cos - self.sin

    @property
    def clock(self) -> Tensor:
        """``dt/dphi``."""
        return self.data_std / self.scale**2

    def velocity(self, x_t: Tensor, v: Tensor) -> Tensor:
        """What the velocity ``v`` of ``x_t`` is to ``z``: of the network, of the data or of a teacher."""
        return self.slope * x_t + self.data_std / self.scale * v

    def derivative(self, x_t: Tensor, v: Tensor, net: Tensor, d_net: Tensor) -> Tensor:
        """``dG/dphi`` along ``v``, from the flow's network ``F`` and its derivative ``dF/dt`` along ``v``."""
        weight = self.data_std / self.scale
        d_weight = -weight * self.slope / self.scale
        return -self.scale * x_t + self.clock * (self.slope * v + weight * d_net) + d_weight * net
