"""A network of another project in the one convention, with room for a second time and for guidance."""

from typing import Protocol

import torch
from torch import Tensor, nn

from fewstep.condition import Condition
from fewstep.conventions import ConventionConfig
from fewstep.conversion import canonical_velocity
from fewstep.errors import UsageError
from fewstep.networks.condition import UNGUIDED, Inputs
from fewstep.networks.embeddings import GuidanceEmbedding, TimeEmbedding

MAX_FREQUENCY = 3.0
"""Of the embeddings that are added here: low, as in our own networks, for the sake of derivatives in time."""


class Raw(Protocol):
    """A network as its own project has it: state and time as that gives them, and its own output.

    ``condition`` is the width E of its embedding of time. ``added_BE`` is added to that embedding before anything else
    sees it; None adds nothing.
    """

    condition: int

    def __call__(
        self, x: Tensor, tau_B: Tensor, label: Condition | None = None, added_BE: Tensor | None = None
    ) -> Tensor: ...


class ForeignNetwork(nn.Module):
    """``net(x, t, r, label, guidance) -> [B, *D]``: the raw network as one of ours, converted to the one convention.

    Its second time and its guidance come in through embeddings that end in a zero layer and are added to the network's
    own of time. A copy of a teacher returns its velocity for every ``r`` and guidance, to the bit.
    """

    def __init__(self, raw: nn.Module, convention: ConventionConfig, inputs: Inputs) -> None:
        super().__init__()
        if inputs.split is not None:
            raise UsageError("a network from elsewhere sees its second time through student.second_time gap alone")
        self.net = raw
        self.convention = convention
        width = int(raw.condition)  # type: ignore[arg-type]
        self.embed_gap = TimeEmbedding(width, max_frequency=MAX_FREQUENCY, zero=True) if inputs.two_times else None
        self.embed_guidance = GuidanceEmbedding(width, max_frequency=MAX_FREQUENCY) if inputs.guidance else None

    def forward(
        self,
        x: Tensor,
        t_B: Tensor,
        r_B: Tensor,
        label: Condition | None = None,
        guidance_B3: Tensor | None = None,
    ) -> Tensor:
        added = None if self.embed_gap is None else self.embed_gap(t_B - r_B)
        if self.embed_guidance is not None:
            if guidance_B3 is None:
                guidance_B3 = torch.stack([torch.full_like(t_B, number) for number in UNGUIDED], dim=-1)
            told = self.embed_guidance(guidance_B3)
            added = told if added is None else added + told
        elif guidance_B3 is not None:
            raise ValueError("guidance was given to a network that has no input for it")
        return canonical_velocity(self.convention, lambda z, tau_B: self.net(z, tau_B, label, added), x, t_B)
