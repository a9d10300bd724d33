"""Conditions that are several tensors: whatever is done with a class is done with them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import OBJECTIVES, SEED, paired_digits
from torch import Tensor

from fewstep.condition import Condition, Embeddings, joined, lose, lost, without
from fewstep.data.config import FolderConfig
from fewstep.data.dataset import Batch, BatchSource
from fewstep.data.embedding_files import load_embeddings
from fewstep.data.embeddings import EmbeddingRows
from fewstep.data.load import digits, load_data
from fewstep.errors import UsageError
from fewstep.keys import Key
from fewstep.networks.mlp import MLP

NONE = {"one_hot": torch.zeros(1, 10), "mask": torch.zeros(1, 2, dtype=torch.bool)}


def embedded(label_B: Tensor) -> Embeddings:
    """Classes as two tensors; what stands for no class is not among them."""
    present_B = torch.ones(len(label_B), 2, dtype=torch.bool)
    values = {"one_hot": torch.nn.functional.one_hot(label_B, 10).float(), "mask": present_B}
    return Embeddings(values, NONE, torch.zeros(len(label_B), dtype=torch.bool))


def classes(condition: Condition | None) -> Tensor | None:
    """The classes again, 10 for none: what a network makes of the tensors that it is told."""
    if not isinstance(condition, Embeddings):
        return condition
    told = condition.told()
    assert bool((told["mask"].all(dim=1) == (told["one_hot"].sum(dim=1) == 1)).all())
    return torch.where(told["mask"].all(dim=1), told["one_hot"].argmax(dim=1), 10)


@pytest.fixture
def networks_read_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = MLP.forward

    def forward(self: MLP, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Any = None, *rest: Any) -> Tensor:
        return plain(self, x, t_B, r_B, classes(label_B), *rest)

    monkeypatch.setattr(MLP, "forward", forward)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.usefixtures("networks_read_embeddings")
def test_every_objective_does_with_embeddings_what_it_does_with_classes(name: str) -> None:
    data = paired_digits()
    rows = torch.arange(16)
    assert data.label is not None
    assert data.noise is not None
    batch = Batch(data.samples(rows), data.label[rows], rows, rows, data.noise[rows])
    objective, key = OBJECTIVES[name](), Key(SEED, 3)
    with_classes = objective(batch, key)
    with_embeddings = objective(replace(batch, label=embedded(data.label[rows])), key)
    assert torch.equal(with_classes.per_sample_B, with_embeddings.per_sample_B)
    with_others = objective(replace(batch, label=embedded(data.label[rows].roll(1))), key)
    assert not torch.equal(with_classes.per_sample_B, with_others.per_sample_B)


def test_conditions_lose_join_and_part() -> None:
    label = torch.tensor([3, 1, 4, 1, 5])
    mask = torch.tensor([True, False, True, False, False])
    for condition in (label, embedded(label)):
        assert torch.equal(lost(lose(condition, mask, 10), 10), mask)
        assert torch.equal(lost(without(condition, 10), 10), torch.ones(5, dtype=torch.bool))
        both = joined(lose(condition, mask, 10), condition)
        assert len(both) == 10
        found = classes(both[torch.tensor([0, 1, 5, 9])])
        assert found is not None
        assert found.tolist() == [10, 1, 3, 5]
    with pytest.raises(ValueError, match="do not go into one batch"):
        joined(label, embedded(label))
    # Who has lost its own is told what stands for none, and keeps its own in store.
    told = lose(embedded(label), mask, 10).told()
    assert torch.equal(told["one_hot"][0], NONE["one_hot"][0])


@pytest.mark.parametrize(
    ("values", "none", "says"),
    [
        ({}, {}, "embeddings"),
        ({"text": torch.zeros(2, 3)}, {"other": torch.zeros(1, 3)}, "for no condition"),
        ({"text": torch.zeros(3, 3)}, {"text": torch.zeros(1, 3)}, "for 2 samples"),
        ({"text": torch.zeros(2, 3)}, {"text": torch.zeros(1, 4)}, "for 2 samples"),
    ],
)
def test_embeddings_that_do_not_fit_together(values: Any, none: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Embeddings(values, none, torch.zeros(2, dtype=torch.bool))


def test_rows_of_files_go_with_their_samples(tmp_path: Path) -> None:
    """Through the memory map, over several files, on one process or as one of two."""
    data = digits()
    assert data.label is not None
    told = embedded(data.label)
    for number, rows in enumerate(torch.arange(len(data.x)).split(700)):
        tensors = {name: value[rows].contiguous() for name, value in told.values.items()}
        none = {f"none.{name}": value for name, value in NONE.items()} if number == 1 else {}
        save_file({**tensors, **none}, tmp_path / f"part-{number}.safetensors")
    rows = load_embeddings(tmp_path, len(data.x))
    with_rows = replace(data, label=None, num_classes=0, embeddings=rows)
    assert with_rows.conditional
    for world in (1, 2):
        for rank in range(world):
            here, there = (
                BatchSource(each, 64, 5, device=torch.device("cpu"), rank=rank, world=world)
                for each in (data, with_rows)
            )
            for step in (0, 27, 28, 100):  # an epoch ends at 28
                batch, other = here.batch(step), there.batch(step)
                assert torch.equal(batch.x, other.x)
                found = classes(other.label)
                assert isinstance(batch.label, Tensor)
                assert found is not None
                assert torch.equal(batch.label, found)
                parts = [classes(part.label) for part in other.split(2)]
                assert torch.equal(torch.cat([part for part in parts if part is not None]), batch.label)
    # Samples beyond the data take their rows again from the first on.
    again = classes(with_rows.drawn_condition(torch.tensor([0, len(data.x), len(data.x) + 2])))
    assert again is not None
    assert torch.equal(again, data.label[[0, 0, 2]])


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"text": torch.zeros(9, 3), "none.text": torch.zeros(1, 3)}, "has 9 rows of text for 10 samples"),
        ({"text": torch.zeros(11, 3), "none.text": torch.zeros(1, 3)}, "has 11 rows of text for 10 samples"),
        ({"text": torch.zeros(10, 3)}, r"a tensor none.text of shape \[1, 3\]"),
        ({"text": torch.zeros(10, 3), "none.text": torch.zeros(1, 4)}, r"a tensor none.text of shape \[1, 3\]"),
        ({"none.text": torch.zeros(1, 4)}, "holds no tensors of samples"),
        (
            {"text": torch.zeros(10, 3), "none.text": torch.zeros(1, 3), "none.mask": torch.zeros(1, 3)},
            "has none.mask and no mask",
        ),
    ],
)
def test_files_that_do_not_fit_their_samples(tmp_path: Path, tensors: dict[str, Tensor], says: str) -> None:
    save_file(tensors, tmp_path / "texts.safetensors")
    with pytest.raises(UsageError, match=says):
        load_embeddings(tmp_path / "texts.safetensors", 10)


def test_the_first_of_more_rows_go_with_the_first_images(tmp_path: Path) -> None:
    save_file({"text": torch.arange(10.0)[:, None], "none.text": torch.zeros(1, 1)}, tmp_path / "texts.safetensors")
    rows = load_embeddings(tmp_path / "texts.safetensors", 4, first=True)
    assert isinstance(rows, EmbeddingRows)
    assert len(rows) == 4
    assert rows.take(torch.tensor([3])).told()["text"].item() == 3
    with pytest.raises(UsageError, match="is no safetensors file"):
        load_embeddings(tmp_path / "nothing", 4)
    with pytest.raises(UsageError, match="nowhere"):
        load_data(FolderConfig(path=str(tmp_path / "nowhere"), embeddings="texts.safetensors"))
