"""Students too large for one device: FSDP2, where every process keeps a shard of each parameter.

Applied here and not through ``Accelerator.prepare``, which shards on GPUs only and casts the parameters themselves to
bfloat16, the Jacobian-vector product with them.
"""

import torch.distributed as distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(net: nn.Module) -> FSDPModule:
    """Shard the parameters of ``net`` among all processes, in place; it now gathers them while it computes.

    The children of every ``nn.ModuleList`` (a network's blocks) are gathered one at a time, what is left as a whole.
    """
    device = next(net.parameters()).device.type
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
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


def whole_of(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which ``part`` is what ``local`` would give; ``like`` says how it is sharded."""
    if not isinstance(like, DTensor):
        return part
    sharded = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return sharded.full_tensor()
