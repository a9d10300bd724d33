"""What a run directory has to look like in the end, whatever happened to the run on the way."""

import json
from pathlib import Path
from typing import Any


def weights(run: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in (run / "model").glob("*.safetensors")}
    assert files
    return files


def assert_same_end(run: Path, undisturbed: Path, total: int) -> None:
    """The model, the log and the end of an undisturbed run, and nothing left behind."""
    assert weights(run) == weights(undisturbed)
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [
        *range(1, total + 1)
    ]
    assert (status(run)["state"], status(run)["step"]) == ("done", total)
    assert leftovers(run) == []


def leftovers(run: Path) -> list[Path]:
    return list(run.rglob(".*"))


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())
