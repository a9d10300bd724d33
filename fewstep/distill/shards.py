"""Students too large for one device: FSDP2, where every process keeps a shard of each parameter.

Applied here and not through ``Accelerator.prepare``, which shards on GPUs only and casts the parameters themselves to
bfloat16, the Jacobian-vector product with them.
"""

from collections.abc import Mapping

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(net: nn.Module, device: torch.device) -> FSDPModule:
    """Shard the parameters of ``net`` among all processes onto their devices, in place; it now gathers them while it
    computes.

    The children of every ``nn.ModuleList`` (a network's blocks) are moved, and later gathered, one at a time, what is
    left as a whole: no device ever holds the whole network.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for module in net.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # Without this the outermost module keeps whole parameters after a forward pass that no backward pass follows.
    return fully_shard(net, mesh=mesh, reshard_after_forward=True)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory; a tensor that is not sharded is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor. Where it is sharded, every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """``whole``, the same in every process, sharded as ``like`` is; unchanged where ``like`` is not sharded."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def sharded_like(part: Tensor, like: Tensor) -> Tensor:
    """The tensor of which this process holds ``part``, sharded as ``like`` is; or ``part``, where ``like`` is not."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def gathered(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Whole tensors; those that were sharded are gathered one by one, on the CPU. Every process takes part, and those
    with ``keep=False`` get nothing."""
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = full(tensor)
        if keep:
            whole[name] = value.cpu() if isinstance(tensor, DTensor) else value
    return whole
