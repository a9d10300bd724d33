"""The run directory, checkpoints and exported models.

A run directory::

    config.yaml  status.json  environment.json  metrics.jsonl
    checkpoints/step-00001000/   everything needed to go on, bit for bit
    model/                       config.json, sampler.json, model*.safetensors, README.md: ready to load
    results.json  report/        what `fewstep evaluate` and `fewstep report` wrote

Weights are safetensors, everything else is JSON or YAML; nothing is ever unpickled. Every file and every checkpoint
folder appears under its final name only when complete, and carries digests that are checked on reading.
"""

import datetime
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fewstep.errors import UsageError
from fewstep.files import (
    FULL,
    DiskError,
    check_folder,
    digest,
    disk_errors,
    is_temporary,
    json_text,
    make_folder,
    overwrite_json,
    read_json,
    sync_folder,
    temporary_for,
    write_atomic,
    write_json,
)

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


def write_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, *, keep: int | None) -> Path:
    """Write ``folder/step-00001000`` by renaming a finished temporary folder; the oldest beyond ``keep`` go (None: all
    stay).

    Whenever the process is killed, every ``step-*`` is whole, and one that is replaced is still there under some name
    (``restore_checkpoints`` finds it). What fails takes its temporary folder with it.
    """
    target = folder / f"step-{step:08d}"
    temporary = temporary_for(target)
    with disk_errors(target):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            make_folder(temporary)
            digests = {}
            for group, tensors in checkpoint.groups.items():
                digests[group] = write_tensors(temporary / f"{group}.safetensors", tensors)
            state = {**checkpoint.state, "step": step, "digests": digests}
            # The state is small and every digit of it counts: it carries its own digest.
            write_json(temporary / _STATE, {**state, "digest": digest(json_text(state).encode())})
            _move_in(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for old in checkpoints(folder)[:-keep] if keep else []:
            # A folder is deleted file by file: not under a name that says it is whole.
            shutil.rmtree(old.rename(temporary_for(old)))
    return target


_STATE = "state.json"


def _move_in(temporary: Path, target: Path) -> None:
    """Give a finished folder its name. One that has the name already is moved aside first, since a folder cannot be
    renamed over another."""
    aside = target.with_name(f".{target.name}.old")
    if target.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    try:
        temporary.rename(target)
    except BaseException:
        if aside.is_dir():
            aside.rename(target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def restore_checkpoints(folder: Path) -> None:
    """Undo what a killed process had begun in a folder of checkpoints: back go the replaced, away the unfinished."""
    for aside in folder.glob(".step-*.old"):
        target = aside.with_name(aside.name.removeprefix(".").removesuffix(".old"))
        if not target.exists():
            aside.rename(target)
    for leftover in [*folder.glob(".step-*.old"), *filter(is_temporary, folder.glob(".step-*"))]:
        shutil.rmtree(leftover, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch("step-[0-9]+", path.name) and path.is_dir()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint. Damage is a ``UsageError`` that says what to do; nothing is deleted here."""
    try:
        return read_whole(path)
    except UsageError as error:
        if isinstance(error.__cause__, PermissionError):  # no damage
            raise
        raise UsageError(f"{error}; {_way_out(path)}") from error


def _way_out(path: Path) -> str:
    """What to do about a damaged checkpoint."""
    damaged = [path]
    for older in reversed(checkpoints(path.parent)):
        if _step(older) < _step(path):
            try:
                read_whole(older)
            except UsageError:
                damaged.append(older)
            else:
                return f"delete {' and '.join(map(str, damaged))} to go on from {older.name}"
    return "no older checkpoint is whole: start again with --overwrite"


def read_whole(path: Path) -> Checkpoint:
    """Read and verify what ``write_checkpoint`` wrote, be it a checkpoint or not. Damage is a ``UsageError``."""
    file = path / _STATE
    if not file.exists():
        raise UsageError(f"{file} is missing")
    document = read_json(file)
    with damage_in(file):
        state = {key: value for key, value in document.items() if key != "digest"}
        if document.get("digest") != digest(json_text(state).encode()):
            raise UsageError(f"{file} is damaged: its digest is not the one recorded in it")
        digests = dict(state["digests"])
        state = {**state, "step": int(state["step"]), "stage": int(state["stage"]), "done": int(state["done"])}
    groups = {group: read_tensors(path / f"{group}.safetensors", sha) for group, sha in digests.items()}
    return Checkpoint(groups, state)


# Exported models -----------------------------------------------------------------------------------------------------

MODEL_FORMAT = 1
_CARD_KEYS = (
    *("name", "role", "objective", "student", "network", "two_times", "guidance", "teacher_digest", "digests"),
    *("data.name", "data.shape", "data.num_classes", "data.kind", "train.steps", "train.samples", "train.seconds"),
)


DATA_MEAN = "data_mean.safetensors"
"""Beside the weights of a contrastive teacher: what its bias depends on."""


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
    def averages(self) -> Path:
        return self.path / "averages"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def resumes(self) -> bool:
        """Whether there is something to go on from: a checkpoint, or pairs, which are made before the first step."""
        saved = bool(checkpoints(self.checkpoints)) or any(self.checkpoints.glob(".step-*.old"))
        return saved or (self.path / "pairs").is_dir()

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Raise ``UsageError`` unless a training may write here. Changes nothing.

        An existing run needs ``resume`` or ``overwrite``; ``overwrite`` refuses what does not look like a run.
        """
        if resume and overwrite:
            raise UsageError("--resume and --overwrite exclude each other")
        check_folder(self.path)
        if resume and not self.resumes():
            remedy = ": start again with --overwrite" if (self.path / "status.json").is_file() else ""
            raise UsageError(f"nothing to resume: no checkpoint in {self.checkpoints}{remedy}")
        if resume or not self.path.exists() or all(is_temporary(child) for child in self.path.iterdir()):
            return
        if not overwrite:
            raise UsageError(f"{self.path} exists: --resume goes on with it, --overwrite starts it again")
        if not (self.path / "status.json").is_file():
            raise UsageError(f"{self.path} is not a run directory (no status.json): not overwriting it")

    def prepare(self, *, resume: bool, overwrite: bool) -> None:
        """Make the directory ready to train in, after ``check``. ``overwrite`` deletes everything in it."""
        self.check(resume=resume, overwrite=overwrite)
        make_folder(self.path)
        if resume:
            for folder in (self.checkpoints, self.averages):
                restore_checkpoints(folder)
            for folder in (self.path, self.model, self.path / "stages"):
                for leftover in filter(is_temporary, folder.glob(".*.tmp")):
                    with suppress(OSError):
                        _delete(leftover)
            return
        # status.json goes last: a directory that is only half deleted still counts as a run.
        for child in sorted(self.path.iterdir(), key=lambda child: child.name == "status.json"):
            # Not under its name: of what is only half deleted nothing may look whole.
            _delete(child.rename(temporary_for(child)))

    def write_status(self, state: str, *, step: int, message: str = "", exit_code: int | None = None) -> None:
        """``status.json``: running, done, failed or interrupted; launchers flatten exit codes, this does not.

        ``running`` is true as long as process ``pid`` of ``host`` lives: a killed one cannot correct it.
        """
        path = self.path / "status.json"
        document = {"state": state, "step": step, "message": message, "exit_code": exit_code}
        document |= {"pid": os.getpid(), "host": socket.gethostname()}
        document |= {"updated": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        try:
            try:
                write_json(path, document)
            except DiskError as error:
                if error.errno not in FULL or not path.is_file():
                    raise
                overwrite_json(path, document, shorten="message")
        except DiskError:
            if state in ("running", "done"):
                raise  # else the error that is being recorded is on its way to the user: not to be hidden by this one

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        with disk_errors(self.metrics), self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines an interrupted run wrote after its last checkpoint: they will be written again."""
        if self.metrics.is_file():
            text = self.metrics.read_text(errors="replace")
            kept = [line for line in text.splitlines() if _logged_step(line) <= step]
            write_atomic(self.metrics, "".join(line + "\n" for line in kept))


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _logged_step(line: str) -> float:
    """The step of a line of ``metrics.jsonl``; infinity for one that a killed process or a full disk cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
