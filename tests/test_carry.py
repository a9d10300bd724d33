"""Runs that are packed into small parts and unpacked elsewhere: what is rounded and by how much, what is not, and that
trainings go on."""

import importlib.util
import json
import math
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import SMALL, contents, refuse, student, succeed
from torch import Tensor

from fewstep.checkpoint import (
    Checkpoint,
    RunDirectory,
    Tensors,
    checkpoints,
    read_checkpoint,
    read_model,
    write_checkpoint,
)
from fewstep.config import load_config
from fewstep.distill.run import Interrupted, run_training
from fewstep.files import read_json

FOLDER = Path(__file__).parent.parent / "benchmarks" / "cifar10_jpeg"

METHODS = {
    "teacher": ("digits-teacher", ("train.steps=12",)),
    # Stages of 4, 4, 8 and 8 steps.
    "progressive": ("digits-progressive", ("train.steps=4", "objective.start_steps=16")),
    "consistency": (
        "digits-consistency",
        ("train.steps=12", "objective.target_decay=0.9", "train.ema=[0.5, 0.99]", "train.optimizer=radam"),
    ),
    # Pairs, 4 steps, pairs of the average, 4 steps.
    "reflow": ("digits-reflow", ("train.steps=4", "objective.pairs={count: 64, steps: 2}")),
}


@pytest.fixture
def carry(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("carry", monkeypatch)


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("rounding", monkeypatch)


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def overrides(method: str, teacher: Path) -> tuple[str, ...]:
    return (*(SMALL if method == "teacher" else student(teacher)), *METHODS[method][1])


def stopped(recipe: str, own: Sequence[str], run: Path, at: int) -> Path:
    """A run, begun or gone on with, that was asked to stop after so many steps in all."""
    resume = run.exists()
    done = newest(run).state["step"] if resume else 0
    training = run_training(
        load_config(recipe, own), RunDirectory(run), resume=resume, overwrite=False, stopped=lambda: done + 1 >= at
    )
    with pytest.raises(Interrupted, match=f"stopped at step {at} "):  # noqa: PT012
        for progress in training:
            done = progress.step
    return run


def newest(run: Path) -> Checkpoint:
    return read_checkpoint(checkpoints(run / "checkpoints")[-1])


def logged(run: Path, what: str = "step") -> list[Any]:
    return [json.loads(line)[what] for line in (run / "metrics.jsonl").read_text().splitlines()]


def moved(carry: ModuleType, run: Path, folder: Path, **options: Any) -> tuple[dict[str, Any], Path]:
    """A run packed and unpacked below a folder: what was said, and where it is."""
    said = carry.pack(run, folder / "parts", **options)
    assert carry.unpack(folder / "parts", folder / "run") == said
    return said, folder / "run"


def flat(tensors: Tensors) -> Tensor:
    return torch.cat([value.flatten() for _, value in sorted(tensors.items())])


def near(carried: Tensor, value: Tensor) -> bool:
    """The same type and shape, and rounded as weights may be: to the nearest bfloat16, less than two dimensions not."""
    if value.dtype != torch.float32 or value.ndim < 2:
        return carried.dtype == value.dtype and torch.equal(carried, value)
    same = carried.dtype == value.dtype and carried.shape == value.shape
    return same and bool(((carried - value).abs() <= 2**-8 * value.abs()).all())


def alike(carried: Tensors, tensors: Tensors) -> bool:
    return carried.keys() == tensors.keys() and all(near(carried[name], tensors[name]) for name in tensors)


# Second moments ------------------------------------------------------------------------------------------------------


def wide(*shape: int, seed: int = 0) -> Tensor:
    """Squares of gradients over some twelve orders of magnitude, far from rank one."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(7).exp() * 1e-9


def again(rounding: ModuleType, v: Tensor, name: str = "3.exp_avg_sq") -> tuple[str, Tensor]:
    how, kept = rounding.fold("optimizer", name, v)
    return how, rounding.unfold(how, kept, v.shape, v.dtype)


def test_a_second_moment_of_rank_one_comes_back(rounding: ModuleType) -> None:
    v = wide(40)[:, None] * wide(27, seed=1)[None] * 1e9
    how, back = again(rounding, v.reshape(40, 3, 3, 3))
    assert how == "factored"
    torch.testing.assert_close(back.flatten(1), v, rtol=1e-6, atol=0)


def test_a_second_moment_keeps_its_means_over_rows_and_columns(rounding: ModuleType) -> None:
    v = torch.rand(30, 50, generator=torch.Generator().manual_seed(0)) + 0.5
    _, back = again(rounding, v)
    torch.testing.assert_close(back.mean(0), v.mean(0))
    torch.testing.assert_close(back.mean(1), v.mean(1))


def test_a_second_moment_stays_within_its_entries(rounding: ModuleType) -> None:
    v = wide(30, 50)
    v[torch.rand(v.shape, generator=torch.Generator().manual_seed(1)) < 0.3] = 0
    v[4], v[:, 7] = 0, 0
    _, back = again(rounding, v)
    untouched = torch.zeros_like(v, dtype=torch.bool)
    untouched[4], untouched[:, 7] = True, True
    assert torch.equal(back == 0, untouched)
    assert back[~untouched].min() >= v[v > 0].min()
    assert back.max() <= v.max()


def test_a_second_moment_far_from_rank_one_stays_within_its_entries(rounding: ModuleType) -> None:
    """The product of means would leave them: above where a full row and column cross, below where two empty ones do."""
    cross, block = torch.full((30, 50), 1e-12), torch.full((30, 50), 1e-6)
    cross[0], cross[:, 0], block[0, 0] = 1, 1, 1
    assert float(again(rounding, cross)[1].max()) == float(cross.max())
    assert float(again(rounding, block)[1].min()) == float(block.min())


@pytest.mark.parametrize("shape", [(300,), (3, 3), (30, 50)])
@pytest.mark.parametrize("scale", [1e-34, 1.0])
def test_a_second_moment_is_zero_only_where_it_was(shape: tuple[int, ...], scale: float, rounding: ModuleType) -> None:
    """Down to the least floats there are: behind a zero the next gradient would be divided by nothing but itself."""
    v = wide(*shape) * scale
    v.view(-1)[:3] = torch.tensor([0.0, 1e-45, 1e-39])
    _, back = again(rounding, v)
    assert bool((back[v > 0] > 0).all())
    if len(shape) == 1:
        assert bool(((back - v).abs() <= 2**-8 * v)[v >= torch.finfo(torch.float32).tiny].all())
        assert back[0] == 0


def test_a_second_moment_of_one_tiny_entry_is_kept(rounding: ModuleType) -> None:
    v = torch.zeros(30, 50)
    v[3, 4] = 1e-45  # its mean over a row is none in float32
    assert torch.equal(again(rounding, v)[1] > 0, v > 0)


def test_what_is_no_moment_stays(rounding: ModuleType) -> None:
    step = torch.tensor(1234567.0)
    assert torch.equal(again(rounding, step, "3.step")[1], step)
    m = torch.randn(30, 50)
    assert torch.equal(again(rounding, m, "3.exp_avg")[1], torch.zeros(30, 50))
    assert torch.equal(again(rounding, torch.tensor(0.5), "3.exp_avg")[1], torch.tensor(0.0))


# Parts ---------------------------------------------------------------------------------------------------------------


def test_parts_stay_below_their_size_and_large_tensors_are_split(carry: ModuleType, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"whole": (90, 13), "split": (1000, 33), "scalar": (), "none": (0, 3), 'a "name"\n' + "x" * 200: (40, 30)}
    stored = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    stored |= {"bf16": torch.randn(70, 100).bfloat16(), "ints": torch.arange(5000), "bytes": torch.arange(9).byte()}
    stored |= {f"small.{number}": torch.tensor(float(number)) for number in range(500)}
    limit, manifest = 10_000, {"parts": []}
    for number, part in enumerate(carry.cut(stored, limit)):
        sha = carry.write_tensors(tmp_path / f"{number}", part)
        manifest["parts"].append({"file": f"{number}", "sha256": sha})
        assert (tmp_path / f"{number}").stat().st_size <= limit
    assert len(manifest["parts"]) < 45
    found = carry.read_parts(tmp_path, manifest)
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name].reshape(value.shape), value) for name, value in stored.items())


def test_equal_tensors_are_stored_once(carry: ModuleType, trained: Path, tmp_path: Path) -> None:
    run = stopped("digits-teacher", overrides("teacher", trained), tmp_path / "run", 3)
    both, weights, averages, average = (
        sum(part["bytes"] for part in carry.pack(run, tmp_path / keep, keep=keep.split(","))["parts"])
        for keep in ("weights,averages", "weights", "averages", "average")
    )
    network = sum(2 * value.numel() for value in newest(run).groups["student"].values())
    assert averages == average
    assert abs(weights - average) < 200
    assert 0.9 * network < both - weights < 1.5 * network


# Runs that go on -----------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on(carry: ModuleType, trained: Path, tmp_path: Path) -> None:
    own = overrides("teacher", trained)
    run = stopped("digits-teacher", own, tmp_path / "stopped", 7)
    before = contents(run)
    said, there = moved(carry, run, tmp_path, part_mb=0.01)
    assert contents(run) == before
    assert (said["what"], said["name"], said["step"]) == ("checkpoint", "digits-teacher", 7)
    assert all((tmp_path / "parts" / part["file"]).stat().st_size == part["bytes"] <= 10_000 for part in said["parts"])
    for name in ("config.yaml", "environment.json", "metrics.jsonl"):
        assert (there / name).read_bytes() == (run / name).read_bytes()
    old, new = newest(run), newest(there)
    facts = [{key: value for key, value in each.state.items() if key != "digests"} for each in (old, new)]
    assert facts[0] == facts[1]
    assert alike(new.groups["student"], old.groups["student"])
    assert alike(new.groups["ema-0.999"], old.groups["ema-0.999"])
    moments, carried = old.groups["optimizer"], new.groups["optimizer"]
    assert moments.keys() == carried.keys()
    assert all(torch.equal(carried[name], moments[name]) for name in moments if name.endswith(".step"))
    assert not any(value.any() for name, value in carried.items() if name.endswith(".exp_avg"))
    succeed("teach", "digits-teacher", *own, "--out", there, "--resume")
    assert logged(there) == list(range(1, 13))
    assert logged(there, "seconds") == sorted(logged(there, "seconds"))
    assert read_model(there).card["train"]["seconds"] >= old.state["seconds"]
    assert read_json(there / "status.json")["state"] == "done"
    assert "carried" not in read_model(there).card


def test_a_stopped_run_of_several_stages_goes_on(carry: ModuleType, trained: Path, tmp_path: Path) -> None:
    """In the third of four stages: the stage before, the grid, and the students of the finished ones come along."""
    own = (*overrides("progressive", trained / "teacher"), "objective.last_stages_factor=2")
    run = stopped("digits-progressive", own, tmp_path / "stopped", 12)
    _, there = moved(carry, run, tmp_path)
    old, new = newest(run), newest(there)
    assert old.groups.keys() == new.groups.keys() >= {"previous", "objective"}
    assert all(alike(new.groups[group], old.groups[group]) for group in old.groups if group != "optimizer")
    assert torch.equal(new.groups["objective"]["grid"], old.groups["objective"]["grid"])
    assert old.groups["objective"]["grid"].dtype == torch.float64
    assert list(new.state["finished"]) == list(old.state["finished"]) == ["8", "4"]
    succeed("distill", "digits-progressive", *own, "--out", there, "--resume")
    assert logged(there) == list(range(1, 25))
    model = read_model(there)
    assert sorted(model.sampler["steps"]) == ["1", "2", "4", "8"]
    whole = carry.read_tensors(run / "stages" / "steps-0008.safetensors", old.state["finished"]["8"])
    assert alike(model.weights(model.sampler["steps"]["8"]["weights"]), whole)


def test_averages_stand_in_for_what_is_left_out(carry: ModuleType, trained: Path, tmp_path: Path) -> None:
    own = overrides("consistency", trained / "teacher")
    run = stopped("digits-consistency", own, tmp_path / "stopped", 7)
    old = newest(run).groups
    first = {"student": "ema-0.5", "ema-0.5": "ema-0.5"}
    for keep, standing_in in {
        "weights,averages": {},
        "weights,average": {"ema-0.99": "ema-0.5"},
        "averages": {"student": "ema-0.5"},
        "average": {**first, "ema-0.99": "ema-0.5"},
        "weights": {"ema-0.5": "student", "ema-0.99": "student"},
    }.items():
        said, there = moved(carry, run, tmp_path / keep, keep=keep.split(","))
        new = newest(there).groups
        assert all(alike(new[group], old[standing_in.get(group, group)]) for group in old if group != "optimizer")
        assert any(name.startswith("target.") for name in new["objective"])
        told = [line for line in said["dropped"] if "stands in" in line]
        assert len(told) == sum(group != other for group, other in standing_in.items())
    succeed("distill", "digits-consistency", *own, "--out", there, "--resume")


def test_tensors_of_every_type_come_back(carry: ModuleType, trained: Path, tmp_path: Path) -> None:
    """Those of equal bytes too, which other types and shapes may have."""
    run = stopped("digits-teacher", overrides("teacher", trained), tmp_path / "stopped", 1)
    checkpoint = newest(run)
    ones = torch.ones(4, 6)
    extra = {
        "float": ones,
        "other": -3.3 * ones.reshape(2, 12),
        "as_int": (-3.3 * ones.flatten()).view(torch.int32),
        "flat": -3.3 * ones.flatten(),
        "double": torch.full((4, 6), 0.1, dtype=torch.float64),
        "half": torch.full((4, 6), 0.1, dtype=torch.float16),
        "brain": torch.full((4, 6), 0.1, dtype=torch.bfloat16),
        "bool": torch.eye(4) > 0,
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(0.1),
    }
    groups = {**checkpoint.groups, "objective": extra}
    write_checkpoint(run / "checkpoints", 1, Checkpoint(groups, checkpoint.state), keep=None)
    _, there = moved(carry, run, tmp_path)
    assert alike(newest(there).groups["objective"], extra)


def test_curvature_comes_along_and_is_not_rounded(carry: ModuleType, trained: Path, tmp_path: Path) -> None:
    own = (*overrides("teacher", trained), "objective.weighting={kind: curvature, warmup_steps: 1}")
    run = stopped("digits-teacher", own, tmp_path / "stopped", 4)
    _, there = moved(carry, run, tmp_path)
    old, new = newest(run).groups["objective"], newest(there).groups["objective"]
    assert alike(new, old)
    assert old["square"].dtype == torch.float64
    assert old["square"].any()
    succeed("teach", "digits-teacher", *own, "--out", there, "--resume")


@pytest.mark.parametrize("at", [2, 6])
def test_pairs_are_made_again(at: int, carry: ModuleType, trained: Path, tmp_path: Path) -> None:
    """Those of the teacher, and those of the average of the stage before."""
    own = overrides("reflow", trained / "teacher")
    run = stopped("digits-reflow", own, tmp_path / "stopped", at)
    said, there = moved(carry, run, tmp_path)
    assert any("pairs/" in line and "made again" in line for line in said["dropped"])
    assert not (there / "pairs").exists()
    succeed("distill", "digits-reflow", *own, "--out", there, "--resume")
    assert logged(there) == list(range(1, 9))


def test_the_first_steps_are_small_and_the_loss_is_that_of_a_plain_resume(carry: ModuleType, tmp_path: Path) -> None:
    own = (
        *("train.batch_size=32", "train.log_every=1", "student.network={kind: mlp, width: 32, depth: 1}"),
        *("train.steps=500", "train.lr_schedule=constant", "train.checkpoint_every=1000", "train.keep_checkpoints=9"),
    )
    run = stopped("digits-teacher", own, tmp_path / "plain", 300)
    _, there = moved(carry, run, tmp_path)
    changes: dict[Path, list[float]] = {}
    for each in (run, there):
        before = flat(newest(each).groups["student"])
        for at in (301, 320, 321):
            stopped("digits-teacher", own, each, at)
            after = flat(newest(each).groups["student"])
            changes.setdefault(each, []).append(float((after - before).norm()))
            before = after
        succeed("teach", "digits-teacher", *own, "--out", each, "--resume")
    share = [carried / plain for carried, plain in zip(changes[there], changes[run], strict=True)]
    assert 0.1 < share[0] < 0.6
    assert 0.8 < share[2] < 1.25
    plain, carried = (logged(each, "loss")[400:] for each in (run, there))
    noise = statistics.stdev(plain) / math.sqrt(len(plain))
    assert abs(statistics.fmean(carried) - statistics.fmean(plain)) < noise


# Models --------------------------------------------------------------------------------------------------------------


def weights_of(run: Path) -> dict[str, Tensors]:
    model = read_model(run)
    return {name: model.weights(name) for name in model.card["digests"]}


@pytest.mark.parametrize("name", ["teacher", "progressive"])
def test_a_model_is_rounded_once(name: str, carry: ModuleType, trained: Path, tmp_path: Path) -> None:
    """Packed again it gives the same bytes, and unpacked again the same digest."""
    said, once = moved(carry, trained / name, tmp_path / "once", part_mb=0.01)
    again, twice = moved(carry, once, tmp_path / "twice", part_mb=0.01)
    assert said["what"] == "model"
    assert said == again
    assert contents(tmp_path / "once" / "parts") == contents(tmp_path / "twice" / "parts")
    assert contents(once / "model") == contents(twice / "model")
    old, new = read_model(trained / name), read_model(once)
    assert new.card["carried"] == "bfloat16"
    assert new.digest() != old.digest()
    assert {**new.card, "digests": None} == {**old.card, "carried": "bfloat16", "digests": None}
    assert new.sampler == old.sampler
    assert all(alike(found, weights_of(trained / name)[file]) for file, found in weights_of(once).items())


def test_a_carried_teacher_teaches(carry: ModuleType, trained: Path, tmp_path: Path) -> None:
    """A student of it goes on in another place, beside the teacher as it was unpacked there, and not beside the one
    from before rounding."""
    _, teacher = moved(carry, trained / "teacher", tmp_path / "once")
    own = (*student(teacher), "train.steps=6")
    run = stopped("digits-meanflow", own, tmp_path / "stopped", 3)
    carry.pack(teacher, tmp_path / "parts")
    shutil.rmtree(teacher)
    shutil.copytree(trained / "teacher", teacher)
    _, there = moved(carry, run, tmp_path / "student")
    command = ("distill", "digits-meanflow", *own, "--out", there, "--resume")
    refuse(*command, says=("the teacher is not the one this run started with",))
    shutil.rmtree(teacher)
    carry.unpack(tmp_path / "parts", teacher)
    succeed(*command)
    assert read_model(there).card["teacher_digest"] == read_model(teacher).digest()
    succeed("evaluate", there, "--n", 64, "--steps", "1,4")
    assert {row["role"] for row in read_json(there / "results.json")["rows"]} == {"student", "teacher"}


def test_the_mean_of_a_contrastive_teacher_is_not_rounded(carry: ModuleType, tmp_path: Path) -> None:
    own = (*SMALL, "train.steps=2", "train.batch_size=64", "objective.contrast=0.05")
    succeed("teach", "digits-teacher", *own, "--out", tmp_path / "trained")
    _, there = moved(carry, tmp_path / "trained", tmp_path)
    old, new = (weights_of(run)["data_mean.safetensors"]["mean"] for run in (tmp_path / "trained", there))
    assert old.ndim == 3
    assert torch.equal(old, new)


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(carry: ModuleType, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    def refused(*arguments: object, says: tuple[str, ...]) -> None:
        """A command line that has to be refused in one sentence, with exit code 2."""
        assert carry.main([str(argument) for argument in arguments]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert len(output.err.strip().splitlines()) == 1
        for word in ("error: ", *says):
            assert word in output.err

    return refused


def test_mistakes_are_refused(
    carry: ModuleType, refused: Callable[..., None], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts, out = tmp_path / "parts", tmp_path / "out"
    assert carry.main(["pack", str(trained / "teacher"), "--out", str(parts), "--part-mb", "0.01"]) == 0
    assert "packed the model of digits-teacher at step 20" in capsys.readouterr().out
    whole = contents(parts)

    refused("pack", trained / "teacher", "--out", parts, says=(str(parts), "not empty"))
    refused("pack", tmp_path / "missing", "--out", out, says=("missing", "nothing to carry"))
    refused("pack", trained / "teacher", "--out", out, "--part-mb", 0.001, says=("--part-mb 0.001",))
    run = stopped("digits-teacher", overrides("teacher", trained), tmp_path / "run", 1)
    refused("pack", run, "--out", out, "--keep", "weights,weight", says=("--keep", "averages", "not weight"))
    refused("pack", run, "--out", out, "--keep", "", says=("--keep", "nothing"))
    refused("unpack", tmp_path / "missing", "--out", out, says=(str(tmp_path / "missing" / "carry.json"),))
    refused("unpack", parts, "--out", trained / "teacher", says=("not empty",))

    second = parts / "part-01.safetensors"
    second.unlink()
    refused("unpack", parts, "--out", out, says=(str(second), "missing"))
    content = whole[second.name]
    second.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    refused("unpack", parts, "--out", out, says=(str(second), "damaged"))
    second.write_bytes(content)
    text = whole["carry.json"].decode()
    (parts / "carry.json").write_text(text.replace('"step": 20', '"step": 21'))
    refused("unpack", parts, "--out", out, says=("carry.json", "damaged"))
    (parts / "carry.json").write_text(text.replace('"format": 1', '"format": 2'))
    refused("unpack", parts, "--out", out, says=("carry.json", "format 2", "reads 1"))
    assert not out.exists()
    (parts / "carry.json").write_text(text)
    assert carry.main(["unpack", str(parts), "--out", str(out)]) == 0
