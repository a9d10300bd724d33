"""`fewstep bench plan`: what it counts against real steps and by hand, what it models, what it refuses."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refuse, succeed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fewstep.bench.accelerators import ACCELERATORS, Accelerator, accelerator
from fewstep.bench.calls import Call, Role, stage_calls
from fewstep.bench.dry import DryStep, Tally, dry_step
from fewstep.bench.memory import peak_bytes
from fewstep.bench.network import forward_flops
from fewstep.bench.outline import outline
from fewstep.bench.plan import LAUNCH_S, Plan, make_plan
from fewstep.bench.plan_memory import Sizes, memory_of
from fewstep.bench.train import bare_training
from fewstep.bench.variants import variants
from fewstep.bench.workshop import Workshop
from fewstep.config import RunConfig, load_config
from fewstep.distill.shards import local, shard
from fewstep.networks.build import build_network, parameter_count
from fewstep.networks.config import SIZES, FloTConfig

CPU = torch.device("cpu")
TINY = ("--shape", "1,8,8", "--classes", 10)
SMALL = FloTConfig(width=16, depth=1, heads=2)
SLOW = Accelerator("slow", memory_gib=1, bf16=2, tf32=2, fp32=1, bandwidth=100, link=10)


def config(recipe: str = "digits-meanflow", *overrides: str) -> RunConfig:
    return load_config(recipe, ["student.network={kind: flot, width: 16, depth: 1, heads: 2}", *overrides])


def planned(recipe: str, *overrides: str, gpus: int = 1, gpu: Accelerator = SLOW, **options: Any) -> Plan:
    return make_plan(outline(config(recipe, *overrides), (1, 8, 8), 10), gpus, gpu, **{"search": False, **options})


# --------------------------------------------------------------------------------------------- against steps that ran


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"), "flot-tiny", (1, 8, 8), 10, 16, CPU)


@pytest.mark.parametrize(
    "objective", ["flow_matching", "meanflow", pytest.param("terminal_velocity", marks=pytest.mark.thorough)]
)
def test_memory_and_operations_are_those_of_a_real_step(objective: str, workshop: Workshop) -> None:
    """The most that torch's allocator holds in a step, measured: 1.001. Operations to the last one, and the bytes that
    kernels move between products but for those of noise, times and loss."""
    variant = variants()[objective]
    steps = bare_training(workshop.objective(variant), workshop.source().batch, workshop.config(variant).train, seed=0)
    next(steps)
    peak = peak_bytes(steps, CPU)
    with Tally() as tally:
        next(steps)
    plan = make_plan(outline(workshop.config(variant), (1, 8, 8), 10), 1, SLOW, cpu=True, search=False)
    (stage,) = plan.stages
    assert stage.flops * 16 == tally.counted.flops.total()
    assert plan.memory.gradients + plan.memory.activations == pytest.approx(peak, rel=0.01)
    between = tally.counted.traffic - tally.counted.product_traffic
    assert 1e9 * SLOW.bandwidth * stage.traffic_s == pytest.approx(between, rel=0.1)


def test_float32_counts_as_the_precision_of_the_run_lets_it() -> None:
    """At the peak of TF32 where that is allowed, which is no part of differences of outputs."""
    gpu = Accelerator("fast memory", memory_gib=1, bf16=1e9, tf32=2, fp32=1, bandwidth=1e9, link=10)

    def stage(*overrides: str) -> tuple[float, str]:
        plan = planned("digits-meanflow", *overrides, gpu=gpu)
        return plan.stages[0].products_s, " ".join(plan.assumptions)

    fp32, tf32, bf16 = (stage(f"train.precision={each}") for each in ("fp32", "tf32", "bf16"))
    differences = stage("train.precision=bf16", "objective.jvp=finite_difference")
    assert fp32[0] == pytest.approx(2 * tf32[0])
    assert 0.1 * tf32[0] < bf16[0] < 0.5 * tf32[0]  # the derivatives: bfloat16 costs nothing here
    assert differences[0] > 1.5 * bf16[0]  # two evaluations at the peak of float32, for one product of two at TF32's
    assert "run without TF32, as train.precision fp32 asks" in fp32[1]
    assert "run in TF32, as train.precision bf16 lets them" in bf16[1]
    assert "run without TF32, as a difference of close outputs asks" in differences[1]


def test_what_stays_between_steps_is_counted() -> None:
    plan = planned("digits-teacher", "train.ema=[0.9, 0.99]")
    net = build_network(SMALL, (1, 8, 8), 10, two_times=False)
    size = 4 * parameter_count(net)
    memory = plan.memory
    assert (memory.weights, memory.gradients, memory.moments) == (size, size, 2 * size)
    assert (memory.averages, memory.teachers, memory.held, memory.exchange) == (2 * size, 0, 0, 0)
    assert plan.params * 4 == size


def test_a_shard_is_what_fsdp2_keeps() -> None:
    """Of three processes: most dimensions do not divide, and the first process has most."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    plan = planned("digits-teacher", "train.parallel=fsdp2", "train.batch_size=129", gpus=3)
    net = build_network(SMALL, (1, 8, 8), 10, two_times=False)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    try:
        shard(net, CPU)
        kept = sum(local(each).untyped_storage().nbytes() for each in net.parameters())
    finally:
        torch.distributed.destroy_process_group()
    assert plan.memory.weights == kept
    assert (plan.memory.moments, plan.memory.averages) == (2 * kept, kept)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("objective", ["flow_matching", "meanflow"])
def test_memory_on_a_gpu(objective: str, precision: str, tmp_path: Path) -> None:
    """What torch has allocated at most in a step of the trainer, everything included: within 15 %."""
    from fewstep.distill.train import make_accelerator, train

    device = torch.device("cuda")
    workshop = Workshop(tmp_path, "flot-mini", (3, 32, 32), 10, 32, device)
    variant = variants()[objective]
    found = workshop.config(variant)
    settings = found.model_copy(update={"train": found.train.model_copy(update={"precision": precision})})
    source, built = workshop.source(), workshop.objective(variant)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    steps = train(built, source, settings.train, make_accelerator(), seed=0, steps=4)
    for _ in range(3):
        next(steps)
    taken = torch.cuda.max_memory_allocated(device) - before
    plan = make_plan(outline(settings, (3, 32, 32), 10), 1, ACCELERATORS["h100"])
    assert plan.memory.total - plan.memory.teachers == pytest.approx(taken, rel=0.15)


# ----------------------------------------------------------------------------------------------------------- by hand


def test_operations_of_the_largest_network() -> None:
    """The closed form of a FloT, which no machine of this suite could hold."""
    size, patches = SIZES["flot-xl"], 16 * 16
    assert isinstance(size, FloTConfig)
    d, e = size.width, size.width // 2
    with FakeTensorMode():
        net = build_network(size, (4, 32, 32), 1000, two_times=True)
        found = forward_flops(net, (4, 32, 32))
    block = patches * (3 * d * d + d * d + 8 * d * d) + e * 6 * d + 2 * patches**2 * d
    times = 2 * (32 * e + e * e)
    assert found == 2 * (size.depth * block + times + patches * 2 * 16 * d + e * 2 * d)


def test_a_step_of_flow_matching_is_three_passes() -> None:
    """But for the gradients of what was given, the recomputed attention, and rounding."""
    plan = planned("digits-teacher")
    assert 2.9 < plan.stages[0].flops / plan.forward_flops < 3.1


def test_a_tally_of_two_layers() -> None:
    """Everything of a product, an addition and their backward passes."""
    a, b = torch.zeros(4, 5, requires_grad=True), torch.zeros(5, 6)
    with Tally() as tally:
        y = a @ b
        assert (tally.held, tally.peak) == (96, 96)
        z = y + 1.0
        del y
        assert (tally.held, tally.peak) == (96, 192)
    assert tally.counted.flops == {"float32": 2 * 4 * 5 * 6}
    product = 4 * (4 * 5 + 5 * 6 + 4 * 6)
    assert tally.counted.product_traffic == product
    assert tally.counted.traffic == product + 2 * 96
    assert tally.counted.kernels == 2
    del z
    assert tally.held == 0


def test_views_and_empty_memory_move_nothing() -> None:
    with Tally() as tally:
        x = torch.empty(8, 1).expand(8, 100).t()
        assert (tally.counted.traffic, tally.counted.kernels, tally.held) == (0, 0, 32)
        x.sum()
    assert tally.counted.traffic == 32 + 4  # a row that is repeated is read once
    assert tally.counted.kernels == 1


def dry(nets: dict[Role, Callable[[], nn.Module]], calls: Sequence[Call], **options: Any) -> DryStep:
    """Of samples of 30 numbers."""
    fake = FakeTensorMode()
    with fake:
        made = {role: make() for role, make in nets.items()}
    return dry_step(made, calls, (30,), 0, fake=fake, **options)


class Layer(nn.Linear):
    """One product, with the interface of a network."""

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: object = None, guidance: object = None) -> Tensor:
        return super().forward(x)


def test_a_dry_step_of_one_layer() -> None:
    """The input of a product is kept for the gradient of its weight; with several microbatches those gradients are
    there as well."""
    call = Call("student", "gradient", 10, False)
    net: dict[Role, Callable[[], nn.Module]] = {"student": lambda: Layer(30, 200, bias=False)}
    one, two = (dry(net, [call], microbatches=n) for n in (1, 2))
    product = 2 * 10 * 30 * 200
    assert one.flops == {"float32": 2 * product}
    assert one.backward_share == 0.5
    weight, out = 4 * 30 * 200, 4 * 10 * 200
    assert weight < one.peak <= weight + 4 * 10 * 30 + 5 * out
    assert (two.flops, two.traffic) == (one.flops, one.traffic + 3 * weight)
    assert two.peak >= 2 * weight  # the new gradient, before it is added to the old one
    assert dry(net, [call], kept=False, microbatches=2).peak == one.peak
    assert dry(net, [call, replace(call, kind="forward")]).flops == {"float32": 3 * product}


def test_what_is_called_twice_counts_twice() -> None:
    """Though it is gone through once."""
    nets: dict[Role, Callable[[], nn.Module]] = {"student": lambda: Layer(30, 20), "teacher": lambda: Layer(30, 20)}
    gradient, forward = Call("student", "gradient", 10, False), Call("teacher", "forward", 10, False)
    one, three = (dry(nets, [*[forward] * n, gradient]) for n in (1, 3))
    product = 2 * 10 * 30 * 20
    assert three.flops["float32"] - one.flops["float32"] == 2 * product
    assert three.kernels - one.kernels == 2


def test_products_run_in_the_type_that_the_call_ran_in() -> None:
    call = Call("student", "gradient", 1000, True)
    net: dict[Role, Callable[[], nn.Module]] = {"student": lambda: Layer(30, 20)}
    assert set(dry(net, [call], mixed=True).flops) == {"bfloat16"}
    assert set(dry(net, [replace(call, autocast=False)], mixed=True).flops) == {"float32"}


def test_a_gpus_autocast_normalises_in_full_precision() -> None:
    """Where the CPU's does not: a kernel more reads and writes the layer's output, and the next ones twice as much."""

    class Normal(Layer):
        def forward(self, x: Tensor, *rest: Any) -> Tensor:
            return F.layer_norm(super().forward(x, *rest), (200,))

    call = Call("student", "gradient", 1000, True)
    gpu, cpu = (dry({"student": lambda: Normal(30, 200)}, [call], mixed=True, gpu=gpu) for gpu in (True, False))
    assert gpu.traffic >= cpu.traffic + 2 * 4 * 1000 * 200


# ------------------------------------------------------------------------------------------------------ what is called


def called(recipe: str, *overrides: str, rows: int = 16) -> list[list[tuple[float, list[tuple[str, str, int]]]]]:
    stages = stage_calls(outline(config(recipe, *overrides), (1, 8, 8), 10), rows)
    return [
        [(share, [(call.role, call.kind, call.rows) for call in calls]) for share, calls in stage.ways]
        for stage in stages
    ]


def test_calls_of_a_step() -> None:
    own = ("student", "gradient", 16)
    assert called("digits-teacher") == [[(1.0, [own])]]
    assert called("digits-meanflow", "objective.jump_fraction=0.25") == [[(1.0, [("student", "path", 4), own])]]
    guided = ("objective.velocity=teacher", "teacher.guidance=2", "objective.jump_fraction=0.25")
    both = ("teacher", "forward", 32)
    assert called("digits-meanflow", *guided) == [[(1.0, [both, ("student", "path", 4), own])]]
    heun = [("teacher", "forward", 16)] * 2
    assert called("digits-consistency") == [[(1.0, [*heun, ("target", "forward", 16), own])]]


def test_calls_of_stages() -> None:
    """Two solver steps of Heun, and then two jumps of the student before."""
    own = ("student", "gradient", 16)
    first = [("teacher", "forward", 16)] * 4
    later = [("previous", "forward", 16)] * 2
    found = called("digits-progressive", "objective.start_steps=8")
    assert found == [[(1.0, [*first, own])], [(1.0, [*later, own])], [(1.0, [*later, own])]]


def test_a_method_that_changes_is_seen_changing() -> None:
    (ways,) = called("digits-alpha-flow")
    assert sum(share for share, _ in ways) == 1
    assert {calls[0][1] for _, calls in ways} == {"forward", "path"}


def test_what_else_an_objective_trains_and_holds() -> None:
    """A target as large as the student; a network beside it that is trained, but not averaged."""
    held = {
        name: stage_calls(outline(config(f"digits-{name}"), (1, 8, 8), 10), 16)[0].held
        for name in ("meanflow", "shortcut", "free-flow")
    }
    assert held == {"meanflow": (), "shortcut": ("target",), "free-flow": ("companion",)}
    target = planned("digits-shortcut").memory
    companion = planned("digits-free-flow", "objective.jvp=finite_difference").memory
    size = target.weights
    assert (target.held, target.moments, target.averages) == (size, 2 * size, size)
    assert (companion.weights, companion.moments, companion.held) == (2 * size, 4 * size, 0)
    assert companion.averages == size


def test_a_teacher_of_half_the_precision_takes_half_the_memory() -> None:
    full, half = (
        planned("digits-soflow", f"teacher.precision={precision}").memory.teachers for precision in ("fp32", "bf16")
    )
    assert 0.5 * full < half < 0.7 * full  # embeddings of time stay as they are


# -------------------------------------------------------------------------------------------------------- time, memory


def test_the_parts_of_a_steps_time() -> None:
    """Twice the peak halves the products, twice the bandwidth the rest, and kernels without work take their launch."""
    slow = planned("digits-teacher", efficiency=0.5).stages[0]
    assert slow.products_s == pytest.approx(128 * slow.flops / (0.5 * 1e12))
    assert slow.step_s == pytest.approx(slow.launches_s + slow.optimiser_s)
    compute = replace(SLOW, fp32=1e-3)
    bound = planned("digits-teacher", gpu=compute, efficiency=1.0).stages[0]
    assert bound.step_s == pytest.approx(bound.products_s + bound.traffic_s + bound.optimiser_s)
    assert bound.products_s == pytest.approx(128 * bound.flops / 1e9)
    fast = planned("digits-teacher", gpu=replace(compute, bandwidth=200), efficiency=1.0).stages[0]
    assert (fast.traffic_s, fast.optimiser_s) == (bound.traffic_s / 2, bound.optimiser_s / 2)
    assert bound.launches_s == pytest.approx(round(bound.launches_s / LAUNCH_S) * LAUNCH_S)
    assert planned("digits-teacher", cpu=True).stages[0].launches_s == 0


def test_microbatches_take_as_long_and_less_memory() -> None:
    one, four = (planned("digits-teacher", f"train.gradient_accumulation_steps={n}") for n in (1, 4))
    assert four.microbatch == 32
    assert four.stages[0].products_s == pytest.approx(one.stages[0].products_s)
    assert four.memory.activations < 0.35 * one.memory.activations


def test_exchange_of_copies() -> None:
    """A ring of N moves 2 (N - 1) / N of the gradients over every link, behind the backward pass."""
    gpu = replace(SLOW, link=1e-3)
    alone, four = (planned("digits-teacher", gpu=gpu, gpus=gpus) for gpus in (1, 4))
    stage = four.stages[0]
    busy = stage.step_s - stage.exchange_s - stage.optimiser_s
    all_reduce = 2 * 3 / 4 * four.memory.gradients / 1e6
    assert stage.exchange_s == pytest.approx(all_reduce - 2 / 3 * busy, rel=0.01)
    assert (four.memory.exchange, alone.memory.exchange) == (four.memory.gradients, 0)
    assert alone.stages[0].exchange_s == 0
    assert planned("digits-teacher", gpus=4, gpu=replace(SLOW, link=1e6)).stages[0].exchange_s == 0


def test_exchange_of_shards() -> None:
    """Gathered for the forward and the backward pass, and gradients scattered: three times the weights."""
    gpu = replace(SLOW, link=1e-3)
    plan = planned("digits-teacher", "train.parallel=fsdp2", gpu=gpu, gpus=4)
    stage = plan.stages[0]
    busy = stage.step_s - stage.exchange_s - stage.optimiser_s
    assert stage.exchange_s == pytest.approx(3 / 4 * 3 * 4 * plan.params / 1e6 - busy)
    assert plan.memory.gradients == plan.memory.weights < 1.1 * plan.params


def test_a_sharded_step_by_hand() -> None:
    """Where activations are most, a block and the next one are there; where gradients are, all buffers of the way back;
    and several microbatches add their gradients up whole. Ten blocks of 40 bytes and 8 outside of them, on four."""
    own = Sizes(whole=408, trained=408, shard=102, trained_shard=102, block=40, root=8)
    shared: dict[str, Any] = {"gpus": 4, "sharded": True, "averages": 2}

    def step(activations: int, microbatches: int = 1) -> int:
        memory = memory_of({"student": own, "target": own}, activations, microbatches=microbatches, **shared)
        assert (memory.weights, memory.held, memory.moments, memory.averages) == (102, 102, 204, 204)
        return memory.gradients + memory.exchange + memory.activations

    assert step(10_000) == 10_000 + 8 + 2 * 40
    assert step(500) == round(0.9 * 500 + 0.1 * 102) + 8 + 5 * 40
    assert step(0) == 102 + 8 + 5 * 40
    assert step(1000, microbatches=2) == 408 + 1000 + 8 + 5 * 40


def test_the_largest_batch_fits_and_a_larger_one_does_not() -> None:
    gpu = replace(SLOW, memory_gib=0.02)
    plan = planned("digits-teacher", gpu=gpu, search=True)
    assert plan.largest is not None
    for batch, fits in ((plan.largest, True), (math.ceil(1.02 * plan.largest), False)):
        assert planned("digits-teacher", f"train.batch_size={batch}", gpu=gpu).fits is fits
    assert planned("digits-teacher", gpu=replace(SLOW, memory_gib=1e-4), search=True).largest == 0


def test_what_peaks_products_have() -> None:
    gpu = ACCELERATORS["h100"]
    assert gpu.peak("bfloat16", tf32=False) == 989e12
    assert (gpu.peak("float32", tf32=False), gpu.peak("float32", tf32=True)) == (67e12, 495e12)
    given = accelerator("h100", peak_tflops=7, link=3)
    assert (given.peak("bfloat16", tf32=True), given.peak("float32", tf32=False), given.link) == (7e12, 7e12, 3)


# ----------------------------------------------------------------------------------------------------------- command


def document(*arguments: object) -> dict[str, Any]:
    return dict(json.loads(succeed("bench", "plan", *arguments, "--json").stdout))


def test_a_plan_for_people_and_its_document() -> None:
    """Of a recipe whose teacher nobody has trained, on more GPUs than there are."""
    said = succeed("bench", "plan", "digits-soflow", "--gpus", 4, "--gpu", "a100", "--json")
    for word in ("GFLOP", "of weights", "most that fit", "GPU-hours", "fits", "0.5 of the peak", "TF32"):
        assert word in said.stderr
    found = json.loads(said.stdout)
    assert (found["gpus"], found["accelerator"]["name"], found["parallel"]) == (4, "a100", "ddp")
    assert (found["shape"], found["classes"], found["microbatch"]) == ([1, 8, 8], 10, 32)
    assert found["gpu_hours"] == pytest.approx(4 * found["hours"])
    assert found["hours"] == pytest.approx(4000 * found["stages"][0]["step_s"] / 3600)
    assert found["memory_bytes"]["total"] == sum(found["stages"][0]["memory"].values())
    assert found["fits"] is True
    assert any("not trained" in each for each in found["assumptions"])


def test_what_does_not_fit_is_told_with_what_would() -> None:
    network = "student.network={kind: flot, width: 192, depth: 1, heads: 6}"
    images = ("--shape", "3,32,32", "--classes", 10)
    said = succeed("bench", "plan", "digits-teacher", network, "train.batch_size=8192", *images, "--gpu", "l4")
    assert "does not fit" in said.stderr
    assert "of 24 GiB" in said.stderr
    assert "raise train.gradient_accumulation_steps" in said.stderr


def test_data_that_are_not_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWSTEP_DATA", str(tmp_path))
    refuse("bench", "plan", "cifar10-teacher", says=("--shape", "--classes"))
    tiny = "student.network={kind: flot, width: 16, depth: 1, heads: 2}"
    assert document("cifar10-teacher", tiny, *TINY)["precision"] == "bf16"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("digits-meanflow", "teacher.path=nowhere"), ("nowhere", "student.network")),
        (("digits-meanflow", "--gpu", "h1000"), ("h1000", "did you mean 'h100'?")),
        (("digits-meanflow", "--gpus", 3), ("128", "3 microbatches")),
        (("digits-meanflow", "--efficiency", 1.5), ("--efficiency", "1.5")),
        (("digits-meanflow", "--classes", 3), ("--classes", "--shape")),
        (("digits-meanflow", "--shape", "1,x"), ("--shape", "1,x")),
        (("checkerboard-soflow", "student.network={kind: flot}", "student.init=scratch"), ("flot", "[2]")),
    ],
)
def test_refusals(arguments: tuple[object, ...], says: tuple[str, ...]) -> None:
    refuse("bench", "plan", *arguments, says=says)


def test_this_machine_as_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory, and what was measured of it; several of it need a link that nobody knows."""
    from fewstep.bench import ceiling

    monkeypatch.setattr(ceiling, "product_tflops", lambda dtype, device: 0.5 if dtype == torch.float32 else 0.25)
    monkeypatch.setattr(ceiling, "copy_gb_per_s", lambda device: 10.0)
    monkeypatch.setattr("fewstep.workflows.default_device", lambda: CPU)
    found = document("digits-teacher", "--measured")["accelerator"]
    assert (found["name"], found["fp32"], found["bf16"], found["bandwidth"]) == ("cpu", 0.5, 0.25, 10.0)
    assert found["memory_gib"] > 1
    refuse("bench", "plan", "digits-teacher", "--measured", "--gpus", 2, says=("--link",))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
