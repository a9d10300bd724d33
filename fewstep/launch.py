"""Several processes: the lines that start them, and starting them on this machine.

``python -m fewstep.launch`` is torchrun without its own traceback.
"""

import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

FORWARDED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""What torchrun passes on to its processes, each as it is: its own choice, and what Slurm sends before time is up."""

NOTICE_S = 120
"""How long before its time is up a Slurm job is told."""


def launched() -> bool:
    """Whether this process already is one of several (torchrun or accelerate launch)."""
    return "LOCAL_RANK" in os.environ


def leave_group() -> None:
    """Take this process out of its group, if it is in one. Threads of the group that still run while the interpreter
    goes end the process with SIGABRT now and then, after all is done."""
    distributed = sys.modules.get("torch.distributed")
    if launched() and distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def launched_alone(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether accelerate launch was asked for several processes and started this one alone, as it does on a CPU.

    It sets a place for them to meet, which it does not do for one process, and no rank.
    """
    asked = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    ranks = ("LOCAL_RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
    return asked and not any(name in environment for name in ranks)


def launch_command(processes: int, arguments: Sequence[str]) -> list[str]:
    """The torchrun line that runs ``fewstep ARGUMENTS`` on several processes.

    torchrun and not ``accelerate launch --cpu --num_processes N``, which runs a single process without saying so.
    """
    return [
        sys.executable,
        *("-m", "fewstep.launch", "--standalone", "--nproc_per_node", str(processes)),
        *("-m", "fewstep.cli", *arguments),
    ]


def run_launched(processes: int, arguments: Sequence[str]) -> int:
    """Run and return the launcher's exit code (see ``_torchrun``; ``status.json`` has the run's own).

    SIGINT, SIGTERM and SIGUSR1 are passed on as SIGTERM: the processes save a checkpoint and end.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    # Signals: some Slurm set-ups send SIGUSR1 to every process of a job, and torchrun has to outlive it.
    own = {"OMP_NUM_THREADS": str(threads), "LOGLEVEL": "CRITICAL", "PET_SIGNALS_TO_HANDLE": FORWARDED}
    environment = {**own, **os.environ}
    # A process group of its own, so that a terminal's Ctrl-C reaches it through here alone.
    launcher = subprocess.Popen(launch_command(processes, arguments), env=environment, process_group=0)

    def pass_on(number: int, frame: FrameType | None) -> None:
        launcher.terminate()

    numbers = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1") if name in signal.Signals.__members__]
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        return _exit_code(launcher.wait())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(returned: int) -> int:
    """As a shell has it: 128 + N for a process killed by signal N."""
    return returned if returned >= 0 else 128 - returned


# Lines to copy -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LaunchLines:
    """Ways to start one training in several processes: command lines for a shell, and a script for sbatch."""

    fewstep: str
    torchrun: str
    accelerate: str
    slurm: str


def launch_lines(name: str, run: Path, processes: int, arguments: Sequence[str], flags: Sequence[str]) -> LaunchLines:
    """The lines that run ``fewstep ARGUMENTS FLAGS``, a training called ``name`` into ``run``, in several processes.

    ``flags`` are ``--resume`` and the like: a Slurm job, which may run several times, chooses them by itself.
    """
    command = [*arguments, *flags]
    several = ["--processes", str(processes)] if processes > 1 else []
    return LaunchLines(
        fewstep=shlex.join(["fewstep", *command, *several]),
        torchrun=shlex.join(
            ["torchrun", "--standalone", "--nproc_per_node", str(processes), "-m", "fewstep.cli", *command]
        ),
        # In full, so that nothing comes from somebody's accelerate config.
        accelerate=shlex.join(
            [
                *("accelerate", "launch", *(["--multi_gpu"] if processes > 1 else [])),
                *("--num_processes", str(processes), "--num_machines", "1"),
                *("--mixed_precision", "no", "--dynamo_backend", "no", "-m", "fewstep.cli", *command),
            ]
        ),
        slurm=slurm_script(name, run, processes, arguments),
    )


def launch_text(lines: LaunchLines) -> str:
    """The lines with what each is for, as comments: the whole is a shell script as far as the last part."""
    return f"""\
# This machine, through fewstep: Ctrl-C saves a checkpoint, and the exit code says how it ended.
{lines.fewstep}

# This machine, through torchrun.
{lines.torchrun}

# The GPUs of this machine, through accelerate. Not for a CPU: `accelerate launch --cpu --num_processes 2` runs a single
# process without saying so, hence torchrun.
{lines.accelerate}

# Slurm: put the rest into a file, set partition and time, and give the file to sbatch.
{lines.slurm}"""


def slurm_script(name: str, run: Path, processes: int, arguments: Sequence[str]) -> str:
    """A script for sbatch: ``processes`` on each of one or more nodes, saved when time is up, queued again, resumed."""
    return f"""\
#!/bin/bash
# {processes} processes on each node; train.batch_size has to divide among all of them. For several nodes raise --nodes.
# Without GPUs drop --gpus-per-node.
#SBATCH --job-name={name}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={processes}
#SBATCH --time=12:00:00
#SBATCH --open-mode=append
#SBATCH --requeue
# {NOTICE_S} s before the time is up: to what srun started, which is torchrun. (B:USR1 would tell this script alone.)
#SBATCH --signal=USR1@{NOTICE_S}

run={shlex.quote(str(run))}
saved_step() {{ grep -o '"step": *[0-9]*' "$run/status.json" 2> /dev/null; }}

again=()
if compgen -G "$run/checkpoints/step-*" > /dev/null; then
    again=(--resume)
elif [ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ]; then
    again=(--overwrite)  # this job was stopped before its first checkpoint
fi
before=$(saved_step)

# torchrun passes the signal on and gives its processes this long to save a checkpoint. A node that is done with that
# must not end the others.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={NOTICE_S - 10}
srun --kill-on-bad-exit=0 torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node {processes} \\
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" \\
    --rdzv_endpoint "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 10000))" \\
    --signals-to-handle {FORWARDED} \\
    -m fewstep.cli {shlex.join(arguments)} "${{again[@]}}"
code=$?

# Interrupted, and further than before: go on in a new job of the same number.
if grep -q '"state": *"interrupted"' "$run/status.json" && [ "$(saved_step)" != "$before" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


# torchrun ------------------------------------------------------------------------------------------------------------


def _torchrun() -> int:
    """torchrun on this process's arguments, silent about failures: the processes have said what went wrong.

    Returns the exit code of a process that was killed, for it says nothing, or else of the first that failed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    if os.environ.get("LOGLEVEL") == "CRITICAL":  # torchrun's own loggers do not all read it
        logging.disable(logging.CRITICAL)
    try:
        main()
    except ChildFailedError as error:
        codes = [error.get_first_failure()[1].exitcode, *(failure.exitcode for failure in error.failures.values())]
        return _exit_code(next((code for code in codes if code < 0 and code != -signal.SIGTERM), codes[0]))
    except SignalException:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_torchrun())
