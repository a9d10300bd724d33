"""Several processes on this machine. ``python -m fewstep.launch`` is torchrun without its own traceback."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType


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
        *("-m", "fewstep.launch", "--standalone", "--nproc_per_node", str(processes)),
        *("-m", "fewstep.cli", *arguments),
    ]


def run_launched(processes: int, arguments: Sequence[str]) -> int:
    """Run and return the launcher's exit code (launchers flatten exit codes; ``status.json`` does not).

    SIGINT and SIGTERM are passed on as SIGTERM, once: the processes save a checkpoint and end.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {"OMP_NUM_THREADS": str(threads), "LOGLEVEL": "CRITICAL", **os.environ}
    # A process group of its own, so that a terminal's Ctrl-C reaches it through here alone.
    launcher = subprocess.Popen(launch_command(processes, arguments), env=environment, process_group=0)

    def pass_on(number: int, frame: FrameType | None) -> None:
        launcher.terminate()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return launcher.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _torchrun() -> int:
    """torchrun on this process's arguments, silent about failures: the processes have said what went wrong."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main()
    except (ChildFailedError, SignalException):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_torchrun())
