"""Sweep runs side by side and write OUT/results.json: one set of samples, features and references for all of them.

    python measure.py RUN [RUN ...] --out OUT --n 10000 --steps 1,2,4,8 --teacher-steps 1,100 --features classifier:DIR

Each student is measured at those of the steps that it serves. A call that was stopped goes on from its last row.
"""

import argparse
import sys
from pathlib import Path

from fewstep.console import meter, stderr
from fewstep.errors import FewstepError
from fewstep.evaluation.config import EvaluateConfig
from fewstep.evaluation.report.tables import console_table
from fewstep.evaluation.results import Row
from fewstep.workflows import evaluate_runs, write_results


def counts(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, required=True)
    parser.add_argument("--steps", type=counts, required=True)
    parser.add_argument("--teacher-steps", type=counts, required=True)
    parser.add_argument("--features", required=True)
    parser.add_argument("--precision", default="fp32", help="of the networks that sample")
    parser.add_argument("--batch-size", type=int, default=1000)
    asked = parser.parse_args(words)
    settings = EvaluateConfig(
        n=asked.n,
        steps=asked.steps,
        teacher_steps=asked.teacher_steps,
        features=tuple(asked.features.split(",")),
        batch_size=asked.batch_size,
        precision=asked.precision,
    )
    asked.out.mkdir(parents=True, exist_ok=True)
    try:
        with meter(f"measure {asked.out.name}") as shown:

            def seen(row: Row, done: int, total: int) -> None:
                shown.update(done, total, f"rows ({row.model}, {row.steps} steps)")

            report = evaluate_runs(
                asked.runs, settings=settings, served_only=True, keep=asked.out / "evaluation", report=seen
            )
    except FewstepError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    write_results(asked.out / "results.json", report)
    stderr().print(console_table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
