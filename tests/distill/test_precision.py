"""What stays in float32 when a student is trained in bfloat16, and when a teacher is evaluated in it."""

from pathlib import Path

import pytest
import tiny
import torch
from conftest import student, succeed
from torch import Tensor, nn

from fewstep.config import load_config
from fewstep.data.load import load_data
from fewstep.distill.config import TrainConfig
from fewstep.distill.objective import LossOutput, Objective
from fewstep.distill.progressive.objective import two_steps
from fewstep.flow import TimeDomain
from fewstep.grids import uniform_nodes
from fewstep.students.maps import AverageVelocityMap
from fewstep.teachers.load import load_teacher
from fewstep.teachers.network import NetworkField, freeze

BF16 = TrainConfig.model_validate({**tiny.CONFIG.model_dump(), "precision": "bf16"})


def watch(net: nn.Module, seen: dict[str, set[torch.dtype]], prefix: str = "") -> None:
    """Note the precision of what every layer gives."""

    def note(name: str) -> None:
        layer = net.get_submodule(name)
        layer.register_forward_hook(lambda _, __, output: seen.setdefault(prefix + name, set()).add(output.dtype))

    for name, _ in net.named_modules():
        note(name)


def test_the_parts_that_stay_in_full_precision() -> None:
    objective = tiny.meanflow()
    field = objective.velocity.field.contrast.field
    assert isinstance(field, NetworkField)
    within: dict[str, set[torch.dtype]] = {}
    seen: dict[str, set[torch.dtype]] = {}
    watch(objective.student, seen)
    watch(field.net, seen, "teacher.")
    derivative = objective.derivative

    def watched(net: nn.Module, *arguments: Tensor) -> Tensor:
        before = {name: set(found) for name, found in seen.items()}
        seen.clear()
        result = derivative(net, *arguments)
        within.update({name: set(found) for name, found in seen.items()})
        seen.clear()
        seen.update(before)
        return result

    objective.derivative = watched
    outputs: list[LossOutput] = []
    objective.register_forward_hook(lambda _, __, output: outputs.append(output))
    states = list(tiny.run(objective, 2, config=BF16))
    full, half = {torch.float32}, {torch.bfloat16}
    assert seen["enter"] == seen["blocks.0.inner"] == seen["blocks.0.outer"] == half
    assert seen["embed_t"] == seen["embed_t.inner"] == seen["embed_gap.outer"] == seen[""] == full
    assert all(found == full for name, found in seen.items() if name.startswith("teacher."))
    assert len(within) > 10
    assert all(found == full for found in within.values())
    for output in outputs:
        assert (output.per_sample_B.dtype, output.residual_B.dtype, output.t_B.dtype) == 3 * (torch.float32,)
    assert all(parameter.dtype == torch.float32 for parameter in objective.student.parameters())
    assert all(value.dtype == torch.float32 for value in states[-1].emas[0].state().values())


@pytest.mark.parametrize("name", tiny.OBJECTIVES)
def test_losses_are_near_those_of_full_precision(name: str) -> None:
    """And not equal: something is done in bfloat16."""
    losses = [
        [state.loss for state in tiny.run(tiny.OBJECTIVES[name](), 5, config=config)] for config in (tiny.CONFIG, BF16)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[1] != losses[0]


def test_targets_of_progressive_distillation_are_in_full_precision() -> None:
    """The teacher of a later stage is a plain network, which autocast would reach."""
    previous = AverageVelocityMap(freeze(tiny.student()), TimeDomain("grid", uniform_nodes(8)))
    batch = torch.randn(4, 1, 8, 8)
    t, m, s = (torch.full((4,), value) for value in (1.0, 0.875, 0.75))
    wanted = two_steps(previous, batch, t, m, s)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(two_steps(previous, batch, t, m, s), wanted)


def test_a_teacher_in_bfloat16(trained: Path, tmp_path: Path) -> None:
    """Its weights are, its time embedding is not; it answers in float32, near the other one, and frozen; and a student
    starts from the weights as they were trained."""
    config = load_config("digits-meanflow", list(student(trained / "teacher")))
    data = load_data(config.data)
    x, t, label = torch.randn(16, 1, 8, 8), torch.linspace(0, 1, 16), torch.arange(16) % 10
    answers = {}
    for precision in ("fp32", "bf16"):
        chosen = config.teacher.model_copy(update={"precision": precision})
        teacher = load_teacher(chosen, config.data, data, torch.device("cpu"))
        net = teacher.field.net
        answers[precision] = teacher.field(x, t, label)
        assert not answers[precision].requires_grad
        assert not net.training
        for name, parameter in net.named_parameters():
            half = precision == "bf16" and not name.startswith("embed_t.")
            assert parameter.dtype == (torch.bfloat16 if half else torch.float32), name
        assert all(parameter.dtype == torch.float32 for parameter in teacher.net.parameters())
    assert answers["bf16"].dtype == torch.float32
    error = (answers["bf16"] - answers["fp32"]).norm() / answers["fp32"].norm()
    assert 1e-5 < float(error) < 2e-2


def test_training_from_a_teacher_in_bfloat16(trained: Path, tmp_path: Path) -> None:
    command = ("distill", "digits-consistency", *student(trained / "teacher"), "train.steps=3", "train.precision=bf16")
    succeed(*command, "teacher.precision=bf16", "--out", tmp_path / "run")


def accumulated(objective: Objective, parts: int) -> tuple[list[float], list[float], dict[str, Tensor]]:
    config = TrainConfig.model_validate({**tiny.CONFIG.model_dump(), "gradient_accumulation_steps": parts})
    *_, state = states = list(tiny.run(objective, 2, config=config))
    losses, norms = ([getattr(state, name) for state in states] for name in ("loss", "grad_norm"))
    return losses, norms, dict(state.student.state_dict())


def partitions() -> list[tuple[str, int]]:
    """Down to a single sample for every objective, or to a whole trajectory of four; for some in other parts too."""
    finest = [(name, 8 if name == "trajectory" else 32) for name in tiny.OBJECTIVES]
    return [*finest, *((name, parts) for name in ("flow_matching", "meanflow", "consistency") for parts in (2, 8))]


@pytest.mark.parametrize(("name", "parts"), partitions())
def test_accumulated_gradients_train_as_the_whole_batch(name: str, parts: int) -> None:
    """What changes is the order of summation. The gradient's norm is compared as well: clipping and Adam forgive a
    gradient that is a multiple of the right one."""
    wanted, lengths, weights = accumulated(tiny.OBJECTIVES[name](), 1)
    losses, norms, found = accumulated(tiny.OBJECTIVES[name](), parts)
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert norms == pytest.approx(lengths, rel=1e-3)
    torch.testing.assert_close(found, weights, rtol=1e-4, atol=1e-5)
