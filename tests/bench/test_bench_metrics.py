"""`fewstep bench metrics`: both sides compute the same, and that is checked before times are. Times are not tested."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cli, refuse, succeed
from torch import Tensor

from fewstep.bench import metrics
from fewstep.bench.measure import Time
from fewstep.bench.metric_peers import CONTESTS, Contest, differ, threads_of_all
from fewstep.bench.metrics import anonymous_kib, check_agreement, compared, features, peak_of_call
from fewstep.bench.sweep import ByHand, Swept, check_sweeps, plain_loop, plain_sweep, swept_runs
from fewstep.errors import FewstepError
from fewstep.evaluation.frechet import frechet_distance, moments
from fewstep.keys import Key
from fewstep.workflows import evaluate_runs

CPU = torch.device("cpu")
QUICK = ("--n", 200, "--dim", 16, "--pairs", 1, "--no-memory")


def contest(metric: str, package: str, ref: Tensor, gen: Tensor) -> Contest:
    try:
        return CONTESTS[metric][package](ref, gen)
    except ImportError as reason:
        pytest.skip(f"{package} does not import: {reason}")


# ------------------------------------------------------------------------------------------------------- single metrics


@pytest.mark.parametrize(
    ("metric", "package"),
    [(metric, package) for metric, packages in CONTESTS.items() if metric != "inception" for package in packages],
)
def test_a_package_computes_the_same(metric: str, package: str) -> None:
    found = contest(metric, package, features(300, 16, 1), features(260, 16, 2) * 1.2)
    own, peer = (found.own(), found.peer()) if found.agree is None else found.agree()
    assert differ(own, peer) <= found.tolerance
    assert all(abs(value) > 1e-4 for value in peer.values()), "a difference could not be seen"
    assert differ({name: 1.01 * value + 0.01 for name, value in own.items()}, peer) > found.tolerance


@pytest.mark.parametrize("package", CONTESTS["inception"])
def test_inception_has_the_features_of_a_package(package: str) -> None:
    images = torch.randint(256, (1, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    found = contest("inception", package, images, images)
    own = found.own()
    assert 0.05 < own["root mean square"] < 20
    assert own == pytest.approx(found.peer(), rel=1e-4)


def test_differences_are_relative_and_absolute_below_one() -> None:
    assert differ({"a": 202.0, "b": 9.0}, {"a": 200.0, "c": 0.0}) == pytest.approx(0.01)
    assert differ({"a": 0.5}, {"a": 0.25}) == 0.25
    with pytest.raises(ValueError, match="nothing to compare"):
        differ({"a": 1.0}, {"b": 1.0})


@pytest.mark.parametrize("wrong", [1.02, float("nan")])
def test_what_does_not_agree_is_not_timed(wrong: float) -> None:
    assert check_agreement("frechet", "prdc", {"a": 1.0}, {"a": 1.005}, 0.01) == pytest.approx(0.005, rel=0.01)
    with pytest.raises(FewstepError, match=r"frechet: fewstep says .* prdc"):
        check_agreement("frechet", "prdc", {"a": wrong}, {"a": 1.0}, 0.01)


def test_times_are_ratios_of_pairs_in_seconds() -> None:
    own, theirs = [Time(1000.0, 500.0), Time(4000.0, 2000.0)], [Time(3000.0, 2000.0), Time(8000.0, 6000.0)]
    line = compared("kernel", "prdc", "", own, theirs, ({}, {}), 0.0, 1.0)
    assert (line.cpu_s.median, line.peer_cpu_s.median, line.wall_s.median) == (1.25, 4.0, 2.5)
    assert line.faster.median == 3.5  # of 4 and 3
    assert line.faster_by_the_clock.median == 2.5


def test_features_are_of_one_distribution() -> None:
    a, b, other = features(500, 16, 1), features(500, 16, 2), features(500, 16, 1) + 0.3
    assert not torch.equal(a, b)
    assert bool((a >= 0).all())
    assert 10 * frechet_distance(moments(a), moments(b)) < frechet_distance(moments(a), moments(other))


@pytest.mark.skipif(anonymous_kib() is None, reason="the system does not say")
def test_the_peak_of_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(ref: Tensor, gen: Tensor) -> Contest:
        def own() -> dict[str, float]:
            held = torch.ones(12 * len(ref), 2**18)
            time.sleep(0.2)  # that a busy machine sees it too
            return {"sum": float(held.sum())}

        return Contest(own, dict, 1.0)

    monkeypatch.setitem(metrics.CONTESTS, "frechet", {"made up": make})  # type: ignore[arg-type]
    paths = tmp_path / "a.npy", tmp_path / "b.npy"
    for path in paths:
        with path.open("wb") as file:
            metrics.np.save(file, torch.zeros(4, 2**4).numpy())
    held = peak_of_call("frechet", "made up", True, paths, 1)
    assert held is not None
    assert 40 < held < 60  # 48 MiB
    assert (peak_of_call("frechet", "made up", False, paths, 1) or 0) < 10


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with threads_of_all(3):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before


# ------------------------------------------------------------------------------------------------------------ the sweep


@pytest.fixture(scope="module")
def runs(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and a student."""
    folder = tmp_path_factory.mktemp("swept")
    for name in ("teacher", "consistency"):
        (folder / name).symlink_to(trained / name)
    return folder


@pytest.fixture(scope="module")
def swept(runs: Path) -> Swept:
    return swept_runs(runs, (2,), 150, CPU)


def test_a_plain_loop_is_the_sampler(trained: Path) -> None:
    """Of a teacher, of maps that jump and of one that goes back to noise."""
    swept = swept_runs(trained, (4,), 8, CPU)
    index, shape = torch.arange(8), swept.data.shape
    rules = set()
    for model, _ in swept.models:
        sampler = model.sampler
        rules.add(sampler.name)
        noise, label = sampler.source(Key(0), "noise", index, shape), index % 10
        fresh = [sampler.source(Key(0, k), "renoise", index, shape) for k in range(3)]
        expected = sampler(4, noise, label, Key(0), index).x
        with torch.no_grad():
            torch.testing.assert_close(plain_loop(sampler, 4, noise, label, fresh), expected)
    assert rules == {"euler", "jumps", "renoise"}


def test_the_values_are_those_of_evaluate(swept: Swept) -> None:
    """What is timed against others is what the command reports, less intervals and what others have not."""
    found = plain_sweep(swept)
    report = evaluate_runs(swept.runs, settings=swept.config, steps=swept.steps)
    assert len(report.rows) == swept.rows == 2
    expected = {
        f"{row.model}@{row.steps} {name}": measured.value
        for row in report.rows
        for name, measured in row.metrics.items()
        if f"{row.model}@{row.steps} {name}" in found
    }
    assert expected.keys() == found.keys()
    assert len(found) == 2 * 2 * 6
    assert dict(found) == pytest.approx(expected, rel=1e-9)


def test_both_sweeps_agree_and_a_wrong_value_is_refused(swept: Swept) -> None:
    try:
        by_hand = ByHand(swept)
        theirs = by_hand.sweep()
    except ImportError as reason:
        pytest.skip(str(reason))
    own = plain_sweep(swept)
    worst, most = check_sweeps(own, theirs, by_hand.errors)
    assert 0 < worst <= most == 1.0
    for kind in ("fd", "kd", "precision", "coverage"):
        name = next(each for each in own if each.split()[1].startswith(kind))
        with pytest.raises(FewstepError, match="more than"):
            check_sweeps({**own, name: own[name] + 0.5 + own[name]}, theirs, by_hand.errors)
    with pytest.raises(FewstepError, match="different rows"):
        check_sweeps(dict(list(own.items())[1:]), theirs, by_hand.errors)


def test_the_models_own_steps(trained: Path) -> None:
    own = swept_runs(trained, None, 200, CPU)
    counts = {model.name: steps for model, steps in own.models}
    assert counts["digits-teacher"] == (1, 2, 4, 8, 16, 32, 64)
    assert counts["digits-meanflow"] == (1, 2, 4, 8)
    assert own.models[0][0].role == "teacher"
    assert own.rows == 19


# ---------------------------------------------------------------------------------------------------------- the command


def document(*arguments: object) -> dict[str, Any]:
    return json.loads(succeed("bench", "metrics", *arguments, "--json").stdout)


def test_a_row_of_single_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity.metric_prc", None)
    ledger = tmp_path / "ledger.jsonl"
    found = document("neighbours", *QUICK, "--ledger", ledger)
    assert json.loads(ledger.read_text()) == found
    assert (found["bench"], found["pairs"], found["threads"]) == ("metrics", 1, 1)
    assert "neighbours: torch-fidelity" in found["left_out"]
    for line in found["compared"]:
        assert (line["metric"], line["peer"], line["what"].partition(";")[0]) == ("neighbours", "prdc", "200 x 16")
        assert line["error"] <= line["tolerance"]
        assert line["values"]["coverage"] == pytest.approx(line["peer_values"]["coverage"])


def test_a_sweep_and_its_gates(runs: Path) -> None:
    pytest.importorskip("prdc")
    sweeping = ("bench", "metrics", "sweep", "--runs", runs, "--n", 100, "--steps", 1, "--pairs", 1)
    failed = cli(*sweeping, "--min-ratio", "sweep-all=1e9", "--json")
    assert failed.exit_code == 4, failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("error: torchmetrics + prdc takes ")
    found = json.loads(failed.stdout)
    assert [line["metric"] for line in found["compared"]] == ["sweep", "sweep-all", "sweep-again"]
    line = found["compared"][0]
    assert set(line["parts"]) == {"references", "sampling", "features", "metrics"}
    assert {"sampling", "torchmetrics: fid", "torchmetrics: kid", "prdc, k = 3", "prdc, k = 5"} < set(
        line["peer_parts"]
    )
    assert len(line["values"]) == len(line["peer_values"]) == 2 * 2 * 6
    assert sum(line["parts"].values()) <= line["cpu_s"]["median"] + 1e-3


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    refuse("bench", "metrics", "frechett", says=("no metric 'frechett'", "did you mean 'frechet'?"))
    refuse("bench", "metrics", "sweep", "--runs", tmp_path, says=("no finished runs", "fewstep demo"))
    refuse("bench", "metrics", "kernel", "--min-ratio", "sweep=2", says=("--min-ratio", "'sweep' is not measured"))
    refuse("bench", "metrics", "kernel", "--min-ratio", "kernel=fast", says=("--min-ratio", "finite number"))


def test_a_sampler_without_a_plain_loop_is_refused(swept: Swept) -> None:
    teacher = swept.models[0][0].sampler
    with pytest.raises(FewstepError, match="no plain loop"):
        plain_loop(replace(teacher, solver="heun"), 1, torch.zeros(1, 1, 8, 8), None, [])  # type: ignore[type-var]
