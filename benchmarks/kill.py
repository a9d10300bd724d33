"""Kill trainings with SIGKILL again and again, resume them, and compare their models with undisturbed ones.

    python benchmarks/kill.py --kills 20 --ledger benchmarks/ledger/NAME.jsonl

One small run per method, started as a user starts it and killed as often as ``--kills`` says. Of every five kills

- two are forced into a checkpoint write: they come while its temporary folder exists (being written or deleted);
- two come some milliseconds after a random step, wherever that is;
- one comes at a random moment after the start, which mostly is an import, or the reading of the last checkpoint.

After each kill every checkpoint has to be whole and ``status.json`` readable. At the end the exported weights have to
be those of the undisturbed run, byte for byte, and every step has to be logged once. One line per method, one row in
the ledger, which is only ever appended to; exit code 1 if anything differs.
"""

import argparse
import datetime
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.checkpoint import RunDirectory, checkpoints, read_checkpoint
from fewstep.environment import describe_environment
from fewstep.errors import UsageError
from fewstep.files import read_json

MOMENTS = ("checkpoint", "training", "checkpoint", "training", "start")

SMALL = ("train.batch_size=16", "train.log_every=1", "train.checkpoint_every=10")
TEACHER = ("teach", "digits-teacher", *SMALL, "student.network={kind: mlp, width: 16, depth: 1}", "train.steps=20")
STAGES = ("objective.start_steps=8", "objective.last_stages_factor=2")  # s, 2 s and 2 s steps for train.steps=s


def student(method: str, teacher: Path, steps: int) -> tuple[str, ...]:
    """The command line of a small student that trains for ``steps`` steps (a multiple of five)."""
    own = (*STAGES, f"train.steps={steps // 5}") if method == "progressive" else (f"train.steps={steps}",)
    return ("distill", f"digits-{method}", *SMALL, f"teacher.path={teacher}", *own)


def start(*arguments: str) -> subprocess.Popen[str]:
    """``fewstep ARGUMENTS`` in a process of its own. One thread: the bits depend on their number."""
    command = [sys.executable, "-m", "fewstep.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(*arguments: str) -> None:
    process = start(*arguments)
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"fewstep {' '.join(arguments)} ended with {process.returncode}: {said}")


@dataclass(frozen=True)
class Kill:
    """One kill: whether it left a temporary checkpoint folder, and the step to go on from (0: from the beginning)."""

    moment: str
    inside: bool
    resumes_at: int


@dataclass(frozen=True)
class Outcome:
    """What became of one run."""

    kills: tuple[Kill, ...]
    steps: int
    identical: bool


def survive(command: Sequence[str], folder: Path, moments: Sequence[str], rng: random.Random) -> Outcome:
    """Train once undisturbed and once killed at the given moments, each in its own part of ``folder``."""
    whole, run = folder / "whole", folder / "killed"
    began = time.monotonic()
    finish(*command, "--out", str(whole))
    trained = read_json(whole / "model" / "config.json")["train"]
    started_s = time.monotonic() - began - trained["seconds"]
    kills: list[Kill] = []
    haste = 1.0
    while len(kills) < len(moments):
        number, moment = len(kills), moments[len(kills)]
        at = _resumes_at(run)
        before = folder / "before"
        if run.exists():
            shutil.copytree(run, before)
        # On average three quarters of an equal share, so that there is something left for the kills to come.
        aim = at + haste * rng.random() * 1.5 * (trained["steps"] - at) / (len(moments) - number + 1)
        process = start(*command, "--out", str(run), *_flag(run))
        try:
            if moment == "start":
                time.sleep(haste * rng.random() * 1.2 * started_s)
            else:
                _wait_for_step(process, run, aim)
            if moment == "training":
                time.sleep(rng.random() * 0.02)
            if moment == "checkpoint":
                _stop_inside_a_write(process, run, rng)
        finally:
            process.kill()
            _, said = process.communicate()
        if process.returncode == 0:  # too late, on a machine that is busy in turns: the same again, earlier
            haste *= 0.7
            shutil.rmtree(run)
            if before.exists():
                before.rename(run)
            continue
        shutil.rmtree(before, ignore_errors=True)
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"ended with {process.returncode}: {said}")
        kills.append(Kill(moment, bool(_unfinished(process, run)), _check(run)))
    finish(*command, "--out", str(run), *_flag(run))
    same = _weights(run) == _weights(whole) and _logged(run) == list(range(1, trained["steps"] + 1))
    return Outcome(tuple(kills), trained["steps"], same)


def _wait_for_step(process: subprocess.Popen[str], run: Path, step: float) -> None:
    """Until this process has logged a step: what a killed one logged too much goes when the run is resumed."""
    metrics, began = run / "metrics.jsonl", time.time() - 0.1
    while process.poll() is None:
        if metrics.exists() and metrics.stat().st_mtime > began and max(_logged(run), default=0) >= step:
            return
        time.sleep(0.005)


def _stop_inside_a_write(process: subprocess.Popen[str], run: Path, rng: random.Random) -> None:
    """Leave the process stopped while a temporary checkpoint folder of its own exists, at a random point of that."""
    while process.poll() is None:
        if _unfinished(process, run):
            time.sleep(rng.random() * 0.01)
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if _unfinished(process, run):
                return
            process.send_signal(signal.SIGCONT)
        time.sleep(0.0005)


def _unfinished(process: subprocess.Popen[str], run: Path) -> list[Path]:
    return list((run / "checkpoints").glob(f".step-*.{process.pid}.tmp"))


def _check(run: Path) -> int:
    """The step of the newest checkpoint, after reading all of them and the status: damage ends the program."""
    if (run / "status.json").exists():
        read_json(run / "status.json")
    for path in checkpoints(run / "checkpoints"):
        read_checkpoint(path)
    return _resumes_at(run)


def _resumes_at(run: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in checkpoints(run / "checkpoints")), default=0)


def _flag(run: Path) -> list[str]:
    """How a user would go on."""
    try:
        RunDirectory(run).check(resume=True, overwrite=False)
    except UsageError:
        return ["--overwrite"] if (run / "status.json").exists() else []
    return ["--resume"]


def _logged(run: Path) -> list[int]:
    """The logged steps; the last line may be on its way."""
    text = (run / "metrics.jsonl").read_text()
    return [json.loads(line)["step"] for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _weights(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "model").glob("*.safetensors")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="meanflow,progressive,consistency")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--ledger", type=Path, required=True)
    arguments = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory() as folder:
        teacher = Path(folder) / "teacher"
        finish(*TEACHER, "--out", str(teacher))
        for method in arguments.methods.split(","):
            moments = [MOMENTS[number % len(MOMENTS)] for number in range(arguments.kills)]
            rng = random.Random(f"{method} {arguments.seed}")
            command = student(method, teacher, 60 * max(5, arguments.kills))
            outcome = survive(command, Path(folder) / method, moments, rng)
            inside = sum(kill.inside for kill in outcome.kills)
            resumed = [kill.resumes_at for kill in outcome.kills]
            print(
                f"{method}: {len(outcome.kills)} kills, {inside} inside a checkpoint write, went on from steps "
                f"{' '.join(map(str, resumed))} of {outcome.steps}, identical {'yes' if outcome.identical else 'no'}",
                flush=True,
            )
            row = {
                "date": datetime.date.today().isoformat(),
                "benchmark": "kill",
                "method": method,
                "seed": arguments.seed,
                "steps": outcome.steps,
                "kills": len(outcome.kills),
                "inside_a_write": inside,
                "moments": [kill.moment for kill in outcome.kills],
                "resumed_at": resumed,
                "identical": outcome.identical,
                "environment": describe_environment(),
            }
            with arguments.ledger.open("a") as file:
                file.write(json.dumps(row) + "\n")
            good = good and outcome.identical and len(outcome.kills) == arguments.kills
    sys.exit(not good)


if __name__ == "__main__":
    main()
