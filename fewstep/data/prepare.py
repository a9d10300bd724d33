"""Writing shards, from any data that fewstep reads and with the memory of one shard."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fewstep.data.config import DataConfig, FilesConfig
from fewstep.data.digests import ContentDigest
from fewstep.data.encoded import Reported, unreported
from fewstep.data.paths import expanded
from fewstep.data.shards import FORMS, META, SCHEMA
from fewstep.data.stream import Run, Stream, stream
from fewstep.errors import UsageError
from fewstep.files import check_folder, digest, disk_errors, make_folder, temporary_for, write_atomic, write_json

SHARD_BYTES = 2**28
"""The size of a shard, where nobody asks for another."""


def prepare(
    config: DataConfig, out: Path, *, shard_size: int | None, overwrite: bool, report: Reported = unreported
) -> dict[str, Any]:
    """Write the data of a config as shards of ``shard_size`` samples to ``out``; returns their ``meta.json``.

    ``out`` appears when all of it is written, and replaces earlier shards with ``overwrite``. The same data give the
    same bytes. What lies in no files, or is wrong with those, is a ``UsageError``.
    """
    if not isinstance(config, FilesConfig):
        raise UsageError(f"data.kind {config.kind} needs no shards: fewstep makes these data itself")
    source = expanded(config.path)
    check_out(out, source, overwrite)
    return write_shards(stream(config, report), out, config.path, shard_size=shard_size)


def write_shards(data: Stream, out: Path, source: str, *, shard_size: int | None) -> dict[str, Any]:
    """Write a stream as shards; see ``prepare``."""
    temporary = temporary_for(out)
    with disk_errors(out):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            make_folder(temporary)
            meta = _write(data, temporary, source, shard_size)
            _move_in(temporary, out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return meta


def check_out(out: Path, source: Path, overwrite: bool) -> None:
    """Before any work: a ``UsageError`` unless shards of ``source`` may be written to ``out``."""
    check_folder(out)
    if source.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"{source} lies where the shards should go ({out}): give another --out")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{out} exists: --overwrite writes the shards again")
    if not (out / META).is_file():
        raise UsageError(f"{out} is no folder of shards (no {META}): not overwriting it")


def _write(data: Stream, folder: Path, source: str, shard_size: int | None) -> dict[str, Any]:
    content = ContentDigest()
    shards: list[dict[str, Any]] = []
    skipped: list[str] = []
    waiting: list[Run] = []
    shape: tuple[int, ...] = ()

    def flush(count: int) -> None:
        """Write the first ``count`` of the samples that wait."""
        whole = _joined(waiting)
        content.add(whole.x[:count], _first(whole.label, count), _first(whole.mirrored, count))
        name = f"shard-{len(shards):05d}.safetensors"
        tensors = {data.key: whole.x, "latents_flip": whole.mirrored, "labels": whole.label}
        bytes_ = save({key: value[:count].contiguous() for key, value in tensors.items() if value is not None})
        write_atomic(folder / name, bytes_)
        shards.append({"file": name, "count": count, "digest": digest(bytes_)})
        waiting[:] = [Run(whole.x[count:], _rest(whole.label, count), _rest(whole.mirrored, count))]

    held = 0
    for run in data.runs:
        skipped += run.skipped
        if not len(run.x):
            continue
        run = _as_stored(run, data)
        if not shards and not waiting:
            shape = tuple(run.x.shape[1:])
            copies = 2 if run.mirrored is not None else 1
            shard_size = shard_size or max(1, SHARD_BYTES // (copies * run.x[0].nbytes))
        waiting.append(run)
        held += len(run.x)
        while shard_size is not None and held >= shard_size:
            flush(shard_size)
            held -= shard_size
    if held:
        flush(held)
    meta = {
        "format": "fewstep-data",
        "schema": SCHEMA,
        "kind": data.key,
        "count": sum(int(shard["count"]) for shard in shards),
        "shape": list(shape),
        "num_classes": data.num_classes,
        "class_names": list(data.class_names),
        "has": {"labels": data.labelled, "latents_flip": data.has_mirrored},
        "latent": None if data.latent is None else data.latent.to_json(),
        "source": source,
        "skipped": len(skipped),
        "autoencoder": data.facts.get("autoencoder"),
        "digest": content.result(data.num_classes, data.latent),
        "shards": shards,
    }
    write_json(folder / META, meta)
    return meta


def _as_stored(run: Run, data: Stream) -> Run:
    """Latents become float16; one that does not fit is a ``UsageError``."""
    form = FORMS[data.key]
    if run.x.dtype == form:
        return run
    x, mirrored = run.x.to(form), None if run.mirrored is None else run.mirrored.to(form)
    if not bool(torch.isfinite(x).all()) or (mirrored is not None and not bool(torch.isfinite(mirrored).all())):
        raise UsageError(f"{data.where} holds latents that are not finite in 16 bits")
    return Run(x, run.label, mirrored)


def _joined(runs: list[Run]) -> Run:
    if len(runs) == 1:
        return runs[0]
    label = [run.label for run in runs if run.label is not None]
    mirrored = [run.mirrored for run in runs if run.mirrored is not None]
    return Run(
        torch.cat([run.x for run in runs]),
        torch.cat(label) if label else None,
        torch.cat(mirrored) if mirrored else None,
    )


def _first(tensor: Tensor | None, count: int) -> Tensor | None:
    return None if tensor is None else tensor[:count]


def _rest(tensor: Tensor | None, count: int) -> Tensor | None:
    return None if tensor is None else tensor[count:]


def _move_in(temporary: Path, out: Path) -> None:
    """Give a finished folder its name; what had it before is there until then."""
    aside = out.with_name(f".{out.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if out.exists():
        out.rename(aside)
    try:
        temporary.rename(out)
    except BaseException:
        with suppress(OSError):
            aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)
