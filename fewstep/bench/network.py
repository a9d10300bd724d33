"""What a network costs: its parameters, its arithmetic, and how long it takes here, beside others of its size."""

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fewstep.bench.ceiling import product_tflops
from fewstep.bench.measure import (
    Precision,
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
from fewstep.block import products_of
from fewstep.distill.tangent import forward_derivative
from fewstep.errors import EnvironmentFault, UsageError, nearest
from fewstep.networks.build import build_network, parameter_count
from fewstep.networks.config import LARGE, SIZES
from fewstep.precision import products


@dataclass(frozen=True)
class NetworkCost:
    """One network. Times are milliseconds for a batch; ``flops`` is the arithmetic of a forward pass per sample.

    A multiply-add is two operations, and matrix products and convolutions alone are counted. ``step_ms`` is a forward
    and a backward pass of a mean square and the optimiser's step, ``jvp_ms`` the derivative along the path.
    ``achieved`` is the arithmetic of three forward passes over the time of a step, as a share of what this machine
    reaches in matrix products.
    """

    size: str
    params: int
    flops: int
    forward_ms: Spread
    step_ms: Spread
    jvp_ms: Spread
    achieved: float


@dataclass(frozen=True)
class NetworkBench:
    """Networks of two times on samples of one shape, in the order of their parameters. ``matmul_flops`` is the rate of
    large matrix products in the same precision, in operations per second."""

    shape: tuple[int, ...]
    classes: int
    batch_size: int
    repeats: int
    device: str
    threads: int
    precision: Precision
    compiled: bool
    matmul_flops: float
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
    precision: Precision = "fp32",
    compiled: bool = False,
    report: Reported = unreported,
) -> NetworkBench:
    """Measure the named networks, or all that take samples of ``shape`` and are not ``LARGE`` where none is named.

    ``precision`` and ``compiled`` are as ``train.precision`` and ``train.compile`` have them; ``EnvironmentFault``
    where there is no working compiler.

    In every round each network does everything once, and every round starts with another one, so that whatever else the
    machine does meets all of them. What comes before the first round is not counted.
    """
    nets = {size: net.to(device) for size, net in _build(sizes, shape, classes).items()}
    flops = {size: forward_flops(net, shape) for size, net in nets.items()}
    with torch_threads(threads), products(products_of(precision)):
        works = {}
        for size, net in nets.items():
            works[size] = _works(net, shape, classes, batch_size, device, precision, compiled)
            _warm_up(size, works[size])
        order = list(nets)
        taken: dict[tuple[str, str], list[float]] = defaultdict(list)
        for round_ in range(repeats):
            first = round_ % len(order)
            for size in order[first:] + order[:first]:
                for name, work in works[size].items():
                    taken[size, name].append(timed(work, device).wall)
            report(round_ + 1, repeats)
        rate = 1e12 * product_tflops(torch.bfloat16 if precision == "bf16" else torch.float32, device)
        costs = []
        for size in nets:
            step_ms = spread(taken[size, "step"])
            costs.append(
                NetworkCost(
                    size=size,
                    params=parameter_count(nets[size]),
                    flops=flops[size],
                    forward_ms=spread(taken[size, "forward"]),
                    step_ms=step_ms,
                    jvp_ms=spread(taken[size, "jvp"]),
                    achieved=3 * flops[size] * batch_size / (step_ms.median / 1e3) / rate,
                )
            )
        return NetworkBench(
            shape=shape,
            classes=classes,
            batch_size=batch_size,
            repeats=repeats,
            device=device_name(device),
            threads=torch.get_num_threads(),
            precision=precision,
            compiled=compiled,
            matmul_flops=rate,
            networks=tuple(sorted(costs, key=lambda cost: cost.params)),
        )


def _warm_up(size: str, works: Mapping[str, Work]) -> None:
    """Everything once, which compiles what is to be compiled."""
    for name, work in works.items():
        try:
            work()
        except torch._dynamo.exc.TorchDynamoException as error:
            said = " ".join(str(error).split())[:160]
            raise EnvironmentFault(f"--compile: the {name} of {size} does not compile here ({said})") from error


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
    how = f"{bench.precision}, {'compiled' if bench.compiled else 'eager'}"
    return f"{what}; {how}; {where(bench.device, bench.threads)}; {bench.repeats} rounds"


def network_table(bench: NetworkBench) -> Table:
    """For people: one line per network, medians with quartiles."""
    table = Table(caption=f"matrix products reach {bench.matmul_flops / 1e9:,.0f} GFLOP/s in {bench.precision}")
    for head in ("", "parameters", "MFLOP/sample", "forward ms", "training step ms", "jvp ms", "of matmul rate"):
        table.add_column(head, justify="left" if head == "" else "right")
    for cost in bench.networks:
        times = (cost.forward_ms, cost.step_ms, cost.jvp_ms)
        cells = (f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})" for found in times)
        table.add_row(cost.size, f"{cost.params:,}", f"{cost.flops / 1e6:,.1f}", *cells, f"{100 * cost.achieved:.0f} %")
    return table


def _build(sizes: Sequence[str], shape: tuple[int, ...], classes: int) -> dict[str, nn.Module]:
    for size in sizes:
        if size not in SIZES:
            raise UsageError(f"no network of size '{size}'; {nearest(size, SIZES)}")
    nets: dict[str, nn.Module] = {}
    for size in sizes or [size for size in SIZES if size not in LARGE]:
        torch.manual_seed(0)
        try:
            nets[size] = build_network(SIZES[size], shape, classes, two_times=True)
        except UsageError:
            if sizes:
                raise
    return nets


def _works(
    net: nn.Module,
    shape: tuple[int, ...],
    classes: int,
    batch_size: int,
    device: torch.device,
    precision: Precision,
    compiled: bool,
) -> dict[str, Work]:
    """What is timed of a network, each as a function of nothing."""
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(batch_size, *shape, generator=generator).to(device) for _ in range(2))
    t = torch.rand(batch_size, generator=generator).to(device)
    label = torch.arange(batch_size, device=device) % classes if classes else None
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)

    derivative = forward_derivative
    if compiled:  # apart, as in training
        net.compile(fullgraph=True, dynamic=False)
        derivative = torch.compile(forward_derivative, fullgraph=True, dynamic=False)

    def network() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return net(x, t, t / 2, label)

    @torch.no_grad()
    def forward() -> Tensor:
        return network()

    def step() -> None:
        (network() - v).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"forward": forward, "step": step, "jvp": functools.partial(derivative, net, x, v, t, t / 2, label)}
