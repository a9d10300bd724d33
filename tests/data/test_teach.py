"""A folder of images teaches a model in one command, and its layout leaves no trace in the weights."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import refuse, succeed
from safetensors.torch import load_file
from written import LAYOUTS, as_folder

TEACHER = """
name: own-digits
data: {{kind: {kind}, path: "{path}", name: own, flip: true}}
student: {{kind: velocity, init: scratch, network: {{kind: mlp, width: 64, depth: 2}}}}
objective: {{kind: flow_matching}}
train: {{threads: 1, steps: {steps}, batch_size: 64, lr: 2.0e-3, warmup_steps: 10, log_every: 10, ema: [0.98]}}
evaluate: {{steps: [16], teacher_steps: [], n: 300, features: [pixels]}}
"""


def teach(folder: Path, path: Path, kind: str, steps: int) -> Path:
    config, run = folder / f"{kind}.yaml", folder / f"run-{path.name}"
    config.write_text(TEACHER.format(kind=kind, path=path, steps=steps))
    succeed("teach", config, "--out", run)
    return run


def test_a_folder_of_images_teaches(tmp_path: Path) -> None:
    """The loss falls below that of predicting nothing, and the samples come nearer to the data than noise is."""
    path = as_folder(tmp_path / "digits")
    run = teach(tmp_path, path, "folder", 300)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    card = json.loads((run / "model" / "config.json").read_text())
    assert card["data"] == {"name": "own", "shape": [1, 8, 8], "num_classes": 10, "kind": "image"}
    early = teach(tmp_path, as_folder(tmp_path / "same"), "folder", 1)
    distances = []
    for each in (run, early):
        row = json.loads(succeed("evaluate", each, "--json").stdout)["rows"][0]
        distances.append(row["metrics"]["fd_pixels"]["value"])
    assert distances[0] < 0.5 * distances[1]


@pytest.mark.parametrize("name", ["zip", "parquet", "webdataset"])
def test_the_layout_leaves_no_trace_in_the_weights(name: str, tmp_path: Path) -> None:
    kind, write = LAYOUTS[name]
    runs = [
        teach(tmp_path, as_folder(tmp_path / "folder"), "folder", 5),
        teach(tmp_path, write(tmp_path / "other"), kind, 5),
    ]
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]


def test_a_run_goes_on_where_its_images_lie(tmp_path: Path) -> None:
    """Stopped and resumed from shards that stay on the host: the bits of a run that went through."""
    shards = tmp_path / "shards"
    succeed("data", "prepare", as_folder(tmp_path / "digits"), "--out", shards, "--shard-size", 100)
    config = tmp_path / "own.yaml"
    config.write_text(TEACHER.format(kind="shards", path=shards, steps=8))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeed("teach", config, "train.checkpoint_every=4", "--out", whole)
    host = ("data.resident=host", "train.checkpoint_every=4")
    succeed("teach", config, *host, "--out", parts)
    newest = max((parts / "checkpoints").iterdir())
    shutil.rmtree(newest)
    shutil.rmtree(parts / "model")
    succeed("teach", config, *host, "--out", parts, "--resume")
    models = [(run / "model" / "model.safetensors").read_bytes() for run in (whole, parts)]
    assert models[0] == models[1]


def test_samples_are_drawn_where_the_data_are_not(tmp_path: Path) -> None:
    """The model says what its samples are like."""
    path = as_folder(tmp_path / "digits")
    run = teach(tmp_path, path, "folder", 1)
    shutil.rmtree(path)
    succeed("sample", run, "--steps", 2, "--n", 3)
    assert load_file(run / "samples" / "steps-02-seed-0.safetensors")["x"].shape == (3, 1, 8, 8)


def test_the_recipe_for_ones_own_images(tmp_path: Path) -> None:
    """As the README has it, in 64 x 64."""
    run = tmp_path / "run"
    small = ("train.steps=1", "train.batch_size=2")
    succeed(
        "teach", "images-teacher", f"data.path={as_folder(tmp_path / 'photos')}", "data.size=64", *small, "--out", run
    )
    card = json.loads((run / "model" / "config.json").read_text())
    assert (card["data"]["shape"], card["data"]["num_classes"], card["network"]["kind"]) == ([3, 64, 64], 10, "unet")


def test_errors_of_data_commands_name_their_own_options(tmp_path: Path) -> None:
    path = as_folder(tmp_path / "digits")
    broken = next(path.rglob("*.png"))
    broken.write_bytes(b"no image")
    refuse("data", "inspect", path, says=(broken.name, "(here: --skip-broken)"))
    refuse("teach", "images-teacher", f"data.path={path}", says=(broken.name, "data.skip_broken=true"))
