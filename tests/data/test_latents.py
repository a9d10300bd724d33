"""Latents in the layouts of others and in ours: the right numbers and statistics, and what can be wrong with them."""

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import contents, refuse, succeed
from safetensors.torch import save_file
from torch import Tensor

from fewstep.data.config import LatentsConfig
from fewstep.data.dataset import BatchSource, Dataset, mirrors
from fewstep.data.detect import data_config, detect
from fewstep.data.digests import content_digest
from fewstep.data.load import load_data
from fewstep.keys import Key

CPU = torch.device("cpu")
N = 23
ROWS = torch.arange(N)


def load(path: Path, **options: object) -> Dataset:
    return load_data(LatentsConfig(path=str(path), **options))  # type: ignore[arg-type]


# LightningDiT --------------------------------------------------------------------------------------------------------


def lightning() -> dict[str, Tensor]:
    normal = {name: Key(0).normal(name, ROWS, (3, 2, 2)) for name in ("latents", "latents_flip")}
    return {**normal, "labels": ROWS % 4}


def as_lightning(path: Path, *, statistics: bool = True, drop: tuple[str, ...] = ()) -> Path:
    path.mkdir()
    tensors = {name: tensor for name, tensor in lightning().items() if name not in drop}
    for shard, rows in enumerate(ROWS.split(9)):
        save_file({name: x[rows] for name, x in tensors.items()}, path / f"latents_rank00_shard{shard:03d}.safetensors")
    if statistics:
        mean, std = torch.tensor([1.0, 0.0, -2.0]), torch.tensor([0.5, 2.0, 4.0])
        torch.save({"mean": mean[None, :, None, None], "std": std[None, :, None, None]}, path / "latents_stats.pt")
    return path


def test_lightning_latents_are_centred_and_scaled_by_their_statistics(tmp_path: Path) -> None:
    path = as_lightning(tmp_path / "cache")
    assert detect(path) == "latents"
    data = load(path)
    assert (data.shape, data.num_classes, data.kind) == ((3, 2, 2), 4, "latents")
    assert data.label is not None
    assert torch.equal(data.label, ROWS % 4)
    z = lightning()["latents"]
    expected = (z - torch.tensor([1.0, 0.0, -2.0])[:, None, None]) / torch.tensor([0.5, 2.0, 4.0])[:, None, None]
    assert torch.equal(data.samples(ROWS), expected), "the deviations are powers of two: nothing is rounded"
    assert len(load(path, max_images=10).x) == 10
    assert load(path, labels=False).label is None


def test_the_config_may_say_the_scale(tmp_path: Path) -> None:
    """Each of the two by itself, and both where there are no statistics."""
    path, bare = as_lightning(tmp_path / "cache"), as_lightning(tmp_path / "bare", statistics=False)
    z = lightning()["latents"]
    mean = torch.tensor([1.0, 0.0, -2.0])[:, None, None]
    assert torch.equal(load(path, scale=0.5).samples(ROWS), (z - mean) * 0.5)
    assert torch.equal(load(bare, scale=(1, 2, 4), shift=0).samples(ROWS), z * torch.tensor([1, 2, 4.0])[:, None, None])
    yaml = recipe(tmp_path, bare)
    refuse("teach", yaml, says=(str(bare), "latents_stats.pt", "data.scale"))
    refuse("teach", yaml, "data.scale=[1, 2]", "data.shift=0", says=("2 values of data.scale", "3 channels"))


def recipe(tmp_path: Path, path: Path, kind: str = "latents") -> Path:
    file = tmp_path / "own.yaml"
    file.write_text(
        f'name: own\ndata: {{kind: {kind}, path: "{path}"}}\n'
        "student: {kind: velocity, init: scratch, network: {kind: mlp, width: 8, depth: 1}}\n"
        "objective: {kind: flow_matching}\ntrain: {steps: 2, batch_size: 8}\n"
        "evaluate: {steps: [1], teacher_steps: [], n: 20, features: [identity]}\n"
    )
    return file


def test_the_mirrored_copies_are_taken(tmp_path: Path) -> None:
    path = as_lightning(tmp_path / "cache")
    batch = BatchSource(load(path, flip=True, scale=1.0, shift=0.0), N, 0, device=CPU).batch(0)
    both, mirror = lightning(), mirrors(Key(0), ROWS)
    assert 0 < int(mirror.sum()) < N
    assert batch.row is not None
    picked = torch.where(mirror[:, None, None, None], both["latents_flip"][batch.row], both["latents"][batch.row])
    assert torch.equal(batch.x, picked)
    none = as_lightning(tmp_path / "none", drop=("latents_flip",))
    refuse("teach", recipe(tmp_path, none), "data.flip=true", says=(str(none), "no mirrored latents"))


@pytest.mark.parametrize("content", [b"", b"not a pickle"])
def test_statistics_that_are_no_tensors(content: bytes, tmp_path: Path) -> None:
    path = as_lightning(tmp_path / "cache")
    (path / "latents_stats.pt").write_bytes(content)
    refuse("data", "inspect", path, says=(str(path / "latents_stats.pt"), "damaged"))


class Attack:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_statistics_that_carry_code(tmp_path: Path) -> None:
    path, made = as_lightning(tmp_path / "cache"), tmp_path / "made"
    torch.save({"mean": torch.zeros(3), "std": torch.ones(3), "more": Attack(made)}, path / "latents_stats.pt")
    refuse("data", "inspect", path, says=(str(path / "latents_stats.pt"), "more than tensors"))
    assert not made.exists()


def test_statistics_without_a_mean(tmp_path: Path) -> None:
    path = as_lightning(tmp_path / "cache")
    torch.save({"std": torch.ones(3)}, path / "latents_stats.pt")
    refuse("data", "inspect", path, says=(str(path / "latents_stats.pt"), "mean"))


def test_shards_that_do_not_go_together(tmp_path: Path) -> None:
    path = as_lightning(tmp_path / "cache")
    odd = path / "latents_rank01_shard000.safetensors"
    for tensors in (
        {**lightning(), "latents": torch.zeros(N, 3, 2, 3)},
        {**lightning(), "labels": torch.arange(N - 1)},
        {"latents": torch.zeros(N, 3, 2, 2)},
    ):
        save_file(tensors, odd)
        refuse("data", "inspect", path, says=(str(odd),))
    odd.write_bytes(b"x")
    refuse("data", "inspect", path, says=(str(odd), "damaged"))


# EDM2 and REPA -------------------------------------------------------------------------------------------------------


def moments(spread: float = 4.0) -> np.ndarray:
    """Means of deviation ``spread`` and deviations between 0 and 1."""
    mean = Key(1).normal("mean", ROWS, (4, 2, 2)).numpy() * spread
    std = Key(1).uniform("std", ROWS, (4, 2, 2)).float().numpy()
    return np.concatenate((mean, std), axis=1)


def array_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def as_edm2(path: Path, spread: float = 4.0) -> Path:
    labels = []
    for number, array in enumerate(moments(spread)):
        name = f"{number // 10:05d}/img-mean-std-{number:08d}.npy"
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(array_bytes(array))
        labels.append([name, number % 3])
    (path / "dataset.json").write_text(json.dumps({"labels": labels}))
    return path


def as_edm2_zip(path: Path) -> Path:
    tree, path = as_edm2(path), path.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(tree.rglob("*"), reverse=True):
            if file.is_file():
                archive.write(file, file.relative_to(tree).as_posix())
    return path


def as_repa(path: Path) -> Path:
    (path / "images" / "00000").mkdir(parents=True)
    (path / "images" / "00000" / "img00000000.png").write_bytes(b"")
    as_edm2(path / "vae-sd")
    return path


def test_repas_trees_have_repas_scale(tmp_path: Path) -> None:
    data = load(as_repa(tmp_path / "cache"))
    assert data.latent is not None
    assert data.latent.scale.flatten().tolist() == [pytest.approx(0.18215)] * 4
    assert not data.latent.shift.any()


@pytest.mark.parametrize("write", [as_edm2, as_edm2_zip])
def test_edm2_trees(write: object, tmp_path: Path) -> None:
    """``mean + std noise``, brought to a deviation of 0.5 by EDM2's constants; the noise is keyed by (seed, step)."""
    path = write(tmp_path / "cache")  # type: ignore[operator]
    assert detect(path) == "latents"
    data = load(path)
    assert (data.shape, data.num_classes) == ((4, 2, 2), 3)
    assert data.label is not None
    assert torch.equal(data.label, ROWS % 3)
    stored = torch.from_numpy(moments())
    assert torch.equal(data.x[ROWS], stored)
    raw_mean = torch.tensor([5.81, 3.25, 0.12, -2.15])[:, None, None]
    raw_std = torch.tensor([4.17, 4.62, 3.71, 3.28])[:, None, None]
    batch = BatchSource(data, N, 6, device=CPU).batch(2)
    mean, std = stored[batch.row].chunk(2, dim=1)
    z = mean + std * Key(6, 2).normal("latent", ROWS, (4, 2, 2))
    torch.testing.assert_close(batch.x, (z - raw_mean) / raw_std * 0.5, rtol=1e-5, atol=1e-6)
    repa = BatchSource(load(path, scale=0.18215, shift=0), N, 6, device=CPU).batch(2)
    torch.testing.assert_close(repa.x, z * 0.18215, rtol=1e-6, atol=1e-7)


def test_files_of_latents_that_are_broken(tmp_path: Path) -> None:
    path = as_edm2(tmp_path / "cache")
    file = path / "00001" / "img-mean-std-00000012.npy"
    refused = (
        (b"", "cannot be read as an array"),
        (array_bytes(np.array([{}])), "cannot be read as an array"),  # a pickle inside
        (array_bytes(np.zeros((8, 2, 3), np.float32)), "[8, 2, 3]"),
        (array_bytes(np.zeros((8, 2, 2), np.int64)), "int64"),
        (array_bytes(np.zeros((7, 2, 2), np.float32)), "[2 C, H, W]"),
    )
    for content, says in refused:
        file.write_bytes(content)
        refuse("data", "inspect", path, says=(str(file), says))
    file.unlink()
    refuse("data", "inspect", path, says=(str(file), "missing"))


def test_a_broken_latent_stops_a_training_with_its_name(tmp_path: Path) -> None:
    """It is read by the thread that gathers, hours into a run maybe."""
    path = as_edm2(tmp_path / "cache")
    (path / "00001" / "img-mean-std-00000012.npy").write_bytes(b"")
    yaml = recipe(tmp_path, path)
    overrides = ("data.resident=host", "train.steps=9", "train.log_every=1000")
    refuse("teach", yaml, *overrides, "--out", tmp_path / "run", says=("img-mean-std-00000012.npy", "cannot be read"))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


# As shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [as_lightning, as_edm2, as_edm2_zip, as_repa])
def test_any_latents_become_shards(write: object, tmp_path: Path) -> None:
    """In 16 bits, with scale, kind and mirrored copies; shards of shards are the same."""
    path = write(tmp_path / "cache")  # type: ignore[operator]
    data, out, again = load(path), tmp_path / "shards", tmp_path / "again"
    succeed("data", "prepare", path, "--out", out, "--shard-size", 7)
    shards = load(out)
    assert load_data(data_config(str(out), "shards")).latent is not None
    assert shards.x.dtype == torch.float16
    assert torch.equal(shards.x[ROWS], data.x[ROWS].half())
    assert (data.mirrored is None) == (shards.mirrored is None)
    if data.mirrored is not None and shards.mirrored is not None:
        assert torch.equal(shards.mirrored[ROWS], data.mirrored[ROWS].half())
    assert (shards.shape, shards.num_classes) == (data.shape, data.num_classes)
    torch.testing.assert_close(shards.samples(ROWS), data.samples(ROWS), rtol=1e-2, atol=1e-2)
    succeed("data", "prepare", out, "--out", again, "--shard-size", 7)
    first, second = contents(out), contents(again)
    assert json.loads(first.pop("meta.json"))["digest"] == json.loads(second.pop("meta.json"))["digest"]
    assert first == second
    assert content_digest(load(out, scale=2.0)) != content_digest(shards) == content_digest(load(again))
    assert torch.equal(
        load(out, scale=2.0, shift=0).samples(ROWS)[0], load(again, scale=1, shift=0).samples(ROWS)[0] * 2
    )


def test_latents_that_16_bits_do_not_hold(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.mkdir()
    save_file({"latents": torch.full((3, 2, 1, 1), 70_000.0)}, path / "a.safetensors")
    yaml = recipe(tmp_path, path)
    yaml.write_text(yaml.read_text().replace("latents,", "latents, scale: 1, shift: 0,"))
    refuse("data", "prepare", yaml, "--out", tmp_path / "shards", says=(str(path), "16 bits"))
    assert not (tmp_path / "shards").exists()


def test_what_is_inspected_is_the_distribution_of_the_samples(tmp_path: Path) -> None:
    """Means and deviations of moments without a draw: those of many draws, within four standard errors.

    The means vary little here, so that leaving out the noise would be wrong by three quarters of the deviation.
    """
    path = as_edm2(tmp_path / "cache", spread=0.1)
    found = json.loads(succeed("data", "inspect", path, "--json").stdout)
    data = load(path)
    source = BatchSource(data, N, 0, device=CPU)
    x = torch.cat([source.batch(step).x for step in range(400)]).transpose(0, 1).flatten(1).double()
    # The rows are always the same, so only the noise varies: its share of the variance is small.
    error = torch.tensor(found["std"]) / (x.shape[1] ** 0.5)
    assert ((x.mean(1) - torch.tensor(found["mean"])).abs() < 4 * error).all()
    assert ((x.std(1) / torch.tensor(found["std"]) - 1).abs() < 4 / (2 * x.shape[1]) ** 0.5).all()


def test_latents_are_taught_and_evaluated(tmp_path: Path) -> None:
    """On samples of the shape of a draw, with the features that need no image."""
    path, run = as_edm2(tmp_path / "cache"), tmp_path / "run"
    yaml = recipe(tmp_path, path)
    succeed("teach", yaml, "--out", run)
    assert json.loads((run / "model" / "config.json").read_text())["data"]["shape"] == [4, 2, 2]
    rows = json.loads(succeed("evaluate", run, "--json").stdout)["rows"]
    assert rows[0]["metrics"]["fd_identity"]["value"] > 0
    succeed("sample", run, "--n", 4, "--steps", 1)
    refuse("evaluate", run, "--features", "pixels", says=("pixels", "latents", "identity"))
