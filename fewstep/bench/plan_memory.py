"""What lies in a GPU's memory during a training, part by part."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from fewstep.bench.calls import Role

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU that holds most, at the moment when it does. ``held`` are targets and the like; ``exchange`` is
    DDP's buckets, or what FSDP2 gathers of one block and the next; ``activations`` is what a step holds beyond all
    else."""

    weights: int
    gradients: int
    moments: int
    averages: int
    teachers: int
    held: int
    exchange: int
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Sizes:
    """Bytes of a network: as a whole, of what is trained, and of one GPU's shard of either; its largest block and what
    lies outside of blocks."""

    whole: int
    trained: int
    shard: int
    trained_shard: int
    block: int
    root: int


def sizes_of(net: nn.Module, gpus: int) -> Sizes:
    """Those of a network, on fake tensors or real ones. Of shards, the largest."""
    parameters = list(net.parameters())
    trained = [each for each in parameters if each.requires_grad]
    blocks = [block for module in net.modules() if isinstance(module, nn.ModuleList) for block in module]
    inside = {id(each) for block in blocks for each in block.parameters()}
    buffers = _bytes(net.buffers())
    return Sizes(
        whole=_bytes(parameters) + buffers,
        trained=_bytes(trained),
        shard=sum(_shard(each, gpus) for each in parameters) + buffers,
        trained_shard=sum(_shard(each, gpus) for each in trained),
        block=max((_bytes(block.parameters()) for block in blocks), default=0),
        root=_bytes(each for each in parameters if id(each) not in inside),
    )


def trained_bytes(sizes: Mapping[Role, Sizes], *, sharded: bool) -> int:
    """Of all that is trained, on one GPU."""
    trained = [sizes[role] for role in sizes if role in ("student", "companion")]
    return sum(each.trained_shard if sharded else each.trained for each in trained)


def memory_of(
    sizes: Mapping[Role, Sizes], peak: int, *, gpus: int, sharded: bool, averages: int, microbatches: int
) -> Memory:
    """All parts, from the sizes of a run's networks and the ``peak`` of a dry step: with its gradients, or without them
    where they are sharded."""

    def here(*roles: Role) -> int:
        return sum(sizes[role].shard if sharded else sizes[role].whole for role in sizes if role in roles)

    def whole(*roles: Role) -> int:
        return sum(sizes[role].whole for role in sizes if role in roles)

    own, trained = sizes["student"], trained_bytes(sizes, sharded=sharded)
    gradients, exchange, beside = trained, trained if gpus > 1 else 0, 0
    if sharded:
        gradients, exchange, peak = _sharded_step(own, trained, peak, microbatches)
        beside = exchange
    return Memory(
        weights=here("student", "companion"),
        gradients=gradients,
        moments=2 * trained,
        averages=averages * (own.trained_shard if sharded else own.trained),
        teachers=whole("teacher", "weak"),
        # A student of the stage before is a plain copy in every process; targets are sharded as the student.
        held=here("target") + whole("previous"),
        exchange=exchange,
        # Gradients are part of the peak, and all of them are there at its end.
        activations=max(0, peak - gradients - beside),
    )


def _sharded_step(own: Sizes, trained: int, activations: int, microbatches: int) -> tuple[int, int, int]:
    """Gradients, what is gathered, and the most held at once of both and activations, under FSDP2.

    A forward pass holds the parameters outside of blocks, a block and the next one; a backward pass the gradients of a
    block, the buffer they leave in and the one that parameters arrive in besides. By then the first block on its way
    back has given up its activations for its gradients. Gradients that are not exchanged after each microbatch are
    added up whole.
    """
    gathered = own.root + 5 * own.block
    if microbatches > 1:
        return own.trained, gathered, own.trained + activations + gathered
    first = own.block / max(own.whole - own.root, 1)
    peak = max(
        activations + own.root + 2 * own.block,
        round((1 - first) * activations + first * trained) + gathered,
        trained + gathered,
    )
    return trained, gathered, peak


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


def _shard(tensor: Tensor, gpus: int) -> int:
    """FSDP2 cuts the first dimension, and gives every GPU as many rows as the one that has most."""
    rows = len(tensor) if tensor.ndim else 1
    return math.ceil(rows / gpus) * (tensor.numel() // max(rows, 1)) * tensor.element_size()
