"""The run directory, checkpoints and exported models.

A run directory::

    config.yaml  status.json  environment.json  metrics.jsonl
    checkpoints/step-00001000/   everything needed to go on, bit for bit
    model/                       config.json, sampler.json, model*.safetensors, README.md: ready to load
    results.json  report/        what `fewstep evaluate` and `fewstep report` wrote

Weights are safetensors, everything else is JSON or YAML; nothing is ever unpickled. Every file and every checkpoint
folder appears under its final name only when complete, and carries digests that are checked on reading.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fewstep.errors import UsageError
from fewstep.files import check_folder, digest, read_json, write_atomic, write_json

Tensors = dict[str, Tensor]


def write_tensors(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file atomically; returns its digest. The same tensors and metadata give the same bytes."""
    content = save(
        {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}, dict(metadata or {})
    )
    content = _sorted_header(content)
    write_atomic(path, content)
    return digest(content)


def _sorted_header(content: bytes) -> bytes:
    """The same safetensors file with its metadata in order: the library writes them in a random one.

    Format: eight bytes of header length, a JSON header padded with spaces, the tensors (which do not move).
    """
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def read_tensors(path: Path, expected_digest: str) -> Tensors:
    """Read a safetensors file after checking its digest. Missing, truncated or altered files are a ``UsageError``."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if digest(content) != expected_digest:
        raise UsageError(f"{path} is damaged or truncated: its digest is not the one recorded beside it")
    try:
        return load(content)
    except SafetensorError as error:
        raise UsageError(f"{path} is damaged: {error}") from error


@contextmanager
def damage_in(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a model is built from the contents of ``path`` is a ``UsageError`` that names it."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        detail = " ".join(str(error).split())
        raise UsageError(f"{path} is damaged: {type(error).__name__} {detail[:160]}") from error


# Checkpoints ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """Groups of tensors (``student``, ``optimizer``, ``ema-0.999``, ...) and a JSON state."""

    groups: dict[str, Tensors]
    state: dict[str, Any]


def write_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write ``folder/step-00001000`` by renaming a finished temporary folder; the oldest beyond ``keep`` go."""
    target = folder / f"step-{step:08d}"
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    digests = {}
    for group, tensors in checkpoint.groups.items():
        digests[group] = write_tensors(temporary / f"{group}.safetensors", tensors)
    write_json(temporary / "state.json", {**checkpoint.state, "step": step, "digests": digests})
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint; damage is a ``UsageError``."""
    state = read_json(path / "state.json")
    with damage_in(path / "state.json"):
        digests = dict(state["digests"])
        state = {**state, "step": int(state["step"]), "stage": int(state["stage"]), "done": int(state["done"])}
    groups = {group: read_tensors(path / f"{group}.safetensors", sha) for group, sha in digests.items()}
    return Checkpoint(groups, state)


# Exported models -----------------------------------------------------------------------------------------------------

MODEL_FORMAT = 1
_CARD_KEYS = (
    *("name", "role", "objective", "student", "network", "two_times", "guidance", "teacher_digest", "digests"),
    *("data.name", "data.shape", "data.num_classes", "train.steps", "train.samples", "train.seconds"),
)


def write_model(
    folder: Path,
    card: Mapping[str, Any],
    sampler: Mapping[str, Any],
    weights: Mapping[str, Tensors],
    readme: str,
) -> None:
    """Export a model: ``config.json`` (its card, with digests), ``sampler.json``, weights by file, ``README.md``."""
    metadata = {"format": "pt", "convention": "t=0 data, t=1 noise, v=e-x", "objective": str(card["objective"])}
    digests = {name: write_tensors(folder / name, tensors, metadata) for name, tensors in weights.items()}
    write_json(folder / "sampler.json", sampler)
    write_atomic(folder / "README.md", readme)
    # Last: a folder with a config.json is complete.
    write_json(folder / "config.json", {"format": MODEL_FORMAT, **card, "digests": digests})


@dataclass(frozen=True)
class ExportedModel:
    """An exported model as read from disk: its card, its sampler specification, and where its weights lie."""

    folder: Path
    card: dict[str, Any]
    sampler: dict[str, Any]

    def weights(self, name: str = "model.safetensors") -> Tensors:
        return read_tensors(self.folder / name, self.digest(name))

    def digest(self, name: str = "model.safetensors") -> str:
        return str(self.card["digests"][name])


def read_model(path: Path) -> ExportedModel:
    """Read the exported model of a run directory (or of a model folder itself)."""
    folder = path if (path / "sampler.json").is_file() else path / "model"
    if not (folder / "config.json").is_file():
        if (path / "config.yaml").is_file():
            raise UsageError(f"{path} holds no finished model: its training has not ended (go on with --resume)")
        raise UsageError(f"no run or model at {path}")
    card = read_json(folder / "config.json")
    if card.get("format") != MODEL_FORMAT:
        raise UsageError(f"{folder}/config.json has format {card.get('format')!r}; this version reads {MODEL_FORMAT}")
    for key in _CARD_KEYS:
        node: Any = card
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                raise UsageError(f"{folder}/config.json is damaged: it has no {key}")
            node = node[part]
    return ExportedModel(folder, card, read_json(folder / "sampler.json"))


# The run directory ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run, and the small files that say how it stands."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Raise ``UsageError`` unless a training may write here. Changes nothing.

        An existing run needs ``resume`` or ``overwrite``; ``overwrite`` refuses what does not look like a run.
        """
        if resume and overwrite:
            raise UsageError("--resume and --overwrite exclude each other")
        check_folder(self.path)
        if resume and not checkpoints(self.checkpoints):
            raise UsageError(f"nothing to resume: no checkpoint in {self.checkpoints}")
        if resume or not self.path.exists() or not any(self.path.iterdir()):
            return
        if not overwrite:
            raise UsageError(f"{self.path} exists: --resume goes on with it, --overwrite starts it again")
        if not (self.path / "status.json").is_file():
            raise UsageError(f"{self.path} is not a run directory (no status.json): not overwriting it")

    def prepare(self, *, resume: bool, overwrite: bool) -> None:
        """Make the directory ready to train in, after ``check``. ``overwrite`` deletes everything in it."""
        self.check(resume=resume, overwrite=overwrite)
        self.path.mkdir(parents=True, exist_ok=True)
        if resume:  # what a killed process left half-written
            for leftover in self.checkpoints.glob(".step-*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
            return
        # status.json goes last: a directory that is only half deleted still counts as a run.
        for child in sorted(self.path.iterdir(), key=lambda child: child.name == "status.json"):
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()

    def write_status(self, state: str, *, step: int, message: str = "", exit_code: int | None = None) -> None:
        """``status.json``: running, done, failed or interrupted; launchers flatten exit codes, this does not."""
        write_json(
            self.path / "status.json", {"state": state, "step": step, "message": message, "exit_code": exit_code}
        )

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines an interrupted run wrote after its last checkpoint: they will be written again."""
        if self.metrics.is_file():
            kept = [line for line in self.metrics.read_text().splitlines() if _logged_step(line) <= step]
            write_atomic(self.metrics, "".join(line + "\n" for line in kept))


def _logged_step(line: str) -> float:
    """The step of a line of ``metrics.jsonl``; infinity for one that a killed process left half-written."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
