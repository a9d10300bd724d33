"""FloT: its rotations, its derivative along the path, a second implementation, and a teacher and a student of it."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import refuse, student, succeed
from family import meanflow
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.checkpoint import RunDirectory
from fewstep.config import load_config
from fewstep.data.dataset import BatchSource
from fewstep.data.load import digits
from fewstep.distill.compiled import compile_objective
from fewstep.distill.run import check_training
from fewstep.distill.tangent import central_difference, forward_derivative
from fewstep.errors import UsageError
from fewstep.networks.build import build_network, parameter_count
from fewstep.networks.config import SIZES, FloTConfig
from fewstep.networks.embeddings import sinusoidal, to_bfloat16
from fewstep.networks.flot import Attention, FloT, angles, normalise, patchify, rotate, unpatchify
from fewstep.students.initialise import copy_teacher

CONFIG = FloTConfig(patch=2, width=24, depth=2, heads=3)
SHAPE = (3, 4, 6)
CLASSES = 5
WIDE = torch.float64


def network(*, two_times: bool = True, random: bool = True, seed: int = 0, **changes: object) -> FloT:
    """A small network; ``random`` gives every weight a value, those that start at zero included."""
    torch.manual_seed(seed)
    net = build_network(CONFIG.model_copy(update=changes), SHAPE, CLASSES, two_times=two_times)
    assert isinstance(net, FloT)
    if random:
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.3)
    return net


def batch(size: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, times, earlier times (some of them equal, some zero) and labels, the null label among them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, *SHAPE, generator=generator)
    t = torch.rand(size, generator=generator)
    r = t * torch.rand(size, generator=generator)
    r[0], r[1] = t[0], 0
    return x, t, r, torch.arange(size) % (CLASSES + 1)


# Where things are ----------------------------------------------------------------------------------------------------


def test_patches_by_hand() -> None:
    """Two channels of 2 x 4 pixels: a patch holds its first channel, then its second, each row by row."""
    x = torch.arange(16.0).reshape(1, 2, 2, 4)
    assert patchify(x, 2).tolist() == [[[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]]


@pytest.mark.parametrize(("shape", "patch"), [((3, 4, 6), 2), ((1, 9, 3), 3), ((4, 8, 8), 1)])
def test_patches_are_put_back(shape: tuple[int, ...], patch: int) -> None:
    x = torch.randn(2, *shape)
    tokens = patchify(x, patch)
    assert tokens.shape == (2, shape[1] * shape[2] // patch**2, shape[0] * patch**2)
    assert torch.equal(unpatchify(tokens, shape, patch), x)


def test_angles_by_hand() -> None:
    """Four pairs on a 2 x 3 grid: frequencies 1 and 1/10, two pairs turn with the row and two with the column."""
    expected = [[row, row / 10, column, column / 10] for row in (0, 1) for column in (0, 1, 2)]
    torch.testing.assert_close(angles(2, 3, 4, torch.zeros(1, dtype=WIDE)), torch.tensor(expected, dtype=WIDE))


def test_scores_depend_on_the_offset_alone() -> None:
    """The same query and key at every place of a 5 x 7 grid: one score per offset in two dimensions, and another one
    for every other offset."""
    rows, columns, pairs = 5, 7, 8
    turn = angles(rows, columns, pairs, torch.zeros(1, dtype=WIDE))
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2 * pairs, dtype=WIDE, generator=generator).expand(rows * columns, -1) for _ in range(2))
    rotated_q, rotated_k = (rotate(part, turn.cos(), turn.sin()) for part in (q, k))
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm(dim=-1), rtol=1e-14, atol=0)
    scores = rotated_q @ rotated_k.T
    by_offset: dict[tuple[int, int], list[float]] = {}
    for a in range(rows * columns):
        for b in range(rows * columns):
            offset = (a // columns - b // columns, a % columns - b % columns)
            by_offset.setdefault(offset, []).append(float(scores[a, b]))
    assert len(by_offset) == (2 * rows - 1) * (2 * columns - 1)
    assert max(max(found) - min(found) for found in by_offset.values()) < 1e-12
    distinct = sorted(found[0] for found in by_offset.values())
    assert min(b - a for a, b in pairwise(distinct)) > 1e-6
    torch.testing.assert_close(scores.diagonal(), (q * k).sum(-1), rtol=1e-13, atol=0)


def test_a_shift_of_all_places_changes_nothing() -> None:
    """A 3 x 4 grid somewhere within a larger one attends as it does on its own."""
    torch.manual_seed(0)
    attention = Attention(24, 3).to(WIDE)
    h = torch.randn(2, 12, 24, dtype=WIDE)
    turn = angles(3, 4, 4, h)
    shifted = angles(9, 11, 4, h).reshape(9, 11, 4)[5:8, 6:10].reshape(12, 4)
    own = attention(h, turn.cos(), turn.sin())
    torch.testing.assert_close(attention(h, shifted.cos(), shifted.sin()), own, rtol=0, atol=1e-12)
    other = turn.flip(0)  # upside down is not a shift
    assert (attention(h, other.cos(), other.sin()) - own).abs().max() > 1e-3


def test_no_score_exceeds_its_bound() -> None:
    """A product over ``sqrt(K)`` is at most ``sqrt(K)``, and that for a query and itself, whatever their length."""
    x = 1e3 * torch.randn(4, 2, 9, 8, dtype=WIDE)
    scores = normalise(x) @ normalise(x).mT / math.sqrt(8)
    assert scores.abs().max() <= math.sqrt(8)
    torch.testing.assert_close(scores.diagonal(dim1=-2, dim2=-1), torch.full((4, 2, 9), math.sqrt(8), dtype=WIDE))
    torch.testing.assert_close(normalise(7 * x), normalise(x), rtol=1e-9, atol=0)


def test_patches_that_look_the_same_know_where_they_are() -> None:
    """Through the learned vectors, and through nothing else."""
    net = network()
    x, t = torch.zeros(1, *SHAPE), torch.ones(1)
    tokens = patchify(net(x, t, t), 2)[0]
    assert torch.cdist(tokens, tokens).fill_diagonal_(1).min() > 1e-3
    nn.init.zeros_(net.place)
    tokens = patchify(net(x, t, t), 2)[0]
    torch.testing.assert_close(tokens, tokens[:1].expand_as(tokens), rtol=1e-5, atol=1e-6)


# The network as a function -------------------------------------------------------------------------------------------


def by_hand(net: FloT, x: Tensor, t: Tensor, r: Tensor, label: Tensor) -> Tensor:
    """The same function of the same weights: sums by their indices, complex rotations, a softmax written out."""
    w = dict(net.named_parameters())
    heads, patch, (_, height, width) = CONFIG.heads, CONFIG.patch, SHAPE

    def linear(name: str, h: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", h, w[f"{name}.weight"]) + w[f"{name}.bias"]

    def silu(h: Tensor) -> Tensor:
        return h / (1 + torch.exp(-h))

    def time(name: str, s: Tensor) -> Tensor:
        return linear(f"{name}.outer", silu(linear(f"{name}.inner", sinusoidal(s, 32, CONFIG.max_frequency))))

    def modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + scale) + shift

    places = [(i, j) for i in range(height // patch) for j in range(width // patch)]
    cut = [x[:, :, patch * i : patch * (i + 1), patch * j : patch * (j + 1)].flatten(1) for i, j in places]
    h = linear("enter", torch.stack(cut, dim=1)) + w["place"]
    condition = silu(time("embed_t", t) + time("embed_gap", t - r) + w["embed_label.weight"][label])[:, None]
    channels = CONFIG.width // heads
    quarter = channels // 4
    frequencies = 100.0 ** (-torch.arange(quarter, dtype=x.dtype) / quarter)
    turns = torch.stack([torch.cat((i * frequencies, j * frequencies)) for i, j in places])
    rotation = torch.exp(1j * turns)
    for number in range(CONFIG.depth):
        name = f"blocks.{number}"
        six = linear(f"{name}.modulation", condition).reshape(len(x), 1, 6, -1).unbind(2)
        qkv = linear(f"{name}.attention.enter", modulated(h, six[0], six[1]))
        q, k, v = qkv.reshape(len(x), len(places), 3, heads, channels).unbind(2)

        def turned(part: Tensor) -> Tensor:
            part = part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            return torch.complex(part[..., : channels // 2], part[..., channels // 2 :]) * rotation[None, :, None]

        scores = torch.einsum("bnac,bmac->banm", turned(q), turned(k).conj()).real / math.sqrt(channels)
        weights = torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True)
        attended = torch.einsum("banm,bmac->bnac", weights, v).flatten(2)
        h = h + six[2] * linear(f"{name}.attention.leave", attended)
        inner = linear(f"{name}.inner", modulated(h, six[3], six[4]))
        gelu = inner / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        h = h + six[5] * linear(f"{name}.outer", gelu)
    shift, scale = linear("modulation", condition).chunk(2, dim=-1)
    tokens = linear("leave", modulated(h, shift, scale))
    out = torch.empty_like(x)
    for token, (i, j) in zip(tokens.unbind(1), places, strict=True):
        tile = token.reshape(len(x), SHAPE[0], patch, patch)
        out[:, :, patch * i : patch * (i + 1), patch * j : patch * (j + 1)] = tile
    return out


def test_a_second_implementation() -> None:
    net = network().to(WIDE)
    x, t, r, label = batch()
    x, t, r = (part.to(WIDE) for part in (x, t, r))
    torch.testing.assert_close(net(x, t, r, label), by_hand(net, x, t, r, label), rtol=0, atol=1e-12)
    assert net(x, t, r, label).std() > 0.1


def test_the_forward_derivative_is_that_of_differences() -> None:
    """The objectives' own two ways, in float64."""
    net = network().to(WIDE)
    x, t, r, label = batch()
    x, t, r = (part.to(WIDE) for part in (x, t, r))
    v = torch.randn(x.shape, dtype=WIDE, generator=torch.Generator().manual_seed(2))
    for labels in (label, None):
        exact = forward_derivative(net, x, v, t, r, labels)
        near = central_difference(1e-5)(net, x, v, t, r, labels)
        assert (exact - near).norm() < 1e-7 * near.norm()
        assert (exact.flatten(1).norm(dim=1) > 0.1).all()


def test_fused_attention_is_the_plain_one() -> None:
    net = network()
    x, t, r, label = batch()
    fused = net(x, t, r, label)
    with sdpa_kernel(SDPBackend.MATH):
        plain = net(x, t, r, label)
    assert (fused - plain).norm() < 1e-6 * plain.norm()


@pytest.mark.thorough
def test_compiled_it_is_the_same() -> None:
    """Two graphs, the student's and its derivative's, and no break in either."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    net = build_network(FloTConfig(width=16, depth=1, heads=2), (1, 8, 8), 10, two_times=True)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    objective = meanflow(net)
    compile_objective(objective, BatchSource(digits(), 8, 0, device=torch.device("cpu")).batch(0), backend="aot_eager")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_an_empty_batch_is_one() -> None:
    """A batch without a sample that jumps still asks for its derivative."""
    net, (x, t, r, label) = network(), (part[:0] for part in batch())
    assert net(x, t, r, label).shape == (0, *SHAPE)
    assert forward_derivative(net, x, x, t, r, label).shape == (0, *SHAPE)


def test_a_fresh_network_does_not_move() -> None:
    x, t, r, label = batch()
    assert not network(random=False)(x, t, r, label).any()


def test_no_label_is_the_null_label() -> None:
    net = network()
    x, t, r, label = batch()
    null = net(x, t, r, torch.full_like(label, CLASSES))
    assert torch.equal(net(x, t, r, None), null)
    assert not torch.allclose(net(x, t, r, torch.zeros_like(label)), null)
    assert not any("label" in name for name in build_network(CONFIG, SHAPE, 0, two_times=True).state_dict())


def test_a_copied_student_is_its_teacher_to_the_bit() -> None:
    """For every ``r``, with labels and without; a network of one time never looks at it."""
    teacher, copied = network(two_times=False), network(random=False, seed=3)
    x, t, r, label = batch()
    copy_teacher(copied, teacher)
    for labels in (label, torch.full_like(label, CLASSES), None):
        wanted = teacher(x, t, t, labels)
        assert wanted.abs().min() > 0
        for earlier in (t, r, t / 2, torch.zeros_like(t)):
            assert torch.equal(copied(x, t, earlier, labels), wanted)
            assert torch.equal(teacher(x, t, earlier, labels), wanted)
    nn.init.normal_(copied.embed_gap.outer.weight)
    assert not torch.allclose(copied(x, t, r, label), copied(x, t, t, label))


def test_gradients_reach_every_weight() -> None:
    net = network()
    x, t, r, label = batch()
    net(x, t, r, label).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_in_bfloat16(how: str) -> None:
    """Near full precision and not equal to it, answered in float32; times are told apart as finely as before."""
    net = network()
    x, t, r, label = batch()
    wanted = net(x, t, r, label)
    if how == "weights":
        to_bfloat16(net)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = net(x, t, r, label)
        time = net.embed_t(torch.tensor([0.75, 0.7501]))
    assert found.dtype == torch.float32
    assert 1e-4 < (found - wanted).norm() / wanted.norm() < 3e-2
    assert time.dtype == torch.float32
    assert (time[0] != time[1]).all()


# Config, sizes and commands ------------------------------------------------------------------------------------------


def test_shapes_it_does_not_take() -> None:
    with pytest.raises(UsageError, match=r"kind flot takes images, not samples of shape \[2\]"):
        build_network(CONFIG, (2,), 0, two_times=True)
    for shape in ((1, 7, 8), (1, 8, 7)):
        with pytest.raises(UsageError, match=f"patch 2 does not divide images of {shape[1]} x {shape[2]}"):
            build_network(CONFIG, shape, 0, two_times=True)


def closed_form(config: FloTConfig, shape: tuple[int, int, int], classes: int) -> int:
    """Parameters of a network of two times, counted by hand."""
    d, e, m = config.width, config.width // 2, config.expansion * config.width
    patch = shape[0] * config.patch**2
    time = (32 + 1) * e + (e + 1) * e
    block = (e + 1) * 6 * d + (d + 1) * 3 * d + (d + 1) * d + (d + 1) * m + (m + 1) * d
    ends = (patch + 1) * d + (d + 1) * patch + (e + 1) * 2 * d
    return 2 * time + (classes + 1) * e + shape[1] * shape[2] // config.patch**2 * d + config.depth * block + ends


@pytest.mark.parametrize(
    ("size", "shape", "millions"),
    [
        ("flot-tiny", (1, 8, 8), 0.5),
        ("flot-mini", (3, 32, 32), 4),
        ("flot-small", (3, 32, 32), 20),
        ("flot-base", (3, 32, 32), 55),
        ("flot-large", (4, 32, 32), 380),
        ("flot-xl", (4, 32, 32), 560),
    ],
)
def test_named_sizes(size: str, shape: tuple[int, int, int], millions: float) -> None:
    config = SIZES[size]
    assert isinstance(config, FloTConfig)
    with torch.device("meta"):
        count = parameter_count(build_network(config, shape, 10, two_times=True))
    assert count == closed_form(config, shape, 10)
    assert count == pytest.approx(1e6 * millions, rel=0.2)


def test_every_size_is_written_out() -> None:
    """In the resolved config; what else the block or another override says changes it, in any order."""
    for size, network in SIZES.items():
        assert load_config("digits-teacher", [f"student.network.size={size}"]).student.network == network
    deeper = SIZES["flot-tiny"].model_copy(update={"depth": 7})
    for overrides in (
        ["student.network.depth=7", "student.network.size=flot-tiny"],
        ["student.network.size=flot-tiny", "student.network.depth=7"],
        ["student.network={size: flot-tiny, depth: 7}"],
        ["student.network={kind: flot, size: flot-tiny, depth: 7}"],
    ):
        assert load_config("digits-teacher", overrides).student.network == deeper


NETWORKS = {
    "unknown key": ("{kind: flot, widht: 64}", ["student.network.widht", "unknown key", "did you mean 'width'?"]),
    "unknown key beside a size": ("{size: flot-tiny, widht: 64}", ["student.network.widht", "did you mean 'width'?"]),
    "unknown kind": ("{kind: flo}", ["student.network.kind", "'flo'", "did you mean 'flot'?"]),
    "no kind": ("{width: 64}", ["student.network: needs a kind or a size"]),
    "unknown size": ("{size: flot-tinny}", ["student.network", "'flot-tinny'", "did you mean 'flot-tiny'?"]),
    "a size far from all": ("{size: 12345}", ["student.network", "'12345'", "known: ", "flot-base", "mlp-tiny"]),
    "a size of another kind": ("{kind: mlp, size: flot-tiny}", ["size flot-tiny", "kind flot, not mlp"]),
    "a wrong value beside a size": ("{size: flot-tiny, depth: 0}", ["student.network.depth", "0"]),
    "heads that do not divide": ("{kind: flot, width: 60, heads: 6}", ["student.network", "width 60", "24"]),
    "a word": ("flot-tiny", ["student.network", "'flot-tiny'"]),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_a_wrong_network_is_one_sentence(case: str) -> None:
    block, words = NETWORKS[case]
    refuse("teach", "digits-teacher", f"student.network={block}", "--dry-run", says=("digits-teacher: ", *words))


def test_images_that_patches_do_not_divide(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    refuse("teach", "digits-teacher", "student.network={kind: flot, patch: 3}", *out, says=("patch 3", "8 x 8"))
    refuse("teach", "moons-teacher", "student.network.size=flot-tiny", *out, says=("kind flot takes images", "[2]"))
    assert not (tmp_path / "run").exists()


def test_a_teacher_and_its_student(tmp_path: Path) -> None:
    """Trained, exported, sampled; and a student that starts as the exported teacher, to the bit."""
    teacher = tmp_path / "teacher"
    small = ("train.steps=10", "train.batch_size=8", "train.log_every=1", "student.network.size=flot-tiny")
    succeed("teach", "digits-teacher", *small, "student.network.depth=1", "--out", teacher)
    succeed("sample", teacher, "--steps", 2, "--n", 3, "--out", tmp_path / "samples")
    assert any((tmp_path / "samples").iterdir())
    config = load_config("digits-meanflow", list(student(teacher)))
    request = check_training(
        config, RunDirectory(tmp_path / "run"), torch.device("cpu"), processes=1, resume=False, overwrite=False
    )
    assert request.teacher is not None
    assert request.teacher.net is not None
    x, t = torch.randn(6, 1, 8, 8), torch.linspace(0.1, 1, 6)
    wanted = request.teacher.net(x, t, t, torch.arange(6))
    assert wanted.any()
    for r in (t, t / 3, torch.zeros(6)):
        assert torch.equal(request.student(x, t, r, torch.arange(6)), wanted)
    succeed("distill", "digits-meanflow", *student(teacher), "train.steps=2", "--out", tmp_path / "run")
    succeed("sample", tmp_path / "run", "--steps", 1, "--n", 3)
