"""Several processes on this machine."""

import os
import subprocess
import sys
from collections.abc import Sequence


def launched() -> bool:
    """Whether this process already is one of several (torchrun or accelerate launch)."""
    return "LOCAL_RANK" in os.environ


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def launch_command(processes: int, arguments: Sequence[str]) -> list[str]:
    """The torchrun line that runs ``fewstep ARGUMENTS`` on several processes.

    torchrun and not ``accelerate launch --cpu --num_processes N``, which runs a single process without saying so.
    """
    return [
        sys.executable,
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)),
        *("-m", "fewstep.cli", *arguments),
    ]


def run_launched(processes: int, arguments: Sequence[str]) -> int:
    """Run and return the launcher's exit code (launchers flatten exit codes; ``status.json`` does not)."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    return subprocess.run(launch_command(processes, arguments), env=environment, check=False).returncode
