"""A teacher from elsewhere as safetensors and JSON, kept by the digest of the file that it came from.

A converted teacher is a folder of ``model.safetensors`` and ``teacher.json``: the kind, the network's config with its
convention, and where all of it came from. ``teacher.path`` takes such a folder, and a file that was converted into the
cache (``FEWSTEP_CACHE``, or ``~/.cache/fewstep``) is read from there.
"""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fewstep.checkpoint import damage_in, read_tensors, write_tensors
from fewstep.errors import UsageError
from fewstep.files import cache_folder, read_json, write_json
from fewstep.networks.config import NetworkConfig
from fewstep.networks.foreign.config import ForeignBlock
from fewstep.teachers.formats.base import Found
from fewstep.teachers.formats.table import FORMATS
from fewstep.teachers.identify import Checkpoint, Source

CARD, WEIGHTS = "teacher.json", "model.safetensors"
FORMAT = 1


def cache() -> Path:
    """Where conversions are kept."""
    return cache_folder() / "teachers"


def cached(digest: str, kind: str) -> Path:
    """The folder of a file's conversion, be it there or not."""
    return cache() / f"{kind}-{digest[:16]}"


def is_converted(path: Path) -> bool:
    return (path / CARD).is_file()


def find_converted(digest: str, kind: str) -> Path | None:
    """The conversion of the file with this digest, if there is a whole one."""
    folder = cached(digest, kind)
    return (
        folder if is_converted(folder) and read_json(folder / CARD).get("source", {}).get("digest") == digest else None
    )


def write_converted(checkpoint: Checkpoint, out: Path | None) -> Path:
    """Write a checkpoint as a converted teacher into ``out``, or into the cache; returns the folder.

    The same teacher is not written twice. A folder that holds something else is a ``UsageError``.
    """
    folder = out or cached(checkpoint.source.digest, checkpoint.format.name)
    card = _card(checkpoint)
    if is_converted(folder):
        held = {key: value for key, value in read_json(folder / CARD).items() if key != "digest"}
        if held == card:
            return folder
        if out is not None:
            raise UsageError(
                f"{folder} holds another teacher ({held.get('source', {}).get('file')}): give another --out"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty and holds no converted teacher: give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    digest = write_tensors(folder / WEIGHTS, checkpoint.found.weights, {"format": "pt", "kind": checkpoint.format.name})
    write_json(folder / CARD, {**card, "digest": digest})  # last: a folder with it is complete
    return folder


def _card(checkpoint: Checkpoint) -> dict[str, Any]:
    found, source = checkpoint.found, checkpoint.source
    return {
        "format": FORMAT,
        "kind": checkpoint.format.name,
        "network": found.network.model_dump(mode="json"),
        "channels": found.channels,
        "side": found.side,
        "num_classes": found.num_classes,
        "left_out": list(found.left_out),
        "license": checkpoint.format.license,
        "source": {
            "file": source.path.name,
            "digest": source.digest,
            "kind_of_file": source.kind_of_file,
            "place": source.place,
            "averaged": source.averaged,
            "beside": list(source.beside),
        },
    }


def read_converted(folder: Path, kind: str) -> Checkpoint:
    """A converted teacher. One of another kind, or a damaged one, is a ``UsageError``."""
    card = read_json(folder / CARD)
    if card.get("format") != FORMAT:
        raise UsageError(f"{folder / CARD} has format {card.get('format')!r}; this version reads {FORMAT}")
    if card.get("kind") != kind:
        raise UsageError(f"{folder} holds a teacher of kind {card.get('kind')}, not {kind}")
    with damage_in(folder):
        network: NetworkConfig = TypeAdapter(NetworkConfig).validate_python(card["network"])
        assert isinstance(network, ForeignBlock)
        said = card["source"]
        source = Source(
            Path(said["file"]),
            said["digest"],
            said["kind_of_file"],
            said["place"],
            said["averaged"],
            tuple(said["beside"]),
        )
        weights = read_tensors(folder / WEIGHTS, card["digest"])
        found = Found(network, card["channels"], card["side"], card["num_classes"], weights, tuple(card["left_out"]))
    return Checkpoint(FORMATS[kind], found, source)
