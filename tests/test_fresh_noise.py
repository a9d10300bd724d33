"""Noise of several nodes in one draw: the numbers that each node would have alone, from every source that is keyed."""

import pytest
import torch
from torch import Tensor

from fewstep import sampling
from fewstep.keys import Key, StepsKey
from fewstep.sampling import fresh_noise
from fewstep.sources import SOURCES, gaussian

INDEX = torch.tensor([7, 0, 2**40 + 3])


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 3)])
@pytest.mark.parametrize("source", SOURCES)
def test_a_row_of_any_step_has_the_numbers_of_that_step(source: str, shape: tuple[int, ...]) -> None:
    if source == "sphere" and not shape:
        shape = (1,)  # a point on a sphere has coordinates
    steps = [4, 4, 2**31]
    together = SOURCES[source](StepsKey(9, step_B=torch.tensor(steps)), "p", INDEX, shape)
    for row, step in enumerate(steps):
        assert torch.equal(together[row], SOURCES[source](Key(9, step), "p", INDEX, shape)[row])


@pytest.mark.parametrize("source", SOURCES)
def test_at_once_or_one_by_one(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches are drawn at once, large ones are not; the bits are the same."""
    draws: list[int] = []

    def counted(key: Key, purpose: str, index_B: Tensor, shape: tuple[int, ...]) -> Tensor:
        draws.append(len(index_B))
        return known(key, purpose, index_B, shape)

    known = SOURCES[source]
    monkeypatch.setitem(SOURCES, source, counted)
    at_once = list(fresh_noise(counted, 5, INDEX, (2, 3), 4))
    assert draws == [12]
    monkeypatch.setattr(sampling, "AT_ONCE", 4 * 3 * 6 - 1)
    one_by_one = list(fresh_noise(counted, 5, INDEX, (2, 3), 4))
    assert draws == [12, 3, 3, 3, 3]
    assert len(at_once) == len(one_by_one) == 4
    for node, (a, b) in enumerate(zip(at_once, one_by_one, strict=True)):
        assert torch.equal(a, b)
        assert torch.equal(a, known(Key(5, node), "renoise", INDEX, (2, 3)))


def test_another_source_is_asked_for_every_node() -> None:
    """It may count its calls, or look at the step of its key."""
    asked: list[tuple[type[Key], int, str]] = []

    def source(key: Key, purpose: str, index_B: Tensor, shape: tuple[int, ...]) -> Tensor:
        asked.append((type(key), key.step, purpose))
        return gaussian(key, purpose, index_B, shape)

    assert len(list(fresh_noise(source, 0, INDEX, (2,), 3))) == 3
    assert asked == [(Key, 0, "renoise"), (Key, 1, "renoise"), (Key, 2, "renoise")]


def test_no_nodes_no_noise() -> None:
    """One step draws none."""
    assert list(fresh_noise(gaussian, 0, INDEX, (2,), 0)) == []
