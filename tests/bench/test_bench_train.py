"""The benchmark of the training loop: what is compared is the same, what is printed adds up. Times are not tested."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, cli, refuse, student, succeed

from fewstep.bench.measure import spread
from fewstep.bench.train import BatchesByHand, bare_training, fitting_batch_size
from fewstep.checkpoint import RunDirectory
from fewstep.config import load_config
from fewstep.data.dataset import BatchSource
from fewstep.data.load import digits
from fewstep.distill.run import check_training
from fewstep.distill.train import make_accelerator, train

CPU = torch.device("cpu")
QUICK = ("--step-ms", "0.5", "--repeats", "2", "--segment", "2")
"""Nothing but behaviour can be seen at this size."""


@pytest.mark.parametrize(
    ("name", "precision"),
    [("teacher", "fp32"), ("teacher", "bf16"), ("meanflow", "fp32"), ("progressive", "fp32"), ("consistency", "fp32")],
)
def test_both_loops_compute_the_same(name: str, precision: str, trained: Path, tmp_path: Path) -> None:
    """Without what only ``train`` does to the gradient and the rate, every weight has the same bits."""
    overrides = ["train.grad_clip=0", "train.lr_schedule=constant", "train.warmup_steps=0", "train.weight_decay=0.1"]
    own = SMALL if name == "teacher" else student(trained / "teacher")
    overrides.append(f"train.precision={precision}")
    targets = ["objective.target_decay=0.9"] if name == "consistency" else []
    config = load_config(f"digits-{name}", [*own, *overrides, *targets])
    weights = []
    for bare in (True, False):
        request = check_training(
            config, RunDirectory(tmp_path / "run"), CPU, processes=1, resume=False, overwrite=False
        )
        objective = request.stages[0].build(request.student, None)
        source = BatchSource(request.data, config.train.batch_size, config.seed, device=CPU)
        if bare:
            by_hand = BatchesByHand(request.data, config.train.batch_size, config.seed, CPU)
            by_hand.draw(0, 5)
            for _ in itertools.islice(bare_training(objective, by_hand.batch, config.train, seed=config.seed), 5):
                pass
        else:
            for _ in train(objective, source, config.train, make_accelerator(), seed=config.seed, steps=5):
                pass
        weights.append(objective.student.state_dict())
    for key in weights[0]:
        assert torch.equal(weights[0][key], weights[1][key]), key
    start = check_training(config, RunDirectory(tmp_path / "run"), CPU, processes=1, resume=False, overwrite=False)
    assert any(not torch.equal(start.student.state_dict()[key], weights[0][key]) for key in weights[0])


def test_batches_by_hand_are_those_of_the_source() -> None:
    """Over several permutations of the data: 12 batches of 500 are more than three times the digits."""
    source, by_hand = BatchSource(digits(), 500, 3, device=CPU), BatchesByHand(digits(), 500, 3, CPU)
    for first in (0, 6):
        by_hand.draw(first, 6)
        for step in range(first, first + 6):
            own, other = source.batch(step), by_hand.batch(step)
            assert own.label is not None
            assert other.label is not None
            for pair in ((own.x, other.x), (own.label, other.label), (own.index, other.index)):
                assert torch.equal(*pair)
    with pytest.raises(KeyError):
        by_hand.batch(0)  # forgotten


@pytest.mark.parametrize(
    ("measure", "step_ms", "low", "high"),
    [
        (lambda size: 0.02 * size, 20.0, 900, 1100),  # 1000 samples of 0.02 ms
        (lambda size: 5 + 0.01 * size, 20.0, 1300, 1700),  # a fixed cost: 1500
        (lambda size: 5 + 0.01 * size, 1.0, 1, 1),  # out of reach
        (lambda size: 1.0, 1.02, 128, 128),  # near enough at once
        (lambda size: 1e-9, 1e9, 128 * 8**4, 2**20),  # no batch without end
    ],
)
def test_the_batch_that_fits(measure: Callable[[int], float], step_ms: float, low: int, high: int) -> None:
    assert low <= fitting_batch_size(measure, step_ms, 128) <= high


def test_median_and_quartiles() -> None:
    found = spread([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (found.low, found.median, found.high) == (2.0, 3.0, 4.0)
    assert spread([7.0]).low == spread([7.0]).high == 7.0


def document(*arguments: object) -> dict[str, Any]:
    return dict(json.loads(succeed("bench", "train", *arguments, *QUICK, "--json").stdout))


def test_the_document_of_a_benchmark() -> None:
    found = document("digits-teacher", *SMALL)
    assert (found["bench"], found["recipe"], found["pairs"], found["segment"]) == ("train", "digits-teacher", 2, 2)
    assert found["threads"] == 1
    assert found["batch_size"] >= 1
    assert {"commit", "processor", "packages", "cores"} <= set(found["environment"])
    for key in ("overhead", "cpu_overhead"):
        assert found[key]["low"] <= found[key]["median"] <= found[key]["high"]
    # By definition: a rate is samples per time, and the parts are the whole.
    assert found["params"] == document("digits-teacher", *SMALL, "seed=1")["params"] > 0
    parts = sum(cost["percent"] for cost in found["costs"])
    assert math.isclose(parts, found["overhead"]["median"], rel_tol=1e-9, abs_tol=1e-9)
    assert [cost["name"] for cost in found["costs"]][-1] == "the rest"
    assert all(cost["ms"] > 0 for cost in found["costs"][:4])


def test_the_recipe_may_be_left_out() -> None:
    found = document(*SMALL)
    assert found["recipe"] == "digits-teacher"


def test_a_student_of_a_trained_teacher(trained: Path) -> None:
    found = document("digits-consistency", *student(trained / "teacher"))
    assert found["recipe"] == "digits-consistency"


def test_the_table_is_for_people() -> None:
    said = succeed("bench", "train", *SMALL, *QUICK)
    assert said.stdout == ""
    for word in ("bare PyTorch", "fewstep", "overhead", "processor time", "weight averages", "the rest", "samples/s"):
        assert word in said.stderr


def test_a_gate_on_the_overhead(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    command = ("bench", "train", *SMALL, *QUICK, "--ledger", ledger)
    assert cli(*command, "--max-overhead", "1e9").exit_code == 0
    failed = cli(*command, "--max-overhead", "-1e9", "--json")
    assert failed.exit_code == 4
    assert failed.stderr.splitlines()[-1].startswith("error: the training loop costs ")
    rows = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert rows[1] == json.loads(failed.stdout)
    assert set(rows[0]) == set(rows[1])


def test_threads_are_put_back() -> None:
    assert torch.get_num_threads() == 1
    assert document(*SMALL, "--threads", 2)["threads"] == 2
    assert torch.get_num_threads() == 1


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    where = tmp_path / "digits-teacher"
    refuse(
        *("bench", "train", "digits-meanflow", f"teacher.path={where}"),
        says=(str(where), "has not been trained", "fewstep teach digits-teacher"),
    )
    refuse("bench", "train", "train.compile=true", says=("train.compile=False", "leave out train.compile=True"))
    refuse("bench", "train", "--max-overhead", "nan", says=("--max-overhead", "finite"))
    refuse("bench", "train", "digits-techer", says=("did you mean 'digits-teacher'?",))
    (tmp_path / "file").write_text("")
    refuse("bench", "train", "--ledger", tmp_path / "file" / "x", says=("is not a folder",))
