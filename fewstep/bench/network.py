"""What a network costs: its parameters, its arithmetic, and how long it takes here, beside others of its size."""

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fewstep.bench.measure import (
    Reported,
    Spread,
    Work,
    device_name,
    ledger_row,
    spread,
    timed,
    torch_threads,
    unreported,
    where,
)
from fewstep.distill.tangent import forward_derivative
from fewstep.errors import UsageError, nearest
from fewstep.networks.build import build_network, parameter_count
from fewstep.networks.config import SIZES


@dataclass(frozen=True)
class NetworkCost:
    """One network. Times are milliseconds for a batch; ``flops`` is the arithmetic of a forward pass per sample.

    A multiply-add is two operations, and matrix products and convolutions alone are counted. ``step_ms`` is a forward
    and a backward pass of a mean square and the optimiser's step, ``jvp_ms`` the derivative along the path.
    """

    size: str
    params: int
    flops: int
    forward_ms: Spread
    step_ms: Spread
    jvp_ms: Spread


@dataclass(frozen=True)
class NetworkBench:
    """Networks of two times on samples of one shape, in the order of their parameters."""

    shape: tuple[int, ...]
    classes: int
    batch_size: int
    repeats: int
    device: str
    threads: int
    networks: tuple[NetworkCost, ...]

    def to_json(self) -> dict[str, Any]:
        """With where and when it was measured: a row of the ledger."""
        return ledger_row("network", self)


def bench_networks(
    sizes: Sequence[str],
    shape: tuple[int, ...],
    *,
    classes: int,
    batch_size: int,
    repeats: int,
    device: torch.device,
    threads: int = 0,
    report: Reported = unreported,
) -> NetworkBench:
    """Measure the named networks, or all that take samples of ``shape`` where none is named.

    In every round each network does everything once, and every round starts with another one, so that whatever else the
    machine does meets all of them. The first round is not counted.
    """
    nets = {size: net.to(device) for size, net in _build(sizes, shape, classes).items()}
    with torch_threads(threads):
        works = {size: _works(net, shape, classes, batch_size, device) for size, net in nets.items()}
        order = list(nets)
        taken: dict[tuple[str, str], list[float]] = defaultdict(list)
        for round_ in range(repeats + 1):
            first = round_ % len(order)
            for size in order[first:] + order[:first]:
                for name, work in works[size].items():
                    ms = timed(work, device).wall
                    if round_:
                        taken[size, name].append(ms)
            report(round_, repeats)
        costs = [
            NetworkCost(
                size=size,
                params=parameter_count(net),
                flops=forward_flops(net, shape),
                forward_ms=spread(taken[size, "forward"]),
                step_ms=spread(taken[size, "step"]),
                jvp_ms=spread(taken[size, "jvp"]),
            )
            for size, net in nets.items()
        ]
        return NetworkBench(
            shape=shape,
            classes=classes,
            batch_size=batch_size,
            repeats=repeats,
            device=device_name(device),
            threads=torch.get_num_threads(),
            networks=tuple(sorted(costs, key=lambda cost: cost.params)),
        )


def forward_flops(net: nn.Module, shape: tuple[int, ...]) -> int:
    """Operations of one forward pass of one sample; a multiply-add is two."""
    parameter = next(net.parameters())
    x, t = parameter.new_zeros(1, *shape), parameter.new_ones(1)
    # The counter does not know every fused attention; the plain one is made of products that it does know.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(x, t, t, None)
    return counter.get_total_flops()


def network_title(bench: NetworkBench) -> str:
    """For people: what was measured."""
    what = f"samples of {' x '.join(map(str, bench.shape))}, {bench.classes} classes, batch {bench.batch_size}"
    return f"{what}; {where(bench.device, bench.threads)}; {bench.repeats} rounds"


def network_table(bench: NetworkBench) -> Table:
    """For people: one line per network, medians with quartiles."""
    table = Table()
    for head in ("", "parameters", "MFLOP/sample", "forward ms", "training step ms", "jvp ms"):
        table.add_column(head, justify="left" if head == "" else "right")
    for cost in bench.networks:
        times = (cost.forward_ms, cost.step_ms, cost.jvp_ms)
        cells = (f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})" for found in times)
        table.add_row(cost.size, f"{cost.params:,}", f"{cost.flops / 1e6:,.1f}", *cells)
    return table


def _build(sizes: Sequence[str], shape: tuple[int, ...], classes: int) -> dict[str, nn.Module]:
    for size in sizes:
        if size not in SIZES:
            raise UsageError(f"no network of size '{size}'; {nearest(size, SIZES)}")
    nets: dict[str, nn.Module] = {}
    for size in sizes or SIZES:
        torch.manual_seed(0)
        try:
            nets[size] = build_network(SIZES[size], shape, classes, two_times=True)
        except UsageError:
            if sizes:
                raise
    return nets


def _works(
    net: nn.Module, shape: tuple[int, ...], classes: int, batch_size: int, device: torch.device
) -> dict[str, Work]:
    """What is timed of a network, each as a function of nothing."""
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(batch_size, *shape, generator=generator).to(device) for _ in range(2))
    t = torch.rand(batch_size, generator=generator).to(device)
    label = torch.arange(batch_size, device=device) % classes if classes else None
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)

    @torch.no_grad()
    def forward() -> Tensor:
        return net(x, t, t / 2, label)

    def step() -> None:
        (net(x, t, t / 2, label) - v).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {
        "forward": forward,
        "step": step,
        "jvp": functools.partial(forward_derivative, net, x, v, t, t / 2, label),
    }
