"""The rows of a batch as the rules of the family see them: states, pairs of times, velocities."""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from fewstep.condition import Condition
from fewstep.distill.flow_maps.guidance import NO_GUIDANCE
from fewstep.distill.tangent import Net
from fewstep.uploads import numbers


@dataclass(frozen=True)
class Rows:
    """``B`` states ``x [B, *D]`` at ``t [B]`` with the ends ``r [B]`` of their jumps and their labels.

    ``v_c`` is the conditional velocity ``e - x_0`` there. ``guidance_B3`` is scale and window where the student is told
    them (None elsewhere). ``index`` is each row's place in the global batch.
    """

    x: Tensor
    t: Tensor
    r: Tensor
    label: Condition | None
    v_c: Tensor
    index: Tensor
    guidance_B3: Tensor | None = None

    def __getitem__(self, rows: slice) -> "Rows":
        return Rows(
            self.x[rows],
            self.t[rows],
            self.r[rows],
            None if self.label is None else self.label[rows],
            self.v_c[rows],
            self.index[rows],
            None if self.guidance_B3 is None else self.guidance_B3[rows],
        )

    def __len__(self) -> int:
        return len(self.x)

    def at(self, x: Tensor, t_B: Tensor) -> "Rows":
        """The same rows in other states at other times."""
        return replace(self, x=x, t=t_B)


@dataclass(frozen=True)
class Guided:
    """A network under the guidance of some rows, as a network of theirs."""

    net: nn.Module
    guidance_B3: Tensor

    def __call__(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None) -> Tensor:
        return self.net(x, t_B, r_B, label_B, self.guidance_B3)


def bound(net: nn.Module, rows: Rows) -> Net:
    """The network for these rows: itself where guidance is no input of it, so that a compiled one stays compiled."""
    return net if rows.guidance_B3 is None else Guided(net, rows.guidance_B3)


def without_guidance(net: nn.Module, rows: Rows) -> Net:
    """The network for these rows with guidance switched off."""
    if rows.guidance_B3 is None:
        return net
    off = numbers(NO_GUIDANCE, rows.x.device).expand(len(rows), 3)
    return Guided(net, off)
