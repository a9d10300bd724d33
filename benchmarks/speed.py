"""The small set of benchmarks, and the table of what it found.

    python benchmarks/speed.py run --out benchmarks/ledger/NAME.jsonl     # every command of the set, a row each
    python benchmarks/speed.py table benchmarks/ledger/NAME.jsonl         # the rows as a Markdown table

Every figure is one of ours beside something else, measured in the same process in turns: medians and quartiles over
pairs. `make bench` runs the set into runs/bench.jsonl and prints the table; it takes less than five minutes on two
cores. `python benchmarks/compare.py A B` does the same at two commits.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SET: dict[str, tuple[str, ...]] = {
    "train": ("train", "digits-teacher", "--step-ms", "20", "--repeats", "40"),
    "objectives": ("objectives", "meanflow", "--batch-size", "64", "--repeats", "7", "--threads", "1"),
    "network": ("network", "flot-tiny", "unet-tiny", "--shape", "1,8,8", "--batch-size", "128", "--repeats", "9"),
    "loader": ("loader", "digits-teacher", "--repeats", "200", "--steps", "20"),
    "sample": ("sample", "--repeats", "12", "--threads", "1"),
    "metrics": ("metrics", "frechet", "neighbours", "--n", "2000", "--dim", "512", "--no-memory"),
    "sweep": ("metrics", "sweep", "--n", "1000", "--steps", "1", "--runs", "RUNS"),
}
"""Arguments of `fewstep bench`. RUNS is a folder of a teacher and three students that have hardly trained: what a sweep
takes does not depend on what they have learned."""

STUDENTS = ("progressive", "meanflow", "consistency")


@dataclass(frozen=True)
class Figure:
    """Something of ours beside something else: a ratio pair by pair (median, quartiles). ``times`` says how it is told:
    what one costs, what it costs more, or how much faster ours is; ``note`` what else was measured. Of somebody else's
    beside something else (``ours`` is false) it is there to be read beside ours."""

    name: str
    beside: str
    median: float
    low: float
    high: float
    times: str = "cost"
    note: str = ""
    ours: bool = True

    def told(self) -> str:
        """For people."""
        middle, low, high = ((value - 1) * 100 for value in (self.median, self.low, self.high))
        if self.times == "overhead":
            return f"{middle:+.2f} % [{low:+.2f}, {high:+.2f}]"
        word = "the time" if self.times == "cost" else "as fast"
        return f"{self.median:.2f} x {word} [{self.low:.2f}, {self.high:.2f}]"


def figures(row: Row) -> list[Figure]:
    """What a row of the ledger says of fewstep beside something else."""
    return FIGURES[row["bench"]](row) if row["bench"] in FIGURES else []


def _train(row: Row) -> list[Figure]:
    found = row["cpu_overhead"] if row["device"] == "cpu" else row["overhead"]
    middle, low, high = (1 + found[name] / 100 for name in ("median", "low", "high"))
    note = f"a step of {row['bare_ms']:.0f} ms"
    return [Figure(f"training loop, {row['recipe']}", "bare PyTorch", middle, low, high, "overhead", note)]


def _objectives(row: Row) -> list[Figure]:
    ratio, textbook = ("cpu_ratio", "textbook_cpu_ratio") if row["device"] == "cpu" else ("ratio", "textbook_ratio")
    found = []
    for cost in row["objectives"]:
        step = f"{cost['name']} step, {row['size']}"
        if cost["name"] != "flow_matching":
            found.append(Figure(step, "flow matching", **cost[ratio]))
        if cost["name"] == "meanflow" and cost.get(textbook):
            found.append(Figure(step, "meanflow-textbook", **cost[textbook]))
    return found


def _network(row: Row) -> list[Figure]:
    kinds = {cost["size"].partition("-")[0]: cost for cost in row["networks"]}
    if set(kinds) != {"flot", "unet"}:
        return []
    found = []
    for name, what in (("forward_ms", "forward"), ("step_ms", "training step"), ("jvp_ms", "jvp")):
        ours, theirs = kinds["flot"][name], kinds["unet"][name]
        middle, low, high = (ours[each] / theirs["median"] for each in ("median", "low", "high"))
        title = f"{kinds['flot']['size']}, {what}"
        found.append(Figure(title, kinds["unet"]["size"], middle, low, high, note=f"{ours['median']:.0f} ms"))
    return found


def _recipe_loader(row: Row) -> list[Figure]:
    slower = min(row["resident"], row["fetched"], key=lambda rate: rate["median"])
    middle, low, high = (slower[name] / row["training"]["median"] for name in ("median", "low", "high"))
    return [Figure(f"batches, {row['recipe']}", "its training step", middle, low, high, "faster")]


def _sample(row: Row) -> list[Figure]:
    which = "cpu_overhead" if row["device"] == "cpu" else "overhead"
    found = []
    for batch in row["batches"]:
        for way in batch["ways"]:
            ours = way["of"] == "fewstep"
            middle, low, high = (1 + way[which][name] / 100 for name in ("median", "low", "high"))
            one = "a sample" if batch["batch_size"] == 1 else "a batch"
            name = f"{'' if ours else way['of'].split()[0] + ': '}{way['name']}, {one}"
            note = f"calls of {batch['call_ms']['median']:.1f} ms; {way['own_us']:.0f} us each of its own"
            beside = f"{way['calls']} bare calls of {row['network']}"
            if way["of"] != "torch":
                found.append(Figure(name, beside, middle, low, high, "overhead", note, ours))
    return found


def _metrics(row: Row) -> list[Figure]:
    which = "faster" if row["device"] == "cpu" else "faster_by_the_clock"
    return [
        Figure(f"{each['metric']}, {each['what']}", f"{each['peer']} {each['version']}", **each[which], times="faster")
        for each in row["compared"]
    ]


FIGURES: dict[str, Callable[[Row], list[Figure]]] = {
    "train": _train,
    "objectives": _objectives,
    "network": _network,
    "recipe-loader": _recipe_loader,
    "sample": _sample,
    "metrics": _metrics,
}


def hardly_trained(folder: Path, environment: dict[str, str]) -> Path:
    """A teacher of the digits and three students after a few steps each."""
    few = ("train.steps=20", "train.warmup_steps=5")
    teacher = folder / "digits-teacher"
    commands = [("teach", "digits-teacher", "--out", str(teacher), *few)]
    for student in STUDENTS:
        stages = ("objective.last_stages_factor=1",) if student == "progressive" else ()
        out = str(folder / f"digits-{student}")
        commands.append(("distill", f"digits-{student}", f"teacher.path={teacher}", "--out", out, *few, *stages))
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "fewstep", *command], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"fewstep {' '.join(command)}: {done.stderr.strip()}")
    return folder


def run(names: Iterable[str], out: Path, *, tree: Path | None = None) -> list[str]:
    """Run benchmarks of the set one after the other, each in a process of its own, appending rows to ``out``; with the
    package of a source ``tree`` in place of the installed one. Returns what failed, a sentence each."""
    environment = dict(os.environ)
    if tree is not None:
        environment["PYTHONPATH"] = str(tree)
    failed = []
    for name in names:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            arguments = SET[name]
            if "RUNS" in arguments:
                runs = hardly_trained(Path(folder), environment)
                arguments = tuple(str(runs) if each == "RUNS" else each for each in arguments)
            command = [sys.executable, "-m", "fewstep", "bench", *arguments, "--ledger", str(out.absolute())]
            done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
            failed.append(f"bench {name}: {said}")
        print(f"bench {name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return failed


def rows_of(path: Path) -> list[Row]:
    """The rows of a ledger."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line per figure, and the machine below."""
    lines = ["| fewstep | beside | median of pairs [quartiles] |", "|:--|:--|--:|"]
    for found in (each for row in rows for each in figures(row)):
        note = f" ({found.note})" if found.note else ""
        lines.append(f"| {found.name}{note} | {found.beside} | {found.told()} |")
    return "\n".join([*lines, "", machine(rows)])


def machine(rows: Sequence[Row]) -> str:
    """What measured: processor or GPU, versions, commits, days."""
    where = [row["environment"] for row in rows]
    devices = sorted({row.get("device", "cpu") for row in rows})
    processors = sorted({f"{each['processor']}, {each['cores']} cores" for each in where})
    torch = sorted({each["packages"]["torch"] for each in where})
    commits = sorted({str(each["commit"]) for each in where})
    days = sorted({row["date"] for row in rows})
    said = (f"{', '.join(devices)} ({'; '.join(processors)})", f"torch {', '.join(torch)}")
    return f"Measured on {'; '.join(said)}; commit {', '.join(commits)}; {', '.join(days)}."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run the set")
    running.add_argument("names", nargs="*", metavar="BENCH", help=f"of the set (default: all): {', '.join(SET)}")
    running.add_argument("--out", type=Path, default=Path("runs/bench.jsonl"))
    shown = commands.add_parser("table", help="rows as a table")
    shown.add_argument("ledger", type=Path, nargs="+")
    given = parser.parse_args(arguments)
    if given.command == "table":
        print(table([row for path in given.ledger for row in rows_of(path)]))
        return
    if odd := [name for name in given.names if name not in SET]:
        parser.error(f"no benchmark '{odd[0]}' in the set: {', '.join(SET)}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    before = len(rows_of(given.out)) if given.out.exists() else 0
    began = time.monotonic()
    failed = run(given.names or SET, given.out)
    print(table(rows_of(given.out)[before:]))
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
