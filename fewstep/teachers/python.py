"""Teachers that are Python code of somebody else's: found by name, frozen, converted."""

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fewstep.data.dataset import Dataset
from fewstep.errors import UsageError
from fewstep.files import digest
from fewstep.targets import load_target, source_of
from fewstep.teachers.config import PythonTeacher
from fewstep.teachers.convention import Model
from fewstep.teachers.network import freeze


def load_model(target: str) -> Model:
    """What lies at ``package.module:name`` (``load_target``); a module is frozen."""
    made = load_target(target, "teacher.target ", "(x, t, label)")
    return freeze(made) if isinstance(made, nn.Module) else made


def identity(config: PythonTeacher, model: Model) -> str:
    """A digest of what determines the teacher, as far as can be seen: how it is read, its source, its weights."""
    parts = [config.model_dump_json(exclude={"guidance"}).encode(), source_of(model)]
    if isinstance(model, nn.Module):
        parts.append(save({name: value.cpu().contiguous() for name, value in model.state_dict().items()}))
    return digest(b"".join(parts))


def checked(model: Model, target: str, data: Dataset, device: torch.device) -> None:
    """Ask once: an answer of another shape, or none, is a ``UsageError``."""
    x, t = torch.zeros(2, *data.shape, device=device), torch.full((2,), 0.5, device=device)
    condition = data.condition(torch.arange(2))
    try:
        with torch.no_grad():
            found = model(x, t, None if condition is None else condition.to(device))
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UsageError(f"teacher.target {target} fails on x {list(x.shape)}: {said}") from error
    if not isinstance(found, Tensor) or found.shape != x.shape:
        gives = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise UsageError(f"teacher.target {target} gives {gives} for x {list(x.shape)}: it has to be as large as x")
