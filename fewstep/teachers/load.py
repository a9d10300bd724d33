"""From a teacher config to a frozen velocity field."""

import copy
import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fewstep.checkpoint import DATA_MEAN, damage_in, read_model
from fewstep.config import recipe_names
from fewstep.data.config import DataConfig, ToyConfig
from fewstep.data.dataset import Dataset
from fewstep.data.toys import EIGHT_GAUSSIANS, MIXTURE, MIXTURE_1D
from fewstep.errors import UsageError, nearest
from fewstep.files import digest
from fewstep.flow import VelocityField
from fewstep.networks.build import network_from_card, parameter_count
from fewstep.networks.config import NetworkConfig
from fewstep.networks.embeddings import to_bfloat16
from fewstep.networks.foreign.config import knows_none
from fewstep.teachers.analytic import MixtureTeacher
from fewstep.teachers.config import (
    AnalyticTeacher,
    CheckpointTeacher,
    DiffusersTeacher,
    NoiseConfig,
    PythonTeacher,
    RunTeacher,
    TeacherConfig,
)
from fewstep.teachers.contrastive import CorrectedField
from fewstep.teachers.convention import ConvertedField
from fewstep.teachers.foreign import Loaded, load_checkpoint, load_diffusers
from fewstep.teachers.guided import ClassContrast, GuidedField, Unconditional, WeakContrast
from fewstep.teachers.network import NetworkField, freeze
from fewstep.teachers.python import checked, identity, load_model

MIXTURES = {"eight_gaussians": EIGHT_GAUSSIANS, "mixture": MIXTURE, "mixture_1d": MIXTURE_1D}
"""Toys with a closed form."""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Teacher:
    """A frozen velocity field (guidance included) and what it is.

    ``net`` and ``network`` are None for a teacher that is no network of ours; ``objective`` says how it came to be;
    ``digest`` identifies the weights (or the formula).
    ``noise`` is what it was trained on, ``contrast`` the pair of velocities that guidance acts between, where there is
    one (the class against none, or the teacher against a weaker one), before any guidance. ``device`` is where it is
    evaluated. ``straightened`` says that it was a student of pairs: its states on the way are not mixtures of any noise
    with any data.
    """

    name: str
    field: VelocityField
    net: nn.Module | None
    network: NetworkConfig | None
    guidance: float
    digest: str
    params: int
    noise: NoiseConfig = dataclasses.field(default_factory=NoiseConfig)
    contrast: ClassContrast | WeakContrast | None = None
    device: torch.device = CPU
    straightened: bool = False
    objective: str = "flow_matching"


def load_teacher(config: TeacherConfig, data_config: DataConfig, data: Dataset, device: torch.device) -> Teacher:
    """Load a teacher for this data. What does not exist or does not fit is a ``UsageError``."""
    if isinstance(config, AnalyticTeacher):
        return dataclasses.replace(_analytic(config, data_config), device=device)
    if isinstance(config, PythonTeacher):
        return dataclasses.replace(_python(config, data, device), device=device)
    if isinstance(config, CheckpointTeacher | DiffusersTeacher):
        return dataclasses.replace(_foreign(config, data, device), device=device)
    return dataclasses.replace(_trained(config, data, device), device=device)


def _trained(config: RunTeacher, data: Dataset, device: torch.device) -> Teacher:
    main = _network(Path(config.path), config, data, device)
    if config.guidance != 1 and not data.num_classes and config.weak is None:
        raise UsageError(
            f"teacher.guidance {config.guidance:g} needs a class-conditional teacher, or a weaker one beside it "
            f"(teacher.weak); {config.path} has no classes"
        )
    contrast: ClassContrast | WeakContrast | None = None
    identity = main.digest
    if config.weak is not None:
        weak = _network(Path(config.weak), config, data, device)
        contrast, identity = WeakContrast(main.field, weak.field), digest((main.digest + weak.digest).encode())
    elif data.num_classes and not main.straightened:
        contrast = ClassContrast(main.field, data.num_classes)
    return Teacher(
        name=main.name,
        field=main.field if config.guidance == 1 or contrast is None else GuidedField(contrast, config.guidance),
        net=main.net,
        network=main.network,
        guidance=config.guidance,
        digest=identity,
        params=parameter_count(main.net),
        noise=main.noise,
        contrast=contrast,
        straightened=main.straightened,
    )


@dataclass(frozen=True)
class _Trained:
    """A trained network as a field, corrected for contrast but not guided."""

    name: str
    field: VelocityField
    net: nn.Module
    network: NetworkConfig
    digest: str
    noise: NoiseConfig
    straightened: bool


def _network(path: Path, config: RunTeacher, data: Dataset, device: torch.device) -> _Trained:
    if not path.exists():
        recipe = path.name if path.name in recipe_names() else "CONFIG"
        usual = path == Path("runs") / recipe
        command = shlex.join(["fewstep", "teach", recipe, *([] if usual else ["--out", str(path)])])
        raise UsageError(f"the teacher {path} has not been trained: run `{command}` first")
    exported = read_model(path)
    card = exported.card
    straightened = card["role"] == "student" and card["student"] == "velocity"
    if card["role"] != "teacher" and not straightened:
        raise UsageError(f"{path} holds a student ({card['objective']}), not a teacher")
    if straightened and (config.guidance != 1 or config.weak is not None):
        raise UsageError(
            f"{path} holds a straightened flow, which has its guidance built in: leave teacher.guidance at 1"
        )
    trained_on = card["data"]
    if (trained_on["name"], trained_on["shape"], trained_on["num_classes"]) != (
        data.name,
        list(data.shape),
        data.num_classes,
    ):
        raise UsageError(
            f"the teacher {path} was trained on {trained_on['name']} (shape {trained_on['shape']}, "
            f"{trained_on['num_classes']} classes); the data here are {data.name} (shape {list(data.shape)}, "
            f"{data.num_classes} classes)"
        )
    with damage_in(exported.folder):
        network, net = network_from_card(card)
        net.load_state_dict(exported.weights())
    net = freeze(net)
    if config.precision == "bf16":  # a copy: students start from the weights as they were trained
        evaluated = to_bfloat16(copy.deepcopy(net)).to(device)
    else:
        evaluated = net.to(device)
    field: VelocityField = NetworkField(evaluated)
    name = str(card["name"])
    with damage_in(exported.folder):
        noise = NoiseConfig.model_validate(card.get("noise", {}))
        if card.get("contrast") and config.correct_contrast:
            field = CorrectedField(field, card["contrast"], exported.weights(DATA_MEAN)["mean"].to(device))
            name += " (corrected)"
    return _Trained(name, field, net, network, exported.digest(), noise, straightened)


def _analytic(config: AnalyticTeacher, data: DataConfig) -> Teacher:
    if not isinstance(data, ToyConfig) or data.name not in MIXTURES:
        asked = data.name if isinstance(data, ToyConfig) else data.kind
        raise UsageError(f"teacher.kind analytic: no closed form for data {asked}; {nearest(asked, MIXTURES)}")
    spec = MIXTURES[data.name]
    field = MixtureTeacher.from_spec(spec)
    if config.guidance != 1:
        raise UsageError("teacher.guidance: the analytic teacher is not guided; leave it at 1")
    contrast = ClassContrast(field, field.num_classes) if field.num_classes and data.classes else None
    return Teacher(
        f"exact {data.name}",
        field,
        None,
        None,
        1.0,
        digest(repr(spec).encode()),
        0,
        contrast=contrast,
        objective="exact",
    )


def _python(config: PythonTeacher, data: Dataset, device: torch.device) -> Teacher:
    model = load_model(config.target)
    params = 0
    if isinstance(model, nn.Module):
        model, params = model.to(device), parameter_count(model)
    checked(model, config.target, data, device)
    field = ConvertedField(model, config.convention)
    contrast = ClassContrast(field, data.num_classes) if data.conditional else None
    if config.guidance != 1 and contrast is None:
        raise UsageError(f"teacher.guidance {config.guidance:g} needs a condition, and {data.name} has none")
    guided = field if config.guidance == 1 or contrast is None else GuidedField(contrast, config.guidance)
    return Teacher(
        name=config.target.partition(":")[2],
        field=guided,
        net=None,
        network=None,
        guidance=config.guidance,
        digest=identity(config, model),
        params=params,
        contrast=contrast,
        objective="python",
    )


def _foreign(config: CheckpointTeacher | DiffusersTeacher, data: Dataset, device: torch.device) -> Teacher:
    """A network of another project: its weights are in the one convention from here on."""
    if isinstance(config, DiffusersTeacher):
        loaded = load_diffusers(config, data)
    else:
        loaded = load_checkpoint(config, data)
    net = freeze(loaded.net)
    if config.precision == "bf16":  # a copy: students start from the weights as they were trained
        evaluated = to_bfloat16(copy.deepcopy(net)).to(device)
    else:
        evaluated = net.to(device)
    field = NetworkField(evaluated)
    contrast, identity = _foreign_contrast(config, loaded, field, data, device)
    return Teacher(
        name=loaded.name,
        field=field if config.guidance == 1 or contrast is None else GuidedField(contrast, config.guidance),
        net=net,
        network=loaded.network,
        guidance=config.guidance,
        digest=digest(f"{identity} {loaded.network.model_dump_json()}".encode()),
        params=parameter_count(net),
        noise=config.noise,
        contrast=contrast,
        objective=config.kind,
    )


def _foreign_contrast(
    config: CheckpointTeacher | DiffusersTeacher,
    loaded: Loaded,
    field: VelocityField,
    data: Dataset,
    device: torch.device,
) -> tuple[ClassContrast | WeakContrast | None, str]:
    """What guides a network of another project, and the digest of all that is asked then. ``UsageError`` if guidance is
    asked for and nothing does."""
    if isinstance(config, CheckpointTeacher) and config.weak is not None:
        weaker = load_checkpoint(config.model_copy(update={"path": config.weak}), data, weak=True)
        weak = NetworkField(freeze(weaker.net).to(device))
        against: VelocityField = weak if weaker.num_classes or not data.conditional else Unconditional(weak)
        return WeakContrast(field, against), digest((loaded.digest + weaker.digest).encode())
    if data.conditional and knows_none(loaded.network):
        return ClassContrast(field, data.num_classes, loaded.guided_channels), loaded.digest
    if config.guidance != 1:
        why = "its network was trained with a class always" if data.conditional else f"{data.name} has no condition"
        raise UsageError(f"teacher.guidance {config.guidance:g}: {why}, so there is nothing to be guided away from")
    return None, loaded.digest
