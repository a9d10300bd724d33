"""What every network is told beside its state: two times, a label and guidance, summed into one vector per sample.

Shapes: B batch, E width of the condition.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.errors import UsageError
from fewstep.networks.embeddings import GuidanceEmbedding, TimeEmbedding

UNGUIDED = (1.0, 0.0, 1.0)
"""Guidance ``(w, low, high)`` that is off: of scale 1, at all times."""


@dataclass(frozen=True)
class Inputs:
    """What a network takes beside its state: labels of ``num_classes`` classes (0 is none), one time or two, and
    guidance or not. ``split`` is how it sees the second time (see ``ConditionedNetwork``)."""

    num_classes: int
    two_times: bool
    split: float | None = None
    guidance: bool = False

    def __post_init__(self) -> None:
        if self.split is not None and not self.two_times:
            raise ValueError("a network of one time has no blocks for the second one")
        if self.split is not None and not 0 < self.split < 1:
            raise ValueError(f"the share of blocks that see t lies between 0 and 1, got {self.split:g}")


class ConditionedNetwork(nn.Module):
    """The base of the networks ``net(x, t, r, label, guidance)``: their embeddings, and the condition of each block.

    A network of one time ignores ``r``. One of two sees it in one of two ways, and both start as the one-time network
    whose weights they copy:

    - ``split = None``: ``emb(t) + emb'(t - r)``, where ``emb'`` ends in a layer that starts at zero. The copy returns
      the teacher's velocity for every ``r``, to the bit.
    - ``split`` in (0, 1): the first ``split`` of the blocks see ``emb(t)``, and the others, with what comes after them,
      ``emb(r)`` from the same embedding (decoupled MeanFlow, 2510.24474: 20 of 28). No parameter is added, and the copy
      returns the teacher's velocity where ``r = t``, to the bit.

    A network with ``guidance`` adds an embedding of ``guidance_B3 = (w, low, high)``, the scale and the window of times
    in which it acts. It ends in a zero layer too: a copy starts as its teacher whatever the guidance.

    Label ``num_classes`` is the null label, and ``label = None`` means null; ``guidance = None`` means ``UNGUIDED``.
    """

    def __init__(self, condition: int, blocks: int, inputs: Inputs, *, max_frequency: float) -> None:
        """``condition`` is E, ``blocks`` how many conditions are asked for."""
        super().__init__()
        classes, split = inputs.num_classes, inputs.split
        self.num_classes = classes
        self.early = blocks if split is None else early_blocks(split, blocks)
        self.late = blocks - self.early
        gap = inputs.two_times and split is None
        self.embed_t = TimeEmbedding(condition, max_frequency=max_frequency, zero=False)
        self.embed_gap = TimeEmbedding(condition, max_frequency=max_frequency, zero=True) if gap else None
        self.embed_label = nn.Embedding(classes + 1, condition) if classes else None
        self.embed_guidance = GuidanceEmbedding(condition, max_frequency=max_frequency) if inputs.guidance else None

    def conditions(
        self, t_B: Tensor, r_B: Tensor, label_B: Tensor | None, guidance_B3: Tensor | None, dtype: torch.dtype
    ) -> list[Tensor]:
        """The condition ``[B, E]`` of each block in order, past its SiLU; the last one is also for what comes after.

        ``ValueError`` if guidance is given to a network that has no input for it.
        """
        time = self.embed_t(t_B)
        if self.embed_gap is not None:
            time = time + self.embed_gap(t_B - r_B)
        beside = []
        if self.embed_label is not None:
            if label_B is None:
                label_B = torch.full((len(t_B),), self.num_classes, device=t_B.device)
            beside.append(self.embed_label(label_B))
        if self.embed_guidance is not None:
            if guidance_B3 is None:
                guidance_B3 = torch.stack([torch.full_like(t_B, number) for number in UNGUIDED], dim=-1)
            beside.append(self.embed_guidance(guidance_B3))
        elif guidance_B3 is not None:
            raise ValueError("guidance was given to a network that has no input for it")
        early = [F.silu(sum(beside, start=time)).to(dtype)] * self.early
        if not self.late:
            return early
        return early + [F.silu(sum(beside, start=self.embed_t(r_B))).to(dtype)] * self.late


def early_blocks(split: float, blocks: int) -> int:
    """How many of ``blocks`` see ``t`` and not ``r``: the share ``split`` of them, and neither none nor all.

    A network of one block cannot see both times: a ``UsageError``.
    """
    if blocks < 2:
        raise UsageError("a network of one block cannot split its blocks between two times: give it two or more")
    return min(max(round(split * blocks), 1), blocks - 1)
