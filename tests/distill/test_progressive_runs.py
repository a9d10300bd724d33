"""Progressive distillation as a user meets it: five stages down to one step, killed and resumed; each stage's student
on its own nodes; guidance; what is refused."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import contents, refuse, student, succeed

import fewstep.distill.progressive.plan as planning
from fewstep.checkpoint import checkpoints, read_checkpoint
from fewstep.data.dataset import Batch
from fewstep.distill.objective import LossOutput
from fewstep.distill.progressive.objective import ProgressiveStage
from fewstep.errors import UsageError
from fewstep.files import read_json
from fewstep.flow import TimeDomain
from fewstep.grids import Grid, cosine_nodes, thinned, uniform_nodes
from fewstep.keys import Key
from fewstep.sampling import MapSampler
from fewstep.students.load import load_model
from fewstep.students.maps import AverageVelocityMap, GuidanceInput
from fewstep.workflows import sample_run

STEPS = (16, 8, 4, 2, 1)
FIVE = ("objective.start_steps=32", "objective.last_stages_factor=2", "train.steps=4", "train.checkpoint_every=3")
COSINE = ("objective.grid.kind=cosine", "objective.solver=midpoint", "objective.substeps=2", "objective.weight=data")
OPTIMISED = ("objective.grid={kind: optimised, fine: 40, samples: 8}",)
LENGTHS = (4, 4, 4, 8, 8)
LAST = sum(LENGTHS)
MIDDLE_OF_THE_THIRD = 4 + 4 + 2


def command(teacher: Path, *overrides: str) -> tuple[str, ...]:
    return ("distill", "digits-progressive", *student(teacher), *FIVE, *overrides)


@pytest.fixture(scope="module")
def runs(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``cosine`` and ``optimised``: 32 -> 1 steps in five stages, every checkpoint kept."""
    folder = tmp_path_factory.mktemp("five")
    for name, overrides in (("cosine", COSINE), ("optimised", OPTIMISED)):
        kept = "train.keep_checkpoints=100"
        succeed(*command(trained / "teacher", *overrides, kept), "--out", folder / name)
    return folder


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(runs / name, tmp_path / name))


def weights(run: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in (run / "model").glob("*.safetensors")}
    assert len(files) == len(STEPS)
    return files


def killed_at(step: int, *arguments: object) -> None:
    """``fewstep ARGUMENTS`` in a process that kills itself (SIGKILL) inside an optimiser step."""
    forward = ProgressiveStage.forward

    def deadly(self: ProgressiveStage, batch: Batch, key: Key) -> LossOutput:
        if key.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, batch, key)

    child = os.fork()
    if child == 0:
        try:
            ProgressiveStage.forward = deadly  # type: ignore[method-assign]
            succeed(*arguments)
        finally:
            os._exit(0)
    _, ended = os.waitpid(child, 0)
    assert os.WIFSIGNALED(ended)
    assert os.WTERMSIG(ended) == signal.SIGKILL


# ------------------------------------------------------------------------------------------------------------- stages


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("grid", ["cosine", "optimised"])
def test_killed_in_the_middle_of_the_third_stage_of_five(grid: str, runs: Path, trained: Path, tmp_path: Path) -> None:
    """And once more at the first step of the last: resumed to the bits of a run that was never killed."""
    overrides = {"cosine": COSINE, "optimised": OPTIMISED}[grid]
    line = (*command(trained / "teacher", *overrides), "--out", tmp_path / "run")
    killed_at(MIDDLE_OF_THE_THIRD, *line)
    newest = read_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1]).state
    assert (newest["step"], newest["stage"]) == (9, 2)
    killed_at(LAST - LENGTHS[-1], *line, "--resume")
    succeed(*line, "--resume")
    assert weights(tmp_path / "run") == weights(runs / grid)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, LAST + 1))
    assert list(dict.fromkeys(line["stage"] for line in lines)) == [f"{2 * n} -> {n} steps" for n in STEPS]


def test_every_stage_starts_afresh_from_the_student_before(runs: Path) -> None:
    """The learning rate falls to zero within each stage and the last two are twice as long; Adam's count begins again;
    the teacher of a stage, and its start, are the raw weights of the stage before and no average."""
    lines = [json.loads(line) for line in (runs / "cosine" / "metrics.jsonl").read_text().splitlines()]
    rates: dict[str, list[float]] = {}
    for line in lines:
        rates.setdefault(line["stage"], []).append(line["lr"])
    assert [len(found) for found in rates.values()] == list(LENGTHS)
    for found in rates.values():
        assert found == pytest.approx([1e-3 * (1 - k / len(found)) for k in range(len(found))])
    saved = [read_checkpoint(path) for path in checkpoints(runs / "cosine" / "checkpoints")]
    ends: dict[int, Any] = {}
    for checkpoint in saved:
        done, stage = checkpoint.state["done"], checkpoint.state["stage"]
        assert int(checkpoint.groups["optimizer"]["0.step"]) == done
        if stage:
            before = ends[stage - 1].groups
            for name, value in checkpoint.groups["previous"].items():
                assert torch.equal(value, before["student"][name])
            assert any(not torch.equal(value, before["ema-0.999"][name]) for name, value in before["student"].items())
        assert checkpoint.groups["objective"]["grid"].tolist() == list(cosine_nodes(STEPS[stage]))
        if done == LENGTHS[stage]:
            ends[stage] = checkpoint
    assert list(ends) == [0, 1, 2, 3, 4]


# -------------------------------------------------------------------------------------------------------------- nodes


@pytest.mark.parametrize("name", ["cosine", "optimised"])
def test_every_stage_is_a_student_on_its_own_nodes(name: str, runs: Path) -> None:
    """Each one's grid is each second node of the one before; samples are its jumps from node to node, by hand."""
    entries = read_json(runs / name / "model" / "sampler.json")["steps"]
    assert sorted(map(int, entries), reverse=True) == list(STEPS)
    grids = {int(steps): tuple(entry["times"]) for steps, entry in entries.items()}
    if name == "cosine":
        assert grids[16] == thinned(cosine_nodes(32), 16)
    else:
        assert set(grids[16]) <= set(uniform_nodes(40))
        assert grids[16] != uniform_nodes(16)
    for more, fewer in pairwise(STEPS):
        assert grids[fewer] == grids[more][::2]
    sampler = load_model(runs / name, torch.device("cpu")).sampler
    assert isinstance(sampler, MapSampler)
    index = torch.arange(5)
    for steps in STEPS:
        flow_map = sampler.maps[steps]
        assert isinstance(flow_map, AverageVelocityMap)
        x = Key(0).normal("noise", index, (1, 8, 8))
        with torch.no_grad():
            for t, r in pairwise(torch.tensor(grids[steps]).tolist()):
                u = flow_map.net(x, torch.full((5,), t), torch.full((5,), r), index % 10)
                x = x - (torch.full((5, 1, 1, 1), t) - r) * u
        found = sample_run(runs / name, steps=steps, n=5, seed=0, batch_size=5).x
        torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-6)


def test_another_number_of_steps_is_refused(runs: Path, tmp_path: Path) -> None:
    for steps in (3, 32):
        says = (f"trained for 1, 2, 4, 8, 16 steps, not for {steps}",)
        refuse("sample", runs / "cosine", "--steps", steps, "--out", tmp_path / "samples", says=says)
        with pytest.raises(UsageError, match=says[0]):
            sample_run(runs / "cosine", steps=steps, n=2, seed=0, batch_size=2)


def test_a_map_of_another_number_of_steps_is_refused() -> None:
    def flow_map(grid: Grid) -> AverageVelocityMap:
        return AverageVelocityMap(lambda x, t, r, label: x, TimeDomain("grid", grid))

    x, index = torch.zeros(2, 1), torch.arange(2)
    MapSampler({4: flow_map(cosine_nodes(4))}, "jumps")(4, x, None, Key(0), index)
    with pytest.raises(ValueError, match="this student's grid has 2 steps, not 4"):
        MapSampler({4: flow_map(cosine_nodes(2))}, "jumps")(4, x, None, Key(0), index)


TIMES: dict[str, Any] = {
    "too few": [1.0, 0.5, 0.0],
    "rising": [1.0, 0.2, 0.5, 0.7, 0.0],
    "not to data": [1.0, 0.8, 0.5, 0.3, 0.1],
    "no numbers": [1.0, "half", 0.5, 0.3, 0.0],
    "nothing": None,
}


@pytest.mark.parametrize("case", TIMES)
def test_times_that_do_not_fit_the_steps_are_refused(case: str, copy: Callable[[str], Path], tmp_path: Path) -> None:
    run = copy("cosine")
    file = run / "model" / "sampler.json"
    sampler = read_json(file)
    sampler["steps"]["4"]["times"] = TIMES[case]
    file.write_text(json.dumps(sampler))
    for what in ("sample", "evaluate"):
        refuse(what, run, "--steps", 4, says=(str(run / "model"), "damaged"))


def test_a_checkpoint_of_another_grid_is_refused(
    copy: Callable[[str], Path], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the search to find another one on this machine: nothing is trained on it, and nothing is changed."""
    run = copy("optimised")
    shutil.rmtree(run / "model")
    for path in checkpoints(run / "checkpoints")[4:]:
        shutil.rmtree(path)
    before = contents(run)
    monkeypatch.setattr(planning, "optimised_nodes", lambda costs, steps: uniform_nodes(steps))
    line = (*command(trained / "teacher", *OPTIMISED, "train.keep_checkpoints=100"), "--out", run, "--resume")
    refuse(*line, says=("step-0000000", "is of a student on the nodes 1, ", "--overwrite"))
    assert contents(run) == before


# ----------------------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("stages", ["one", "two"])
def test_guidance_as_an_input(stages: str, trained: Path, tmp_path: Path) -> None:
    """Chosen when it samples, at no cost, at every step count; killed and resumed where its second stage begins."""
    told = ("student.guidance_input=true", "objective.guidance={scale: 1.0, largest: 4.0}")
    fast = ("train.lr=0.03", "train.ema=[0.1]", "objective.start_steps=4", f"objective.guidance_stages={stages}")
    line = command(trained / "teacher", *told, *fast, "objective.grid={kind: shifted, shift: 3}")
    succeed(*line, "--out", tmp_path / "run")
    card = read_json(tmp_path / "run" / "model" / "config.json")
    assert (card["guidance_input"], card["train"]["steps"]) == (True, 16 if stages == "one" else 20)
    assert sorted(read_json(tmp_path / "run" / "model" / "sampler.json")["steps"]) == ["1", "2"]
    names = [json.loads(text)["stage"] for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = ["guided velocity"] if stages == "two" else []
    assert list(dict.fromkeys(names)) == [*first, "4 -> 2 steps", "2 -> 1 steps"]
    for steps in (1, 2):
        off, two, four = (
            sample_run(tmp_path / "run", steps=steps, n=5, seed=0, batch_size=5, guidance=guidance)
            for guidance in (None, GuidanceInput(2.0), GuidanceInput(4.0))
        )
        assert (off.nfe, two.nfe) == (steps, steps)
        assert not torch.equal(off.x, two.x)
        assert not torch.equal(two.x, four.x)
    if hasattr(os, "fork"):
        killed_at(4, *line, "--out", tmp_path / "killed")
        succeed(*line, "--out", tmp_path / "killed", "--resume")
        files = [sorted((tmp_path / name / "model").glob("*.safetensors")) for name in ("run", "killed")]
        assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


def test_guidance_twice_is_refused(trained: Path, tmp_path: Path) -> None:
    line = command(trained / "teacher", "objective.guidance={scale: 2.0}", "teacher.guidance=2")
    refuse(*line, "--out", tmp_path / "run", says=("objective.guidance", "teacher.guidance", "exclude each other"))
    assert not (tmp_path / "run").exists()
