"""The trainer: its rates, steps and stops by hand, its batches, resumption and two processes."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from fewstep.checkpoint import Tensors
from fewstep.data.dataset import Batch, BatchSource, Dataset
from fewstep.data.load import digits
from fewstep.distill.config import TrainConfig
from fewstep.distill.objective import LossOutput, Objective
from fewstep.distill.optimise import learning_rate
from fewstep.distill.train import NonFiniteError, make_accelerator, train
from fewstep.errors import UsageError
from fewstep.keys import Key


def cloned(net: nn.Module) -> Tensors:
    return {name: value.clone() for name, value in net.state_dict().items()}


def copied(groups: dict[str, Tensors]) -> dict[str, Tensors]:
    return {group: {name: value.clone() for name, value in tensors.items()} for group, tensors in groups.items()}


def assert_same_bits(a: dict[str, Tensors], b: dict[str, Tensors]) -> None:
    assert a.keys() == b.keys()
    for group in a:
        assert a[group].keys() == b[group].keys()
        for name, value in a[group].items():
            assert torch.equal(value, b[group][name]), f"{group}: {name}"


# -------------------------------------------------------------------------------------------------------------- rates


@pytest.mark.parametrize(("grad_clip", "clipped"), [(0.5, 4), (1.1, 3), (0.0, 0)])
def test_training_is_textbook_adam(grad_clip: float, clipped: int) -> None:
    """Against a loop written from scratch: gradient clipped to norm (where it is longer, and never for a bound of 0),
    decoupled decay, moments with bias correction, each at the rate of its step. After 4 steps the weights agree to
    rounding."""
    config = TrainConfig.model_validate({**tiny.CONFIG.model_dump(), "grad_clip": grad_clip})
    reference = tiny.flow_matching()
    source = BatchSource(digits(), config.batch_size, tiny.SEED, device=torch.device("cpu"))
    parameters = list(reference.student.parameters())
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    beta1, beta2 = config.betas
    norms = []
    for k in range(4):
        loss = reference(source.batch(10 + k), Key(tiny.SEED, 10 + k)).per_sample_B.mean()
        grads = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        norms.append(norm)
        lr = learning_rate(config, k, 4)
        for p, g, m, v in zip(parameters, grads, first, second, strict=True):
            g = g * (min(1.0, grad_clip / norm) if grad_clip else 1.0)
            m.mul_(beta1).add_((1 - beta1) * g)
            v.mul_(beta2).add_((1 - beta2) * g * g)
            mean, variance = m / (1 - beta1 ** (k + 1)), v / (1 - beta2 ** (k + 1))
            p.data = p.data * (1 - lr * config.weight_decay) - lr * mean / (variance.sqrt() + 1e-8)
    assert sum(0 < grad_clip < 0.96 * norm for norm in norms) == clipped
    assert sum(norm < 0.96 * grad_clip or not grad_clip for norm in norms) == 4 - clipped

    objective = tiny.flow_matching()
    states = list(tiny.run(objective, 4, config=config, first_step=10))
    assert [state.grad_norm for state in states] == pytest.approx(norms, rel=1e-4)
    assert [state.lr for state in states] == [learning_rate(config, k, 4) for k in range(4)]
    for ours, theirs in zip(objective.student.parameters(), parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("steps", "done"), [(1, 0), (5, 0), (5, 3)])
def test_number_of_steps(steps: int, done: int) -> None:
    """As many as were asked, counted by the optimiser too, and yielded after each."""
    start = None
    if done:
        *_, last = tiny.run(tiny.flow_matching(), done)
        start = copied(last.snapshot())
    states = list(tiny.run(tiny.flow_matching(), steps, start=start, done=done))
    assert [state.step for state in states] == list(range(done + 1, steps + 1))
    assert float(states[-1].snapshot()["optimizer"]["0.step"]) == steps
    assert all(ema.updates == steps for ema in states[-1].emas)


@pytest.mark.parametrize("name", tiny.OBJECTIVES)
def test_what_a_step_gives_holds_no_graph(name: str) -> None:
    """Outputs are collected until the next line of the log: with their graphs, memory would grow with every step."""
    for state in tiny.run(tiny.OBJECTIVES[name](), 2):
        for output in state.outputs:
            tensors = (output.per_sample_B, output.residual_B, output.t_B, *output.diagnostics.values())
            assert not any(tensor.requires_grad for tensor in tensors)


# -------------------------------------------------------------------------------------------------------------- stops


class Poisoned(Objective):
    """Wraps an objective and lets its loss, its gradient or both become infinite at one step."""

    def __init__(self, inner: Objective, step: int, *, what: str) -> None:
        super().__init__()
        self.student = inner.student
        self.inner = inner
        self.step = step
        self.what = what
        self.steps_taken = 0

    def forward(self, batch: Batch, key: Key) -> LossOutput:
        output = self.inner(batch, key)
        loss = output.per_sample_B
        if key.step == self.step:
            # The square root has an infinite slope at zero, where its value is fine.
            zero = (next(self.student.parameters()).sum() * 0.0).abs()
            loss = {"gradient": loss + zero.sqrt(), "loss": loss + math.inf, "both": loss * math.inf}[self.what]
        return LossOutput(loss, output.residual_B, output.t_B, output.diagnostics)

    def after_step(self) -> None:
        self.steps_taken += 1


@pytest.mark.parametrize("what", ["loss", "gradient", "both"])
def test_a_non_finite_number_stops_before_the_weights_change(what: str) -> None:
    """At the third step, keyed 12: the error counts from one, and weights and averages are those of the second."""
    objective = Poisoned(tiny.flow_matching(), step=12, what=what)
    last: dict[str, Tensors] = {}
    steps: list[int] = []

    def finish() -> None:
        for state in tiny.run(objective, 5, first_step=10):
            steps.append(state.step)
            last.update(copied(state.snapshot()), live_average=state.emas[0].state())

    with pytest.raises(NonFiniteError, match="not finite at step 13") as caught:
        finish()
    assert "keyed by seed 7, step 12" in str(caught.value)
    assert ("gradient" in str(caught.value)) == (what == "gradient")
    assert steps == [1, 2]
    assert objective.steps_taken == 2
    assert_same_bits({"now": cloned(objective.student)}, {"now": last["student"]})
    assert_same_bits({"now": last["live_average"]}, {"now": last["ema-0.9"]})
    assert all(value.isfinite().all() for value in last["student"].values())


# --------------------------------------------------------------------------------------------------------- resumption


HOLD_MORE = (
    "progressive",
    "consistency",
    "consistency_training",
    "continuous_consistency",
    "self_corrected",
    "shortcut",
    "terminal_velocity",
    "free_flow",
    "guided_and_weighted",
)
"""Objectives with a target network, with something they learn beside the student, or with a grid."""


@pytest.mark.parametrize("name", tiny.OBJECTIVES)
def test_a_resumed_run_has_the_same_bits(name: str) -> None:
    """Seven steps at once, or three and then four from a snapshot into fresh objects of other weights: student,
    averages, optimiser and target network."""
    whole = tiny.OBJECTIVES[name]()
    losses, groups = [], {}
    for state in tiny.run(whole, 7, first_step=20):
        losses.append(state.loss)
        if state.step == 3:
            groups = copied(state.snapshot())
    wanted = state.snapshot()
    assert set(wanted) == {"student", "optimizer", "ema-0.9", "ema-0.5"} | ({"objective"} & set(wanted))
    assert ("objective" in wanted) == (name in HOLD_MORE)

    resumed = tiny.OBJECTIVES[name]()
    for parameter in resumed.student.parameters():
        parameter.data.add_(1.0)
    states = tiny.run(resumed, 7, first_step=20, start=groups, done=3)
    tail = []
    for state in states:
        tail.append(state.loss)
    assert tail == losses[3:]
    assert_same_bits(state.snapshot(), wanted)


# ------------------------------------------------------------------------------------------------------------ batches


def numbered(count: int, classes: int = 0) -> Dataset:
    """Samples that are their own numbers."""
    x = torch.arange(count, dtype=torch.float32)[:, None]
    return Dataset("numbers", x, torch.arange(count) % classes if classes else None, classes, kind="points")


def source(data: Dataset, batch_size: int, seed: int = 3, rank: int = 0, world: int = 1) -> BatchSource:
    return BatchSource(data, batch_size, seed, device=torch.device("cpu"), rank=rank, world=world)


@pytest.mark.parametrize("batch_size", [4, 7, 23, 50])
def test_every_epoch_is_a_permutation(batch_size: int) -> None:
    """Also where batches straddle epochs or hold several of them; each epoch has its own order."""
    batches = source(numbered(23, classes=5), batch_size)
    drawn = [batches.batch(step) for step in range(-(-23 * 4 // batch_size))]
    x = torch.cat([batch.x[:, 0] for batch in drawn])[: 23 * 4].reshape(4, 23)
    for epoch in x:
        assert torch.equal(epoch.sort().values, torch.arange(23.0))
    assert len({tuple(epoch.tolist()) for epoch in x}) == 4
    for batch in drawn:
        assert torch.equal(batch.label, batch.x[:, 0].long() % 5)
        assert torch.equal(batch.index, torch.arange(batch_size))


@pytest.mark.parametrize("size", [23, 3000, 9000])
def test_the_order_of_an_epoch_is_keyed_by_its_number(size: int) -> None:
    """However many orders are drawn at once: 356, 2 or 1 here."""
    batches = source(numbered(size), size)
    for epoch in (0, 1, 2, 3, 355, 356, 1, 712):
        (order,) = Key(3, epoch).permutations("shuffle", size, 1, torch.device("cpu"))
        assert torch.equal(batches.batch(epoch).row, order)


def test_microbatches_in_order_are_the_batch() -> None:
    """With labels, places and rows; unequal ones are refused."""
    whole = source(numbered(23, classes=5), 12, rank=1, world=2).batch(1)
    parts = whole.split(3)
    assert [len(part.x) for part in parts] == [2, 2, 2]
    for name in ("x", "label", "index", "row"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    (bare,) = {(part.label, part.row) for part in replace(whole, label=None, row=None).split(2)}
    assert bare == (None, None)
    with pytest.raises(ValueError, match="6 samples do not divide into 4 equal parts"):
        whole.split(4)


def test_batches_are_keyed_by_seed_and_step() -> None:
    """In any order of asking, and another seed shuffles otherwise."""
    straight = source(numbered(23), 8)
    wanted = [straight.batch(step).x for step in range(9)]
    other = source(numbered(23), 8)
    for step in (8, 2, 5, 0, 2):
        assert torch.equal(other.batch(step).x, wanted[step])
    assert not torch.equal(source(numbered(23), 8, seed=4).batch(0).x, wanted[0])


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batch(world: int) -> None:
    """Their shares in order are the single process's batch, with labels and places."""
    data = numbered(23, classes=5)
    for step in range(5):
        whole = source(data, 8).batch(step)
        parts = [source(data, 8, rank=rank, world=world).batch(step) for rank in range(world)]
        for name in ("x", "label", "index"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    with pytest.raises(ValueError, match="a batch of 9 does not divide among 2 processes"):
        source(data, 9, world=2)


# ------------------------------------------------------------------------------------------------------ two processes


def test_averaged_gradients_of_the_ranks_are_the_whole_batchs() -> None:
    """In one process: what two ranks would average is the gradient of the undivided batch, for every objective."""
    data = tiny.paired_digits()
    for build in tiny.OBJECTIVES.values():
        objective = build()
        parameters = list(objective.student.parameters())

        def gradient(rank: int, world: int, objective: Objective = objective) -> list[Tensor]:
            batch = source(data, 32, rank=rank, world=world).batch(2)
            loss = objective(batch, Key(1, 2)).per_sample_B.mean()
            return list(torch.autograd.grad(loss, list(objective.student.parameters()), allow_unused=True))

        for whole, a, b in zip(gradient(0, 1), gradient(0, 2), gradient(1, 2), strict=True):
            torch.testing.assert_close((a + b) / 2, whole, rtol=1e-4, atol=1e-5)
        assert len(parameters) > 5


def test_trainer_takes_its_accelerator() -> None:
    """Two runs in one process do not disturb each other."""
    config = tiny.CONFIG
    accelerator = make_accelerator()
    final = []
    for _ in range(2):
        objective = tiny.flow_matching()
        batches = BatchSource(digits(), config.batch_size, tiny.SEED, device=accelerator.device)
        *_, state = train(objective, batches, config, accelerator, seed=tiny.SEED, steps=2)
        final.append(cloned(state.student))
    assert_same_bits({"student": final[0]}, {"student": final[1]})


def test_somebodys_accelerate_config_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launcher sets the environment: precision and compilation are overruled, other sharding is refused."""
    wanted = [state.loss for state in tiny.run(tiny.meanflow(), 2)]
    for name, value in (("MIXED_PRECISION", "bf16"), ("DYNAMO_BACKEND", "EAGER"), ("GRADIENT_ACCUMULATION_STEPS", "4")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert [state.loss for state in tiny.run(tiny.meanflow(), 2)] == wanted
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match=r"accelerate is configured for FSDP: .* train\.parallel=fsdp2"):
        make_accelerator()
