"""Low-rank adapters (2106.09685) in a network of diffusers, by way of peft, in the files that diffusers loads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from fewstep.compat import prepare_torchvision
from fewstep.errors import EnvironmentFault, UsageError
from fewstep.files import write_atomic
from fewstep.networks.foreign.config import LoRAConfig

FILE = "pytorch_lora_weights.safetensors"
"""Where ``load_lora_weights`` of diffusers' pipelines looks."""

ADAPTER = "default"


def apply_lora(net: nn.Module, lora: LoRAConfig) -> None:
    """Put adapters into a module of diffusers, which computes what it did before: they begin at zero.

    They alone have gradients afterwards; the layers they are in are called ``*.base_layer`` (see ``with_adapters``).
    ``UsageError`` if no layer's name ends in one of the targets, ``EnvironmentFault`` without peft.
    """
    prepare_torchvision()
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise EnvironmentFault("LoRA students need the package peft: pip install 'fewstep[diffusers]'") from error
    alpha = lora.rank if lora.alpha is None else lora.alpha
    found: Any = net
    try:
        found.add_adapter(LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=list(lora.targets)), ADAPTER)
    except ValueError as error:  # of no match, from peft
        raise UsageError(f"lora.targets {', '.join(lora.targets)}: {' '.join(str(error).split())}") from error


def with_adapters(weights: Mapping[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """The weights of a network without adapters under the names of ``net``, which has them; those of its adapters are
    its own present ones. Names that are unknown to it stay what they are."""
    own = net.state_dict()
    renamed = {name.replace(".base_layer.", "."): name for name in own if ".lora_" not in name}
    adapters = {name: value for name, value in own.items() if ".lora_" in name}
    return adapters | {renamed.get(name, name): value for name, value in weights.items()}


def save_lora(net: nn.Module, folder: Path) -> None:
    """Write the adapters of a module of diffusers to ``pytorch_lora_weights.safetensors``, for ``load_lora_weights`` of
    its pipeline or its own ``load_lora_adapter(folder, prefix="transformer")``.

    They are all that is written: a second time or guidance as an input have weights outside of them.
    """
    from peft import get_peft_model_state_dict

    found: Any = net
    told = {name: _plain(value) for name, value in found.peft_config[ADAPTER].to_dict().items()}
    weights = {
        f"transformer.{name}": value.detach().cpu().contiguous()
        for name, value in get_peft_model_state_dict(net, adapter_name=ADAPTER).items()
    }
    # Without the config diffusers takes alpha for the rank.
    described = json.dumps({f"transformer.{name}": value for name, value in told.items()}, sort_keys=True)
    write_atomic(folder / FILE, save(weights, {"format": "pt", "lora_adapter_metadata": described}))


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value
