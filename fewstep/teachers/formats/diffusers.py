"""Folders as diffusers saves them: a pipeline, or one network of it. What is in them is read, never run."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewstep.conventions import ConventionConfig
from fewstep.data.dataset import LatentScale
from fewstep.errors import UsageError, nearest
from fewstep.files import read_json
from fewstep.networks.foreign.config import DiffusersConfig, DiffusersFamily
from fewstep.networks.foreign.diffusers import class_count
from fewstep.networks.foreign.diffusers_families import FAMILIES
from fewstep.teachers.formats.schedulers import Scheduler, read_scheduler, unsettled

INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PARTS = f"{WEIGHTS}.index.json"
NETWORKS: tuple[DiffusersFamily, ...] = get_args(DiffusersFamily)

EARLIER: dict[str, DiffusersFamily] = {
    "ada_norm_zero": "DiTTransformer2DModel",
    "ada_norm_single": "PixArtTransformer2DModel",
}
"""What a ``Transformer2DModel`` of before diffusers 0.30 is now, by its ``norm_type``."""


@dataclass(frozen=True)
class DiffusersFound:
    """A network in a folder, and what the files around it say of it.

    ``channels`` and ``sides`` (height and width; None where any will do) are those of one sample, ``num_classes`` does
    not count "no class". ``scheduler`` is None if there was none to read, and then the convention was declared.
    ``latent`` is how its autoencoder's output becomes samples, None without an autoencoder. ``license`` is the one that
    a ``README.md`` states.
    """

    network: DiffusersConfig
    channels: int
    sides: tuple[int, int] | None
    num_classes: int
    scheduler: Scheduler | None
    latent: LatentScale | None
    license: str
    files: tuple[Path, ...]
    expected: frozenset[str] | None

    def weights(self) -> dict[str, Tensor]:
        """Every weight under its name in ``DiffusersNetwork``, in the precision it was saved in.

        Files that are damaged, or that lack what their index lists, are a ``UsageError``.
        """
        found: dict[str, Tensor] = {}
        for file in self.files:
            try:
                found |= load_file(file)
            except (SafetensorError, OSError) as error:
                raise UsageError(f"{file} is damaged: {' '.join(str(error).split())}") from error
        if self.expected is not None and self.expected != found.keys():
            odd = sorted(self.expected ^ found.keys())
            raise UsageError(
                f"{self.files[0].parent} is damaged: its index and its files differ in {len(odd)} weights, "
                f"such as {odd[0]}"
            )
        return {f"net.{_present(name)}": value for name, value in found.items()}


def read_folder(path: Path, said: Mapping[str, Any] | None = None) -> DiffusersFound:
    """What the folder ``path`` holds: of a pipeline (``model_index.json``), or of one network (``config.json``).

    ``said`` has what the user declares: fields of ``DiffusersConfig``, of which ``convention`` takes the place of what
    the scheduler says. Whatever is missing, damaged or unknown is a ``UsageError`` of one sentence.
    """
    said = dict(said or {})
    root, folder = _places(path)
    config = read_json(folder / "config.json")
    family = _family(config, folder)
    scheduler_file = None if root is None else _part(root, "scheduler") / "scheduler_config.json"
    scheduler = None
    if "convention" not in said:
        if scheduler_file is None or not scheduler_file.is_file():
            raise unsettled(str(folder), "has no scheduler beside it")
        scheduler = read_scheduler(read_json(scheduler_file), family, config, str(scheduler_file))
    autoencoder = None if root is None else root / "vae" / "config.json"
    beside = read_json(autoencoder) if autoencoder is not None and autoencoder.is_file() else None
    declared = {
        "convention": ConventionConfig() if scheduler is None else scheduler.convention,
        **({} if beside is None else {"pixels": _pixels(beside)}),
        **said,
    }
    try:
        network = DiffusersConfig(
            family=family,
            config={key: value for key, value in config.items() if not key.startswith("_")},
            **declared,
        )
        channels = FAMILIES[family].channels(config)
        sides = _sides(config.get("sample_size"))
        latent = None if beside is None else _latent(beside, channels)
        num_classes = class_count(network)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"teacher.{where}: {first['msg']}") from error
    except KeyError as error:
        raise UsageError(f"{folder / 'config.json'} has no {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{folder} is damaged: {error}") from error
    files, expected = _files(folder)
    return DiffusersFound(
        network=network,
        channels=channels,
        sides=sides,
        num_classes=num_classes,
        scheduler=scheduler,
        latent=latent,
        license=_license(root or folder),
        files=files,
        expected=expected,
    )


def _present(name: str) -> str:
    """The name of a weight, for those of attention in U-Nets of before diffusers 0.15 the one that it has now."""
    return _EARLY.sub(lambda found: f"{found[1]}{_SINCE[found[2]]}{found[3]}", name)


_SINCE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_EARLY = re.compile(r"^(.*\.attentions\.[0-9]+\.)(query|key|value|proj_attn)(\.(?:weight|bias))$")


def _places(path: Path) -> tuple[Path | None, Path]:
    """The folder of the pipeline, if there is one, and that of its network. Early pipelines have no folders inside."""
    if (path / INDEX).is_file():
        listed = read_json(path / INDEX)
        part = next((part for part in ("transformer", "unet") if isinstance(listed.get(part), list)), None)
        if part is None:
            raise UsageError(f"{path / INDEX} lists neither a transformer nor a unet")
        folder = _part(path, part)
        if not (folder / "config.json").is_file():
            raise UsageError(f"{path} is not whole: {INDEX} lists {part}, and {folder} has no config.json")
        return path, folder
    if not (path / "config.json").is_file():
        raise UsageError(f"{path} is no folder of diffusers: it has neither {INDEX} nor config.json")
    parent = path.absolute().parent
    return (parent if (parent / INDEX).is_file() else None), path


def _part(root: Path, name: str) -> Path:
    return root / name if (root / name).is_dir() or not (root / "config.json").is_file() else root


def _family(config: Mapping[str, Any], folder: Path) -> DiffusersFamily:
    name = config.get("_class_name")
    if name == "Transformer2DModel":  # one class, until they were told apart
        name = EARLIER.get(str(config.get("norm_type")), name)
    for known in NETWORKS:
        if known == name:
            return known
    raise UsageError(f"{folder} holds a network of class {name}; {nearest(str(name), NETWORKS)}")


def _files(folder: Path) -> tuple[tuple[Path, ...], frozenset[str] | None]:
    """The files of the weights, all present, and the names that an index promises of them together."""
    if (folder / PARTS).is_file():
        listed = read_json(folder / PARTS).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise UsageError(f"{folder / PARTS} is damaged: it has no weight_map")
        files = tuple(folder / Path(name).name for name in sorted(set(listed.values())))
        for file in files:
            if not file.is_file():
                raise UsageError(f"{folder} is not whole: {PARTS} lists {file.name}, which is not there")
        return files, frozenset(listed)
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,), None
    other = sorted(file.name for file in folder.glob("*.safetensors"))
    if other:
        raise UsageError(f"{folder} has {', '.join(other)} and no {WEIGHTS}: rename the one that is meant")
    if any(folder.glob("*.bin")):
        raise UsageError(f"{folder} has its weights pickled, which can run code: save them as safetensors")
    raise UsageError(f"{folder} has no weights: no {WEIGHTS}")


def _sides(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = size if isinstance(size, list) else (size, size)
    return int(height), int(width)


def _pixels(autoencoder: Mapping[str, Any]) -> int:
    """How many pixels a side become one latent."""
    levels = autoencoder.get("block_out_channels") or autoencoder.get("encoder_block_out_channels")
    return 2 ** (len(levels) - 1) if isinstance(levels, list) else 8


def _latent(autoencoder: Mapping[str, Any], channels: int) -> LatentScale | None:
    """One factor and shift, or a mean and a deviation per channel as well; None if it states no factor."""
    factor = autoencoder.get("scaling_factor")
    if factor is None:
        return None
    shift = autoencoder.get("latents_mean") or [autoencoder.get("shift_factor") or 0.0] * channels
    std = autoencoder.get("latents_std") or [1.0] * channels
    return LatentScale.of_channels([float(value) for value in shift], [float(factor) / float(value) for value in std])


def _license(folder: Path) -> str:
    """What the head of a model card says, ``unknown`` without one."""
    import yaml

    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        head = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
    except (OSError, UnicodeDecodeError, IndexError, yaml.YAMLError):
        return "unknown"
    if not isinstance(head, dict):
        return "unknown"
    stated = head.get("license_name") if head.get("license") == "other" else head.get("license")
    return str(stated or head.get("license") or "unknown")
