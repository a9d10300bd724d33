"""Pairs of a teacher: where they land, that they are the same bytes however they are made, and what is refused."""

import json
import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL, contents, refuse, student, succeed
from family import LINE
from forked import fewstep, started, together
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.data.config import DigitsConfig
from fewstep.data.dataset import BatchSource, Dataset
from fewstep.data.load import digits
from fewstep.data.pairs import META, PairsRequest, check_noise, read_pairs
from fewstep.distill.reflow.config import PairsSettings
from fewstep.distill.reflow.pairs import Share, load_pairs, make_pairs, request_of
from fewstep.errors import FewstepError, UsageError
from fewstep.files import digest
from fewstep.keys import Key
from fewstep.sources import gaussian
from fewstep.teachers.config import RunTeacher
from fewstep.teachers.load import Teacher, load_teacher

CPU = torch.device("cpu")
POINTS = Dataset("line", torch.empty(0, 1), None, 0, kind="points")
EXACT = Teacher("exact line", LINE, None, None, 1.0, "line", 0)


def request(seed: int = 3, **settings) -> PairsRequest:
    asked = PairsSettings.model_validate({"count": 300, "steps": 8, "shard_size": 128, **settings})
    return request_of(asked, POINTS, teacher="exact line", teacher_digest="line", source="gaussian", seed=seed)


def made(folder: Path, asked: PairsRequest, field=LINE, batch_size: int = 100, **rest) -> Dataset:
    *_, count = make_pairs(folder, asked, field, batch_size=batch_size, device=CPU, **rest)
    assert count == asked.count
    return read_pairs(folder).data


# ------------------------------------------------------------------------------------------------------ what they are


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_pairs_land_on_the_exact_map_with_the_solvers_order(solver: str, order: int, tmp_path: Path) -> None:
    """The mixture on the line by its distribution functions; steps doubled twice."""
    errors = []
    for steps in (32, 64, 128):
        data = made(tmp_path / f"{steps}", request(solver=solver, steps=steps))
        e = data.noise[torch.arange(300)]
        exact = LINE.flow_map(e.double(), torch.ones(300), torch.zeros(300))
        errors.append(float((data.x[torch.arange(300)] - exact).square().mean().sqrt()))
    assert errors[0] < {1: 0.1, 2: 0.02}[order]
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.15)
    assert errors[0] > errors[1] > errors[2]


def test_noise_is_keyed_by_seed_and_row_and_begins_no_evaluation(tmp_path: Path) -> None:
    """Also by the round; and it is not the noise that samples of the same seed are drawn from."""
    rows = torch.arange(300)
    e = made(tmp_path / "a", request()).noise[rows]
    assert torch.equal(e, gaussian(Key(3), "pairs", rows, (1,)))
    assert not torch.isclose(e, gaussian(Key(3), "noise", rows, (1,))).any()
    for other in (request(seed=4), replace(request(), round=1)):
        assert not torch.isclose(e, other.noise(rows)).any()


def test_the_same_bytes_for_any_batch_size_and_any_number_of_processes(tmp_path: Path) -> None:
    """Processes as threads that wait for each other; pairs of other shards are the same rows."""
    whole = made(tmp_path / "whole", request())
    made(tmp_path / "small", request(), batch_size=7)
    assert contents(tmp_path / "small") == contents(tmp_path / "whole")
    barrier, counts = threading.Barrier(2, timeout=60), {}

    def process(rank: int) -> None:
        share = Share(rank, 2, barrier.wait)
        *_, counts[rank] = make_pairs(tmp_path / "two", request(), LINE, batch_size=50, device=CPU, share=share)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == {0: 128 + 44, 1: 128}
    assert contents(tmp_path / "two") == contents(tmp_path / "whole")
    cut = made(tmp_path / "cut", request(shard_size=70))
    rows = torch.arange(300)
    assert torch.equal(cut.x[rows], whole.x[rows])
    assert torch.equal(cut.noise[rows], whole.noise[rows])


def test_batches_bring_the_noise_of_each_sample(tmp_path: Path) -> None:
    """Through shuffling, shares of processes, microbatches, and where a thread gathers them."""
    data = made(tmp_path / "pairs", request())
    for resident, world in (("device", 1), ("host", 2)):
        for rank in range(world):
            source = BatchSource(data, 24, 0, device=CPU, rank=rank, world=world, resident=resident)
            for part in source.batch(5).split(3):
                assert torch.equal(part.noise, data.noise[part.row])
                assert torch.equal(part.x, data.x[part.row])
            source.close()
    assert BatchSource(digits(), 8, 0, device=CPU).batch(0).noise is None


def test_a_solution_that_is_not_finite_is_told(tmp_path: Path) -> None:
    def field(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return torch.where(x > 1.5, torch.inf, x)

    field.nfe = 1
    with pytest.raises(FewstepError, match=r"solution of pair \d+ is not finite"):
        made(tmp_path / "pairs", request(), field)


# --------------------------------------------------------------------------------------------------- going on with it


def test_finished_shards_stay_and_the_rest_is_made(tmp_path: Path) -> None:
    """After a stop in the second shard: the first is not solved again, leftovers go, and the bytes are the same."""
    made(tmp_path / "whole", request())
    folder = tmp_path / "pairs"
    making = make_pairs(folder, request(), LINE, batch_size=50, device=CPU)
    for done in making:
        if done > 200:
            break
    making.close()
    assert {path.name for path in folder.iterdir()} == {"request.json", "shard-00000.safetensors"}
    (folder / ".shard-00001.safetensors.123.tmp").write_bytes(b"half")
    with pytest.raises(UsageError, match="not finished"):
        read_pairs(folder)
    asked = []

    def field(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        asked.append(len(x))
        return LINE(x, t, label)

    field.nfe = 1
    made(folder, request(), field, resume=True)
    assert contents(folder) == contents(tmp_path / "whole")
    assert sum(asked) == 16 * (2 * 64 + 64 + 64)  # 100 and 28 rows of the second shard, 44 of the third, in tiles
    with pytest.raises(UsageError, match=r"steps was 8 and is 9.*--overwrite"):
        made(folder, request(steps=9), resume=True)
    with pytest.raises(UsageError, match="--resume goes on"):
        made(folder, request())
    made(folder, request(steps=9), overwrite=True)
    assert contents(folder) != contents(tmp_path / "whole")


def test_nothing_else_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"x")
    for rest in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UsageError, match="is no folder of pairs"):
            made(tmp_path / "photos", request(), **rest)
    with pytest.raises(UsageError, match="nothing to resume"):
        made(tmp_path / "empty", request(), resume=True)
    assert contents(tmp_path / "photos") == {"a.png": b"x"}


def command(trained: Path, folder: Path, *rest: object) -> tuple[object, ...]:
    return (
        "data",
        "pairs",
        trained / "teacher",
        "--out",
        folder,
        "--count",
        500,
        "--steps",
        6,
        "--shard-size",
        100,
        *rest,
    )


def test_killed_and_resumed_gives_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    """SIGKILL while it solves: one shard of ten rows at a time, 60 of them."""
    own = ("data", "pairs", trained / "teacher", "--n", 600, "--shard-size", 10, "--steps", 16)
    folder = tmp_path / "killed"
    process = started(*own, "--out", folder)
    deadline = time.monotonic() + 90
    while not (folder / "shard-00002.safetensors").exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / META).exists()
    refuse("distill", "digits-reflow", *pairs_for(trained, folder), "--out", tmp_path / "run", says=("not finished",))
    succeed(*own, "--out", folder, "--resume")
    succeed(*own, "--out", tmp_path / "whole")
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_make_what_one_makes(trained: Path, tmp_path: Path) -> None:
    together(2, fewstep, *(str(each) for each in command(trained, tmp_path / "two")))
    succeed(*command(trained, tmp_path / "one"))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


# ------------------------------------------------------------------------------------------------------ by the command


@pytest.fixture(scope="module")
def pairs(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "pairs"
    printed = succeed(*command(trained, folder, "--json"))
    assert json.loads(printed.stdout)["count"] == 500
    assert "500 pairs of digits-teacher by 6 heun steps" in printed.stderr
    return folder


def pairs_for(trained: Path, folder: Path) -> tuple[str, ...]:
    """Overrides of a short reflow of the small teacher on the pairs of a folder."""
    short = ("train.steps=4", "objective.distil_steps=null", f"objective.pairs={folder}")
    return (*student(trained / "teacher"), *short)


def test_what_the_command_writes(pairs: Path, trained: Path) -> None:
    """Balanced labels, the provenance, and the pairs a run trains on."""
    meta = json.loads((pairs / META).read_text())
    card = json.loads((trained / "teacher" / "model" / "config.json").read_text())
    wanted = {"teacher": "digits-teacher", "teacher_digest": card["digests"]["model.safetensors"], "solver": "heun"}
    wanted |= {"steps": 6, "guidance": 1.0, "window": [0.0, 1.0], "seed": 0, "source": "gaussian", "count": 500}
    wanted |= {"data": "digits", "shape": [1, 8, 8], "num_classes": 10}
    assert {name: meta[name] for name in wanted} == wanted
    assert [shard["count"] for shard in meta["shards"]] == 5 * [100]
    data = read_pairs(pairs).data
    assert torch.equal(data.label, torch.arange(500) % 10)
    teacher = load_teacher(RunTeacher(path=str(trained / "teacher")), DigitsConfig(), digits(), CPU)
    assert torch.equal(load_pairs(pairs, teacher, digits()).x[torch.arange(500)], data.x[torch.arange(500)])


def test_a_network_solves_a_row_alike_in_any_batch(pairs: Path, trained: Path, tmp_path: Path) -> None:
    """Matrix products of odd sizes round otherwise; nothing here depends on the size that is asked for."""
    succeed(*command(trained, tmp_path / "small", "--batch-size", 7))
    assert contents(tmp_path / "small") == contents(pairs)


def test_training_on_pairs(pairs: Path, trained: Path, tmp_path: Path) -> None:
    succeed("distill", "digits-reflow", *pairs_for(trained, pairs), "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "pairs").exists()


def test_guided_pairs_go_with_a_guided_teacher(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "guided"
    succeed(*command(trained, folder, "--guidance", 2, "--window", "0.1,0.9"))
    assert json.loads((folder / META).read_text())["window"] == [0.1, 0.9]
    own = pairs_for(trained, folder)
    refuse("distill", "digits-reflow", *own, "--out", tmp_path / "run", says=("solved at guidance 2", "it is 1"))
    succeed("distill", "digits-reflow", *own, "teacher.guidance=2", "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["guidance"] == 2


def test_what_the_command_refuses(pairs: Path, trained: Path, tmp_path: Path) -> None:
    refuse(*command(trained, pairs), says=("exists", "--resume", "--overwrite"))
    refuse(*command(trained, pairs, "--resume", "--seed", 1), says=("seed was 0 and is 1",))
    refuse(*command(trained, pairs, "--resume", "--overwrite"), says=("exclude each other",))
    refuse(*command(trained, tmp_path / "new", "--window", "0.9,0.1"), says=("--window", "the lower first"))
    refuse(*command(trained, tmp_path / "new", "--window", "x"), says=("--window", "separated by a comma"))
    meanflow = ("data", "pairs", trained / "meanflow", "--out", tmp_path / "new", "--n", 10)
    refuse(*meanflow, says=("holds a student (meanflow)",))
    refuse("data", "pairs", tmp_path / "no", "--out", tmp_path / "new", "--n", 10, says=("no run or model at",))
    assert not (tmp_path / "new").exists()


# ----------------------------------------------------------------------------------------------------------- provenance


def altered(pairs: Path, folder: Path, change: Callable[[dict[str, Tensor]], object], **meta: object) -> Path:
    """A copy of pairs whose tensors somebody has changed, with digests that say that all is well."""
    folder.mkdir()
    document = {**json.loads((pairs / META).read_text()), **meta}
    for shard in document["shards"]:
        tensors = load_file(pairs / shard["file"])
        change(tensors)
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / shard["file"])
        shard["digest"] = digest((folder / shard["file"]).read_bytes())
    (folder / META).write_text(json.dumps(document))
    return folder


def swap(tensors: dict[str, Tensor]) -> None:
    tensors["noise"], tensors["x"] = tensors["x"], tensors["noise"]


def fresh(tensors: dict[str, Tensor]) -> None:
    tensors["noise"] = torch.randn(tensors["noise"].shape, generator=torch.Generator().manual_seed(0))


CHANGES = {
    "swapped ends": (swap, {}, ("noise and solutions are swapped", "noise of seed 0")),
    "louder noise": (lambda t: t["noise"].mul_(1.2), {}, ("its noise has mean", "variance 1.4", "not 0 and 1")),
    "noise with a mean": (lambda t: t["noise"].add_(0.2), {}, ("its noise has mean 0.2",)),
    "another draw": (fresh, {}, ("its noise is not what seed 0 draws",)),
    "another seed": (lambda t: None, {"seed": 1}, ("its noise is not what seed 1 draws",)),
    "other labels": (lambda t: t["labels"].add_(1).remainder_(10), {}, ("its labels are not those",)),
    "other solutions": (lambda t: t["x"].add_(0.1), {}, ("does not end where 6 heun steps of digits-teacher take it",)),
    "rows in disorder": (lambda t: t.update(x=t["x"].roll(1, 0)), {}, ("pair 0 does not end where",)),
    "another solver": (lambda t: None, {"solver": "euler"}, ("does not end where 6 euler steps",)),
    "another teacher": (lambda t: None, {"teacher_digest": "f" * 64}, ("are of another teacher", "ffffffffffff")),
    "other classes": (lambda t: None, {"num_classes": 9}, ("9 classes", "the data here are digits", "10 classes")),
    "other data": (lambda t: None, {"data": "letters"}, ("are of letters", "the data here are digits")),
    "another source": (lambda t: None, {"source": "laplace"}, ("start from laplace noise",)),
    "too few": (lambda t: None, {"count": 501}, ("meta.json is damaged", "501 pairs")),
    "a request that is none": (lambda t: None, {"window": 3}, ("meta.json is damaged",)),
    "another format": (lambda t: None, {"format": "fewstep-data"}, ("is not of pairs",)),
    "a shape of its own": (lambda t: t.update(x=t["x"][:, :, :7]), {}, ("is damaged: its x are", "[100, 1, 7, 8]")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_pairs_of_something_else_are_refused(name: str, pairs: Path, trained: Path, tmp_path: Path) -> None:
    """In one sentence, by the command line, before anything is written."""
    change, meta, says = CHANGES[name]
    folder = altered(pairs, tmp_path / "pairs", change, **meta)
    refuse("distill", "digits-reflow", *pairs_for(trained, folder), "--out", tmp_path / "run", says=says)
    assert not (tmp_path / "run").exists()


def test_pairs_of_another_training_are_refused(pairs: Path, trained: Path, tmp_path: Path) -> None:
    """A teacher of the same name and data, trained from another seed."""
    other = tmp_path / "other"
    succeed("teach", "digits-teacher", *SMALL, "train.steps=2", "--seed", 1, "--out", other)
    own = pairs_for(trained, pairs)
    moved = (*own, f"teacher.path={other}")
    refuse(
        "distill", "digits-reflow", *moved, "--out", tmp_path / "run", says=("are of another teacher, digits-teacher",)
    )


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_damaged_shards_are_refused(damage: str, pairs: Path, trained: Path, tmp_path: Path) -> None:
    folder = altered(pairs, tmp_path / "pairs", lambda tensors: None)
    file = folder / "shard-00003.safetensors"
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-50] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    says = {"cut": "is damaged", "flipped": "is damaged: its digest", "gone": "is missing"}[damage]
    own = pairs_for(trained, folder)
    refuse("distill", "digits-reflow", *own, "--out", tmp_path / "run", says=(str(file), says))


def test_no_pairs_at_all(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, says in ((tmp_path / "empty", "holds no pairs"), (tmp_path / "gone", "no folder of pairs at")):
        own = pairs_for(trained, folder)
        refuse("distill", "digits-reflow", *own, "--out", tmp_path / "run", says=(says,))


def test_swapped_ends_are_found_where_the_data_are_gaussian_too(tmp_path: Path) -> None:
    """There statistics say nothing; the keyed noise does."""
    made(tmp_path / "pairs", request(), lambda_field())
    altered(tmp_path / "pairs", tmp_path / "swapped", swap)
    with pytest.raises(UsageError, match="swapped"):
        check_noise(read_pairs(tmp_path / "swapped"))


def lambda_field():
    def field(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return 2 * x.flip(0) * 0 + 0.5  # shifts by a half: variance one stays

    field.nfe = 1
    return field


def test_loading_looks_at_an_exact_teacher_too(tmp_path: Path) -> None:
    made(tmp_path / "pairs", request())
    assert load_pairs(tmp_path / "pairs", EXACT, POINTS).facts["pairs"] == str(tmp_path / "pairs")
    with pytest.raises(UsageError, match="are of another teacher"):
        load_pairs(tmp_path / "pairs", replace(EXACT, digest="other"), POINTS)
