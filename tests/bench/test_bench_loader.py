"""The benchmark of the loader: what is measured is what a training gets. Times are not tested."""

import json
from pathlib import Path

import torch
import typer
from conftest import SMALL, CliRunner, cli, refuse, succeed

from fewstep.bench.loader import bench_loader, loader_table, loader_title
from fewstep.commands.bench.loader import bench_loader as command


def test_every_place_is_measured_at_every_size() -> None:
    seen: list[tuple[int, int]] = []
    bench = bench_loader(
        (4, 8),
        batch_size=16,
        repeats=3,
        work_ms=0.1,
        device=torch.device("cpu"),
        report=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 8) for done in range(1, 9)]
    assert [rate.size for rate in bench.rates] == [4] * 4 + [8] * 4
    assert len({rate.place for rate in bench.rates}) == 4
    for rate in bench.rates:
        assert 0 < rate.images_per_s.low <= rate.images_per_s.median <= rate.images_per_s.high
        assert 0 < rate.wait_ms.low <= rate.wait_ms.median
    assert loader_table(bench).row_count == 8
    assert "batches of 16, cpu" in loader_title(bench)


def test_the_command(tmp_path: Path) -> None:
    app, ledger = typer.Typer(), tmp_path / "ledger.jsonl"
    app.command()(command)
    arguments = ["--batch-size", "4", "--repeats", "2", "--work-ms", "0", "--ledger", str(ledger), "--json"]
    result = CliRunner(env={"NO_COLOR": "1"}).invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document == json.loads(ledger.read_text())
    assert (document["bench"], document["batch_size"], len(document["rates"])) == ("loader", 4, 8)
    assert "images/s" in result.stderr


def test_a_recipe_beside_its_training_step(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    measured = ("bench", "loader", "digits-teacher", *SMALL, "--repeats", 6, "--steps", 3)
    document = json.loads(succeed(*measured, "--ledger", ledger, "--min-ratio", 0.001, "--json").stdout)
    assert document == json.loads(ledger.read_text())
    assert (document["recipe"], document["batch_size"]) == ("digits-teacher", 16)
    slower = min(document[place]["median"] for place in ("resident", "fetched"))
    assert document["ratio"] == slower / document["training"]["median"]
    refused = cli(*measured, "--min-ratio", 1e9)
    assert refused.exit_code == 4
    assert "times as fast" in refused.stderr


def test_a_ratio_of_nothing_is_refused() -> None:
    refuse("bench", "loader", "--min-ratio", 2, says=("--min-ratio", "CONFIG"))
