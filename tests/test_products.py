"""What float32 means for products: told for a while, to matrices and convolutions alike, and given back."""

from collections.abc import Callable, Iterator

import pytest
import tiny
import torch
from torch import Tensor

from fewstep.block import ProductsName
from fewstep.config import load_config
from fewstep.distill.config import TrainConfig
from fewstep.distill.objective import LossOutput
from fewstep.errors import UsageError
from fewstep.precision import products


def flags() -> tuple[str, bool, bool]:
    """What torch has for float32: of matrices by its two names, and of convolutions."""
    cuda = torch.backends.cuda.matmul.allow_tf32
    return torch.get_float32_matmul_precision(), cuda, torch.backends.cudnn.allow_tf32


FLAGS = {"fp32": ("highest", False, False), "tf32": ("high", True, True)}


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    matrices, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(matrices)
    torch.backends.cudnn.allow_tf32 = convolutions


@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("matrices", ["highest", "high", "medium"])
@pytest.mark.parametrize("convolutions", [True, False])
def test_both_are_told_and_the_callers_choice_comes_back(kind: ProductsName, matrices: str, convolutions: bool) -> None:
    torch.set_float32_matmul_precision(matrices)
    torch.backends.cudnn.allow_tf32 = convolutions
    before, on_cpu = flags(), torch.backends.mkldnn.matmul.fp32_precision
    with products(kind):
        assert flags() == FLAGS[kind]
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"  # a CPU multiplies in float32 in any case
        for inner in FLAGS:
            with pytest.raises(ZeroDivisionError):
                _divide_by_zero_under(inner)
            assert flags() == FLAGS[kind]
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    assert flags() == before
    assert torch.backends.mkldnn.matmul.fp32_precision == on_cpu


def _divide_by_zero_under(kind: ProductsName) -> None:
    with products(kind):
        assert flags() == FLAGS[kind]
        _ = 1 / 0


@pytest.mark.parametrize(
    ("precision", "given", "kind"),
    [("fp32", None, "fp32"), ("tf32", None, "tf32"), ("bf16", None, "tf32"), ("bf16", "fp32", "fp32")],
)
def test_a_training_step_is_told_and_the_loop_around_it_is_not(
    precision: str, given: ProductsName | None, kind: str
) -> None:
    """Forward and backward pass; between steps, and for what the caller does there, its own choice holds."""
    config = TrainConfig.model_validate({**tiny.CONFIG.model_dump(), "precision": precision})
    objective = tiny.flow_matching()
    forward, backward = [], []

    def in_forward(*_: object) -> None:
        forward.append(flags())

    def in_backward(gradient: Tensor) -> None:
        backward.append(flags())

    objective.register_forward_hook(in_forward)
    next(iter(objective.student.parameters())).register_hook(in_backward)
    outside = flags()
    for _ in tiny.run(objective, 2, config=config, float32=given):
        assert flags() == outside
    assert forward == backward == [FLAGS[kind]] * 2
    assert flags() == outside


def test_a_step_that_fails_gives_the_callers_choice_back() -> None:
    objective = tiny.flow_matching()

    def fail(*_: object) -> LossOutput:
        raise RuntimeError("in a step")

    objective.register_forward_hook(fail)
    outside = flags()
    with pytest.raises(RuntimeError, match="in a step"):
        next(
            tiny.run(objective, 1, config=TrainConfig.model_validate({**tiny.CONFIG.model_dump(), "precision": "tf32"}))
        )
    assert flags() == outside


def test_tf32_and_fp32_are_the_same_bits_on_a_cpu() -> None:
    config = TrainConfig.model_validate({**tiny.CONFIG.model_dump(), "precision": "tf32"})
    losses = [[state.loss for state in tiny.run(tiny.meanflow(), 3, config=each)] for each in (tiny.CONFIG, config)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        ((), "fp32"),
        (("train.precision=tf32",), "tf32"),
        (("train.precision=bf16",), "tf32"),
        (("train.precision=bf16", "objective.jvp=finite_difference"), "fp32"),
    ],
)
def test_what_a_config_lets_products_run_in(overrides: tuple[str, ...], kind: str) -> None:
    assert load_config("digits-meanflow", overrides).products == kind


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("objective.jvp=one_sided",), r"objective\.jvp one_sided needs train\.precision fp32, not tf32"),
        (("objective.jvp=finite_difference",), r"finite_difference needs train\.precision fp32 or bf16"),
    ],
)
def test_differences_of_outputs_refuse_tf32(overrides: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        load_config("digits-meanflow", (*overrides, "train.precision=tf32"))


# On a GPU ------------------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return x.flatten(1) @ weight.flatten(1).T


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.conv2d(x, weight, padding=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("work", [linear, convolution])
def test_what_the_kinds_mean_on_a_gpu(work: Callable[[Tensor, Tensor], Tensor]) -> None:
    """True float32 agrees with float64 to 1e-6, whatever the caller had; TF32 does not, where the device has it."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (64, 64, 3, 3)
    x, weight = (torch.randn(shape, generator=generator, device="cuda") for _ in range(2))
    exact = work(x.double(), weight.double())

    def error() -> float:
        return float((work(x, weight).double() - exact).norm() / exact.norm())

    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    with products("fp32"):
        assert error() < 1e-6
    with products("tf32"):
        assert error() < 1e-3
        if torch.cuda.get_device_capability()[0] >= 8:
            assert error() > 1e-5
