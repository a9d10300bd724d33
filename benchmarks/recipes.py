"""Train recipes over several seeds and append what they reached to the ledger.

    python benchmarks/recipes.py digits-teacher digits-meanflow --seeds 0,1,2 --ledger benchmarks/ledger/NAME.jsonl
    python benchmarks/recipes.py digits-teacher digits-meanflow --seeds 0,1,2 \
        --vary student.network.max_frequency=3,8,60 --vary-in digits-teacher --ledger benchmarks/ledger/NAME.jsonl
    python benchmarks/recipes.py checkerboard-teacher --seeds 0,1,2 --metrics w2_identity,straightness \
        --variant "plain:" --variant "assignment:objective.noise.coupling.kind=assignment" --ledger ...

The first recipe is the teacher of the others. ``--vary KEY=A,B,C`` repeats everything with each value of one config
key, and every ``--variant "LABEL:KEY=VALUE KEY=VALUE"`` with those overrides, in the recipe that ``--vary-in`` names
(the first one). One JSON row per model and step count; the ledger is only ever appended to. ``ratio`` is that of the
first metric to the teacher's at its most steps. ``--summary`` prints mean and standard deviation over the seeds of a
ledger file and trains nothing.
"""

import argparse
import datetime
import json
import shlex
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

METRICS = ("fd_pixels", "recall_pixels")


def measure(
    recipes: list[str],
    seed: int,
    changes: list[str],
    label: str,
    vary_in: str,
    settings: EvaluateConfig,
    metrics: list[str],
) -> list[dict[str, object]]:
    """Train the recipes with one seed and one set of changes, and return their rows."""
    teacher, *students = recipes
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for name in recipes:
            overrides = [f"seed={seed}"]
            if name == vary_in:
                overrides += changes
            if name in students:
                overrides.append(f"teacher.path={folder}/{teacher}")
            run = RunDirectory(Path(folder) / name)
            for _ in run_training(load_config(name, overrides), run, resume=False, overwrite=False):
                pass
            runs.append(run.path)
        report = evaluate_runs(runs, settings=settings, seed=seed)
    at_most_steps = max((row for row in report.rows if row.role == "teacher"), key=lambda row: row.steps)
    base = at_most_steps.metrics[metrics[0]].value
    seconds = {model.name: model.train_s for model in report.models}
    return [
        {
            "date": datetime.date.today().isoformat(),
            "recipe": row.model,
            "varied": label,
            "seed": seed,
            "steps": row.steps,
            "n": row.n,
            **{name: row.metrics[name].value for name in metrics if name in row.metrics},
            "ratio": row.metrics[metrics[0]].value / base,
            "train_s": seconds[row.model],
            "environment": report.environment,
        }
        for row in report.rows
    ]


def summarise(ledger: Path, metrics: list[str]) -> None:
    """Mean and standard deviation over seeds, per recipe, variant and step count."""
    groups: dict[tuple[str, str, int], list[dict[str, float]]] = defaultdict(list)
    for line in ledger.read_text().splitlines():
        row = json.loads(line)
        groups[row["varied"], row["recipe"], row["steps"]].append(row)
    columns = [metrics[0], "ratio", *metrics[1:]]
    heads = [f"ratio of {metrics[0]} to the teacher's at most steps" if name == "ratio" else name for name in columns]
    print(f"| varied | recipe | steps | seeds | {' | '.join(heads)} |")
    print("|:--|:--|--:|--:|" + "--:|" * len(columns))
    for (varied, recipe, steps), rows in sorted(groups.items(), key=lambda group: (group[0][2], group[0][1])):
        cells = []
        for name in columns:
            values = [row[name] for row in rows if name in row]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        print(f"| {varied} | {recipe} | {steps} | {len(rows)} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--vary", default="", metavar="KEY=A,B,C")
    parser.add_argument("--variant", action="append", default=[], metavar="LABEL:KEY=VALUE ...")
    parser.add_argument("--vary-in", default="", metavar="RECIPE")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--teacher-steps", default="1,4,64")
    parser.add_argument("--metrics", default=",".join(METRICS))
    parser.add_argument("--ledger", type=Path, required=True)
    parser.add_argument("--summary", action="store_true")
    arguments = parser.parse_args()
    metrics = arguments.metrics.split(",")
    if arguments.summary:
        summarise(arguments.ledger, metrics)
        return
    vary_in = arguments.vary_in or arguments.recipes[0]
    variants: list[tuple[str, list[str]]] = []
    if arguments.vary:
        key, _, values = arguments.vary.partition("=")
        variants += [(f"{vary_in}: {key}={value}", [f"{key}={value}"]) for value in values.split(",")]
    for variant in arguments.variant:
        label, _, changes = variant.partition(":")
        variants.append((label, shlex.split(changes)))
    features = tuple(dict.fromkeys(name.partition("_")[2] for name in metrics if "_" in name))
    steps = tuple(map(int, arguments.teacher_steps.split(",")))
    settings = EvaluateConfig(n=arguments.n, features=features, teacher_steps=steps)
    environment = describe_environment()
    print(f"commit {environment['commit']}, {environment['processor']}")
    for seed in map(int, arguments.seeds.split(",")):
        for label, changes in variants or [("", [])]:
            rows = measure(arguments.recipes, seed, changes, label, vary_in, settings, metrics)
            with arguments.ledger.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            print(f"seed {seed} {label}: {len(rows)} rows", flush=True)


if __name__ == "__main__":
    main()
