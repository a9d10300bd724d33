"""What this machine has and lacks, each with its remedy."""

import importlib
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch

from fewstep.compat import prepare_torchvision
from fewstep.environment import describe_environment
from fewstep.errors import EnvironmentFault
from fewstep.evaluation.encoders import ENCODERS
from fewstep.evaluation.weights import INCEPTION, INCEPTION_FILES, WeightsFolder, cached_path, find_folder, find_weights


@dataclass(frozen=True)
class Check:
    """``ok``, ``note`` (something optional is absent) or ``missing`` (something needed is)."""

    name: str
    status: Literal["ok", "note", "missing"]
    detail: str


def examine() -> list[Check]:
    """Every check, in the order a reader wants them."""
    facts = describe_environment()
    return [
        Check("fewstep", "ok", f"{facts['fewstep']} (commit {facts['commit'] or 'unknown'}), Python {facts['python']}"),
        Check("processor", "ok", f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} torch threads"),
        _accelerator(),
        *[_package(name) for name in ("torch", "accelerate", "safetensors", "numpy")],
        _torchvision(),
        _import("torchmetrics"),
        _import("cleanfid"),
        _scipy(),
        _forward_mode(),
        _attention(),
        _processes(),
        _inception(),
        _encoders(),
    ]


def _accelerator() -> Check:
    if torch.cuda.is_available():
        return Check("accelerator", "ok", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return Check("accelerator", "note", "none: everything runs on the CPU")


def _package(name: str) -> Check:
    try:
        return Check(name, "ok", version(name))
    except PackageNotFoundError:
        return Check(name, "missing", f"not installed: pip install -c constraints.txt {name}")


def _torchvision() -> Check:
    try:
        branch = prepare_torchvision()
        import torchvision
    except Exception as error:
        return Check("torchvision", "missing", f"does not import ({error}): install the version that fits torch")
    return Check("torchvision", "ok", f"{torchvision.__version__}; {branch}")


def _import(name: str) -> Check:
    prepare_torchvision()
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken torchvision raises RuntimeError, not ImportError
        return Check(name, "missing", f"does not import: {error}")
    return Check(name, "ok", "imports")


def _scipy() -> Check:
    try:
        found = version("scipy")
    except PackageNotFoundError:
        return Check("scipy", "note", "not installed (fewstep does not need it)")
    if tuple(int(part) for part in found.split(".")[:2]) >= (1, 18):
        return Check("scipy", "note", f"{found}: clean-fid's own distance fails with it; fewstep computes its own")
    return Check("scipy", "ok", found)


def _forward_mode() -> Check:
    """A Jacobian-vector product of x^3 at 2 along 1 is 12."""
    tangent = torch.func.jvp(lambda x: x**3, (torch.tensor([2.0]),), (torch.tensor([1.0]),))[1]
    if tangent.item() != 12:
        return Check("forward-mode AD", "missing", f"d(x^3) at 2 came out as {tangent.item()}: this torch is broken")
    return Check("forward-mode AD", "ok", "Jacobian-vector product right")


def _attention() -> Check:
    """Only the math kernel of scaled dot product attention has a forward derivative."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.randn(1, 1, 4, 8)

    def attend(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    try:
        with sdpa_kernel(SDPBackend.MATH):
            torch.func.jvp(attend, (q,), (torch.ones_like(q),))
    except Exception as error:
        return Check("attention under AD", "note", f"the math kernel fails: {error}")
    return Check("attention under AD", "ok", "math kernel")


def _processes() -> Check:
    import torch.distributed as distributed

    if not distributed.is_available():
        return Check("processes", "note", "torch.distributed is not built in: one process only")
    backends = ["gloo"] * distributed.is_gloo_available() + ["nccl"] * distributed.is_nccl_available()
    with tempfile.TemporaryDirectory() as folder:
        if distributed.is_initialized():
            return Check("processes", "ok", ", ".join(backends))
        try:
            distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
            distributed.destroy_process_group()
        except Exception as error:
            return Check("processes", "note", f"gloo does not start ({error}): one process only")
    return Check("processes", "ok", ", ".join(backends))


def _inception() -> Check:
    """Which of Inception's files is there. What lies in the cache was verified when it was put there."""
    if cached_path(INCEPTION).is_file():
        return Check("inception weights", "ok", f"{cached_path(INCEPTION)} (converted)")
    try:
        path = find_weights(INCEPTION_FILES)
    except EnvironmentFault as fault:
        return Check("inception weights", "note", f"absent, so no FID; {fault}")
    if path.suffix == ".pt":
        return Check("inception weights", "ok", f"{path}: FID, but no Inception score and no sFID ({INCEPTION.name})")
    return Check("inception weights", "ok", str(path))


def _encoders() -> Check:
    """Which encoders have a local folder; their weights are read when they are asked for."""
    found = []
    for name, encoder in ENCODERS.items():
        try:
            found.append(f"{name} in {find_folder(WeightsFolder(name, encoder.repository))}")
        except EnvironmentFault:
            continue
    if not found:
        return Check("encoder weights", "note", f"absent: {', '.join(ENCODERS)} are folders in $FEWSTEP_WEIGHTS")
    try:
        return Check("encoder weights", "ok", f"{', '.join(found)}; transformers {version('transformers')}")
    except PackageNotFoundError:
        return Check(
            "encoder weights", "note", f"{', '.join(found)}, but no transformers: pip install 'fewstep[encoders]'"
        )
