"""What a finished training leaves: ``model/``, ready to load."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fewstep
from fewstep.checkpoint import DATA_MEAN, RunDirectory, Tensors, write_model
from fewstep.config import RunConfig, config_yaml
from fewstep.data.dataset import Dataset
from fewstep.distill.legs import Leg, cost
from fewstep.distill.reflow.config import PiecewiseReflowConfig, ReflowConfig
from fewstep.environment import commit
from fewstep.files import digest
from fewstep.grids import Grid, uniform_nodes
from fewstep.networks.build import parameter_count
from fewstep.networks.foreign.lora import save_lora
from fewstep.students.initialise import network_of
from fewstep.students.model_card import model_readme
from fewstep.teachers.config import NoiseConfig
from fewstep.teachers.load import Teacher

RULES = {"velocity": "ode", "average_velocity": "jumps", "consistency": "renoise"}
"""How each kind of student is sampled."""

NO_GRIDS: Mapping[int, Grid] = {}


def export(
    config: RunConfig,
    run: RunDirectory,
    data: Dataset,
    teacher: Teacher | None,
    student: nn.Module,
    exported: dict[int, Tensors],
    steps: int,
    legs: Sequence[Leg],
    grids: Mapping[int, Grid] = NO_GRIDS,
) -> None:
    """Write ``model/``: the averaged weights of every stage that is worth keeping, ready to load. ``exported`` and
    ``grids`` are keyed by the step counts they serve; what has no grid there is sampled on a uniform one. ``legs`` say
    how long training took, and on what."""
    is_teacher = config.objective.kind == "flow_matching"
    files = _files(exported)
    entries: dict[str, dict[str, Any]] = {}
    for serves, file in sorted(files.items()):
        entries[str(serves)] = {"weights": file}
        if serves:
            entries[str(serves)]["times"] = list(grids.get(serves) or uniform_nodes(serves))
        if isinstance(config.objective, PiecewiseReflowConfig):
            entries[str(serves)]["multiples"] = True
    sampler: dict[str, Any] = {"sampler": RULES[config.student.kind], "steps": entries}
    if config.student.kind == "velocity" and not is_teacher:
        sampler["sampler"] = config.objective.sampler if isinstance(config.objective, ReflowConfig) else "euler"
    if is_teacher:
        sampler["solver"] = "euler"
    network = network_of(config.student, None if teacher is None else teacher.network)
    card = {
        "fewstep": fewstep.__version__,
        "commit": commit(),
        "name": config.name,
        "role": "teacher" if is_teacher else "student",
        "objective": config.objective.kind,
        "student": config.student.kind,
        "network": network.model_dump(mode="json"),
        "two_times": config.student.two_times,
        "split": config.student.split,
        "guidance_input": config.student.guidance_input,
        "params": parameter_count(student),
        "data": {"name": data.name, "shape": list(data.shape), "num_classes": data.num_classes, "kind": data.kind},
        "convention": "t=0 data, t=1 noise, v=e-x",
        "noise": noise_config(config, teacher).model_dump(mode="json"),
        "guidance": 1.0 if teacher is None else teacher.guidance,
        "teacher": None if teacher is None else teacher.name,
        "teacher_digest": None if teacher is None else teacher.digest,
        "ema": config.train.ema[0].name,
        "config_digest": digest(config_yaml(config).encode()),
        "train": {"steps": steps, "samples": steps * config.train.batch_size, **cost(legs)},
    }
    weights = {file: exported[serves] for serves, file in files.items()}
    if config.objective.kind == "flow_matching" and config.objective.contrast:
        card["contrast"] = config.objective.contrast
        weights[DATA_MEAN] = {"mean": data_mean(data)}
    if config.student.lora is not None:
        _export_adapters(run, student, exported)
    write_model(run.model, card, sampler, weights, model_readme(card, sampler))


def _export_adapters(run: RunDirectory, student: nn.Module, exported: dict[int, Tensors]) -> None:
    """The adapters by themselves, as diffusers loads them: in ``model/``, or in a folder for each step count."""
    net = copy.deepcopy(student)
    for serves, weights in exported.items():
        net.load_state_dict(weights)
        save_lora(net.net.net, run.model if len(exported) == 1 else run.model / f"lora-steps-{serves}")  # type: ignore


def _files(exported: dict[int, Tensors]) -> dict[int, str]:
    """The file of every step count. Counts with the same weights share the one of the least of them."""
    files: dict[int, str] = {}
    for serves, weights in sorted(exported.items()):
        shared = [file for count, file in files.items() if exported[count] is weights]
        fresh = f"model-steps-{serves}.safetensors" if files else "model.safetensors"
        files[serves] = shared[0] if shared else fresh
    return files


def noise_config(config: RunConfig, teacher: Teacher | None) -> NoiseConfig:
    """The noise of a run: a teacher's own, and a student's from its teacher."""
    if config.objective.kind == "flow_matching":
        return config.objective.noise
    return NoiseConfig() if teacher is None else teacher.noise


def data_mean(data: Dataset) -> Tensor:
    """``E[x]``, ``[*D]`` float32, over all samples as training sees them, mirrored ones included."""

    def mean(samples: Callable[[Tensor], Tensor]) -> Tensor:
        total = torch.zeros(data.shape, dtype=torch.float64)
        for rows in torch.arange(len(data.x)).split(4096):
            total += samples(rows).double().sum(dim=0)
        return total / len(data.x)

    here = mean(data.samples)
    if not data.flip:
        return here.float()
    mirrored = data.mirrored
    there = here.flip(-1) if mirrored is None else mean(replace(data, x=mirrored).samples)
    return ((here + there) / 2).float()
