"""What a file or folder holds, as far as it says so itself: for a look before anything is trusted."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewstep.checkpoint import read_model
from fewstep.conventions import ConventionConfig
from fewstep.errors import UsageError
from fewstep.files import digest, read_json
from fewstep.networks.build import network_from_card, parameter_count
from fewstep.networks.foreign.build import raw_network
from fewstep.networks.foreign.config import ForeignBlock
from fewstep.teachers.containers import choose
from fewstep.teachers.convert import CARD, find_converted, is_converted, read_converted
from fewstep.teachers.foreign import file_digest, made_with, told
from fewstep.teachers.formats.diffusers import INDEX, read_folder
from fewstep.teachers.formats.table import FORMATS
from fewstep.teachers.identify import Checkpoint, check_names, dtypes, identified
from fewstep.teachers.pickles import open_checkpoint


@dataclass(frozen=True)
class TeacherInspection:
    """What lies at ``path``.

    ``kind`` is what ``teacher.kind`` has to be, ``kinds`` all that it could be: names and shapes alone do not tell SiT
    from DiT. ``place`` is where in the file the weights are, ``beside`` where others are. ``network`` has the network's
    config without its ``convention``. ``notes`` are sentences for people.
    """

    path: str
    kind: str
    kinds: tuple[str, ...]
    title: str
    kind_of_file: str
    digest: str
    place: str
    averaged: bool
    beside: tuple[str, ...]
    params: int
    dtype: str
    channels: int
    side: int | None
    num_classes: int
    network: dict[str, Any]
    convention: dict[str, Any]
    guided_channels: int | None
    license: str
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect_teacher(
    path: Path, *, kind: str | None = None, trust: bool = False, architecture: dict[str, Any] | None = None
) -> TeacherInspection:
    """Find out what a teacher is. What is no teacher, or damaged, is a ``UsageError``."""
    if not path.exists():
        raise UsageError(f"{path} is missing")
    if path.is_dir():
        return _folder(path)
    opened = open_checkpoint(path, trust=trust)
    chosen = choose(opened.tree, "auto", str(path))
    kinds = tuple(name for name, format in FORMATS.items() if format.recognises(chosen.weights))
    if kind is not None and kind not in FORMATS:
        raise UsageError(f"no teacher kind {kind}: known are {', '.join(FORMATS)}")
    if not kinds and kind is None:
        names = ", ".join(list(chosen.weights)[:3])
        raise UsageError(
            f"{path}: no known project names its weights so ({names}, ...): known are {', '.join(FORMATS)}"
        )
    said = {**made_with(opened), **(architecture or {})}
    found: Checkpoint | None = None
    fault: UsageError | None = None
    fits = []
    for name in (kind,) if kind is not None else kinds:
        try:
            checkpoint = identified(FORMATS[name], chosen, said, str(path))
        except UsageError as error:
            fault = fault or error
            continue
        fits.append(name)
        found = found or checkpoint
    if found is None:
        assert fault is not None
        raise fault
    notes = []
    if len(fits) > 1:
        notes.append(
            f"{' and '.join(fits)} name and shape their weights alike: say which by --kind, and see it confirmed by "
            "`fewstep teacher check`"
        )
    if not chosen.averaged:
        notes.append("no average of the weights beside them: these are taken as they are")
    if find_converted(opened.digest, fits[0]) is not None:
        notes.append("converted already: training reads the conversion")
    return _inspection(found, tuple(fits), opened.kind_of_file, opened.digest, str(path), notes)


def _inspection(
    checkpoint: Checkpoint, kinds: tuple[str, ...], kind_of_file: str, digest: str, path: str, notes: list[str]
) -> TeacherInspection:
    found, source = checkpoint.found, checkpoint.source
    network, convention = _described(found.network)
    return TeacherInspection(
        path=path,
        kind=checkpoint.format.name,
        kinds=kinds,
        title=checkpoint.format.title,
        kind_of_file=kind_of_file,
        digest=digest,
        place=source.place,
        averaged=source.averaged,
        beside=source.beside,
        params=sum(tensor.numel() for tensor in found.weights.values()),
        dtype=dtypes(found.weights),
        channels=found.channels,
        side=found.side,
        num_classes=found.num_classes,
        network=network,
        convention=convention,
        guided_channels=checkpoint.format.guided_channels,
        license=checkpoint.format.license,
        left_out=found.left_out,
        notes=tuple(notes),
    )


def _folder(path: Path) -> TeacherInspection:
    if is_converted(path):
        kind = str(read_json(path / CARD).get("kind"))
        if kind not in FORMATS:
            raise UsageError(f"{path / CARD} is damaged: no teacher kind {kind}")
        checkpoint = read_converted(path, kind)
        notes = [f"converted from {checkpoint.source.path.name}"]
        return _inspection(checkpoint, (kind,), "converted", checkpoint.source.digest, str(path), notes)
    if (path / INDEX).is_file() or ((path / "config.json").is_file() and not (path / "sampler.json").is_file()):
        return _diffusers(path)
    exported = read_model(path)  # says so if it is none
    config, net = network_from_card(exported.card)
    data = exported.card["data"]
    return TeacherInspection(
        path=str(path),
        kind="run",
        kinds=("run",),
        title=f"fewstep {exported.card['role']} ({exported.card['objective']})",
        kind_of_file="safetensors",
        digest=exported.digest(),
        place="model/model.safetensors",
        averaged=True,
        beside=(),
        params=parameter_count(net),
        dtype="float32",
        channels=data["shape"][0],
        side=data["shape"][1] if len(data["shape"]) == 3 else None,
        num_classes=data["num_classes"],
        network=config.model_dump(mode="json"),
        convention=ConventionConfig().model_dump(mode="json"),
        guided_channels=None,
        license="your own",
        left_out=(),
        notes=(),
    )


def _diffusers(path: Path) -> TeacherInspection:
    found = read_folder(path)
    network, convention = _described(found.network)
    weights, notes = found.weights(), []
    config = found.network
    if config.config.get("guidance_embeds"):
        notes.append("it is told its guidance: set teacher.embedded_guidance (FLUX.1-dev is used with 3.5)")
        config = config.model_copy(update={"embedded_guidance": 1.0})
    raw = raw_network(config, (found.channels, *(found.sides or (64, 64))), found.num_classes)
    check_names(weights, raw.state_dict(), config.family, str(path))
    if found.scheduler is not None:
        moved = "with the size of the image" if found.scheduler.dynamic else f"by {found.scheduler.shift:g}"
        moves = found.scheduler.dynamic or found.scheduler.shift != 1
        notes.append(f"read by its {found.scheduler.name}" + (f", which shifts its grids {moved}" if moves else ""))
    if found.latent is not None:
        scale, shift = (found.latent.to_json()[name][0] for name in ("scale", "shift"))
        notes.append(f"its autoencoder says of latents: data.scale {scale:g}, data.shift {shift:g}")
    wanted = told(found.network)
    if wanted:
        notes.append(f"data.embeddings has to hold {' and '.join(wanted)}")
    return TeacherInspection(
        path=str(path),
        kind="diffusers",
        kinds=("diffusers",),
        title=f"diffusers {found.network.family}",
        kind_of_file="safetensors",
        digest=digest(" ".join(map(file_digest, found.files)).encode()),
        place=", ".join(file.name for file in found.files),
        averaged=False,
        beside=(),
        params=sum(tensor.numel() for tensor in weights.values()),
        dtype=dtypes(weights),
        channels=found.channels,
        side=found.sides[0] if found.sides else None,
        num_classes=found.num_classes,
        network=network,
        convention=convention,
        guided_channels=None,
        license=found.license,
        left_out=(),
        notes=tuple(notes),
    )


def _described(config: ForeignBlock) -> tuple[dict[str, Any], dict[str, Any]]:
    """A network's config, and how it counts time, apart."""
    whole = config.model_dump(mode="json")
    convention = whole.pop("convention")
    return whole, {name: value for name, value in convention.items() if value is not None}
