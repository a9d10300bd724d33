"""The trainer on an accelerator against the golden losses of the CPU; skipped where there is none."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import tiny
import torch
from test_golden import FOLDER

from fewstep.data.dataset import Batch
from fewstep.distill.config import TrainConfig
from fewstep.distill.objective import LossOutput
from fewstep.distill.train import NonFiniteError
from fewstep.keys import Key

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def recorded(name: str, steps: int) -> list[float]:
    return [float(line.split()[1]) for line in (FOLDER / f"{name}.txt").read_text().splitlines()[:steps]]


@pytest.mark.parametrize("name", tiny.OBJECTIVES)
def test_losses_are_those_of_the_cpu(name: str) -> None:
    assert [state.loss for state in tiny.run(tiny.OBJECTIVES[name](), 20)] == pytest.approx(
        recorded(name, 20), rel=1e-3
    )


@pytest.mark.parametrize(
    ("change", "near"),
    [({"precision": "bf16"}, 2e-2), ({"compile": True}, 1e-3), ({"gradient_accumulation_steps": 4}, 1e-3)],
    ids=str,
)
def test_options_that_change_no_loss(change: dict[str, object], near: float) -> None:
    config = TrainConfig.model_validate({**tiny.CONFIG.model_dump(), **change})
    losses = [state.loss for state in tiny.run(tiny.meanflow(), 20, config=config)]
    assert losses == pytest.approx(recorded("meanflow", 20), rel=near)


@pytest.mark.parametrize("optimizer", ["adam", "radam"])
def test_other_optimisers_train(optimizer: str) -> None:
    config = TrainConfig.model_validate({**tiny.CONFIG.model_dump(), "optimizer": optimizer})
    losses = [state.loss for state in tiny.run(tiny.progressive(), 20, config=config)]
    assert losses[0] == pytest.approx(recorded("progressive", 1)[0], rel=1e-3)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", tiny.OBJECTIVES)
def test_a_resumed_run_has_the_same_bits(name: str) -> None:
    groups = {}
    for state in tiny.run(tiny.OBJECTIVES[name](), 6):
        if state.step == 3:
            groups = {
                group: {key: value.clone() for key, value in tensors.items()}
                for group, tensors in state.snapshot(True).items()
            }
    wanted = {key: value.clone() for key, value in state.student.state_dict().items()}
    *_, state = tiny.run(tiny.OBJECTIVES[name](), 6, start=groups, done=3)
    for key, value in state.student.state_dict().items():
        assert torch.equal(value, wanted[key]), key


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    """Puts back what a test says of synchronisation."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize("name", tiny.OBJECTIVES)
def test_a_step_waits_for_nothing(name: str) -> None:
    """Whole steps of the trainer, once what is made but once is there, and beyond the twentieth, where grids that grow
    over the training have grown: a new one is brought to the device."""
    steps = tiny.run(tiny.OBJECTIVES[name](), 1000, first_step=30)
    for _ in range(3):
        next(steps)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(2):
        next(steps)


def test_a_failed_step_is_told_of_one_step_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves the weights of the step before it."""
    objective = tiny.flow_matching()
    plain = objective.forward

    def poisoned(batch: Batch, key: Key) -> LossOutput:
        output = plain(batch, key)
        return replace(output, per_sample_B=output.per_sample_B * (torch.inf if key.step == 2 else 1.0))

    monkeypatch.setattr(objective, "forward", poisoned)
    steps = tiny.run(objective, 6)
    next(steps), next(steps)
    wanted = {key: value.clone() for key, value in objective.student.state_dict().items()}
    next(steps)
    with pytest.raises(NonFiniteError, match="not finite at step 3"):
        next(steps)
    for key, value in objective.student.state_dict().items():
        assert torch.equal(value, wanted[key]), key
