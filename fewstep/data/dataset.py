"""A data set, and the one source of training batches.

Batches are a function of (seed, step): epoch ``k`` runs through a permutation keyed by (seed, k), and the global batch
of step ``s`` is the ``s``-th slice of that endless sequence. Any rank of any number of processes, and any resumed run,
finds the same samples in the same places. So it is with what is drawn beside them: which samples are mirrored, and the
noise of latents that are kept as means and standard deviations.

Shapes: N samples, B of them in a batch, D of one sample, C channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.condition import Condition
from fewstep.data.ahead import Ahead
from fewstep.data.embeddings import EmbeddingRows
from fewstep.data.rows import Rows, gathered, size_bytes
from fewstep.keys import Key

Residence = Literal["auto", "device", "host"]

_REFERENCE = Key(0, 2**32 - 1)  # no training gets to this step


@dataclass(frozen=True)
class LatentScale:
    """How stored latents ``z`` become samples ``(z - shift) * scale``; both are ``[C, 1, 1]`` float32.

    With ``moments`` the channels ``[2 C]`` that are stored hold the mean of ``z`` and its standard deviation, or the
    logarithm of its variance, and every draw of a sample draws ``z`` anew.
    """

    shift: Tensor
    scale: Tensor
    moments: Literal["std", "logvar"] | None = None

    def samples(self, stored: Tensor, key: Key, index_B: Tensor) -> Tensor:
        """Samples ``[B, C, H, W]`` float32 of stored latents, the noise of their draws addressed by key and index."""
        z = stored.to(torch.float32)
        if self.moments is not None:
            mean, std = self._mean_and_std(z)
            z = mean + std * key.normal("latent", index_B, tuple(mean.shape[1:]))
        return (z - self.shift) * self.scale

    def distribution(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance ``[B, C, H, W]`` of the samples that stored latents stand for, in their own precision."""
        mean, std = (stored, torch.zeros_like(stored)) if self.moments is None else self._mean_and_std(stored)
        return (mean - self.shift) * self.scale, (std * self.scale).square()

    def _mean_and_std(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = stored.chunk(2, dim=1)
        # Autoencoders clamp the logarithm to the same bounds.
        return mean, spread if self.moments == "std" else spread.clamp(-30, 20).div(2).exp()

    def to(self, device: torch.device) -> "LatentScale":
        return replace(self, shift=self.shift.to(device), scale=self.scale.to(device))

    def to_json(self) -> dict[str, Any]:
        return {
            "shift": self.shift.flatten().tolist(),
            "scale": self.scale.flatten().tolist(),
            "moments": self.moments,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "LatentScale":
        """What ``to_json`` gave; anything else is a ``LookupError``, ``TypeError`` or ``ValueError``."""
        moments = document["moments"]
        if moments not in ("std", "logvar", None):
            raise ValueError(f"unknown moments {moments!r}")
        return cls.of_channels(document["shift"], document["scale"], moments)

    @classmethod
    def of_channels(
        cls, shift: Sequence[float], scale: Sequence[float], moments: Literal["std", "logvar"] | None = None
    ) -> "LatentScale":
        """From one number per channel each."""
        if len(shift) != len(scale):
            raise ValueError(f"{len(shift)} shifts and {len(scale)} scales")
        both = torch.tensor([shift, scale], dtype=torch.float32)[:, :, None, None]
        return cls(both[0], both[1], moments)


@dataclass(frozen=True)
class Dataset:
    """All samples as they are stored, ``x [N, ...]``, with labels ``[N]`` int64 or None.

    Stored are samples themselves (float32, images in [-1, 1]), images as uint8 (grey level ``u`` is the sample
    ``u / 127.5 - 1``), or latents of which ``latent`` says what to make; ``mirrored`` holds the latents of the mirrored
    images. ``flip`` mirrors half of the samples of every training batch. ``skipped`` names what was broken and left
    out, ``facts`` is what else is known of the data and does not change them.
    """

    name: str
    x: Rows
    label: Tensor | None
    num_classes: int
    kind: Literal["image", "points", "latents"]
    latent: LatentScale | None = None
    mirrored: Rows | None = None
    flip: bool = False
    resident: Residence = "auto"
    class_names: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    noise: Rows | None = None
    embeddings: EmbeddingRows | None = None

    @property
    def conditional(self) -> bool:
        """Whether samples have a condition: a class, or embeddings."""
        return self.num_classes > 0 or self.embeddings is not None

    def condition(self, rows: Tensor, *, pin: bool = False) -> Condition | None:
        """The condition of some rows, in page-locked memory if they are to be copied to a GPU (``pin``)."""
        if self.embeddings is not None:
            return self.embeddings.take(rows, pin=pin)
        if self.label is None:
            return None
        return self.label[rows].pin_memory() if pin else self.label[rows]

    def drawn_condition(self, index_B: Tensor) -> Condition | None:
        """What samples ``index [B]`` of any number are generated from: classes, or embeddings, in turn."""
        if self.embeddings is not None:
            return self.embeddings.take(index_B)
        return index_B % self.num_classes if self.num_classes else None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        stored = tuple(self.x.shape[1:])
        if self.latent is not None and self.latent.moments is not None:
            return (stored[0] // 2, *stored[1:])
        return stored

    def decode(self, stored: Tensor, key: Key, index_B: Tensor) -> Tensor:
        """Samples ``[B, *D]`` float32 of stored rows; ``key`` and ``index`` address the noise of moments."""
        if stored.dtype == torch.uint8:
            return stored.to(torch.float32).div_(127.5).sub_(1)
        return stored if self.latent is None else self.latent.samples(stored, key, index_B)

    def to(self, device: torch.device) -> "Dataset":
        """The same with what is drawn from on another device. Memory maps stay files on the CPU."""
        return replace(
            self,
            x=self.x.to(device),
            label=None if self.label is None else self.label.to(device),
            mirrored=self.mirrored.to(device) if self.flip and self.mirrored is not None else None,
            latent=None if self.latent is None else self.latent.to(device),
            noise=None if self.noise is None else self.noise.to(device),
            embeddings=None if self.embeddings is None else self.embeddings.to(device),
        )

    def samples(self, rows: Tensor) -> Tensor:
        """Samples ``[B, *D]`` float32 of some rows, never mirrored: what an evaluation compares with.

        Of moments it is one draw per row, always the same. Means would be narrower than what a model is trained on.
        """
        return self.decode(self.x[rows], _REFERENCE, rows)


@dataclass(frozen=True)
class Batch:
    """Samples ``x [B, *D]``, their condition (classes ``[B]`` or embeddings) or None, each sample's place ``index [B]``
    in the global batch and its row ``row [B]`` in the data set (None for a batch that comes from none). ``noise [B,
    *D]`` belongs to pairs alone: the noise that each sample is the solution of. ``first`` is the first place where
    places are consecutive, so that the host knows them without asking the device (None: it does not)."""

    x: Tensor
    label: Condition | None
    index: Tensor
    row: Tensor | None = None
    noise: Tensor | None = None
    first: int | None = None

    def split(self, parts: int) -> "list[Batch]":
        """Consecutive microbatches of equal size. ``ValueError`` where they cannot be equal."""
        if parts == 1:
            return [self]
        if len(self.x) % parts:
            raise ValueError(f"{len(self.x)} samples do not divide into {parts} equal parts")
        size = len(self.x) // parts
        return [
            Batch(
                self.x[slice(k, k + size)],
                None if self.label is None else self.label[slice(k, k + size)],
                self.index[slice(k, k + size)],
                None if self.row is None else self.row[slice(k, k + size)],
                None if self.noise is None else self.noise[slice(k, k + size)],
                None if self.first is None else self.first + k,
            )
            for k in range(0, len(self.x), size)
        ]


class BatchSource:
    """Batches of a data set, for one rank of several.

    ``batch_size`` is the global batch; rank ``k`` of ``world`` gets its ``k``-th contiguous share. The data stay on the
    device if ``resident`` (by default what the data say) asks for it or they fit, else on the host, where a thread
    gathers the batches of the next steps while this one is computed. That changes the speed and no bit of a batch.
    """

    def __init__(
        self,
        data: Dataset,
        batch_size: int,
        seed: int,
        *,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        resident: Residence | None = None,
    ) -> None:
        if batch_size % world:
            raise ValueError(f"a batch of {batch_size} does not divide among {world} processes")
        self.batch_size = batch_size
        self.seed = seed
        self._device = device
        on_host = not _stays_on(device, data, resident or data.resident)
        home = data.to(torch.device("cpu") if on_host else device)
        share = batch_size // world
        order = Order(len(data.x), batch_size, seed, home.x.device, first=rank * share, share=share)
        self._gather = _Gather(home, order, seed, pin=on_host and device.type == "cuda")
        self._ahead = Ahead(self._gather) if on_host else None
        self._data = replace(data, latent=None if data.latent is None else data.latent.to(device))
        self._mirrors = data.flip and data.mirrored is None
        self._first = rank * share
        self._index = torch.arange(self._first, self._first + share, device=device)

    def batch(self, step: int) -> Batch:
        """This rank's share of the batch of optimiser step ``step`` (counted from 0)."""
        stored = self._gather(step) if self._ahead is None else self._ahead.get(step).to(self._device)
        key, x = Key(self.seed, step), stored.x
        if self._mirrors:
            x = torch.where(mirrors(key, self._index).reshape(-1, *(1,) * (x.ndim - 1)), x.flip(-1), x)
        x = self._data.decode(x, key, self._index)
        return Batch(x, stored.label, self._index, stored.row, stored.noise, self._first)

    def close(self) -> None:
        """End the thread that gathers, if there is one. It also ends with this object."""
        if self._ahead is not None:
            self._ahead.close()


class Order:
    """Which rows of ``size`` a step's batch holds: ``share`` places from ``first`` on in each global batch."""

    def __init__(self, size: int, batch_size: int, seed: int, device: torch.device, *, first: int, share: int) -> None:
        self.index = torch.arange(first, first + share, device=device)
        self._size, self._batch_size, self._seed, self._device = size, batch_size, seed, device
        self._first, self._share = first, share
        # Small data sets begin an epoch every few steps: their orders are drawn a number at a time.
        self._at_once = max(1, 2**14 // size)
        self._from = -1
        self._orders = torch.empty(0, dtype=torch.int64)

    def rows(self, step: int) -> Tensor:
        place = step * self._batch_size + self._first
        end = place + self._share
        pieces = []
        while place < end:  # from one epoch to the next
            epoch, offset = divmod(place, self._size)
            piece = self._permutation(epoch)[offset : offset + end - place]
            pieces.append(piece)
            place += len(piece)
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _permutation(self, epoch: int) -> Tensor:
        first = epoch - epoch % self._at_once
        if first != self._from:
            key = Key(self._seed, first)
            self._orders = key.permutations("shuffle", self._size, self._at_once, self._device)
            self._from = first
        return self._orders[epoch - first]


def mirrors(key: Key, index_B: Tensor) -> Tensor:
    """Which samples of a step are mirrored, ``[B]`` bool."""
    return key.uniform("flip", index_B) < 0.5


@dataclass(frozen=True)
class _Stored:
    """A batch as it is stored, before it is decoded."""

    x: Tensor
    label: Condition | None
    row: Tensor
    noise: Tensor | None = None

    def to(self, device: torch.device) -> "_Stored":
        """From page-locked memory the copies run while the device computes."""

        label = None if self.label is None else self.label.to(device, non_blocking=True)
        noise = None if self.noise is None else self.noise.to(device, non_blocking=True)
        row = self.row.to(device, non_blocking=True)
        return _Stored(self.x.to(device, non_blocking=True), label, row, noise)


@dataclass(frozen=True)
class _Gather:
    """From a step to its stored batch."""

    data: Dataset
    order: Order
    seed: int
    pin: bool

    def __call__(self, step: int) -> _Stored:
        rows = self.order.rows(step)
        x = gathered(self.data.x, rows, pin=self.pin)
        if self.data.flip and self.data.mirrored is not None:
            mirror = mirrors(Key(self.seed, step), self.order.index)
            if x.device.type == "cpu":  # only what is needed is read from disk
                x[mirror] = self.data.mirrored[rows[mirror]]
            else:  # only the device knows how many those are
                x = torch.where(mirror.reshape(-1, *(1,) * (x.ndim - 1)), self.data.mirrored[rows], x)
        label = self.data.condition(rows, pin=self.pin)
        noise = None if self.data.noise is None else gathered(self.data.noise, rows, pin=self.pin)
        return _Stored(x, label, rows.pin_memory() if self.pin else rows, noise)


def _stays_on(device: torch.device, data: Dataset, resident: Residence) -> bool:
    """Whether the data are kept on the device: they may take half of a GPU's free memory; the rest is the training's.

    On a CPU they are where they are, in memory or in the memory map of a file.
    """
    if resident != "auto" or device.type != "cuda":
        return resident != "host"
    needed = size_bytes(data.x) + (size_bytes(data.mirrored) if data.flip and data.mirrored is not None else 0)
    needed += 0 if data.noise is None else size_bytes(data.noise)
    needed += 0 if data.embeddings is None else data.embeddings.bytes
    return 2 * needed <= torch.cuda.mem_get_info(device)[0]
