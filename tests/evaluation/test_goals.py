"""Goals: what some student has to reach, how sure that is, and how reports and terminals say it."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import cli, refuse, succeed
from reports import rich_report

from fewstep.errors import GateFailed, UsageError
from fewstep.evaluation.bounds import Relative
from fewstep.evaluation.gates import check_gates, parse_gate
from fewstep.evaluation.goals import Goal, parse_goal, reached
from fewstep.evaluation.report import standing, write_report
from fewstep.evaluation.results import Measured, Report, over_seeds


@pytest.fixture(scope="module")
def rich() -> Report:
    """Meanflow has 0.43 at 4 steps and 0.91 at 1, the teacher 0.54 at 64. Debiased distances are known to 0.03, their
    differences to the teacher's to 0.02; recall to 0.01 and 0.02."""
    return rich_report()


def at(report: Report, *kept: tuple[str, int]) -> Report:
    return replace(report, rows=tuple(row for row in report.rows if (row.model, row.steps) in kept))


# The command line's form ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "goal", "said"),
    [
        ("fd_x=1.05*teacher@4", Goal("fd_x", "max", Relative(1.05), 4), "fd_x ≤ 1.05 × teacher at 4 steps"),
        ("recall=teacher-0.02@1", Goal("recall", "min", Relative(1, -0.02), 1), "recall ≥ teacher - 0.02 at 1 step"),
        ("coverage=0.9", Goal("coverage", "min", 0.9), "coverage ≥ 0.9"),
        ("latency_ms=0.05*teacher", Goal("latency_ms", "max", Relative(0.05)), "latency_ms ≤ 0.05 × teacher"),
        ("images_per_s=1e4", Goal("images_per_s", "min", 1e4), "images_per_s ≥ 10000"),
    ],
)
def test_a_goal_is_on_the_better_side(text: str, goal: Goal, said: str) -> None:
    assert parse_goal(text) == goal
    assert str(goal) == said


def test_what_is_no_goal() -> None:
    for text in ("fd_x", "fd_x=", "=1", "fd_x=teacher*2", "fd_x=1@many"):
        with pytest.raises(UsageError, match="--goal takes METRIC=BOUND"):
            parse_goal(text)
    with pytest.raises(UsageError, match="neither more nor less of density_x is known to be better"):
        parse_goal("density_x=1")


# Whether some student reaches it -------------------------------------------------------------------------------------


def test_some_student_is_enough_where_a_gate_asks_all(rich: Report) -> None:
    goal, students = "fd_pixels=0.5@4", [row for row in rich.rows if row.role == "student"]
    found = reached(parse_goal(goal), rich)
    assert found.row is not None
    assert (found.row.model, found.row.steps, found.kept) == ("digits-meanflow", 4, True)
    assert found.missed_by is None
    with pytest.raises(GateFailed, match=r"\(digits-progressive\)"):
        check_gates([parse_gate(goal, "max")], students)


def test_the_nearest_is_named_where_none_reaches_it(rich: Report) -> None:
    low = reached(Goal("fd_pixels", "max", 0.4), rich)  # at any number of steps: 0.43 at 4
    assert low.row is not None
    assert (low.row.model, low.row.steps, low.kept) == ("digits-meanflow", 4, False)
    assert low.missed_by == pytest.approx(0.03 / 0.4)
    high = reached(Goal("recall_pixels", "min", Relative(1.0, 0.1), 4), rich)
    best = max(row.metrics["recall_pixels"].value for row in rich.rows if row.role == "student" and row.steps == 4)
    assert high.row is not None
    assert (high.value, high.kept) == (best, False)
    assert high.missed_by == pytest.approx((high.bound - best) / high.bound)


def test_the_bound_is_the_teachers_at_most_steps(rich: Report) -> None:
    found = reached(Goal("fd_pixels", "max", Relative(1.05), 4), rich)
    assert found.teacher is not None
    assert found.teacher.steps == 64
    assert found.bound == pytest.approx(1.05 * 0.54)
    assert found.margin == pytest.approx(0.43 - 1.05 * 0.54)
    quick = reached(parse_goal("latency_ms=0.1*teacher@4"), rich)
    assert (quick.value, quick.bound, quick.kept) == (pytest.approx(1.65), pytest.approx(2.56), True)
    assert quick.within_noise is None


def test_a_student_is_held_against_its_own_teacher(rich: Report) -> None:
    """Another teacher is better. Who learnt from the first is not measured by it; who learnt from neither is by any."""
    teacher = next(row for row in rich.rows if row.role == "teacher" and row.steps == 64)
    metrics = {**teacher.metrics, "fd_pixels": Measured(0.1)}
    other = replace(teacher, model="better", digest="other", metrics=metrics)
    both = replace(rich, rows=(other, *rich.rows))
    assert reached(Goal("fd_pixels", "max", Relative(), 4), both).bound == pytest.approx(0.54)
    models = tuple(replace(model, teacher_digest=None) for model in rich.models)
    assert reached(Goal("fd_pixels", "max", Relative(), 4), replace(both, models=models)).bound == pytest.approx(0.1)


def test_what_cannot_be_answered_is_said(rich: Report) -> None:
    teachers = replace(rich, rows=tuple(row for row in rich.rows if row.role == "teacher"))
    students = replace(rich, rows=tuple(row for row in rich.rows if row.role == "student"))
    with pytest.raises(UsageError, match="did you mean 'fd_pixels'"):
        reached(parse_goal("fd_pixel=1"), rich)
    with pytest.raises(UsageError, match="no student was measured"):
        reached(parse_goal("fd_pixels=1"), teachers)
    with pytest.raises(UsageError, match="no teacher was measured"):
        reached(parse_goal("fd_pixels=teacher"), students)
    missing = reached(parse_goal("fd_pixels=1@3"), rich)
    assert missing.row is None
    assert not missing.kept
    nan = {"fd_pixels": Measured(math.nan)}
    broken = replace(students, rows=(replace(students.rows[0], metrics=nan), *students.rows[1:]))
    assert reached(parse_goal("fd_pixels=9@1"), broken).value == pytest.approx(1.22)


# How sure it is ------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_share_of_the_teachers(rich: Report) -> None:
    """``a - f b`` is ``(a - b) + (1 - f) b``: 0.02 + |1 - f| 0.03, or 0.03 + f 0.03 where that is less."""

    def half(metric: str, bound: float | Relative) -> float | None:
        return reached(Goal(metric, "max", bound, 4), at(rich, ("digits-teacher", 64), ("digits-meanflow", 4))).half

    assert half("fd_pixels", Relative()) == pytest.approx(0.02)
    assert half("fd_pixels", Relative(1.0, 0.5)) == pytest.approx(0.02)
    assert half("fd_pixels", Relative(1.05)) == pytest.approx(0.0215)
    assert half("fd_pixels", Relative(0.1)) == pytest.approx(0.033)
    assert half("fd_pixels", 0.4) == pytest.approx(0.03)
    assert half("recall_pixels", Relative(1.0, -0.02)) == pytest.approx(0.02)
    assert half("fd_digits", Relative()) is None


def test_within_noise(rich: Report) -> None:
    """0.43 is 0.03 from 0.4, and 0.43 - f 0.54 is within 0.02 + |1 - f| 0.03 of 0 for f from 0.754 to 0.842."""
    near = {share: reached(Goal("fd_pixels", "max", Relative(share), 4), rich) for share in (0.74, 0.76, 0.84, 0.85)}
    assert [found.kept for found in near.values()] == [False, False, True, True]
    assert [found.within_noise for found in near.values()] == [False, True, True, False]
    said = [standing.outcome(found) for found in near.values()]
    assert said == ["missed by 7.6 %", "missed by 4.8 %, within noise", "reached, within noise", "reached"]
    assert standing.outcome(reached(parse_goal("fd_pixels=0.1@1"), rich)) == "missed by 810 %"
    assert standing.outcome(reached(parse_goal("fd_pixels=0@4"), rich)) == "missed by 0.430"


def test_trainings_tell_the_noise_of_their_means(rich: Report) -> None:
    """Three trainings each, the student's spread 1.1 times the teacher's: Welch's interval of ``a - 1.1 b`` has four
    degrees of freedom, and of ``a`` alone Student's has two."""
    small = at(rich, ("digits-teacher", 64), ("digits-meanflow", 4))
    values = {"digits-teacher": (0.50, 0.55, 0.57), "digits-meanflow": (0.406, 0.461, 0.483)}

    def of_seed(seed: int) -> Report:
        rows = (replace(row, metrics={"fd_pixels": Measured(values[row.model][seed])}) for row in small.rows)
        return replace(small, rows=tuple(rows))

    merged = over_seeds({seed: of_seed(seed) for seed in range(3)})
    sd = next(row.metrics["fd_pixels"].sd or 0.0 for row in merged.rows if row.role == "student")
    plain = reached(Goal("fd_pixels", "max", 0.4), merged)
    assert plain.half == pytest.approx(4.30265 * sd / math.sqrt(3), rel=1e-4)
    scaled = reached(Goal("fd_pixels", "max", Relative(1.1)), merged)
    assert scaled.half == pytest.approx(2.77645 * sd * math.sqrt(2 / 3), rel=1e-4)
    assert scaled.margin == pytest.approx(0.45 - 1.1 * 0.54)


# In reports and at a terminal ----------------------------------------------------------------------------------------

GOALS = ("fd_pixels=1.1*teacher@4", "fd_pixels=0.4@4", "recall_pixels=0.5@3")


def test_goals_are_on_the_pages(rich: Report, tmp_path: Path) -> None:
    few = at(rich, ("digits-teacher", 64), ("digits-meanflow", 4), ("digits-progressive", 4))
    found = [reached(parse_goal(text), few) for text in GOALS]
    write_report(few, tmp_path, goals=found)
    text = (tmp_path / "report.md").read_text()
    line = "| fd_pixels ≤ 1.1 × teacher at 4 steps | reached | digits-meanflow | 4 | 0.430 | 0.594 |"
    assert f"{line} -0.164 [-0.187, -0.141] |" in text
    assert "| fd_pixels ≤ 0.4 at 4 steps | missed by 7.5 %, within noise | digits-meanflow | 4 | 0.430 |" in text
    assert "| recall_pixels ≥ 0.5 at 3 steps | not measured | – | – | – | – | – |" in text
    assert "The teacher is digits-teacher at 64 steps." in text
    page = (tmp_path / "index.html").read_text()
    assert page.index("<h2>Goals</h2>") < page.index("<h2>Results</h2>")
    assert "missed by 7.5 %, within noise" in page


def test_a_terminal_has_them_without_the_differences(rich: Report) -> None:
    from rich.console import Console

    console = Console(width=130, file=io.StringIO(), color_system=None)
    console.print(standing.console_goals([reached(parse_goal(text), rich) for text in GOALS], rich))
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in console.file.getvalue().splitlines()]
    assert ["fd_pixels ≤ 1.1 × teacher at 4 steps", "reached", "digits-meanflow", "4", "0.430", "0.594"] in lines


def test_the_command_tells_and_does_not_fail(rich: Report, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.json").write_text(json.dumps(at(rich, ("digits-teacher", 64), ("digits-meanflow", 4)).to_json()))
    asked = [word for text in GOALS for word in ("--goal", text)]
    done = succeed("report", run, *asked, "--json")
    goals = json.loads(done.stdout)["goals"]
    assert [(goal["outcome"], goal["reached"]) for goal in goals] == [
        ("reached", True),
        ("missed by 7.5 %, within noise", False),
        ("not measured", False),
    ]
    assert (goals[0]["low"], goals[0]["high"]) == (pytest.approx(-0.187), pytest.approx(-0.141))
    assert "missed by 7.5 %" in done.stderr
    refuse("report", run, "--goal", "fd_pixels", says=("--goal takes METRIC=BOUND",))
    assert cli("report", run, "--goal", "fd_pixle=1").exit_code == 2
