"""DiT, SiT and REPA: what their projects' own code says, derivatives, the room for a second time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family import meanflow
from filled import fill, numbers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.conventions import ConventionConfig
from fewstep.data.dataset import BatchSource
from fewstep.data.load import digits
from fewstep.distill.compiled import compile_objective
from fewstep.errors import UsageError
from fewstep.networks.condition import Inputs
from fewstep.networks.foreign.config import DiTConfig
from fewstep.networks.foreign.converted import ForeignNetwork
from fewstep.networks.foreign.dit import DiT, places

GOLDEN: dict[str, dict[str, Any]] = {
    name: case
    for name, case in json.loads((Path(__file__).parent / "golden_dit.json").read_text()).items()
    if not name.startswith("minrf")
}
"""Made by the projects' own code (SiT at its commit 947f95b, which is DiT's network too; REPA at 67f7145; both with
timm 1.0.31, its attention normalised by torch's layer norm as in the versions of their day) with the weights and inputs
of ``filled``, in float64: their casts to single precision made casts to double. ``pos_embed`` is as they begin."""

WIDE = torch.float64
CONFIG = DiTConfig(patch=2, width=24, depth=2, heads=3)
SHAPE, CLASSES = (4, 6, 6), 5


def network(config: DiTConfig = CONFIG, shape: tuple[int, ...] = SHAPE, classes: int = CLASSES) -> DiT:
    net = DiT(shape, config, classes).to(WIDE)
    with torch.no_grad():
        net.pos_embed.copy_(places(shape[1] // config.patch, config.width))
    fill(net, leave=("pos_embed",))
    return net


def batch(size: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return numbers("x", (size, *SHAPE)), numbers("tau", (size,)).abs(), torch.arange(size) % (CLASSES + 1)


@pytest.mark.parametrize("name", GOLDEN)
def test_it_says_what_its_project_says(name: str) -> None:
    case = GOLDEN[name]
    shape, tau = tuple(case["shape"]), torch.tensor(case["tau"], dtype=WIDE)
    net = network(DiTConfig(**case["config"]), shape, case["num_classes"])
    x, label = 1.7 * numbers(f"{name} x", (len(tau), *shape)), torch.tensor(case["label"])
    wanted = torch.tensor(case["output"], dtype=WIDE).reshape(x.shape)
    assert wanted.std() > 0.5
    torch.testing.assert_close(net(x, tau, label), wanted, rtol=0, atol=1e-10)
    single = net.float()(x.float(), tau.float(), label)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.to(WIDE), wanted, rtol=0, atol=2e-5)


def test_places_by_hand() -> None:
    """A grid of 2 x 2 and 8 channels: frequencies 1 and 1/100, the column's before the row's."""
    one = torch.tensor([1, 0.01], dtype=WIDE)
    along = [torch.tensor([0, 0, 1, 1], dtype=WIDE), torch.cat((one.sin(), one.cos()))]
    wanted = [torch.cat((along[column], along[row])) for row in (0, 1) for column in (0, 1)]
    torch.testing.assert_close(places(2, 8), torch.stack(wanted), rtol=0, atol=1e-15)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_forward_derivative_is_that_of_differences(qk_norm: bool) -> None:
    net = network(CONFIG.model_copy(update={"qk_norm": qk_norm}))
    x, tau, label = batch()
    toward = (numbers("dx", x.shape), numbers("dtau", tau.shape))
    with sdpa_kernel(SDPBackend.MATH):
        value, exact = torch.func.jvp(lambda x, tau: net(x, tau, label), (x, tau), toward)
    h = 1e-5
    ahead, behind = (net(x + s * toward[0], tau + s * toward[1], label) for s in (h, -h))
    torch.testing.assert_close(value, net(x, tau, label), rtol=0, atol=1e-12)
    assert exact.norm() > 0.1
    assert ((ahead - behind) / (2 * h) - exact).norm() < 1e-7 * exact.norm()


def test_gradients_reach_every_weight_but_the_places() -> None:
    net = network(CONFIG.model_copy(update={"qk_norm": True, "learn_sigma": False}))
    x, tau, label = batch(6)
    net(x, tau, label).square().mean().backward()
    assert net.pos_embed.grad is None
    for name, weight in net.named_parameters():
        if name != "pos_embed":
            assert weight.grad is not None, name
            assert weight.grad.any(), name


def test_a_fresh_network_says_zero_and_learns() -> None:
    torch.manual_seed(0)
    net = DiT(SHAPE, CONFIG, CLASSES)
    x, tau, label = (part.float() if part.is_floating_point() else part for part in batch())
    assert not net(x, tau, label).any()
    torch.testing.assert_close(net.pos_embed[0], places(3, 24).float())
    for name, weight in net.named_parameters():
        silent = weight.ndim == 1 or "adaLN" in name or name.startswith("final_layer")
        assert weight.any() != silent, name
    # Glorot's: 4 channels of 2 x 2 pixels to 24.
    assert net.x_embedder.proj.weight.detach().abs().max().item() == pytest.approx((6 / (16 + 24)) ** 0.5, rel=0.02)
    optimiser = torch.optim.Adam([weight for weight in net.parameters() if weight.requires_grad], 1e-2)
    losses = []
    for _ in range(20):
        loss = (net(x, tau, label) - x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_what_is_added_to_the_time() -> None:
    """Nothing changes nothing, to the bit; something is what the time's embedding would have had in its last bias."""
    net = network()
    x, tau, label = batch()
    plain = net(x, tau, label)
    assert torch.equal(net(x, tau, label, torch.zeros(3, net.condition, dtype=WIDE)), plain)
    added = numbers("added", (net.condition,))
    moved = net(x, tau, label, added.expand(3, -1))
    assert (moved - plain).abs().max() > 0.1
    with torch.no_grad():
        net.t_embedder.mlp[2].bias += added
    torch.testing.assert_close(net(x, tau, label), moved, rtol=0, atol=1e-12)


def test_a_student_of_it_starts_as_its_teacher() -> None:
    """For every second time, in SiT's convention."""
    raw, config = network(), ConventionConfig(noise_at=0, velocity_to="data")
    teacher = ForeignNetwork(raw, config, Inputs(CLASSES, two_times=False))
    student = ForeignNetwork(raw, config, Inputs(CLASSES, two_times=True)).to(WIDE)
    x, t, label = batch()
    wanted = teacher(x, t, t, label)
    torch.testing.assert_close(wanted, -raw(x, 1 - t, label), rtol=0, atol=1e-12)
    for r in (t, t / 2, torch.zeros_like(t)):
        assert torch.equal(student(x, t, r, label), wanted)
    torch.nn.init.normal_(student.embed_gap.outer.weight)
    assert not torch.allclose(student(x, t, t / 2, label), wanted)


def test_no_label_is_the_null_row() -> None:
    net = network()
    x, tau, label = batch()
    null = net(x, tau, torch.full_like(label, CLASSES))
    assert torch.equal(net(x, tau), null)
    assert not torch.allclose(net(x, tau, label), null)
    always = network(CONFIG.model_copy(update={"null_row": False}))
    assert len(always.y_embedder.embedding_table.weight) == CLASSES
    with pytest.raises(ValueError, match="trained with a class always"):
        always(x, tau)


def test_one_sample_and_none() -> None:
    net = network()
    x, tau, label = batch()
    torch.testing.assert_close(net(x[:1], tau[:1], label[:1]), net(x, tau, label)[:1], rtol=0, atol=1e-12)
    assert net(x[:0], tau[:0], label[:0]).shape == (0, *SHAPE)


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_in_bfloat16(how: str) -> None:
    """Near full precision and not equal to it, in the precision of its input."""
    net = network(CONFIG.model_copy(update={"qk_norm": True})).float()
    x, tau, label = (part.float() if part.is_floating_point() else part for part in batch())
    wanted = net(x, tau, label)
    if how == "weights":
        net.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = net(x, tau, label)
        time = net.t_embedder(torch.tensor([0.75, 0.7501]))
    assert found.dtype == torch.float32
    if how == "autocast":
        assert time.dtype == torch.float32
        assert (time[0] != time[1]).any()
    assert 1e-4 < (found - wanted).norm() / wanted.norm() < 3e-2


@pytest.mark.thorough
def test_compiled_it_is_the_same() -> None:
    """Two graphs, the student's and its derivative's, and no break in either."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    raw = DiT((1, 8, 8), DiTConfig(patch=4, width=8, depth=1, heads=2, qk_norm=True), 10)
    fill(raw)
    net = ForeignNetwork(raw, ConventionConfig(noise_at=0, velocity_to="data"), Inputs(10, two_times=True))
    one = BatchSource(digits(), 4, 0, device=torch.device("cpu")).batch(0)
    compile_objective(meanflow(net), one, backend="aot_eager")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(
    ("shape", "says"),
    [((2,), r"square images, not samples of shape \[2\]"), ((4, 6, 4), "square"), ((4, 5, 5), "side of 5")],
)
def test_shapes_it_does_not_take(shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        DiT(shape, CONFIG, CLASSES)
