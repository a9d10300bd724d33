"""torch.compile: the same results as eager mode, and nothing that is known to be wrong gets through."""

import math
from collections.abc import Callable

import pytest
import tiny
import torch
from family import meanflow
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from fewstep.data.dataset import Batch, BatchSource
from fewstep.data.load import digits
from fewstep.distill.compiled import compile_objective
from fewstep.distill.config import TrainConfig
from fewstep.distill.tangent import central_difference, forward_derivative
from fewstep.errors import EnvironmentFault, FewstepError, UsageError

BACKEND = "aot_eager"
"""Traces and differentiates as the default backend does, and generates no code."""


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> None:
    torch._dynamo.reset()


def batch() -> Batch:
    return BatchSource(digits(), 8, 0, device=torch.device("cpu")).batch(0)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_the_compiled_objective_trains_as_the_eager_one() -> None:
    """Losses of three steps; compiled were two graphs, one of the student and one of its derivative, and no others
    followed: nothing fell back to eager mode."""
    wanted = [state.loss for state in tiny.run(tiny.meanflow_from_data(), 3)]
    objective = tiny.meanflow_from_data()
    torch._dynamo.utils.counters.clear()
    compile_objective(
        objective, BatchSource(digits(), 32, tiny.SEED, device=torch.device("cpu")).batch(0), backend=BACKEND
    )
    assert graphs() == 2
    assert objective.derivative is not forward_derivative
    found = [state.loss for state in tiny.run(objective, 3)]
    assert found == pytest.approx(wanted, rel=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("name", ["terminal_velocity", "free_flow"])
def test_a_gradient_that_passes_the_derivative_stays_uncompiled(name: str) -> None:
    """A compiled network has no forward derivative of its own: what is not compiled as a whole runs eagerly."""
    wanted = [state.loss for state in tiny.run(tiny.OBJECTIVES[name](), 3)]
    objective = tiny.OBJECTIVES[name]()
    compile_objective(
        objective, BatchSource(digits(), 32, tiny.SEED, device=torch.device("cpu")).batch(0), backend=BACKEND
    )
    found = [state.loss for state in tiny.run(objective, 3)]
    assert found == pytest.approx(wanted, rel=1e-5)


def test_an_objective_without_a_derivative() -> None:
    objective = tiny.progressive()
    torch._dynamo.utils.counters.clear()
    compile_objective(objective, batch(), backend=BACKEND)
    assert graphs() == 1
    assert objective.derivative is None


class Normed(nn.Module):
    """A network with a normalisation, with or without weights of its own."""

    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64, elementwise_affine=affine)

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        h = self.norm(self.inner(x.flatten(1)) + t_B[:, None]) * r_B[:, None].exp()
        return h.reshape(x.shape)


def test_layers_that_do_not_compile_are_refused_by_name() -> None:
    compile_objective(meanflow(Normed(affine=False)), batch(), backend=BACKEND)
    with pytest.raises(UsageError, match=r"the student's layer norm \(LayerNorm with weights\) does not compile"):
        compile_objective(meanflow(Normed(affine=True)), batch(), backend=BACKEND)
    differences = meanflow(Normed(affine=True))
    differences.derivative = central_difference(1e-2)
    compile_objective(differences, batch(), backend=BACKEND)


class Rounded(torch.autograd.Function):
    """Rounds, and passes tangents straight through."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (x * 8).round() / 8

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad

    @staticmethod
    def jvp(ctx: object, tangent: Tensor) -> Tensor:
        return tangent


class WithRounding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        return Rounded.apply(self.inner(x.flatten(1)) * t_B[:, None]).reshape(x.shape)


def test_a_jvp_that_compilation_would_lose_is_caught() -> None:
    """An autograd function's own ``jvp``: some torch drops it in silence, some says that it cannot."""
    with pytest.raises(FewstepError, match=r"compiled tangent differs|Unsupported custom jvp"):
        compile_objective(meanflow(WithRounding()), batch(), backend=BACKEND)


@pytest.mark.parametrize(("factor", "by"), [(1.01, "0.01"), (math.nan, "nan")])
@pytest.mark.parametrize(("graph", "name"), [(1, "output"), (2, "tangent")])
def test_wrong_results_are_caught(graph: int, name: str, factor: float, by: str) -> None:
    """A compiler that gets its first or second graph wrong by a hundredth, or altogether."""
    seen: list[int] = []

    def wrong(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        seen.append(1)
        times = factor if len(seen) == graph else 1.0
        return lambda *arguments: tuple(times * output for output in module(*arguments))

    with pytest.raises(FewstepError, match=f"the compiled {name} differs from the eager one by {by}"):
        compile_objective(meanflow(tiny.student()), batch(), backend=wrong)


def test_a_wrong_gradient_is_caught() -> None:
    """A compiler that is right about the forward pass and gets the backward pass wrong by a hundredth."""

    def right(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        return make_boxed_func(module.forward)

    def wrong(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        return make_boxed_func(lambda *arguments: [g if g is None else 1.01 * g for g in module(*arguments)])

    with pytest.raises(FewstepError, match=r"the compiled gradient differs from the eager one by 0\.01"):
        compile_objective(tiny.progressive(), batch(), backend=aot_autograd(fw_compiler=right, bw_compiler=wrong))


def test_a_missing_compiler_is_a_fault_of_the_environment() -> None:
    with pytest.raises(EnvironmentFault, match=r"torch\.compile fails here"):
        compile_objective(tiny.progressive(), batch(), backend="no_such_backend")


def test_compile_with_shards_is_refused() -> None:
    with pytest.raises(ValueError, match="compile with parallel fsdp2"):
        TrainConfig(compile=True, parallel="fsdp2")


@pytest.mark.slow
@pytest.mark.thorough
def test_the_default_backend() -> None:
    """Through the trainer, with generated code; needs a C++ compiler."""
    config = TrainConfig.model_validate({**tiny.CONFIG.model_dump(), "compile": True})
    wanted = [state.loss for state in tiny.run(tiny.meanflow(), 2)]
    try:
        found = [state.loss for state in tiny.run(tiny.meanflow(), 2, config=config)]
    except EnvironmentFault as fault:
        pytest.skip(str(fault))
    assert found == pytest.approx(wanted, rel=1e-5)
