"""From the config of a network from elsewhere to its module, through one literal dict."""

from typing import Any

from torch import nn

from fewstep.networks.foreign.adm import ADM
from fewstep.networks.foreign.config import ForeignBlock
from fewstep.networks.foreign.diffusers import DiffusersNetwork
from fewstep.networks.foreign.dit import DiT
from fewstep.networks.foreign.edm import EDM
from fewstep.networks.foreign.edm2 import EDM2
from fewstep.networks.foreign.minrf import MinRF
from fewstep.networks.foreign.ncsnpp import NCSNPP

RAW: dict[str, Any] = {
    "dit": DiT,
    "minrf": MinRF,
    "adm": ADM,
    "ncsnpp": NCSNPP,
    "edm": EDM,
    "edm2": EDM2,
    "diffusers": DiffusersNetwork,
}


def raw_network(config: ForeignBlock, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A freshly initialised network as its own project has it, for samples of ``shape``; see ``Raw``."""
    return RAW[config.kind](shape, config, num_classes)  # type: ignore[attr-defined]
