"""Jumps made faster: as a CUDA graph, with a compiled network, in bfloat16, in channels last."""

import copy
import functools
import warnings
from dataclasses import replace

import torch
from torch import nn

from fewstep.bench.sample_ways import JUMPS, Inputs, Way, jump_sampler, sampled
from fewstep.errors import UsageError
from fewstep.graphs import GraphSampler
from fewstep.networks.embeddings import to_bfloat16


def variant_ways(
    net: nn.Module, inputs: Inputs, *, compile: bool, precision: str, channels_last: bool
) -> tuple[list[Way], list[str]]:
    """The ways that were asked for, and a sentence on each that cannot be had here.

    Beside them are the same bare calls as beside the others: of the network as it is.
    """
    notes: list[str] = []
    way = functools.partial(Way, of="fewstep", calls=inputs.steps, like=JUMPS, alone=False)
    ways: list[Way] = []
    if device_type(inputs) == "cuda":
        graph = GraphSampler(jump_sampler(net), report=notes.append)
        sampled(graph, inputs)
        if not notes:
            ways.append(
                way("jumps, CUDA graph", build=lambda _: functools.partial(sampled, graph, inputs), tolerance=0.0)
            )
    if compile:
        compiled = copy.deepcopy(net)
        compiled.compile(fullgraph=True, dynamic=False)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the compiler, about its own insides
                sampled(jump_sampler(compiled), inputs)
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            notes.append(f"torch.compile fails here ({type(error).__name__}: {first[:120]})")
        else:
            ways.append(_with("jumps, compiled", compiled, inputs, way, 1e-3))
    if precision == "bf16":
        ways.append(_with("jumps, bf16", to_bfloat16(copy.deepcopy(net)), inputs, way, 0.1))
    if channels_last:
        if not any(isinstance(module, nn.Conv2d) for module in net.modules()):
            raise UsageError("--channels-last is for networks of convolutions, such as unet-tiny")
        other = copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        noise = inputs.noise.to(memory_format=torch.channels_last)
        ways.append(_with("jumps, channels last", other, replace(inputs, noise=noise), way, 1e-4))
    return ways, notes


def device_type(inputs: Inputs) -> str:
    return inputs.noise.device.type


def _with(name: str, net: nn.Module, inputs: Inputs, way: functools.partial[Way], tolerance: float) -> Way:
    sampler = jump_sampler(net)
    return way(name, build=lambda _: functools.partial(sampled, sampler, inputs), tolerance=tolerance)
