"""The same images in every layout give the same batches, bit for bit, directly and as shards."""

import json
import os
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import contents, succeed
from written import COUNT, LAYOUTS, images, png

from fewstep.data.config import DataConfig, FilesConfig, ImagesConfig, ParquetConfig
from fewstep.data.dataset import BatchSource, Dataset
from fewstep.data.detect import CONFIGS, data_config, detect
from fewstep.data.digests import content_digest
from fewstep.data.load import LOADS, OPENS, load_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("layouts")
    return {name: write(folder / name.replace(" ", "-")) for name, (_, write) in LAYOUTS.items()}


@pytest.fixture(scope="module")
def prepared(laid_out: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every layout as shards, of another size each."""
    folder = tmp_path_factory.mktemp("prepared")
    for number, (name, path) in enumerate(laid_out.items()):
        succeed("data", "prepare", path, "--out", folder / name, "--shard-size", 40 + 25 * number)
    return {name: folder / name for name in laid_out}


def test_every_kind_of_data_has_a_loader() -> None:
    blocks = get_args(get_args(DataConfig)[0])
    assert {block.model_fields["kind"].default for block in blocks} == set(LOADS)
    assert {kind for kind, block in CONFIGS.items() if issubclass(block, ImagesConfig)} == set(OPENS)
    assert set(CONFIGS.values()) == {block for block in blocks if issubclass(block, FilesConfig)}
    assert all(block.model_fields["kind"].default == kind for kind, block in CONFIGS.items())


def in_memory() -> Dataset:
    return Dataset("digits", *images(), 10, kind="image")


def same_batches(a: Dataset, b: Dataset) -> None:
    """Over more than three epochs, of which none ends with a batch."""
    one, other = (BatchSource(data, 64, 5, device=CPU) for data in (a, b))
    for step in range(3 * COUNT // 64 + 2):
        first, second = one.batch(step), other.batch(step)
        assert torch.equal(first.x, second.x)
        assert first.x.dtype == torch.float32
        assert first.label is not None
        assert second.label is not None
        assert torch.equal(first.label, second.label)
        assert first.row is not None
        assert torch.equal(first.row, second.row)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_batches_of_the_arrays(name: str, laid_out: dict[str, Path]) -> None:
    path = laid_out[name]
    assert detect(path) == LAYOUTS[name][0]
    data = load_data(data_config(str(path), detect(path)))
    assert (data.shape, data.num_classes, data.kind) == ((1, 8, 8), 10, "image")
    assert data.x.dtype == torch.uint8
    same_batches(data, in_memory())


@pytest.mark.parametrize("name", LAYOUTS)
def test_shards_of_every_layout_give_the_same_batches(name: str, prepared: dict[str, Path]) -> None:
    data = load_data(data_config(str(prepared[name]), detect(prepared[name])))
    assert len(list(prepared[name].glob("*.safetensors"))) > 1
    same_batches(data, in_memory())


def test_pixels_are_grey_levels_over_127_5_minus_1() -> None:
    x, _ = images()
    batch = BatchSource(in_memory(), COUNT, 0, device=CPU).batch(0)
    assert torch.equal(batch.x, x[batch.row].float() / 127.5 - 1)
    assert (batch.x.min(), batch.x.max()) == (-1, 1)


def test_the_digest_is_that_of_the_content(prepared: dict[str, Path]) -> None:
    """Neither the layout nor the size of the shards changes it; one pixel, one label, or their order does."""
    metas = [json.loads((path / "meta.json").read_text()) for path in prepared.values()]
    whole = in_memory()
    assert {meta["digest"] for meta in metas} == {content_digest(whole)}
    assert len({len(meta["shards"]) for meta in metas}) > 1
    x, label = images()
    pixel, moved = x.clone(), label.clone()
    pixel[-1, 0, 7, 7] ^= 1
    moved[0] += 1
    order = torch.arange(COUNT).flip(0)
    others = [(pixel, label, 10), (x, moved, 10), (x[order], label[order], 10), (x[1:], label[1:], 10), (x, label, 11)]
    digests = {content_digest(Dataset("", *other, kind="image")) for other in others}
    assert len(digests | {content_digest(whole)}) == 6


def test_preparing_is_idempotent(laid_out: dict[str, Path], tmp_path: Path) -> None:
    """Again over what is there: the same bytes. Shards of shards: the same shards, but for where they came from."""
    out, again = tmp_path / "shards", tmp_path / "again"
    write = ("data", "prepare", laid_out["zip"], "--out", out, "--shard-size", 128, "--overwrite")
    succeed(*write)
    first = contents(out)
    succeed(*write)
    assert contents(out) == first
    succeed("data", "prepare", out, "--out", again, "--shard-size", 128)
    second = contents(again)
    metas = [json.loads(files.pop("meta.json")) for files in (first, second)]
    assert first == second
    assert [meta.pop("source") for meta in metas] == [str(laid_out["zip"]), str(out)]
    assert metas[0] == metas[1]
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_shards_are_mapped_and_not_read(prepared: dict[str, Path]) -> None:
    """What is drawn comes from the file as it is then: a changed byte shows (and `inspect` finds it by its digest)."""
    data = load_data(data_config(str(prepared["zip"]), "shards"))
    before = data.x[torch.tensor([0])].clone()
    file = prepared["zip"] / "shard-00000.safetensors"
    content = file.read_bytes()
    at = content.index(before.numpy().tobytes())
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(bytes([content[at] ^ 255]))
    try:
        changed = data.x[torch.tensor([0])]
        assert int((changed != before).sum()) == 1
    finally:
        file.write_bytes(content)


def test_parquet_is_read_in_any_order_and_few_rows_are_kept(
    laid_out: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row groups hold 37 rows: those of the last two are kept, however little memory is allowed."""
    import fewstep.data.parquet

    monkeypatch.setattr(fewstep.data.parquet, "_KEPT_ROWS", 50)
    read = fewstep.data.parquet.open_parquet(ParquetConfig(path="-"), laid_out["parquet"]).read
    x, _ = images()
    for row in (299, 0, 150, 36, 37, 169, 170, 0, 299, *range(COUNT)):
        assert read(row) == png(x[row])
    rows: fewstep.data.parquet._Rows = read.__self__  # type: ignore[attr-defined]
    assert len(rows._kept) == 2


def test_the_first_images_alone(laid_out: dict[str, Path], prepared: dict[str, Path]) -> None:
    """``max_images`` cuts after the order is fixed, within a shard or not, and leaves the number of classes."""
    x, label = images()
    for path in (*laid_out.values(), *prepared.values()):
        data = load_data(data_config(str(path), detect(path), max_images=101))
        rows = torch.arange(101)
        assert len(data.x) == 101
        assert torch.equal(data.x[rows], x[:101])
        assert data.label is not None
        assert torch.equal(data.label, label[:101])
        assert data.num_classes == 10


def test_labels_can_be_ignored_or_insisted_on(laid_out: dict[str, Path], prepared: dict[str, Path]) -> None:
    for path in (*laid_out.values(), prepared["zip"]):
        data = load_data(data_config(str(path), detect(path), labels=False))
        assert (data.label, data.num_classes, data.class_names) == (None, 0, ())
        assert load_data(data_config(str(path), detect(path), labels=True)).num_classes == 10


def test_class_folders_have_names(laid_out: dict[str, Path], prepared: dict[str, Path]) -> None:
    for path in (laid_out["folder"], prepared["folder"]):
        assert load_data(data_config(str(path), detect(path))).class_names == tuple("0123456789")


@pytest.mark.skipif("FEWSTEP_DATA" not in os.environ, reason="FEWSTEP_DATA names no folder of data")
def test_cifar10_jpeg() -> None:
    """The benchmarks' own data: 50,000 images, 5,000 of each class, the second one decoded as PIL decodes it."""
    path = "$FEWSTEP_DATA/cifar10-jpeg/train.parquet"
    if not Path(os.path.expandvars(path)).is_file():
        pytest.skip(f"no {path}")
    import io

    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    data = load_data(ParquetConfig(path=path))
    assert (data.name, data.shape, data.num_classes) == ("cifar10-jpeg-train", (3, 32, 32), 10)
    assert data.label is not None
    assert data.label.bincount().tolist() == [5000] * 10
    assert data.class_names[:2] == ("airplane", "automobile")
    last = pq.read_table(os.path.expandvars(path)).column("img")[-1].as_py()["bytes"]
    expected = np.asarray(Image.open(io.BytesIO(last)))
    assert np.array_equal(data.x[torch.tensor([-1])][0].permute(1, 2, 0).numpy(), expected)
