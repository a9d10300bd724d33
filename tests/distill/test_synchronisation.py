"""A training step makes the host wait for nothing: not for numbers off the device, and not for uploads to it.

The device here is ``meta``: its tensors have shapes and no values, so whatever would look at one fails, as code that
looks at a GPU's would wait. What copies to it is counted.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fewstep.distill.train as trainer
from fewstep import keys
from fewstep.bench.variants import variants
from fewstep.checkpoint import RunDirectory, checkpoints
from fewstep.config import load_config
from fewstep.data.dataset import Batch, BatchSource, Dataset
from fewstep.distill.couplings import assignment, paired_noise
from fewstep.distill.curvature import CurvatureWeighting
from fewstep.distill.flow_matching import FlowMatching
from fewstep.distill.objective import LossOutput, Objective
from fewstep.distill.progressive.objective import ProgressiveStage
from fewstep.distill.run import run_training
from fewstep.distill.tangent import central_difference
from fewstep.distill.train import NonFiniteError
from fewstep.files import read_json
from fewstep.flow import TimeDomain
from fewstep.grids import uniform_nodes
from fewstep.keys import Key
from fewstep.sources import gaussian
from fewstep.students.maps import AverageVelocityMap
from fewstep.teachers.network import freeze
from fewstep.times import jump_rows, jumps_last, logit_normal, truncated_student

META = torch.device("meta")


def weighted_by_curvature() -> Objective:
    net = tiny.network(two_times=False)
    weighting = CurvatureWeighting(
        net, power=0.5, warmup_steps=2, probed=0.25, derivative=central_difference(5e-3), decay=0.9
    )
    return FlowMatching(net, times=logit_normal(0.0, 1.0), label_dropout=0.1, null_label=10, weighting=weighting)


def later_stage() -> Objective:
    """Progressive distillation with the student of the stage before for a teacher."""
    previous = AverageVelocityMap(freeze(tiny.student()), TimeDomain("grid", uniform_nodes(8)))
    return ProgressiveStage(tiny.student(), teacher=previous, teacher_grid=uniform_nodes(8))


def heavy_tailed() -> Objective:
    net = tiny.network(two_times=False)
    return FlowMatching(net, times=truncated_student(0.01, 0.2, 1.0, 80.0), label_dropout=0.0, null_label=10)


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    **tiny.OBJECTIVES,
    "finite differences": partial(tiny.flow_map, "meanflow", jvp="finite_difference"),
    "one-sided differences": partial(tiny.flow_map, "meanflow", jvp="one_sided", velocity="data"),
    "weighted by curvature": weighted_by_curvature,
    "a later stage": later_stage,
    "heavy-tailed times": heavy_tailed,
}


def test_every_kind_of_objective_is_here() -> None:
    assert {variant.kind for variant in variants().values()} <= OBJECTIVES.keys()


class Uploads(TorchFunctionMode):
    """Counts the tensors made on the host for the device: ``torch.tensor`` does not show what it copies."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def __torch_function__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made_there = func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == META
        if made_there or func is Tensor.new_tensor:
            self.found.append(str(func))
        return func(*args, **kwargs)


class Copies(TorchDispatchMode):
    """Counts copies between the host and the device, either way."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        places = {each.device.type for each in (*args, result) if isinstance(each, Tensor) and each.ndim}
        if "copy" in str(func) and len(places) > 1:
            self.found.append(str(func))
        return result


@pytest.fixture
def _autocast_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast knows no such device; here it is only ever switched off."""
    plain = torch.autocast.__init__

    def init(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        plain(self, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

    monkeypatch.setattr(torch.autocast, "__init__", init)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)


def blank(**changes: Any) -> Dataset:
    """Images on the device, with labels and a noise for each."""
    images = torch.empty(64, 1, 8, 8, dtype=torch.uint8, device=META)
    label = torch.empty(64, dtype=torch.int64, device=META)
    return Dataset("blank", images, label, 10, kind="image", noise=torch.empty(64, 1, 8, 8, device=META), **changes)


def waits(work: Callable[[int], object]) -> list[str]:
    """What the host waits for in the second of two calls; the first one brings constants to the device."""
    work(0)
    with Uploads() as uploads, Copies() as copies:
        work(1)
    return [*uploads.found, *copies.found]


@pytest.fixture
def _short_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers without their rounds, which would be most of a step's operations."""
    monkeypatch.setattr(keys, "philox", lambda counter, key: counter)


@pytest.mark.parametrize("draw", ["normal", "uniform"])
def test_no_random_number_waits_for_the_device(draw: str) -> None:
    index = torch.arange(5, device=META)
    assert waits(lambda number: getattr(Key(0, number), draw)("noise", index, (3, 2))) == []
    assert waits(lambda number: Key(0, number).permutations("shuffle", 5, 3, META)) == []


@pytest.mark.usefixtures("_autocast_on_meta", "_short_draws")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_objective_waits_for_the_device(name: str) -> None:
    """Forward and backward pass, and what follows the optimiser's step; batches that begin in the middle, too. A grid
    that changes over the training is brought to the device when it does, so both steps are of one grid."""
    objective = OBJECTIVES[name]()
    tiny.move(objective, META)
    source = BatchSource(blank(), 32, 0, device=META)

    def step(_: int) -> None:
        batch = source.batch(3).split(2)[1]
        objective(batch, Key(0, 3)).per_sample_B.mean().backward()
        objective.after_step()

    assert waits(step) == []


@pytest.mark.parametrize(
    "changes",
    [{}, {"flip": True}, {"flip": True, "mirrored": torch.empty(64, 1, 8, 8)}],
    ids=["as they are", "mirrored", "mirrored beforehand"],
)
def test_no_batch_of_resident_data_waits_for_the_device(changes: dict[str, Any]) -> None:
    """Rows are drawn, taken, mirrored and decoded there; the third step begins an epoch."""
    if "mirrored" in changes:
        changes = {**changes, "mirrored": torch.empty(64, 1, 8, 8, dtype=torch.uint8, device=META)}
    source = BatchSource(blank(**changes), 64, 0, device=META)
    assert waits(source.batch) == []
    assert waits(lambda number: source.batch(200 + number)) == []


@pytest.mark.usefixtures("_autocast_on_meta")
def test_what_would_wait_is_seen() -> None:
    """A number read off the device, places that the host does not know, an upload, a coupling made on the host."""
    batch = BatchSource(blank(), 32, 0, device=META).batch(0)
    assert waits(lambda number: torch.tensor([0.5], device=META)) != []
    assert waits(lambda number: torch.arange(3.0).to(META)) != []
    with pytest.raises(RuntimeError, match="meta"):
        batch.x.sum().item()
    meanflow = tiny.meanflow_from_data()
    tiny.move(meanflow, META)
    with pytest.raises(RuntimeError, match="meta"):
        meanflow(replace(batch, first=None), Key(0))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        paired_noise(gaussian, assignment(8))(batch, Key(0))


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.75, 0.999, 1.0])
def test_rows_that_jump_are_counted_without_looking(fraction: float) -> None:
    """For batches that begin anywhere, as for places that are read."""
    for first in (0, 1, 7, 64, 10_001):
        for count in (1, 2, 3, 16, 100):
            index = torch.arange(first, first + count)
            order, stay = jumps_last(index, fraction, first)
            jump = jump_rows(index, fraction)
            assert stay == jumps_last(index, fraction)[1] == int((~jump).sum())
            assert torch.equal(order, torch.cat(((~jump).nonzero().flatten(), jump.nonzero().flatten())))


# ------------------------------------------------------------------------------------- looked at one step later


@pytest.fixture
def _deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer as it is on a GPU: fused Adam has the same ``found_inf`` everywhere."""
    monkeypatch.setattr(trainer, "_passes_over", lambda optimizer, accelerator: "fused" in optimizer.defaults)


@pytest.mark.parametrize(("optimizer", "grad_clip"), [("adamw", 0.0), ("adamw", 1.77), ("adam", 1.77)])
def test_looking_later_changes_no_bit(monkeypatch: pytest.MonkeyPatch, optimizer: str, grad_clip: float) -> None:
    """Losses, norms (some of them clipped) and everything a checkpoint holds, after six steps."""
    config = tiny.CONFIG.model_copy(update={"optimizer": optimizer, "grad_clip": grad_clip})
    found = []
    for deferred in (False, True):
        monkeypatch.setattr(trainer, "_passes_over", lambda optimizer, accelerator, now=deferred: now)
        states = list(tiny.run(tiny.meanflow_from_data(), 6, config=config))
        numbers = [(state.loss, state.grad_norm) for state in states]
        found.append((numbers, states[-1].snapshot(True)))
    assert found[0][0] == found[1][0]
    assert not grad_clip or len({norm > grad_clip for _, norm in found[0][0]}) == 2
    for group, tensors in found[0][1].items():
        for name, value in tensors.items():
            assert torch.equal(value, found[1][1][group][name]), (group, name)


@pytest.mark.usefixtures("_deferred")
def test_nothing_is_read_until_the_next_step_has_its_gradients() -> None:
    """Of the states of four steps at most the last is unread, and the one that ends the training is not."""
    states = []
    for state in tiny.run(tiny.flow_matching(), 4):
        states.append(state)
        read = [each.reading._values is not None for each in states]
        assert read == [True] * (state.step - 1) + [state.step == 4]


class Poisoned(Objective):
    """An objective whose loss or gradient becomes infinite at one step and at that one only."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__()
        self.inner = (tiny.flow_matching(),)  # in a tuple, so that it is no submodule
        self.student = self.inner[0].student
        self.step, self.what, self.taken = step, what, 0

    def forward(self, batch: Batch, key: Key) -> LossOutput:
        output = self.inner[0](batch, key)
        loss = output.per_sample_B
        if key.step == self.step:
            zero = (next(self.student.parameters()).sum() * 0.0).abs()
            loss = loss + zero.sqrt() if self.what == "gradient" else loss * math.inf
        return replace(output, per_sample_B=loss)

    def after_step(self) -> None:
        self.taken += 1


@pytest.mark.usefixtures("_deferred")
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("asks", ["nobody", "loss", "grad_norm", "snapshot"])
def test_a_failed_step_is_told_of_later_and_leaves_no_trace(what: str, asks: str) -> None:
    """It is the third of six. Who asks for its numbers or a snapshot is told, who does not before the fourth changes
    anything. The weights are those of the second, and the averages have seen no others."""
    objective = Poisoned(2, what)
    steps = tiny.run(objective, 6)
    states = [next(steps) for _ in range(3)]
    told = {
        "nobody": lambda: next(steps),
        "loss": lambda: states[-1].loss,
        "grad_norm": lambda: states[-1].grad_norm,
        "snapshot": lambda: states[-1].snapshot(True),
    }
    with pytest.raises(NonFiniteError, match=r"not finite at step 3.*seed 7, step 2"):
        told[asks]()
    healthy = tiny.run(tiny.flow_matching(), 6)
    *_, second = (next(healthy) for _ in range(2))
    for name, value in objective.student.state_dict().items():
        assert torch.equal(value, second.student.state_dict()[name])
    for ema in states[-1].emas:
        assert all(value.isfinite().all() for value in ema.state().values())
    assert objective.taken == 3


@pytest.mark.usefixtures("_deferred")
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_last_step_that_fails_is_not_yielded(what: str) -> None:
    steps = tiny.run(Poisoned(2, what), 3)
    assert [next(steps).step for _ in range(2)] == [1, 2]
    with pytest.raises(NonFiniteError, match="step 3"):
        next(steps)


@pytest.mark.usefixtures("_deferred")
@pytest.mark.parametrize("every", [1, 4])
def test_no_checkpoint_is_of_a_step_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """The third step of a run fails; lines of the log and checkpoints are due at every step, or not before that."""
    plain = FlowMatching.forward

    def poisoned(self: FlowMatching, batch: Batch, key: Key) -> LossOutput:
        output = plain(self, batch, key)
        return replace(output, per_sample_B=output.per_sample_B * (math.inf if key.step == 2 else 1.0))

    monkeypatch.setattr(FlowMatching, "forward", poisoned)
    short = ["train.steps=8", "train.batch_size=8", "student.network={kind: mlp, width: 8, depth: 1}"]
    config = load_config("digits-teacher", [*short, f"train.checkpoint_every={every}", f"train.log_every={every}"])
    run = RunDirectory(tmp_path / "run")
    good = [f"step-{step:08d}" for step in (1, 2) if every == 1]
    with pytest.raises(NonFiniteError, match=rf"step 3.*last good checkpoint: {good[-1] if good else 'none'};"):
        for _ in run_training(config, run, resume=False, overwrite=False):
            pass
    assert [path.name for path in checkpoints(run.checkpoints)] == good
    log = run.path / "metrics.jsonl"
    assert (len(log.read_text().splitlines()) if log.exists() else 0) == len(good)
    assert read_json(run.path / "status.json")["state"] == "failed"
