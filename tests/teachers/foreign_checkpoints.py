"""Small checkpoints of every project, in the containers that those projects write."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from persistence import persistent, write_snapshot
from torch import Tensor, nn

from fewstep.networks.foreign.build import raw_network
from fewstep.networks.foreign.config import (
    ADMConfig,
    DiTConfig,
    EDM2Config,
    EDMConfig,
    ForeignConfig,
    MinRFConfig,
    NCSNPPConfig,
)

SHAPE, CLASSES = (1, 8, 8), 10
"""Of the digits."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """A network of that project for the digits, its container for the averaged weights and raw ones, what has to be
    said beside the weights, and where the average is found (None: there is none)."""

    network: ForeignConfig
    save: Callable[[Path, nn.Module, State, State], None]
    said: dict[str, Any] = field(default_factory=dict)
    place: str | None = "ema"
    classes: int = CLASSES


def _sit(path: Path, net: nn.Module, ema: State, raw: State) -> None:
    settings = argparse.Namespace(model="SiT-XL/2", results_dir=Path("results"), lr=1e-4)
    torch.save({"model": raw, "ema": ema, "opt": {"state": {}}, "args": settings}, path)


def _repa(path: Path, net: nn.Module, ema: State, raw: State) -> None:
    heads = {"projectors.0.0.weight": torch.zeros(3, 3)}
    settings = argparse.Namespace(model="SiT-XL/2")
    torch.save({"model": raw | heads, "ema": ema | heads, "opt": {}, "args": settings, "steps": 400}, path)


def _plain(path: Path, net: nn.Module, ema: State, raw: State) -> None:
    torch.save(ema, path)


def _torchcfm(path: Path, net: nn.Module, ema: State, raw: State) -> None:
    held = {
        "net_model": {f"module.{name}": value for name, value in raw.items()},
        "ema_model": {f"module.{name}": value for name, value in ema.items()},
    }
    torch.save({**held, "sched": {"last_epoch": 4}, "optim": {"state": {}}, "step": 4}, path)


def _flow_matching(path: Path, net: nn.Module, ema: State, raw: State) -> None:
    model = {f"model.{name}": value for name, value in raw.items()}
    trained = [name for name, value in net.named_parameters() if value.requires_grad]
    shadows = {f"shadow_params.{number}": ema[name] for number, name in enumerate(trained)}
    both = {**model, "num_updates": torch.tensor(3), **shadows}
    torch.save({"model": both, "optimizer": {}, "epoch": 2, "args": argparse.Namespace(dataset="cifar10")}, path)


def _rectified_flow(path: Path, net: nn.Module, ema: State, raw: State) -> None:
    shadows = [ema[name] for name, value in net.named_parameters() if value.requires_grad]
    model = {f"module.{name}": value for name, value in raw.items()}
    average = {"decay": 0.999999, "num_updates": 5, "shadow_params": shadows}
    torch.save({"optimizer": {}, "model": model, "ema": average, "step": 5}, path)


def _snapshot(arguments: dict[str, Any], class_name: str) -> Callable[[Path, nn.Module, State, State], None]:
    def save(path: Path, net: nn.Module, ema: State, raw: State) -> None:
        net.load_state_dict(ema)
        write_snapshot(path, ema=persistent(net, arguments, "raise SystemExit", class_name))

    return save


KINDS: dict[str, Kind] = {
    "sit": Kind(DiTConfig(patch=2, width=24, depth=2, heads=3), _sit, {"heads": 3}),
    "dit": Kind(DiTConfig(patch=2, width=24, depth=2, heads=3), _plain, {"heads": 3}, place=None),
    "repa": Kind(DiTConfig(patch=2, width=24, depth=2, heads=3, learn_sigma=False), _repa, {"heads": 3}),
    "minrf": Kind(MinRFConfig(patch=2, width=64, depth=1, heads=4, hidden=96), _plain, {"heads": 4}, place=None),
    "torchcfm": Kind(
        ADMConfig(model_channels=32, channel_mult=(1, 1), num_res_blocks=1),
        _torchcfm,
        {"num_heads": 1, "num_head_channels": -1, "use_new_attention_order": False},
        place="ema_model",
        classes=0,
    ),
    "flow_matching": Kind(
        ADMConfig(model_channels=32, channel_mult=(1, 1), num_res_blocks=1, null_row=True),
        _flow_matching,
        {"num_heads": 1, "num_head_channels": -1, "use_new_attention_order": False},
        place="model.shadow_params",
    ),
    "rectified_flow": Kind(
        NCSNPPConfig(nf=16, ch_mult=(1, 1), num_res_blocks=1),
        _rectified_flow,
        {"fir": False, "skip_rescale": True, "centered": True},
        place="ema.shadow_params",
        classes=0,
    ),
    "edm": Kind(
        EDMConfig(arch="ddpmpp", channels=16, multipliers=(1, 2), blocks=1, attention=(4,)),
        _snapshot({"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}, "EDMPrecond"),
    ),
    "edm2": Kind(
        EDM2Config(channels=16, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=16),
        _snapshot({"model_channels": 16, "channel_mult": [1, 2], "channels_per_head": 16}, "Precond"),
    ),
}


def network(kind: str) -> nn.Module:
    """The raw network of a kind, in which every weight matters."""
    torch.manual_seed(3)
    of = KINDS[kind]
    net = raw_network(of.network, SHAPE, of.classes)
    randomise(net)
    return net.eval()


def randomise(net: nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    for parameter in net.parameters():
        if parameter.requires_grad:
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.2
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)


def write(kind: str, path: Path) -> nn.Module:
    """A checkpoint of a kind; returns the raw network with the average that it holds."""
    net = network(kind)
    ema = {name: value.clone() for name, value in net.state_dict().items()}
    raw = {name: value + 0.5 if value.is_floating_point() else value for name, value in ema.items()}
    KINDS[kind].save(path, net, ema, raw)
    net.load_state_dict(ema)
    return net
