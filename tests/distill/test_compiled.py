"""torch.compile: the same results as eager mode, and nothing that is known to be wrong gets through."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from conftest import succeed
from family import meanflow
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from fewstep.data.dataset import Batch, BatchSource
from fewstep.data.load import digits
from fewstep.distill import run, train
from fewstep.distill.compiled import compile_objective, compile_teacher, norms_in_parts
from fewstep.distill.config import TrainConfig
from fewstep.distill.tangent import central_difference, forward_derivative
from fewstep.errors import EnvironmentFault, FewstepError, UsageError
from fewstep.teachers.network import NetworkField, freeze

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
    """A network with a normalisation: of images of four channels, or of vectors."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.norm = norm
        vectors = isinstance(norm, nn.BatchNorm1d) or getattr(norm, "normalized_shape", 0) == (64,)
        self.shape = (64,) if vectors or getattr(norm, "num_channels", 0) == 64 else (4, 4, 4)

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        h = (self.inner(x.flatten(1)) + t_B[:, None]).unflatten(1, self.shape)
        return self.norm(h).reshape(x.shape) * r_B[:, None, None, None].exp()


def drawn(norm: nn.Module) -> nn.Module:
    """With weights unlike those it starts with."""
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.5)
    return norm


NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(64),
    "LayerNorm without bias": lambda: nn.LayerNorm((4, 4, 4), bias=False),
    "LayerNorm without weights": lambda: nn.LayerNorm(64, elementwise_affine=False),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "GroupNorm of vectors": lambda: nn.GroupNorm(4, 64),
    "GroupNorm without weights": lambda: nn.GroupNorm(2, 4, affine=False),
}


@pytest.mark.parametrize("name", ["LayerNorm", "GroupNorm"])
def test_norms_compile_with_their_weights(name: str) -> None:
    """In two parts: output, gradient of every weight and tangent are checked against eager mode on the way, and the
    weights keep their names."""
    net = Normed(drawn(NORMS[name]()))
    names = list(net.state_dict())
    objective = meanflow(net)
    compile_objective(objective, batch(), backend=BACKEND)
    assert list(net.state_dict()) == names
    assert isinstance(net.norm, nn.LayerNorm if name == "LayerNorm" else nn.GroupNorm)
    compile_objective(objective, batch(), backend=BACKEND)  # of a copy of it, say


@pytest.mark.parametrize("name", NORMS)
def test_norms_in_parts_are_the_norms(name: str) -> None:
    """Value, gradients and, where nobody compiles, the forward derivative too. In float64."""
    results = []
    for parts in (False, True):
        torch.manual_seed(3)
        net = Normed(drawn(NORMS[name]())).double()
        if parts:
            norms_in_parts(net)
        x, v = (torch.randn(5, 1, 8, 8, dtype=torch.float64) for _ in range(2))
        t = torch.rand(5, dtype=torch.float64)
        y = net(x, t, t / 2)
        gradients = torch.autograd.grad(y.square().sum(), list(net.parameters()))
        results.append((y, forward_derivative(net, x, v, t, t / 2, None), *gradients))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_layers_that_do_not_compile_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"the student's layer norm \(BatchNorm1d with weights\) does not compile"):
        compile_objective(meanflow(Normed(nn.BatchNorm1d(64).eval())), batch(), backend=BACKEND)
    differences = meanflow(Normed(nn.BatchNorm1d(64).eval()))
    differences.derivative = central_difference(1e-2)
    compile_objective(differences, batch(), backend=BACKEND)


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_a_compiled_teacher_is_checked(factor: float) -> None:
    """It is compiled in place; one that says something else then is refused, and so is a compiler that is none."""
    net = freeze(tiny.network(two_times=False))
    x, t, label = batch().x, torch.rand(8), batch().label
    wanted = net(x, t, t, label)

    def compiler(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *arguments: tuple(factor * output for output in module(*arguments))

    if factor == 1.0:
        compile_teacher(net, batch(), backend=compiler)
        torch.testing.assert_close(NetworkField(net)(x, t, label), wanted)
    else:
        with pytest.raises(FewstepError, match=r"the compiled output of the teacher differs .* by 0\.01"):
            compile_teacher(net, batch(), backend=compiler)
    with pytest.raises(EnvironmentFault, match="fails for the teacher"):
        compile_teacher(freeze(tiny.network(two_times=False)), batch(), backend="no_such_backend")


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


def test_a_run_compiles_its_teacher_unless_pairs_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a batch of the run's own; an analytic teacher has nothing to compile."""
    small = ("train.batch_size=8", "train.steps=1", "train.warmup_steps=0")
    teacher = tmp_path / "teacher"
    succeed("teach", "digits-teacher", *small, "student.network={kind: mlp, width: 8, depth: 1}", "--out", teacher)
    compiled: list[tuple[nn.Module, Batch]] = []
    monkeypatch.setattr(run, "compile_teacher", lambda net, data: compiled.append((net, data)))
    monkeypatch.setattr(train, "compile_objective", lambda objective, data: None)
    own = ("train.compile=true", f"teacher.path={teacher}", *small)
    succeed("distill", "digits-meanflow", *own, "--out", tmp_path / "meanflow")
    ((net, data),) = compiled
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert data.x.shape == (8, 1, 8, 8)
    pairs = ("objective.pairs.count=8", "objective.pairs.steps=2", "objective.distil_steps=null")
    succeed("distill", "digits-reflow", *own, *pairs, "--out", tmp_path / "reflow")
    assert len(compiled) == 1
