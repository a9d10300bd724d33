"""Train recipes over several seeds and append what they reached to the ledger.

    python benchmarks/recipes.py digits-teacher digits-meanflow --seeds 0,1,2 --ledger benchmarks/ledger/NAME.jsonl
    python benchmarks/recipes.py digits-teacher digits-meanflow --seeds 0,1,2 \
        --vary student.network.max_frequency=3,8,60 --vary-in digits-teacher --ledger benchmarks/ledger/NAME.jsonl

The first recipe is the teacher of the others. ``--vary KEY=A,B,C`` repeats everything with each value of one config
key, in the recipe that ``--vary-in`` names. One JSON row per model and step count; the ledger is only ever appended to.
``--summary`` prints mean and standard deviation over the seeds of a ledger file and trains nothing.
"""

import argparse
import datetime
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from fewstep.checkpoint import RunDirectory
from fewstep.config import load_config
from fewstep.distill.run import run_training
from fewstep.environment import describe_environment
from fewstep.evaluation.config import EvaluateConfig
from fewstep.workflows import evaluate_runs


def measure(recipes: list[str], seed: int, key: str, value: str, vary_in: str, n: int) -> list[dict[str, object]]:
    """Train the recipes with one seed and one value, and return their rows on pixels."""
    teacher, *students = recipes
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for name in recipes:
            overrides = [f"seed={seed}"]
            if key and name == vary_in:
                overrides.append(f"{key}={value}")
            if name in students:
                overrides.append(f"teacher.path={folder}/{teacher}")
            run = RunDirectory(Path(folder) / name)
            for _ in run_training(load_config(name, overrides), run, resume=False, overwrite=False):
                pass
            runs.append(run.path)
        settings = EvaluateConfig(n=n, features=("pixels",), teacher_steps=(1, 4, 64))
        report = evaluate_runs(runs, settings=settings, seed=seed)
    at_most_steps = max((row for row in report.rows if row.role == "teacher"), key=lambda row: row.steps)
    base = at_most_steps.metrics["fd_pixels"].value
    seconds = {model.name: model.train_s for model in report.models}
    return [
        {
            "date": datetime.date.today().isoformat(),
            "recipe": row.model,
            "varied": f"{vary_in}: {key}={value}" if key else "",
            "seed": seed,
            "steps": row.steps,
            "n": row.n,
            "fd_pixels": row.metrics["fd_pixels"].value,
            "ratio": row.metrics["fd_pixels"].value / base,
            "recall_pixels": row.metrics["recall_pixels"].value,
            "train_s": seconds[row.model],
            "environment": report.environment,
        }
        for row in report.rows
    ]


def summarise(ledger: Path) -> None:
    """Mean and standard deviation over seeds, per recipe, varied value and step count."""
    groups: dict[tuple[str, str, int], list[dict[str, float]]] = defaultdict(list)
    for line in ledger.read_text().splitlines():
        row = json.loads(line)
        groups[row["varied"], row["recipe"], row["steps"]].append(row)
    print("| varied | recipe | steps | seeds | fd_pixels | ratio to teacher at 64 | recall_pixels |")
    print("|:--|:--|--:|--:|--:|--:|--:|")
    for (varied, recipe, steps), rows in groups.items():
        cells = []
        for name in ("fd_pixels", "ratio", "recall_pixels"):
            values = [row[name] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        print(f"| {varied} | {recipe} | {steps} | {len(rows)} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--vary", default="=", metavar="KEY=A,B,C")
    parser.add_argument("--vary-in", default="", metavar="RECIPE")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--ledger", type=Path, required=True)
    parser.add_argument("--summary", action="store_true")
    arguments = parser.parse_args()
    if arguments.summary:
        summarise(arguments.ledger)
        return
    key, _, values = arguments.vary.partition("=")
    environment = describe_environment()
    print(f"commit {environment['commit']}, {environment['processor']}")
    for seed in map(int, arguments.seeds.split(",")):
        for value in values.split(","):
            rows = measure(arguments.recipes, seed, key, value, arguments.vary_in or arguments.recipes[0], arguments.n)
            with arguments.ledger.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            print(f"seed {seed} {key}={value}: {len(rows)} rows", flush=True)


if __name__ == "__main__":
    main()
