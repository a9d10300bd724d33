"""A comparison's runs: checked before any of them starts, trained seed by seed, measured, merged over the seeds.

Below the folder of a comparison::

    comparison.yaml  results.json  report/         what was asked for; means and spreads over the seeds
    seed-0/results.json  seed-0/RECIPE/...         the runs of a seed: its own teacher, and students of that teacher
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.checkpoint import RunDirectory
from fewstep.comparison.config import Budget, Comparison, Overrides, run_config
from fewstep.config import RunConfig, command_of, config_changes, read_config
from fewstep.distill.export import export
from fewstep.distill.run import Progress, Request, check_training, run_training
from fewstep.distill.stage import Stage, first_steps
from fewstep.errors import FewstepError, UsageError
from fewstep.evaluation.results import Report, read_results
from fewstep.evaluation.sweep import Seen
from fewstep.students.load import load_model
from fewstep.teachers.config import RunTeacher
from fewstep.workflows import default_device, evaluate_runs, ready_extractors, served_steps


@dataclass(frozen=True)
class Run:
    """One training of a comparison: what is trained, and where."""

    config: RunConfig
    directory: RunDirectory


def seed_folder(out: Path, seed: int) -> Path:
    return out / f"seed-{seed}"


def seed_runs(comparison: Comparison, folder: Path, seed: int, overrides: Sequence[str] = ()) -> list[Run]:
    """The runs of one seed below ``folder``, the teacher first. ``overrides`` are for all of them, the teacher too."""
    further = [f"seed={seed}", *overrides]
    teacher = _config(comparison.teacher, comparison.set_teacher, further, trains="teach")
    path = folder / teacher.name
    runs = [Run(teacher, RunDirectory(path))]
    for source in comparison.students:
        own = {**comparison.set, **comparison.set_for.get(source, {})}
        student = _config(source, own, further, trains="distill")
        if student.teacher is not None:
            if not isinstance(student.teacher, RunTeacher):
                raise UsageError(
                    f"{source} learns from a teacher of kind {student.teacher.kind}, and the students of a comparison "
                    f"from {comparison.teacher}: its teacher has to be of kind run"
                )
            student = student.model_copy(update={"teacher": student.teacher.model_copy(update={"path": str(path)})})
        if student.data != teacher.data:
            raise UsageError(f"{source} has other data than {comparison.teacher}: their rows would not compare")
        if student.name in {run.config.name for run in runs}:
            raise UsageError(f"two runs of this comparison are called {student.name}: give {source} another name")
        runs.append(Run(student, RunDirectory(folder / student.name)))
    return runs


def _config(source: str, overrides: Overrides, further: Sequence[str], *, trains: str) -> RunConfig:
    config = run_config(source, overrides, further)
    if command_of(config) != trains:
        place, other = ("teacher", "student") if trains == "teach" else ("students", "teacher")
        raise UsageError(f"{place}: {source} trains a {other}")
    return config


def check_runs(comparison: Comparison, runs: Sequence[Run]) -> list[Budget]:
    """Find all that can be wrong with the configs of a seed's runs before the first of them starts: ``FewstepError``.

    Students are checked against an untrained teacher, exported as the trained one will be. Returns the budgets.
    """
    device = default_device()
    first, *students = runs
    with tempfile.TemporaryDirectory() as temporary:
        stand_in = RunDirectory(Path(temporary) / "teacher")
        elsewhere = RunDirectory(Path(temporary) / "run")

        def checked(config: RunConfig) -> Request:
            try:
                return check_training(config, elsewhere, device, processes=1, resume=False, overwrite=False)
            except FewstepError as error:
                said = str(error).replace(str(stand_in.path), str(first.directory.path))
                raise _named(error, f"{config.name}: {said}") from error

        request = checked(first.config)
        weights = request.student.state_dict()
        export(first.config, stand_in, request.data, None, request.student, {0: weights}, 0, ())
        budgets = [_budget(first.config, request.stages)]
        for run in students:
            config = run.config
            if isinstance(config.teacher, RunTeacher):
                teacher = config.teacher.model_copy(update={"path": str(stand_in.path)})
                config = config.model_copy(update={"teacher": teacher})
            stages = checked(config).stages
            _check_serves(comparison, config.name, stages)
            budgets.append(_budget(config, stages))
    ready_extractors(comparison.evaluate, request.data, device)
    return budgets


def check_place(run: Run, *, resume: bool, overwrite: bool) -> None:
    """What may lie where a run goes: nothing, with ``resume`` a run of the same config, or one to be overwritten."""
    path = run.directory.path
    if not resume:
        run.directory.check(resume=False, overwrite=overwrite and path.exists())
    elif (path / "config.yaml").is_file():
        changes = config_changes(read_config(path), run.config)
        if changes:
            more = " and more" if len(changes) > 3 else ""
            raise UsageError(f"{path} was trained with another config: {'; '.join(changes[:3])}{more}")


def _check_serves(comparison: Comparison, name: str, stages: Sequence[Stage]) -> None:
    serves = {stage.serves for stage in stages}
    if 0 not in serves and not serves & set(comparison.evaluate.steps):
        asked = ", ".join(map(str, comparison.evaluate.steps))
        raise UsageError(
            f"evaluate.steps asks for {asked}, and {name} serves {', '.join(map(str, sorted(serves)))}: "
            "there would be nothing to measure"
        )


def _budget(config: RunConfig, stages: Sequence[Stage]) -> Budget:
    steps = first_steps(tuple(stages))[-1]
    return Budget(config.name, steps, steps * config.train.batch_size)


def train_run(run: Run, *, resume: bool, overwrite: bool, stopped: Callable[[], bool]) -> Iterator[Progress]:
    """Progress of one run; with ``resume`` a finished run is left alone and an unfinished one goes on."""
    if resume and (run.directory.model / "config.json").is_file():
        return iter(())
    again = resume and run.directory.resumes()
    fresh = overwrite and run.directory.path.exists()
    return run_training(
        run.config, run.directory, resume=again, overwrite=fresh or (resume and not again), stopped=stopped
    )


def measure_seed(comparison: Comparison, runs: Sequence[Run], seed: int, keep: Path, report: Seen) -> Report:
    """The finished runs of a seed, the teacher at ``teacher_steps`` and each student at the steps that it serves.

    Noise and labels come from the same seed as the training. Finished rows are kept in ``keep``, for a call that goes
    on where this one is stopped.
    """
    paths = [run.directory.path for run in runs]
    return evaluate_runs(paths, settings=comparison.evaluate, seed=seed, served_only=True, keep=keep, report=report)


def measured_already(comparison: Comparison, runs: Sequence[Run], folder: Path) -> Report | None:
    """The results of a seed that an earlier call wrote, if they are of these weights and of these settings."""
    path = folder / "results.json"
    if not path.is_file():
        return None
    found = read_results(path)
    settings, expected = comparison.evaluate, []
    for run in runs:
        model = load_model(run.directory.path, torch.device("cpu"))
        asked = served_steps(model, settings.steps)
        if model.role == "teacher":
            asked = settings.teacher_steps or run.config.evaluate.steps
        expected += [(model.name, model.digest, steps, settings.n) for steps in sorted(asked)]
    same = (
        [(row.model, row.digest, row.steps, row.n) for row in found.rows] == expected
        and {row.sampler for row in found.rows if row.role == "teacher"} == {settings.solver}
        and {row.precision for row in found.rows} == {settings.precision}
        and list(found.reference.get("extractors", ())) == list(settings.features)
    )
    return found if same else None


def _named(error: FewstepError, message: str) -> FewstepError:
    """The same failure under another message."""
    named = FewstepError(message)
    named.exit_code = error.exit_code
    return named
