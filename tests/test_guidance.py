"""Guidance as an input of a student and the second time by layers, as a user meets them: train, sample, evaluate."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, refuse, student, succeed
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.checkpoint import RunDirectory
from fewstep.config import load_config
from fewstep.distill.run import check_training
from fewstep.flow import uniform_grid
from fewstep.keys import Key
from fewstep.sampling import sample_ode
from fewstep.students.load import load_model, with_guidance
from fewstep.students.maps import GuidanceInput
from fewstep.teachers.guided import ClassContrast, GuidedField
from fewstep.teachers.network import NetworkField
from fewstep.workflows import sample_run

Copy = Callable[[str], Path]
INPUT = ("student.guidance_input=true", "objective.guidance={scale: 1.0, largest: 4.0}")
WINDOW = ("--guidance", 2.5, "--window", "0.1,0.8")


@pytest.fixture(scope="module")
def runs(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small students that take guidance: ``meanflow`` and ``split-meanflow``. Large steps, so that it tells."""
    folder = tmp_path_factory.mktemp("guided")
    for name in ("meanflow", "split-meanflow"):
        small = (
            *student(trained / "teacher"),
            "train.steps=6",
            "train.lr=0.03",
            "train.warmup_steps=0",
            "train.ema=[0.1]",
        )
        succeed("distill", f"digits-{name}", *small, *INPUT, "--out", folder / name)
    return folder


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of three blocks."""
    run = tmp_path_factory.mktemp("deep") / "teacher"
    succeed("teach", "digits-teacher", *SMALL, "student.network.depth=3", "train.steps=20", "--out", run)
    return run


def card_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "model" / "config.json").read_text())


def sampled(run: Path, guidance: GuidanceInput | None, steps: int = 2) -> Tensor:
    return sample_run(run, steps=steps, n=5, seed=0, batch_size=5, guidance=guidance).x


def printed(*arguments: object) -> dict[str, Any]:
    return json.loads(succeed(*arguments, "--json").stdout)


def start() -> tuple[Tensor, Tensor]:
    index = torch.arange(5)
    return Key(0).normal("noise", index, (1, 8, 8)), index % 10


# Guidance as an input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["meanflow", "split-meanflow"])
def test_a_card_tells_of_the_input(name: str, runs: Path, trained: Path) -> None:
    assert card_of(runs / name)["guidance_input"] is True
    assert "guidance: an input of the network" in (runs / name / "model" / "README.md").read_text()
    assert card_of(trained / "meanflow")["guidance_input"] is False
    assert "guidance: none" in (trained / "meanflow" / "model" / "README.md").read_text()
    assert load_model(runs / name, torch.device("cpu")).guidance == 1


@pytest.mark.parametrize("name", ["meanflow", "split-meanflow"])
def test_samples_follow_guidance(name: str, runs: Path) -> None:
    """Off is what comes without it; scale and window each tell."""
    run = runs / name
    off = sampled(run, None)
    assert torch.equal(sampled(run, GuidanceInput(1.0)), off)
    found = [off, *(sampled(run, GuidanceInput(*numbers)) for numbers in ((4.0,), (4.0, 0.5), (4.0, 0.0, 0.5)))]
    for number, one in enumerate(found):
        for other in found[:number]:
            assert (one - other).abs().max() > 1e-5


def test_one_step_by_hand(runs: Path) -> None:
    """``x - u(x, 1, 0, label, (w, low, high))``, of the exported weights."""
    noise, label = start()
    net: nn.Module = load_model(runs / "meanflow", torch.device("cpu")).sampler.maps[0].net  # type: ignore[attr-defined]
    one, zero = torch.ones(5), torch.zeros(5)
    wanted = noise - net(noise, one, zero, label, torch.tensor([[2.5, 0.1, 0.8]]).expand(5, 3))
    torch.testing.assert_close(sampled(runs / "meanflow", GuidanceInput(2.5, 0.1, 0.8), steps=1), wanted)


def test_guided_samples_have_files_of_their_own(runs: Path, tmp_path: Path) -> None:
    """And cost no more."""
    command = ("sample", runs / "meanflow", "--steps", 2, "--n", 5, "--out", tmp_path)
    documents = [printed(*command, *options) for options in ((), WINDOW[:2], WINDOW)]
    stems = ["steps-02-seed-0", "guidance-2.5-steps-02-seed-0", "guidance-2.5-window-0.1-0.8-steps-02-seed-0"]
    assert [Path(document["samples"]).stem for document in documents] == stems
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{stem}.{kind}" for stem in stems for kind in ("safetensors", "png")
    }
    assert [document["nfe"] for document in documents] == [2, 2, 2]
    off, scale, window = (load_file(document["samples"])["x"] for document in documents)
    assert not torch.equal(off, scale)
    assert not torch.equal(scale, window)


def test_evaluation_at_a_guidance(runs: Path) -> None:
    """The teacher beside it is guided as the student is, at twice the cost; a window makes other rows."""
    measure = ("evaluate", runs / "meanflow", "--steps", "1,2", "--features", "pixels", "--n", 50)
    heads = {}
    for options in ((), WINDOW[:2], WINDOW):
        rows = printed(*measure, *options)["rows"]
        heads[options] = [(row["role"], row["guidance"], row["steps"], row["nfe"], row["sampler"]) for row in rows]
    assert heads[()] == [
        ("teacher", 1.0, 4, 4, "euler"),
        ("student", 1.0, 1, 1, "jumps"),
        ("student", 1.0, 2, 2, "jumps"),
    ]
    assert heads[WINDOW[:2]] == [
        ("teacher", 2.5, 4, 8, "euler"),
        ("student", 2.5, 1, 1, "jumps"),
        ("student", 2.5, 2, 2, "jumps"),
    ]
    window = ", guided in [0.1, 0.8]"
    assert heads[WINDOW] == [(*head[:4], head[4] + window) for head in heads[WINDOW[:2]]]


def test_the_gap_is_to_the_teacher_at_the_same_guidance(runs: Path, trained: Path) -> None:
    """Root mean square difference of the samples from the same noise, both guided in the same window."""
    measure = ("evaluate", runs / "meanflow", "--steps", 1, "--features", "pixels", "--n", 50)
    row = printed(*measure, *WINDOW)["rows"][-1]
    guidance = GuidanceInput(2.5, 0.1, 0.8)
    x, y = (
        sample_run(run, steps=steps, n=50, seed=0, batch_size=50, guidance=guidance).x.double()
        for run, steps in ((runs / "meanflow", 1), (trained / "teacher", 4))
    )
    assert row["metrics"]["teacher_gap"]["value"] == pytest.approx(float((x - y).square().mean().sqrt()), rel=1e-5)


def test_guidance_without_classes(tmp_path: Path) -> None:
    """Away from a weaker teacher: the student hears of it, and the teacher beside it is guided in the same way."""
    data = "data={kind: toy, name: checkerboard, count: 200}"
    teacher, weak, run = tmp_path / "teacher", tmp_path / "weak", tmp_path / "run"
    for out, steps in ((teacher, 4), (weak, 2)):
        succeed("teach", "digits-teacher", *SMALL, data, f"train.steps={steps}", "--out", out)
    auto = (f"teacher.weak={weak}", "objective.velocity=teacher")
    command = ("distill", "digits-meanflow", *student(teacher), data, "train.steps=2", *INPUT)
    succeed(*command, *auto, "--out", run)
    measure = ("evaluate", run, "--steps", 1, "--features", "identity", "--n", 50, "--guidance", 2)
    rows = printed(*measure)["rows"]
    assert [(row["role"], row["guidance"]) for row in rows] == [("teacher", 2.0), ("student", 2.0)]
    assert [row["nfe"] for row in rows] == [2 * rows[0]["steps"], 1]
    refuse("sample", teacher, "--guidance", 2, "--out", tmp_path / "x", says=("digits-teacher", "without classes"))
    assert not (tmp_path / "x").exists()
    refuse(*command, "--out", tmp_path / "y", says=("objective.guidance", "classes"))


def test_another_average_takes_guidance_too(runs: Path, tmp_path: Path) -> None:
    succeed("average", runs / "meanflow", "--ema", "0.1", "--out", tmp_path / "again")
    guidance = GuidanceInput(3.0, 0.2)
    assert torch.equal(sampled(tmp_path / "again", guidance), sampled(runs / "meanflow", guidance))


# Guidance of teachers ------------------------------------------------------------------------------------------------


def test_a_guided_teacher(trained: Path, tmp_path: Path) -> None:
    """Two evaluations per step, samples of the guided field, under any solver and in any window."""
    run, (noise, label) = trained / "teacher", start()
    field = load_model(run, torch.device("cpu")).sampler.field  # type: ignore[attr-defined]
    assert isinstance(field, NetworkField)
    for guidance in (GuidanceInput(2.5), GuidanceInput(2.5, 0.1, 0.8)):
        guided = GuidedField(ClassContrast(field, 10), 2.5, guidance.low, guidance.high)
        wanted = sample_ode(guided, noise, uniform_grid(4), label)
        torch.testing.assert_close(sampled(run, guidance, steps=4), wanted.x)
        assert (sampled(run, None, steps=4) - wanted.x).abs().max() > 1e-4
    command = ("sample", run, "--steps", 2, "--n", 5, "--solver", "heun", "--guidance", 2.5, "--out", tmp_path)
    document = printed(*command)
    assert document["nfe"] == 8
    assert Path(document["samples"]).stem == "heun-guidance-2.5-steps-02-seed-0"


def test_evaluation_of_a_guided_teacher(copied: Copy) -> None:
    measure = ("evaluate", copied("teacher"), "--steps", "1,2", "--features", "pixels", "--n", 50, "--guidance", 2)
    assert [(row["guidance"], row["nfe"]) for row in printed(*measure)["rows"]] == [(2.0, 2), (2.0, 4)]


def test_a_loaded_model_is_left_as_it_was(runs: Path) -> None:
    model = load_model(runs / "meanflow", torch.device("cpu"))
    guided = with_guidance(model, GuidanceInput(3.0))
    assert (model.guidance, guided.guidance) == (1.0, 3.0)
    assert model.sampler.maps[0].guidance == GuidanceInput(1.0)  # type: ignore[attr-defined]


# What a user can get wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_a_student_that_takes_no_guidance(command: str, trained: Path) -> None:
    for name in ("meanflow", "progressive", "consistency"):
        says = (f"digits-{name}", "does not take guidance", "student.guidance_input=true", "teacher.guidance")
        refuse(command, trained / name, "--guidance", 1, says=says)


WRONG = {
    "a window alone": (("--window", "0.1,0.8"), ("--window", "--guidance")),
    "one time": (("--guidance", 2, "--window", "0.1"), ("--window", "two times", "'0.1'")),
    "three times": (("--guidance", 2, "--window", "0,0.5,1"), ("two times", "'0,0.5,1'")),
    "words": (("--guidance", 2, "--window", "a,b"), ("two times", "'a,b'")),
    "nothing": (("--guidance", 2, "--window", ""), ("two times", "''")),
    "the higher first": (("--guidance", 2, "--window", "0.8,0.1"), ("--window", "lower first", "0.8, 0.1")),
    "beyond the noise": (("--guidance", 2, "--window", "0.8,1.1"), ("in [0, 1]", "1.1")),
    "no number": (("--guidance", 2, "--window", "nan,1"), ("in [0, 1]", "nan")),
    "scale zero": (("--guidance", 0), ("--guidance", "positive", "got 0")),
    "an infinite scale": (("--guidance", "inf"), ("--guidance", "positive", "inf")),
}


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_guidance_is_one_sentence(command: str, case: str, runs: Path) -> None:
    options, says = WRONG[case]
    refuse(command, runs / "meanflow", *options, says=says)


# The second time by layers -------------------------------------------------------------------------------------------


def test_a_student_by_layers(deep: Path, tmp_path: Path) -> None:
    """It starts as its teacher where ``r = t``, to the bit; it has no weight more, and is trained and sampled."""
    small = (*student(deep), "student.second_time=layers", "student.early_layers=0.4")
    config, run = load_config("digits-meanflow", list(small)), tmp_path / "run"
    device = torch.device("cpu")
    request = check_training(config, RunDirectory(run), device, processes=1, resume=False, overwrite=False)
    assert request.teacher is not None
    assert request.teacher.net is not None
    assert list(request.student.state_dict()) == list(request.teacher.net.state_dict())
    (x, label), t = start(), torch.linspace(0.2, 1, 5)
    wanted = request.teacher.net(x, t, t, label)
    assert torch.equal(request.student(x, t, t, label), wanted)
    assert not torch.equal(request.student(x, t, 0 * t, label), wanted)

    succeed("distill", "digits-meanflow", *small, "train.steps=6", "--out", run)
    card = card_of(run)
    assert (card["two_times"], card["split"], card["params"]) == (True, 0.4, card_of(deep)["params"])
    net = load_model(run, device).sampler.maps[0].net  # type: ignore[attr-defined]
    assert net.early == 1
    assert sampled(run, None).isfinite().all()


def test_stages_of_students_by_layers(deep: Path, tmp_path: Path) -> None:
    """Weights pass from one stage of progressive distillation to the next."""
    overrides = ("student.second_time=layers", "objective.start_steps=4", "train.steps=2")
    succeed("distill", "digits-progressive", *student(deep), *overrides, "--out", tmp_path / "run")
    assert card_of(tmp_path / "run")["split"] == 0.7
    for steps in (1, 2):
        assert sampled(tmp_path / "run", None, steps=steps).isfinite().all()


def test_a_network_of_one_block_cannot_be_split(trained: Path, tmp_path: Path) -> None:
    command = ("distill", "digits-meanflow", *student(trained / "teacher"), "student.second_time=layers")
    refuse(*command, "--out", tmp_path / "run", says=("one block", "two or more"))
    assert not (tmp_path / "run").exists()


def test_a_model_of_before_there_was_a_choice(copied: Copy) -> None:
    """Its card says nothing of splits and guidance: the gap, and no input."""
    run = copied("meanflow")
    before = sampled(run, None)
    card = card_of(run)
    assert (card.pop("split"), card.pop("guidance_input")) == (None, False)
    (run / "model" / "config.json").write_text(json.dumps(card))
    assert torch.equal(sampled(run, None), before)


@pytest.mark.parametrize("change", [{"split": "half"}, {"split": 2}, {"guidance_input": True}])
def test_a_card_that_does_not_fit_its_weights(change: dict[str, Any], copied: Copy) -> None:
    run = copied("meanflow")
    (run / "model" / "config.json").write_text(json.dumps({**card_of(run), **change}))
    for command in ("sample", "evaluate"):
        refuse(command, run, "--steps", 1, says=("model",))
