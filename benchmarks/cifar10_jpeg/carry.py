"""Runs small enough to carry: a run's newest checkpoint, or its finished model, in parts of a few megabytes.

    python benchmarks/cifar10_jpeg/carry.py pack RUN --out DIR [--part-mb 15] [--keep weights,averages]
    python benchmarks/cifar10_jpeg/carry.py unpack DIR --out RUN

For machines that are lent for a while, when what leaves them has to be small: ``pack`` writes ``part-00.safetensors``,
..., each below ``--part-mb`` (10^6 bytes), and ``carry.json`` (what it is, what was rounded and dropped, the digest of
every part). ``unpack`` makes a run directory of them that ``fewstep teach|distill CONFIG --resume --out RUN`` goes on
with, at the step, the stage and the seconds that the first one had reached; or, of a run that has ended, a model to be
loaded, evaluated and learned from.

What is rounded: float32 tensors of two dimensions and more become bfloat16, the nearest one, off by 2^-8 of the value
at most. Those of fewer dimensions (biases, gains, fixed frequencies: a thousandth of a network), integers, float64 and
texts stay as they are. Equal tensors are stored once.

What Adam and its relatives know: the step count stays, the first moment is dropped, the second one is stored as means
over rows and columns (see ``rounding.py``). Bias correction is over by then, so that the first step after unpacking is
``(1 - beta_1) g / sqrt(v)``: a tenth of a usual one where gradients agree with each other, four tenths where they are
independent, and a usual one again after some ten steps. That is a warm-up of its own.

A carried model has other weights than the one it was made of, so another digest, and a student refuses to go on with a
teacher of another digest. Rounding twice changes nothing (bfloat16 to float32 is exact): when a teacher has ended,
pack it, unpack it, and use the unpacked copy from then on, on this machine too. Its digest is the same wherever the
parts are unpacked.

``--keep`` says what of a checkpoint is worth its size: ``weights``, ``averages`` (all of them) or ``average`` (the
first, which is exported). What is left out is replaced by what is kept: the weights by the first average, averages by
that or by the weights. Target networks, the stage before and the students of finished stages always come along.
Left behind: pairs of noise and solution (the resumed run makes them again), snapshots of averages, older checkpoints,
trackers' files, evaluations (of weights that were not rounded).

A run of 15.6 million parameters with one average, 238 MB on disk, makes 63 MB, or 32 with ``--keep average``.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rounding import fold, unfold
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fewstep.checkpoint import (
    Checkpoint,
    RunDirectory,
    Tensors,
    checkpoints,
    damage_in,
    read_checkpoint,
    read_model,
    read_tensors,
    write_checkpoint,
    write_tensors,
)
from fewstep.config import read_config
from fewstep.errors import FewstepError, UsageError
from fewstep.files import check_folder, digest, is_temporary, json_text, read_json, write_atomic, write_json

FORMAT = 1
MANIFEST = "carry.json"
TEXTS = ("config.yaml", "environment.json", "metrics.jsonl")
KEEP = ("weights", "averages", "average")
MB = 1_000_000
HEADER, ENTRY = 256, 160
"""Bytes that the header of a part takes at most, and each of its entries beside its name."""


@dataclass
class Contents:
    """What is carried of a run: tensors by file and name, texts by path, and what else is to be known of it.

    ``what`` is ``checkpoint`` (files are its groups, and ``stages/*``; ``facts`` its state) or ``model`` (files below
    ``model/``; ``facts`` its card, ``metadata`` of each file).
    """

    what: str
    name: str
    step: int
    tensors: dict[str, Tensors]
    facts: dict[str, Any]
    texts: dict[str, bytes] = field(default_factory=dict)
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


# Reading a run -------------------------------------------------------------------------------------------------------


def read_run(path: Path, keep: Sequence[str] = KEEP[:2]) -> Contents:
    """The finished model of a run, or its newest checkpoint as far as ``keep`` says. ``UsageError`` for neither."""
    if (path / "sampler.json").is_file() or (path / "model" / "config.json").is_file():
        contents = read_ended(path)
    elif checkpoints(path / "checkpoints"):
        contents = read_stopped(path, keep)
    else:
        raise UsageError(f"{path} has neither a checkpoint nor a finished model: there is nothing to carry")
    contents.texts |= {name: (path / name).read_bytes() for name in TEXTS if (path / name).is_file()}
    return contents


def read_stopped(path: Path, keep: Sequence[str]) -> Contents:
    """The newest checkpoint of a run, with the students of its finished stages."""
    unknown = set(keep) - set(KEEP)
    if unknown or not keep:
        raise UsageError(f"--keep takes some of {', '.join(KEEP)}, not {', '.join(sorted(unknown)) or 'nothing'}")
    config, checkpoint = read_config(path), read_checkpoint(checkpoints(path / "checkpoints")[-1])
    groups, state = dict(checkpoint.groups), checkpoint.state
    dropped = ["first moments of the optimiser (zero when unpacked)"]
    averages = [f"ema-{average.name}" for average in config.train.ema]
    kept = averages if "averages" in keep else averages[:1] if "average" in keep else []
    # What is left out becomes what replaces it; equal tensors are stored once.
    replacing = kept[0] if kept else "student"
    for group in [*averages, "student"]:
        if group not in kept and not (group == "student" and "weights" in keep):
            groups[group] = groups[replacing]
            dropped.append(f"{group} ({replacing} stands in for it)")
    for serves, sha in state["finished"].items():
        file = stage_file(serves)
        groups[file] = read_tensors(path / file, sha)
    for folder, then in (
        ("pairs", "they are made again by the run that goes on"),
        ("averages", "no other averages can be rebuilt from before"),
    ):
        size = sum(file.stat().st_size for file in (path / folder).rglob("*") if file.is_file())
        if size:
            dropped.append(f"{folder}/, {size / MB:.1f} MB ({then})")
    return Contents("checkpoint", config.name, int(state["step"]), groups, state, dropped=dropped)


def stage_file(serves: str) -> str:
    """Where a run keeps the student of a finished stage."""
    return f"stages/steps-{int(serves):04d}.safetensors"


def read_ended(path: Path) -> Contents:
    """The exported model of a run that has ended."""
    exported = read_model(path)
    card = {key: value for key, value in exported.card.items() if key != "digests"} | {"carried": "bfloat16"}
    contents = Contents("model", str(card["name"]), int(card["train"]["steps"]), {}, card)
    contents.dropped = ["checkpoints and averages", "evaluations and reports (of the weights before rounding)"]
    for file in sorted(each for each in exported.folder.rglob("*") if each.is_file() and not is_temporary(each)):
        name = file.relative_to(exported.folder).as_posix()
        if file.suffix == ".safetensors":
            known = name in exported.card["digests"]  # adapters by themselves have no digest
            contents.tensors[f"model/{name}"] = exported.weights(name) if known else load_file(file)
            with safe_open(file, "pt") as opened:
                contents.metadata[f"model/{name}"] = dict(sorted((opened.metadata() or {}).items()))
        elif name != "config.json":
            contents.texts[f"model/{name}"] = file.read_bytes()
    return contents


# Writing parts -------------------------------------------------------------------------------------------------------


def pack(run: Path, out: Path, *, part_mb: float = 15, keep: Sequence[str] = KEEP[:2]) -> dict[str, Any]:
    """Write ``RUN`` to the empty folder ``out``; returns what ``carry.json`` says. The same run gives the same
    bytes."""
    check_empty(out)
    limit = int(part_mb * MB)
    if limit < MB // 100:
        raise UsageError(f"--part-mb {part_mb:g} is too small: at least 0.01")
    contents = read_run(run, keep)
    stored: Tensors = {}
    known: dict[tuple[str, str], str] = {}
    rules: Counter[str] = Counter()

    def put(key: str, value: Tensor) -> str:
        """Store a tensor, unless an equal one is; returns the key to find it by."""
        found = known.setdefault(_identity(value), key)
        if found == key:
            stored[key] = value
        return found

    table: dict[str, Any] = {"facts": contents.facts, "metadata": contents.metadata, "files": {}, "texts": {}}
    for file, tensors in contents.tensors.items():
        entries = table["files"][file] = {}
        for name, value in sorted(tensors.items()):  # safetensors gives them in any order
            how, parts = fold(file, name, value)
            rules[how] += 1
            keys = {part: put(f"{file}/{name}{part}", tensor) for part, tensor in parts.items()}
            entries[name] = [how, str(value.dtype).removeprefix("torch."), list(value.shape), keys]
    for path, content in contents.texts.items():
        stored[f"text:{path}"] = _as_tensor(content)
        table["texts"][path] = f"text:{path}"
    stored["table"] = _as_tensor(json.dumps(table).encode())
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "what": contents.what,
        "name": contents.name,
        "step": contents.step,
        "tensors": dict(sorted(rules.items())),
        "dropped": contents.dropped,
        "parts": [],
    }
    for number, part in enumerate(cut(stored, limit)):
        file = f"part-{number:02d}.safetensors"
        sha = write_tensors(out / file, part)
        manifest["parts"].append({"file": file, "bytes": (out / file).stat().st_size, "sha256": sha})
    write_json(out / MANIFEST, {**manifest, "digest": digest(json_text(manifest).encode())})
    return manifest


def cut(stored: Tensors, limit: int) -> Iterator[Tensors]:
    """Parts of at most ``limit`` bytes as files, of tensors named ``KEY#0``; one that is larger than a part is flat and
    lies in several, as ``KEY#0``, ``KEY#1``, ..."""
    part: Tensors = {}
    room = limit - HEADER
    for key, value in stored.items():
        named = len(json.dumps(key).encode()) + ENTRY
        whole = limit - HEADER - named
        pieces = (value,) if value.nbytes <= whole else value.flatten().split(whole // value.element_size())
        for number, piece in enumerate(pieces):
            if piece.nbytes + named > room:
                yield part
                part, room = {}, limit - HEADER
            part[f"{key}#{number}"] = piece
            room -= piece.nbytes + named
    yield part


def _identity(value: Tensor) -> tuple[str, str]:
    """The type of a tensor and its bytes. Its shape is noted where it is used."""
    return str(value.dtype), digest(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def _as_bytes(value: Tensor) -> bytes:
    return value.numpy().tobytes()


# Writing a run -------------------------------------------------------------------------------------------------------


def unpack(folder: Path, out: Path) -> dict[str, Any]:
    """Write what ``folder`` holds as a run directory to the empty folder ``out``; returns what ``carry.json`` says.
    Missing and altered files are a ``UsageError``."""
    check_empty(out)
    manifest = read_manifest(folder)
    stored = read_parts(folder, manifest)
    with damage_in(folder / MANIFEST):
        table = json.loads(_as_bytes(stored["table"]))
        tensors: dict[str, Tensors] = {
            file: {
                name: unfold(how, {part: stored[key] for part, key in keys.items()}, shape, getattr(torch, dtype))
                for name, (how, dtype, shape, keys) in entries.items()
            }
            for file, entries in table["files"].items()
        }
        texts = {path: _as_bytes(stored[key]) for path, key in table["texts"].items()}
        facts, step = table["facts"], int(manifest["step"])
    if not all((out / path).resolve().is_relative_to(out.resolve()) for path in [*tensors, *texts]):
        raise UsageError(f"{folder} holds files that lie outside of a run: not unpacking it")
    for path, content in texts.items():
        write_atomic(out / path, content)
    run = RunDirectory(out)
    if manifest["what"] == "model":
        digests = {
            file.removeprefix("model/"): write_tensors(out / file, values, table["metadata"][file])
            for file, values in tensors.items()
        }
        write_json(run.model / "config.json", {**facts, "digests": digests})
        run.write_status("done", step=step, exit_code=0)
        return manifest
    finished = {
        serves: write_tensors(out / stage_file(serves), tensors.pop(stage_file(serves))) for serves in facts["finished"]
    }
    run.write_status("interrupted", step=step, message="carried here; go on with --resume", exit_code=130)
    write_checkpoint(run.checkpoints, step, Checkpoint(tensors, {**facts, "finished": finished}), keep=None)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """What ``carry.json`` says, if it is whole and of this format."""
    path = folder / MANIFEST
    document = read_json(path)
    if document.get("format") != FORMAT:
        raise UsageError(f"{path} has format {document.get('format')!r}; this version reads {FORMAT}")
    manifest = {key: value for key, value in document.items() if key != "digest"}
    if document.get("digest") != digest(json_text(manifest).encode()):
        raise UsageError(f"{path} is damaged: its digest is not the one recorded in it")
    return manifest


def read_parts(folder: Path, manifest: dict[str, Any]) -> Tensors:
    """The stored tensors, put together again where ``cut`` has split them (those are flat)."""
    pieces: dict[str, dict[int, Tensor]] = {}
    for part in manifest["parts"]:
        for name, piece in read_tensors(folder / part["file"], part["sha256"]).items():
            key, _, number = name.rpartition("#")
            pieces.setdefault(key, {})[int(number)] = piece
    return {
        key: found[0] if len(found) == 1 else torch.cat([found[number] for number in sorted(found)])
        for key, found in pieces.items()
    }


def check_empty(folder: Path) -> None:
    """``UsageError`` unless ``folder`` can be made, or is there and empty."""
    check_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty: give another --out")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="a run directory into parts")
    packing.add_argument("run", type=Path)
    packing.add_argument("--out", type=Path, required=True, metavar="DIR")
    packing.add_argument("--part-mb", type=float, default=15.0, help="the largest part, in 10^6 bytes (15)")
    packing.add_argument("--keep", default=",".join(KEEP[:2]), help="some of weights, averages, average")
    unpacking = commands.add_parser("unpack", help="parts into a run directory")
    unpacking.add_argument("folder", type=Path)
    unpacking.add_argument("--out", type=Path, required=True, metavar="RUN")
    given = parser.parse_args(arguments)
    try:
        if given.command == "pack":
            keep = [each for each in given.keep.split(",") if each]
            manifest = pack(given.run, given.out, part_mb=given.part_mb, keep=keep)
            print(f"left out: {'; '.join(manifest['dropped'])}")
        else:
            manifest = unpack(given.folder, given.out)
    except FewstepError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    size = sum(part["bytes"] for part in manifest["parts"]) / MB
    of = f"the {manifest['what']} of {manifest['name']} at step {manifest['step']}"
    print(f"{given.command}ed {of}: {len(manifest['parts'])} parts, {size:.1f} MB, in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
