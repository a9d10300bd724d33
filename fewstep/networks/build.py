"""From a network's config to its module, through one literal dict."""

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter
from torch import nn

from fewstep.networks.condition import Inputs
from fewstep.networks.condition_shift import ConditionShift
from fewstep.networks.config import NetworkConfig
from fewstep.networks.flot import FloT
from fewstep.networks.foreign.build import raw_network
from fewstep.networks.foreign.config import ForeignBlock
from fewstep.networks.foreign.converted import ForeignNetwork
from fewstep.networks.mlp import MLP
from fewstep.networks.unet import UNet

NETWORKS = {"mlp": MLP, "flot": FloT, "unet": UNet}


def build_network(
    config: NetworkConfig,
    shape: tuple[int, ...],
    num_classes: int,
    *,
    two_times: bool,
    split: float | None = None,
    guidance: bool = False,
) -> nn.Module:
    """A freshly initialised ``net(x, t, r, label, guidance)`` for samples of ``shape``; ``num_classes = 0`` is
    unconditional.

    ``split`` is the share of the blocks that see ``t`` and not ``r``, None for an embedding of ``t - r`` in all of
    them; ``guidance`` gives the network that input (see ``ConditionedNetwork``). The initial weights depend on torch's
    global seed: call ``torch.manual_seed`` first. A shape that this kind of network does not take is a ``UsageError``.
    """
    inputs = Inputs(num_classes, two_times, split, guidance)
    if isinstance(config, ForeignBlock):
        return ForeignNetwork(raw_network(config, shape, num_classes), config.convention, inputs)
    net = NETWORKS[config.kind](shape, config, inputs)
    return ConditionShift(net, shape, num_classes) if config.condition_shift else net


def parameter_count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def network_from_card(card: Mapping[str, Any]) -> tuple[NetworkConfig, nn.Module]:
    """The network an exported model's ``config.json`` describes, with its config; its weights are not loaded yet."""
    config: NetworkConfig = TypeAdapter(NetworkConfig).validate_python(card["network"])
    data = card["data"]
    net = build_network(
        config,
        tuple(data["shape"]),
        data["num_classes"],
        two_times=card["two_times"],
        # Models of before there were these say nothing of them.
        split=card.get("split"),
        guidance=card.get("guidance_input", False),
    )
    return config, net
