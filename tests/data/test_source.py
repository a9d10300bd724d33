"""Batches are a function of (seed, step), wherever the data lie and however many processes share them."""

import math
import threading
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep.data.ahead import Ahead
from fewstep.data.dataset import Batch, BatchSource, Dataset, LatentScale, mirrors
from fewstep.data.rows import Chunks, OnDisk, joined
from fewstep.keys import Key

CPU = torch.device("cpu")
N = 110


def pictures(flip: bool = False) -> Dataset:
    """Images no two of which, mirrored or not, are alike."""
    x = (Key(0).uniform("pixels", torch.arange(N), (3, 4, 4)) * 256).to(torch.uint8)
    return Dataset("pictures", x, torch.arange(N) % 7, 7, kind="image", flip=flip)


def cached(flip: bool = False) -> Dataset:
    """Moments of latents with mirrored copies."""
    x, mirrored = (Key(0).normal(name, torch.arange(N), (4, 2, 2)).half() for name in ("x", "mirrored"))
    latent = LatentScale.of_channels([1.0, 2.0], [0.5, 0.25], "logvar")
    return Dataset("cached", x, None, 0, kind="latents", latent=latent, mirrored=mirrored, flip=flip)


def same(a: Batch, b: Batch) -> bool:
    labels = a.label is b.label is None or (
        a.label is not None and b.label is not None and torch.equal(a.label, b.label)
    )
    assert a.row is not None
    assert b.row is not None
    return labels and torch.equal(a.x, b.x) and torch.equal(a.row, b.row) and torch.equal(a.index, b.index)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("make", [pictures, cached])
def test_gathering_ahead_changes_no_bit(make: type, flip: bool, rank: int) -> None:
    """In order, again from the middle as after a resume, backwards, and far away."""
    data = make(flip)
    resident, ahead = (
        BatchSource(data, 20, 3, device=CPU, rank=rank, world=2, resident=where) for where in ("device", "host")
    )
    for step in (*range(14), 6, 7, 2, 1, 0, 900, 901, 3):
        assert same(resident.batch(step), ahead.batch(step)), step
    ahead.close()


def test_the_data_say_where_they_stay() -> None:
    """`resident: host` of a config starts the thread; what the caller says goes first."""
    data = replace(pictures(), resident="host")
    count = threading.active_count()
    source = BatchSource(data, 20, 3, device=CPU)
    source.batch(0)
    assert threading.active_count() == count + 1
    source.close()
    assert threading.active_count() == count
    BatchSource(data, 20, 3, device=CPU, resident="device").batch(0)
    assert threading.active_count() == count


@pytest.mark.parametrize("make", [pictures, cached])
def test_ranks_and_microbatches_share_one_batch(make: type) -> None:
    """Flips and the noise of moments belong to a sample's place in the global batch."""
    data = make(True)
    whole = BatchSource(data, 24, 1, device=CPU).batch(9)
    parts = [
        piece
        for rank in range(3)
        for piece in BatchSource(data, 24, 1, device=CPU, rank=rank, world=3).batch(9).split(2)
    ]
    assert torch.equal(torch.cat([part.x for part in parts]), whole.x)
    assert torch.equal(torch.cat([part.index for part in parts]), whole.index)


def test_half_of_the_images_are_mirrored() -> None:
    """Each is its row or the mirror of it, as (seed, step, index) say; the share is 1/2 within four standard errors."""
    data = pictures(flip=True)
    source = BatchSource(data, 50, 8, device=CPU)
    flipped = []
    for step in range(100):
        batch = source.batch(step)
        assert batch.row is not None
        plain = data.samples(batch.row)
        own = (batch.x == plain).flatten(1).all(1)
        other = (batch.x == plain.flip(-1)).flatten(1).all(1)
        assert torch.equal(own, ~other)
        assert torch.equal(other, mirrors(Key(8, step), batch.index))
        flipped.append(other)
    share = torch.stack(flipped).double()
    assert abs(share.mean().item() - 0.5) < 4 * 0.5 / math.sqrt(5000)
    # And neither a step nor a place decides: both vary as fair coins do (four standard errors of a variance).
    assert 0.25 / 50 * (1 - 4 * math.sqrt(2 / 100)) < share.mean(1).var() < 0.25 / 50 * (1 + 4 * math.sqrt(2 / 100))
    assert 0.25 / 100 * (1 - 4 * math.sqrt(2 / 50)) < share.mean(0).var() < 0.25 / 100 * (1 + 4 * math.sqrt(2 / 50))


def test_without_flip_nothing_is_mirrored() -> None:
    data = pictures()
    batch = BatchSource(data, 50, 8, device=CPU).batch(0)
    assert batch.row is not None
    assert torch.equal(batch.x, data.samples(batch.row))


def test_mirrored_latents_are_the_cached_ones() -> None:
    latent = LatentScale.of_channels([0.0] * 4, [1.0] * 4)
    data = replace(cached(True), latent=latent)
    source, seen = BatchSource(data, 55, 2, device=CPU), []
    assert data.mirrored is not None
    for step in range(8):
        batch = source.batch(step)
        mirror = mirrors(Key(2, step), batch.index)
        expected = torch.where(mirror[:, None, None, None], data.mirrored[batch.row], data.x[batch.row])
        assert torch.equal(batch.x, expected.float())
        seen.append(mirror)
    assert 0 < torch.cat(seen).double().mean() < 1
    assert torch.equal(data.x, cached().x), "the stored latents stay as they are"


def test_samples_of_moments_have_their_mean_and_deviation() -> None:
    """Draws of one row over many steps: mean ``(mu - shift) scale``, deviation ``sigma scale``.

    Four standard errors; a factor of 1.05 on either, or a variance taken for a deviation, would be ten and more.
    """
    mean, std = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0])
    draws = 20_000
    stored = {"std": torch.cat((mean, std)), "logvar": torch.cat((mean, 2 * std.log()))}
    for moments, row in stored.items():
        latent = LatentScale.of_channels([1.0, 2.0], [0.5, 4.0], moments)  # type: ignore[arg-type]
        data = Dataset("one", row[None, :, None, None].repeat(draws, 1, 1, 1), None, 0, kind="latents", latent=latent)
        assert data.shape == (2, 1, 1)
        for x in (BatchSource(data, draws, 4, device=CPU).batch(7).x, data.samples(torch.arange(draws))):
            x = x[:, :, 0, 0].double()
            target, deviation = (mean - torch.tensor([1.0, 2.0])) * latent.scale.flatten(), std * latent.scale.flatten()
            assert ((x.mean(0) - target).abs() < 4 * deviation / math.sqrt(draws)).all()
            assert ((x.std(0) / deviation - 1).abs() < 4 / math.sqrt(2 * draws)).all()
            assert abs(torch.corrcoef(x.T)[0, 1].item()) < 4 / math.sqrt(draws)


def test_moments_are_drawn_anew_each_step_and_fixed_for_an_evaluation() -> None:
    data = cached()
    source = BatchSource(data, N, 0, device=CPU)
    first, second = source.batch(0), source.batch(1)
    assert first.row is not None
    assert second.row is not None
    assert not torch.isclose(first.x[first.row.argsort()], second.x[second.row.argsort()]).all(dim=1).any()
    rows = torch.tensor([5, 3])
    assert torch.equal(data.samples(rows), data.samples(torch.arange(N))[rows])


def test_samples_of_float_data_are_themselves() -> None:
    x = Key(1).normal("x", torch.arange(9), (2,))
    rows = torch.tensor([8, 0, 8])
    assert torch.equal(Dataset("points", x, None, 0, kind="points").samples(rows), x[rows])


def test_chunks_are_read_as_one() -> None:
    x = torch.arange(60).reshape(20, 3)
    parts = list(x.split([7, 1, 12]))
    chunks = Chunks(parts)
    rows = torch.tensor([19, 0, 7, 6, 8, 7, 19])
    assert torch.equal(chunks[rows], x[rows])
    assert (tuple(chunks.shape), len(chunks), chunks.dtype) == ((20, 3), 20, torch.int64)
    assert chunks.to(CPU) is chunks
    for limit in range(1, 21):
        cut = joined(parts, limit)
        assert len(cut) == limit
        assert torch.equal(cut[torch.arange(limit)], x[:limit])
        assert isinstance(cut, Tensor) == (limit <= 7)


# The thread ----------------------------------------------------------------------------------------------------------


class Failing(OnDisk):
    """Rows of zeros of which one cannot be read."""

    def __init__(self, bad: int) -> None:
        super().__init__((N, 1), torch.float32)
        self._bad = bad

    def take(self, rows_B: Tensor, out: Tensor) -> Tensor:
        if bool((rows_B == self._bad).any()):
            raise OSError(f"row {self._bad} is gone")
        return out.zero_()


def test_a_failure_in_the_thread_comes_out_of_its_batch() -> None:
    """Of that step's, not of an earlier one that was computed at the same time; other steps still work."""
    data = Dataset("failing", Failing(17), None, 0, kind="points", resident="host")
    source = BatchSource(data, 10, 0, device=CPU)
    bad = next(step for step in range(11) if 17 in BatchSource(pictures(), 10, 0, device=CPU).batch(step).row)  # type: ignore[operator]
    for step in range(11):
        if step == bad:
            with pytest.raises(OSError, match="row 17 is gone"):
                source.batch(step)
        else:
            assert source.batch(step).x.shape == (10, 1)
    source.close()


def test_the_next_steps_are_computed_while_nobody_waits() -> None:
    done: list[int] = []
    ahead = Ahead(lambda step: done.append(step) or step, depth=2)  # type: ignore[func-returns-value]
    assert ahead.get(4) == 4
    for _ in range(200):
        if len(done) == 3:
            break
        time.sleep(0.01)
    assert done == [4, 5, 6]
    assert ahead.get(5) == 5
    assert ahead.get(6) == 6
    ahead.close()
    assert done[:3] == [4, 5, 6]
    assert len(done) == len(set(done)), "nothing is computed twice"


def test_the_thread_ends_with_its_source() -> None:
    count = threading.active_count()
    source = BatchSource(pictures(), 10, 0, device=CPU, resident="host")
    source.batch(0)
    assert threading.active_count() == count + 1
    del source
    for _ in range(200):
        if threading.active_count() == count:
            return
        time.sleep(0.01)
    pytest.fail("the thread is still there")
