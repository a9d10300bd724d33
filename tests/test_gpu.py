"""What must hold on an accelerator; skipped where there is none. Run these alone with ``pytest -m gpu``."""

from pathlib import Path

import pytest
import torch
from family import meanflow

from fewstep.checkpoint import RunDirectory
from fewstep.config import load_config
from fewstep.data.dataset import BatchSource
from fewstep.data.load import digits
from fewstep.distill.consistency.measures import step_length
from fewstep.distill.consistency.objective import AlongTeacher, ConsistencyMatching
from fewstep.distill.consistency.schedules import Constant
from fewstep.distill.consistency.steps import GridSteps, even_nodes
from fewstep.distill.objective import Objective
from fewstep.distill.run import run_training
from fewstep.evaluation.config import EvaluateConfig
from fewstep.files import read_json
from fewstep.keys import Key
from fewstep.networks.build import build_network
from fewstep.networks.config import MLPConfig
from fewstep.teachers.network import NetworkField
from fewstep.workflows import evaluate_runs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_keyed_numbers_are_those_of_the_cpu() -> None:
    """The Philox words are integers, so equal to the bit; Box-Muller in float64 leaves at most a rounding."""
    index = torch.arange(1000)
    here, there = (Key(3, 7)._words("noise", index.to(device), 63) for device in ("cpu", "cuda"))
    assert torch.equal(here, there.cpu())
    here, there = (Key(3, 7).normal("noise", index.to(device), (63,)) for device in ("cpu", "cuda"))
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["meanflow", "consistency"])
def test_losses_are_those_of_the_cpu(kind: str) -> None:
    losses = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        torch.manual_seed(0)
        teacher, student = (
            build_network(MLPConfig(width=32, depth=2), (1, 8, 8), 10, two_times=True) for _ in range(2)
        )
        for net in (teacher, student):
            torch.nn.init.normal_(net.leave.weight, std=0.1)
        objective: Objective
        if kind == "meanflow":
            objective = meanflow(student, NetworkField(teacher.to(device)))
        else:
            objective = ConsistencyMatching(
                student,
                steps=GridSteps(even_nodes, Constant(8)),
                nearer=AlongTeacher(NetworkField(teacher.to(device)), "heun"),
                unit=step_length,
                target_decay=0.9,
            )
        objective.to(device)
        batch = BatchSource(digits(), 64, 0, device=device).batch(3)
        losses.append(objective(batch, Key(0, 3)).per_sample_B.detach().cpu())
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-3, atol=1e-5)


def test_teacher_student_evaluation_end_to_end(tmp_path: Path) -> None:
    short = ["train.steps=20", "train.warmup_steps=2", "train.checkpoint_every=10"]
    runs = []
    for name in ("digits-teacher", "digits-progressive", "digits-consistency"):
        own = [] if name == "digits-teacher" else [f"teacher.path={tmp_path / 'digits-teacher'}"]
        run = RunDirectory(tmp_path / name)
        for _ in run_training(load_config(name, [*short, *own]), run, resume=False, overwrite=False):
            pass
        assert read_json(run.path / "status.json")["state"] == "done"
        runs.append(run.path)
    settings = EvaluateConfig(n=200, features=("pixels", "digits"), teacher_steps=(1, 4))
    rows = evaluate_runs(runs, settings=settings).rows
    assert len(rows) == 2 + 4 + 4
    assert all(torch.isfinite(torch.tensor(row.metrics["fd_pixels"].value)) for row in rows)
