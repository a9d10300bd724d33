"""What a teacher may be trained on and with, through the command line, and what its students take over of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVALUATE, SMALL, cli, refuse, succeed
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.config import load_config, read_config
from fewstep.data.dataset import Batch, Dataset
from fewstep.data.load import load_data
from fewstep.distill.couplings import Noise, assignment, gaussian_noise, paired_noise, sinkhorn
from fewstep.distill.objective import Objective
from fewstep.distill.plan import PLANS, plan
from fewstep.distill.tangent import forward_derivative
from fewstep.flow import LINEAR
from fewstep.keys import Key
from fewstep.networks.condition_shift import ConditionShift
from fewstep.sources import SOURCES, gaussian, laplace, sphere
from fewstep.students.load import load_model
from fewstep.teachers.load import load_teacher
from fewstep.times import Times, jump_rows, logit_normal, shifted, truncated_log_normal, u_shaped, uniform
from fewstep.workflows import evaluate_runs, sample_run

CPU = torch.device("cpu")
MOONS = (*SMALL, "train.steps=3", "data.count=200", "objective.noise.group_size=8")
COUPLED = ("objective.noise={source: laplace, coupling: {kind: assignment}, group_size: 8}",)
COUPLED_CARD = {"source": "laplace", "coupling": {"kind": "assignment"}, "group_size": 8}


def card(run: Path) -> dict[str, Any]:
    return json.loads((run / "model" / "config.json").read_text())


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


OPTIONS: dict[str, tuple[str, ...]] = {
    "cosine": ("objective.path=cosine",),
    "variance_preserving": ("objective.path=variance_preserving",),
    "uniform": ("objective.times={kind: uniform, shift: 3}",),
    "logit_normal": ("objective.times={kind: logit_normal, mean: -0.5, shift: 0.5}",),
    "truncated_log_normal": ("objective.times={kind: truncated_log_normal, shift: 2}",),
    "u_shaped": ("objective.times={kind: u_shaped, sharpness: 4, shift: 2}",),
    "uniform noise": ("objective.noise.source=uniform",),
    "laplace noise": ("objective.noise.source=laplace",),
    "sphere noise": ("objective.noise.source=sphere",),
    "assignment": ("objective.noise.coupling={kind: assignment}",),
    "sinkhorn": ("objective.noise.coupling={kind: sinkhorn, epsilon: 0.2}",),
    "contrast": ("objective.contrast=0.05",),
    "curvature": ("objective.weighting={kind: curvature, warmup_steps: 1}",),
    "curvature forward": ("objective.weighting={kind: curvature, jvp: forward, probed: 1, warmup_steps: 0}",),
    "condition_shift": ("student.network.condition_shift=true",),
    "coupled": COUPLED,
    "all": (
        *("objective.path=cosine", "objective.times={kind: u_shaped, shift: 2}", "objective.contrast=0.02"),
        *("objective.weighting={kind: curvature, warmup_steps: 0}", "student.network.condition_shift=true", *COUPLED),
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Teachers of the moons with one option each, or none ("plain"), trained for three steps when asked for."""
    folder = tmp_path_factory.mktemp("teaching")

    def of(option: str) -> Path:
        run = folder / option.replace(" ", "-")
        if not run.exists():
            succeed("teach", "moons-teacher", *MOONS, *EVALUATE, *OPTIONS.get(option, ()), "--out", run)
        return run

    return of


@pytest.mark.parametrize("option", OPTIONS)
def test_option(option: str, runs: Callable[[str], Path], tmp_path: Path) -> None:
    """It trains something else than none of it, is written down, and the model can be sampled."""
    run = runs(option)
    config = read_config(run)
    for override in OPTIONS[option]:
        place, _, value = override.partition("=")
        asked = load_config("moons-teacher", [f"{place}={value}"]).model_dump(mode="json")
        found = config.model_dump(mode="json")
        for name in place.split("."):
            asked, found = asked[name], found[name]
        assert found == asked
    told = card(run)
    assert told["noise"] == config.objective.noise.model_dump(mode="json")
    assert told.get("contrast", 0) == config.objective.contrast
    assert told["network"]["condition_shift"] == config.student.network.condition_shift
    assert all(value.isfinite().all() for value in weights(run).values())
    succeed("sample", run, "--steps", 2, "--n", 5, "--out", tmp_path / "samples")
    (file,) = (tmp_path / "samples").glob("*.safetensors")
    assert load_file(file)["x"].shape == (5, 2)
    ours, plain = (sample_run(of, steps=2, n=5, seed=0, batch_size=5).x for of in (run, runs("plain")))
    assert ours.isfinite().all()
    assert not torch.equal(ours, plain)


@pytest.mark.parametrize(
    ("override", "times"),
    [
        ("{kind: uniform, shift: 3}", shifted(uniform, 3.0)),
        ("{kind: uniform}", uniform),
        ("{kind: logit_normal, mean: -0.5, std: 0.7, shift: 0.5}", shifted(logit_normal(-0.5, 0.7), 0.5)),
        ("{kind: truncated_log_normal}", truncated_log_normal(-1.2, 1.2, 0.002, 80.0)),
        ("{kind: truncated_log_normal, mean: -1, std: 0.5, sigma_min: 0.1, sigma_max: 2, shift: 2}",
         shifted(truncated_log_normal(-1.0, 0.5, 0.1, 2.0), 2.0)),
        ("{kind: u_shaped, sharpness: 3, shift: 2}", shifted(u_shaped(3.0), 2.0)),
    ],
)  # fmt: skip
def test_times_are_those_of_the_config(override: str, times: Times) -> None:
    """Every number of it, in the objective that is built from it."""
    (stage,) = plan(load_config("moons-teacher", [f"objective.times={override}"]), None, moons())
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    assert torch.equal(stage.build(Recorder(), None).times(u), times(u))


def test_pairs_are_those_of_the_config() -> None:
    """Epsilon and size of the groups, both unlike their defaults; the contrast is within the same groups."""
    noise = "objective.noise={source: sphere, coupling: {kind: sinkhorn, epsilon: 0.4}, group_size: 8}"
    (stage,) = plan(load_config("moons-teacher", [noise, "objective.contrast=0.1"]), None, moons())
    objective, batch = stage.build(Recorder(), None), moons_batch()
    wanted = paired_noise(sphere, sinkhorn(8, 0.4))(batch, Key(2, 3))
    assert torch.equal(objective.noise(batch, Key(2, 3)), wanted)
    assert not torch.equal(paired_noise(sphere, sinkhorn(8, 0.05))(batch, Key(2, 3)), wanted)
    assert (objective.contrast, objective.group) == (0.1, 8)


def test_weighting_is_that_of_the_config() -> None:
    """Power, warm-up, share and derivative, each unlike its default, and none by default."""
    (stage,) = plan(load_config("moons-teacher"), None, moons())
    assert stage.build(Recorder(), None).weighting is None
    override = "{kind: curvature, power: 0.7, warmup_steps: 9, probed: 0.4, jvp: forward}"
    (stage,) = plan(load_config("moons-teacher", [f"objective.weighting={override}"]), None, moons())
    own = stage.build(Recorder(), None).weighting
    assert (own.power, own.warmup_steps, own.probed) == (0.7, 9, 0.4)
    assert own.derivative is forward_derivative


def test_curvature_goes_through_a_checkpoint(tmp_path: Path) -> None:
    """A run that went on from its middle ends with the bits of one that did not, weights by curvature included."""
    overrides = (*MOONS, *OPTIONS["curvature"], "train.steps=8", "train.checkpoint_every=4")
    for name in ("whole", "cut"):
        succeed("teach", "moons-teacher", *overrides, "--out", tmp_path / name)
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000008")
    shutil.rmtree(tmp_path / "cut" / "model")
    succeed("teach", "moons-teacher", *overrides, "--out", tmp_path / "cut", "--resume")
    for part in ("student", "objective", "optimizer"):
        whole, cut = (
            load_file(tmp_path / name / "checkpoints" / "step-00000008" / f"{part}.safetensors")
            for name in ("whole", "cut")
        )
        assert whole.keys() == cut.keys()
        assert all(torch.equal(cut[key], value) for key, value in whole.items()), part
    logged = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert logged[0]["weight"] == 1
    assert logged[-1]["weight"] != 1


def test_condition_shift_of_digits(tmp_path: Path) -> None:
    """A shift of an image for each class, moved by training; a student starts from it."""
    overrides = (*SMALL[:2], "student.network={kind: mlp, width: 16, depth: 1, condition_shift: true}")
    succeed("teach", "digits-teacher", *overrides, *EVALUATE, "train.steps=3", "--out", tmp_path / "teacher")
    tables = weights(tmp_path / "teacher")
    assert tables["data_shift"].shape == tables["noise_shift"].shape == (11, 1, 8, 8)
    assert tables["data_shift"].any()
    overrides = (f"teacher.path={tmp_path / 'teacher'}", *SMALL[:2], *EVALUATE, "train.steps=1", "train.lr=1e-30")
    succeed("distill", "digits-meanflow", *overrides, "--out", tmp_path / "student")
    student = weights(tmp_path / "student")
    for name in ("data_shift", "noise_shift", "net.enter.weight"):
        assert torch.equal(student[name], tables[name]), name
    assert isinstance(load_model(tmp_path / "student", CPU).sampler.maps[0].net, ConditionShift)


# ------------------------------------------------------------------------------------------------- noise and its pairs


class Recorder(nn.Module):
    """A student that says zero, and remembers the last state and times it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        self.x, self.t = x, t_B
        return self.weight * x


def moons() -> Dataset:
    return load_data(load_config("moons-teacher").data)


def moons_batch() -> Batch:
    data = moons()
    return Batch(data.x[:16], data.label[:16], torch.arange(16))


def check_noise(objective: Objective, student: Recorder, wanted: Noise, jump_fraction: float | None = None) -> None:
    """The states of a batch are those of the wanted noise at the times the student is told."""
    batch, key = moons_batch(), Key(3, 1)
    objective(batch, key)
    e = wanted(batch, key)
    order = torch.arange(16)
    if jump_fraction is not None:  # rows that jump come last
        order = jump_rows(batch.index, jump_fraction).int().argsort(stable=True)
    assert torch.equal(student.x, LINEAR.sample(batch.x[order], e[order], student.t).x_t)
    assert not torch.equal(e, gaussian_noise(batch, key))


STUDENTS: dict[str, tuple[str, ...]] = {
    "meanflow from data": ("student.kind=average_velocity", "objective={kind: meanflow, velocity: data}"),
    "meanflow from its teacher": ("student.kind=average_velocity", "objective={kind: meanflow, velocity: teacher}"),
    "progressive": ("student.kind=average_velocity", "objective={kind: progressive, start_steps: 4}"),
    "consistency": ("student.kind=consistency", "objective={kind: consistency}"),
}


def student_of(run: Path, name: str) -> tuple[str, ...]:
    small = (*SMALL[:2], "train.steps=2", "data.count=200", *EVALUATE)
    return ("name=student", f"teacher.path={run}", *small, *STUDENTS[name])


def test_a_teacher_is_trained_on_its_noise() -> None:
    """Every source under every coupling: what the config's objective draws."""
    data = moons()
    for source, law in SOURCES.items():
        for coupling in ("independent", "assignment"):
            noise = f"objective.noise={{source: {source}, coupling: {{kind: {coupling}}}, group_size: 8}}"
            (stage,) = plan(load_config("moons-teacher", [noise]), None, data)
            student = Recorder()
            objective = stage.build(student, None)
            batch, key = moons_batch(), Key(3, 1)
            objective(batch, key)
            e = law(key, "noise", batch.index, (2,))
            if coupling == "assignment":
                e = assignment(8)(batch.x, e, batch.label, key, batch.index)
            assert torch.equal(student.x, LINEAR.sample(batch.x, e, student.t).x_t), (source, coupling)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_sees_its_teachers_pairs(name: str, runs: Callable[[str], Path]) -> None:
    """The batch's noise of the objective its config builds is that of the teacher's training: Laplace draws, assigned
    within groups of eight and within classes. In every stage."""
    config = load_config("moons-progressive", student_of(runs("coupled"), name))
    data = load_data(config.data)
    teacher = load_teacher(config.teacher, config.data, data, CPU)
    assert teacher.noise.model_dump(mode="json") == COUPLED_CARD
    assert config.objective.kind in PLANS
    previous = None
    for stage in plan(config, teacher, data):
        student = Recorder()
        fraction = config.objective.jump_fraction if config.objective.kind == "meanflow" else None
        check_noise(stage.build(student, previous), student, paired_noise(laplace, assignment(8)), fraction)
        previous = student


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_is_sampled_from_its_teachers_noise(name: str, runs: Callable[[str], Path], tmp_path: Path) -> None:
    """Its card has the teacher's noise, and its samples start from Laplace draws. Re-noising leaves the flow of a
    coupled teacher: a consistency student says so, and the others have nothing to say."""
    run = runs("coupled")
    said = succeed("distill", "moons-progressive", *student_of(run, name), "--out", tmp_path / "student").stderr
    warnings = [line for line in said.splitlines() if "warning" in line]
    if name == "consistency":
        assert len(warnings) == 1
        assert "the teacher pairs noise with data" in warnings[0]
        assert "re-noising (more than 1 step) leaves its flow" in warnings[0]
    else:
        assert warnings == []
    assert card(tmp_path / "student")["noise"] == COUPLED_CARD
    page = (tmp_path / "student" / "model" / "README.md").read_text()
    assert "- noise: laplace" in page
    assert "- pairs of noise and data: assignment, in groups of 8" in page
    model = load_model(tmp_path / "student", CPU)
    assert model.sampler.source is laplace
    sampled = sample_run(tmp_path / "student", steps=1, n=4, seed=5, batch_size=3)
    e = laplace(Key(5), "noise", torch.arange(4), (2,))
    by_hand = model.sampler(1, e, torch.arange(4) % 2, Key(5), torch.arange(4)).x
    torch.testing.assert_close(sampled.x, by_hand, rtol=0, atol=1e-6)


def test_samples_start_from_the_teachers_noise(runs: Callable[[str], Path]) -> None:
    """One Euler step by hand, ``e - v(e, 1)``, of each source."""
    for option, source in (("laplace noise", laplace), ("sphere noise", sphere), ("plain", gaussian)):
        run = runs(option)
        sampled = sample_run(run, steps=1, n=6, seed=7, batch_size=4)
        e, label = source(Key(7), "noise", torch.arange(6), (2,)), torch.arange(6) % 2
        model = load_model(run, CPU)
        by_hand = e - model.sampler.field(e, torch.ones(6), label)
        torch.testing.assert_close(sampled.x, by_hand, rtol=0, atol=1e-6)
        assert torch.equal(sampled.label, label)


def test_the_anchor_of_an_evaluation_starts_from_the_teachers_noise(
    runs: Callable[[str], Path], tmp_path: Path
) -> None:
    """A student's report has its teacher beside it: with the numbers of the teacher's own report."""
    run = runs("coupled")
    succeed("distill", "moons-progressive", *student_of(run, "meanflow from data"), "--out", tmp_path / "student")
    settings = read_config(run).evaluate
    beside, alone = (evaluate_runs([of], settings=settings) for of in (tmp_path / "student", run))
    found, wanted = ({row.steps: row.metrics for row in of.rows if row.role == "teacher"} for of in (beside, alone))
    assert set(found) == {4}
    assert found[4]["fd_identity"].value == pytest.approx(wanted[4]["fd_identity"].value, rel=1e-5)


def test_renoising_draws_from_the_teachers_noise(runs: Callable[[str], Path], tmp_path: Path) -> None:
    """Two steps of a consistency student by hand, fresh Laplace noise at t = 1/2. Its teacher's pairs are independent:
    nothing is warned of."""
    overrides = student_of(runs("laplace noise"), "consistency")
    said = succeed("distill", "moons-progressive", *overrides, "--out", tmp_path / "student").stderr
    assert "warning" not in said
    sampled = sample_run(tmp_path / "student", steps=2, n=6, seed=7, batch_size=6)
    index = torch.arange(6)
    flow_map, label = load_model(tmp_path / "student", CPU).sampler.maps[0], index % 2
    one, half, zero = (torch.full((6,), t) for t in (1.0, 0.5, 0.0))
    first = flow_map(laplace(Key(7), "noise", index, (2,)), one, zero, label)
    state = 0.5 * first + 0.5 * laplace(Key(7, 0), "renoise", index, (2,))
    with torch.no_grad():
        torch.testing.assert_close(sampled.x, flow_map(state, half, zero, label), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ what is refused


GROUPS = {
    "coupling": ("objective.noise.coupling={kind: assignment}", "16 samples", "groups of 64"),
    "contrast": ("objective.contrast=0.05", "16 samples", "groups of 64"),
    "entropic": ("objective.noise={coupling: {kind: sinkhorn}, group_size: 12}", "16 samples", "groups of 12"),
}


@pytest.mark.parametrize("override", GROUPS)
def test_a_microbatch_holds_whole_groups(override: str, tmp_path: Path) -> None:
    """Of the default 64, or another number that does not divide it; nothing is written."""
    option, *says = GROUPS[override]
    remedies = ("train.batch_size", "objective.noise.group_size")
    refuse("teach", "moons-teacher", *SMALL, option, "--out", tmp_path / "run", says=(*says, *remedies))
    assert not (tmp_path / "run").exists()


def test_groups_are_of_a_microbatch(tmp_path: Path) -> None:
    """Of 16 samples in two microbatches groups of eight are whole, groups of 16 are not."""
    two = (*SMALL, "train.gradient_accumulation_steps=2", "train.steps=1", "data.count=200", OPTIONS["assignment"][0])
    sixteen = "objective.noise.group_size=16"
    refuse("teach", "moons-teacher", *two, sixteen, "--out", tmp_path / "run", says=("8 samples", "groups of 16"))
    succeed("teach", "moons-teacher", *two, "objective.noise.group_size=8", "--out", tmp_path / "run")


def test_groups_of_nothing_may_be_of_any_size(tmp_path: Path) -> None:
    """Independent pairs without contrast ask nothing of the batch."""
    succeed("teach", "moons-teacher", *SMALL, "train.steps=1", "data.count=200", "--out", tmp_path / "run")


def test_a_student_of_coupled_pairs_needs_whole_groups(runs: Callable[[str], Path], tmp_path: Path) -> None:
    """Its teacher's, which it cannot change: the sentence names the batch alone."""
    overrides = (*student_of(runs("coupled"), "progressive"), "train.batch_size=12")
    line = refuse("distill", "moons-progressive", *overrides, "--out", tmp_path / "run", says=("12 samples", "of 8"))
    assert "train.batch_size" in line
    assert "group_size" not in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("objective.times={kind: u_shape}", ("objective.times.kind", "'u_shaped'")),
        ("objective.times={kind: truncated_lognormal}", ("objective.times.kind", "'truncated_log_normal'")),
        ("objective.times.shft=2", ("objective.times.shft", "'shift'")),
        ("objective.noise.coupling={kind: asignment}", ("objective.noise.coupling.kind", "'assignment'")),
        ("objective.noise.coupling.kind=sinkhron", ("objective.noise.coupling.kind", "'sinkhorn'")),
        ("objective.noise.group=8", ("objective.noise.group", "'group_size'")),
        ("objective.weighting={kind: curvatur}", ("objective.weighting.kind", "'curvature'")),
        ("objective.weighting={kind: curvature, powr: 1}", ("objective.weighting.powr", "'power'")),
        ("objective.contrst=0.1", ("objective.contrst", "'contrast'")),
        ("objective.path=cosin", ("objective.path", "'cosine'", "cosin")),
        ("objective.noise.source=gausian", ("objective.noise.source", "'gaussian'", "gausian")),
        ("student.network.condition_shft=true", ("student.network.condition_shft", "'condition_shift'")),
    ],
)
def test_misspelt(override: str, says: tuple[str, ...], tmp_path: Path) -> None:
    """The place, the word, and the nearest right one (or the few there are)."""
    refuse("teach", "moons-teacher", *SMALL, override, "--out", tmp_path / "run", says=says)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("objective.times={kind: truncated_log_normal, sigma_min: 3, sigma_max: 2}", ("sigma_max 2", "sigma_min 3")),
        (
            "objective.times={kind: truncated_log_normal, mean: 0, std: 0.01, sigma_min: 3, sigma_max: 4}",
            ("objective.times", "30 standard deviations"),
        ),
        ("objective.times={kind: u_shaped, sharpness: 0}", ("objective.times.sharpness", "greater than 0")),
        ("objective.times={kind: uniform, shift: 0}", ("objective.times.shift", "greater than 0")),
        ("objective.contrast=1", ("objective.contrast", "less than 1")),
        ("objective.noise.group_size=1", ("objective.noise.group_size", "2")),
        ("objective.noise.coupling={kind: sinkhorn, epsilon: 0}", ("objective.noise.coupling.epsilon", "greater")),
        ("objective.weighting={kind: curvature, probed: 0}", ("objective.weighting.probed", "greater than 0")),
        ("objective.weighting={kind: curvature, jvp: backward}", ("objective.weighting.jvp", "'finite_difference'")),
    ],
)
def test_out_of_range(override: str, says: tuple[str, ...]) -> None:
    refuse("teach", "moons-teacher", override, "--dry-run", says=says)


def test_dry_run_shows_what_is_left_out() -> None:
    """The defaults of all of it: what a plain teacher was trained on before there were any."""
    objective = json.loads(cli("teach", "moons-teacher", "--dry-run", "--json").stdout)["objective"]
    assert objective["path"] == "linear"
    assert objective["noise"] == {"source": "gaussian", "coupling": {"kind": "independent"}, "group_size": 64}
    assert objective["contrast"] == 0
    assert objective["weighting"] == {"kind": "none"}
    assert objective["times"] == {"kind": "uniform", "shift": 1}
