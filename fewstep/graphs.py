"""CUDA graphs for sampling: all kernels of a few steps as one launch, where a small batch would wait for the host.

What is captured reads and writes fixed buffers. Noise stays outside of it: the fresh noise that a rule draws between
its steps is drawn before the replay, from the same keys, and copied to where the captured steps look for it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fewstep.condition import Condition
from fewstep.keys import Key
from fewstep.sampling import FieldSampler, MapSampler, OdeSampler, Samples, fresh_noise
from fewstep.sources import Source

Work = Callable[[], Samples]
Capture = Callable[[Work], tuple[Samples, Callable[[], None]]]
"""Captures a work: what it returned, and a function that does it again into the same tensors."""

WARM_UP = 2
KEPT = 8
"""Graphs of so many shapes and numbers of steps; the oldest goes first."""


def cuda_capture(work: Work) -> tuple[Samples, Callable[[], None]]:
    """Capture on the current device, after a warm-up on a stream of its own. Raises what CUDA raises, and
    ``RuntimeError`` for a work on a CPU, of which a graph would hold nothing."""
    if work().x.device.type != "cuda":
        raise RuntimeError("the samples are not on a CUDA device")
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        samples = work()
    return samples, graph.replay


def to_stderr(sentence: str) -> None:
    from fewstep.console import say

    say(sentence)


@dataclass(frozen=True)
class _Graph:
    """Fixed tensors that a replay reads and writes; ``fresh`` is the noise of the nodes where there is some."""

    noise: Tensor
    label_B: Tensor | None
    fresh: list[Tensor]
    samples: Samples
    replay: Callable[[], None]


@dataclass
class GraphSampler:
    """A sampler that captures its first call of every number of steps and every shape, and replays it in the others.

    The samples are those of the sampler, to the bit. Its weights may change in place, its network may not. Where
    capture fails, as it does without a GPU, the sampler goes on as it is and ``report`` hears why, once.
    """

    sampler: OdeSampler | MapSampler | FieldSampler
    capture: Capture = cuda_capture
    report: Callable[[str], None] = to_stderr
    _graphs: dict[tuple[object, ...], _Graph] = field(default_factory=dict, init=False, repr=False)
    _failed: bool = field(default=False, init=False, repr=False)

    @property
    def name(self) -> str:
        return self.sampler.name

    @property
    def source(self) -> Source:
        return self.sampler.source

    def check(self, steps: int) -> None:
        self.sampler.check(steps)

    def __call__(self, steps: int, noise: Tensor, label_B: Condition | None, key: Key, index_B: Tensor) -> Samples:
        self.check(steps)
        if self._failed or not (label_B is None or isinstance(label_B, Tensor)):  # embeddings have shapes of their own
            return self.sampler(steps, noise, label_B, key, index_B)
        which = (steps, noise.shape, noise.dtype, noise.device, label_B is None)
        if which not in self._graphs:
            try:
                graph = self._captured(steps, noise, label_B, key, index_B)
            except Exception as error:
                self._failed = True
                first = str(error).strip().partition("\n")[0]
                self.report(f"no CUDA graph ({type(error).__name__}: {first[:160]}): sampling goes on without")
                return self.sampler(steps, noise, label_B, key, index_B)
            if len(self._graphs) == KEPT:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[which] = graph
        return self._replayed(self._graphs[which], noise, label_B, key, index_B)

    def _captured(self, steps: int, noise: Tensor, label_B: Tensor | None, key: Key, index_B: Tensor) -> _Graph:
        fresh: list[Tensor] = []

        def kept(key: Key, purpose: str, index_B: Tensor, shape: tuple[int, ...]) -> Tensor:
            if key.step == len(fresh):
                fresh.append(self.source(key, purpose, index_B, shape))
            return fresh[key.step]

        own_noise, own_label = noise.clone(), None if label_B is None else label_B.clone()
        sampler = replace(self.sampler, source=kept)
        sampler(steps, own_noise, own_label, key, index_B)  # finds out which fresh noise there is
        samples, replay = self.capture(lambda: sampler(steps, own_noise, own_label, key, index_B))
        return _Graph(own_noise, own_label, fresh, samples, replay)

    def _replayed(self, graph: _Graph, noise: Tensor, label_B: Tensor | None, key: Key, index_B: Tensor) -> Samples:
        graph.noise.copy_(noise)
        if graph.label_B is not None and label_B is not None:
            graph.label_B.copy_(label_B)
        drawn = fresh_noise(self.source, key.seed, index_B, tuple(noise.shape[1:]), len(graph.fresh))
        for buffer, new in zip(graph.fresh, drawn, strict=True):
            buffer.copy_(new)
        graph.replay()
        return Samples(graph.samples.x.clone(), graph.samples.nfe)
