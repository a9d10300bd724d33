"""A training step gone through on paper: what the real networks would do, on tensors with shapes and no numbers.

What is counted is what the step would do: operations, bytes read and written, kernels, and bytes held at once. The
tensors are torch's fake ones, so a network of any size takes seconds and no memory. Shapes: B batch.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fewstep.bench.calls import Call, Role
from fewstep.distill.tangent import end_derivative, forward_derivative, path_derivative

aten = torch.ops.aten


@dataclass(frozen=True)
class DryStep:
    """Forward and backward pass of one microbatch. ``flops`` is the arithmetic of matrix products and convolutions by
    type (a multiply-add is two operations), ``backward_share`` the part of it that the backward pass does. ``traffic``
    is the bytes that all kernels read and write, ``product_traffic`` those of products alone, ``kernels`` how many
    there are. ``peak`` is the most bytes held at once beyond the weights, gradients included."""

    flops: Mapping[str, int]
    backward_share: float
    traffic: int
    product_traffic: int
    kernels: int
    peak: int


def dry_step(
    nets: Mapping[Role, nn.Module],
    calls: Sequence[Call],
    shape: tuple[int, ...],
    classes: int,
    *,
    rows: Callable[[Call], int] = lambda call: call.rows,
    mixed: bool = False,
    gpu: bool = True,
    kept: bool = True,
    microbatches: int = 1,
    fake: FakeTensorMode,
) -> DryStep:
    """Go through ``calls`` one after the other, then backward through all that are trained, ``microbatches`` times.

    ``nets`` were made within ``fake`` and are left without gradients. ``rows`` says how many rows a call has, ``mixed``
    whether bfloat16 is asked for, ``gpu`` whose kernels and whose autocast are meant: a GPU's, or the CPU's. Gradients
    stay where they are with ``kept``, else each is freed at once, as where they are reduced and sharded. What is
    counted is the last microbatch, and the peak is that of all: later ones find the gradients of the first.
    """
    trained = [each for net in nets.values() for each in net.parameters() if each.requires_grad]
    hooks = [] if kept else [each.register_post_accumulate_grad_hook(_forget) for each in trained]
    tally = Tally([*nets.values()])
    with fake:
        for _ in range(microbatches):
            with tally:
                tally.counted = Counted()
                with torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext():
                    outputs = _outputs(nets, calls, shape, classes, rows, gpu, tally)
                forward = tally.counted.flops.total()
                torch.autograd.backward([output.float().square().mean() for output in outputs])
                del outputs
    for hook in hooks:
        hook.remove()
    for parameter in trained:
        parameter.grad = None
    counted = tally.counted
    return DryStep(
        flops=dict(counted.flops),
        backward_share=1 - forward / max(counted.flops.total(), 1),
        traffic=counted.traffic,
        product_traffic=counted.product_traffic,
        kernels=counted.kernels,
        peak=tally.peak,
    )


def _outputs(
    nets: Mapping[Role, nn.Module],
    calls: Sequence[Call],
    shape: tuple[int, ...],
    classes: int,
    rows: Callable[[Call], int],
    gpu: bool,
    tally: "Tally",
) -> list[Tensor]:
    """Those of the calls that a backward pass follows. Of the others the same one is gone through once and counted as
    often as it comes: it leaves nothing behind."""
    costs: dict[Call, Counted] = {}
    trained = []
    for call in calls:
        if call in costs:
            tally.counted = tally.counted + costs[call]
            continue
        before, tally.counted = tally.counted, Counted()
        output = _called(nets[call.role], call, shape, classes, rows(call), gpu)
        if output.requires_grad:
            trained.append(output)
        else:
            costs[call] = tally.counted
        tally.counted = before + tally.counted
    return trained


def _called(net: nn.Module, call: Call, shape: tuple[int, ...], classes: int, rows: int, gpu: bool) -> Tensor:
    """The output of a call: as the objective would hold it until the backward pass."""
    x, t_B = torch.empty(rows, *shape), torch.empty(rows)
    label_B = torch.zeros(rows, dtype=torch.int64) if classes else None
    if call.kind == "path":
        return forward_derivative(net, x, x, t_B, t_B, label_B)
    if call.kind in ("path_gradient", "end_gradient"):
        both = (
            path_derivative(net, x, x, t_B, t_B, label_B)
            if call.kind == "path_gradient"
            else end_derivative(net, x, t_B, t_B, label_B)
        )
        return both[0] + both[1]
    if call.kind == "end":
        with torch.no_grad():
            return end_derivative(net, x, t_B, t_B, label_B)[1]
    plain = contextlib.nullcontext() if call.autocast else torch.autocast("cpu", enabled=False)
    with torch.set_grad_enabled(call.kind == "gradient"), plain, _Kernels(gpu):
        return net(x, t_B, t_B, label_B)


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


@dataclass
class Counted:
    """What kernels did: operations by type, bytes of all of them and of products alone, their number."""

    flops: Counter[str] = field(default_factory=Counter)
    traffic: int = 0
    product_traffic: int = 0
    kernels: int = 0

    def __add__(self, other: "Counted") -> "Counted":
        return Counted(
            self.flops + other.flops,
            self.traffic + other.traffic,
            self.product_traffic + other.product_traffic,
            self.kernels + other.kernels,
        )


class Tally(TorchDispatchMode):
    """Counts what runs under it; ``nets`` are there before. Works on real tensors as on fake ones."""

    def __init__(self, nets: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.counted = Counted()
        self.held = self.peak = 0
        self._known: dict[int, int] = {}
        for net in nets:
            for tensor in net.state_dict(keep_vars=True).values():
                self._meet(tensor, counted=False)

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for result in results:
            self._meet(result)
        if func.is_view or func.namespace == "prim" or func._overloadpacket in _FREE:
            return out
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        moved = sum(map(_moved, (*given, *results)))
        self.counted.kernels += 1
        self.counted.traffic += moved
        count = _FLOPS.get(func._overloadpacket)
        if count is not None:
            self.counted.product_traffic += moved
            self.counted.flops[str(given[0].dtype).removeprefix("torch.")] += count(*args, **kwargs, out_val=out)
        return out

    def _meet(self, tensor: Tensor, *, counted: bool = True) -> None:
        """Take note of the memory of a tensor, and of when it is given back."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._known:
            return
        self._known[address] = storage.nbytes() if counted else 0
        self.held += self._known[address]
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, address)

    def _release(self, address: int) -> None:
        self.held -= self._known.pop(address)


def _moved(tensor: Tensor) -> int:
    """Bytes of a tensor; what it repeats by a stride of zero is read once."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else 1
    return size


def _cpu_attention(q: Tensor, k: Tensor, v: Tensor, *rest: object, out_val: object = None, **options: object) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _cpu_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object, out_val: object = None, **options: object
) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # The counter's table leaves out the CPU's fused attention.
    aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}
_FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.lift_fresh}
"""What takes memory, or a name for it, and moves nothing."""


class _Kernels(TorchFunctionMode):
    """Attention by the fused kernel that training takes, which fake tensors are too shapeless to choose; and, for a
    GPU, the operations that its autocast keeps in float32, where the CPU's does not."""

    def __init__(self, gpu: bool) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and not kwargs and len(args) == 3:
            if self._gpu:
                return aten._scaled_dot_product_efficient_attention(*args, None, torch.is_grad_enabled())[0]
            return aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        if self._gpu and func in _FULL_PRECISION and torch.is_autocast_enabled("cpu"):
            args = [each.float() if isinstance(each, Tensor) and each.is_floating_point() else each for each in args]
        return func(*args, **kwargs)


_FULL_PRECISION = {
    *(F.layer_norm, F.group_norm, F.softmax, F.mse_loss, torch.softmax, torch.rsqrt, torch.exp, torch.pow, torch.sum),
    *(torch.square, torch.norm, torch.cumsum, torch.prod, torch.reciprocal, torch.log),
    *(Tensor.softmax, Tensor.rsqrt, Tensor.exp, Tensor.pow, Tensor.sum, Tensor.square, Tensor.norm, Tensor.cumsum),
    *(Tensor.prod, Tensor.reciprocal, Tensor.log),
}
"""Of torch's documented list for CUDA, the operations that networks here use."""
