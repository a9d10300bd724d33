"""Lines that start several processes: whole when copied, understood by what they start, and right about signals."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import cli, process_environment, refuse, student, succeed
from test_cli import HEAVY, PROBE, loaded
from test_processes import WITNESS, seen

import fewstep.launch
from fewstep.checkpoint import RunDirectory
from fewstep.distill.run import _lost_another
from fewstep.launch import FORWARDED, launch_lines, launch_text, launched_alone, run_launched, slurm_script

NASTY = [
    "distill",
    "a b.yaml",
    "objective={kind: meanflow, times: {kind: uniform}}",
    "name=it's",
    "x=$HOME",
    "--out",
    "r s",
]
"""Arguments that a shell would take apart, or fill in."""


# The lines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_torchrun_understands_its_line(processes: int) -> None:
    from torch.distributed.run import get_args_parser

    lines = launch_lines("name", Path("r s"), processes, NASTY, ["--resume"])
    program, *words = shlex.split(lines.torchrun)
    parsed = get_args_parser().parse_args(words)
    assert program == "torchrun"
    assert (parsed.standalone, parsed.nproc_per_node) == (True, str(processes))
    assert (parsed.module, parsed.training_script) == (True, "fewstep.cli")
    assert parsed.training_script_args == [*NASTY, "--resume"]


@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_understands_its_line(processes: int) -> None:
    from accelerate.commands.launch import launch_command_parser

    lines = launch_lines("name", Path("r s"), processes, NASTY, ["--overwrite"])
    program, launch, *words = shlex.split(lines.accelerate)
    parsed = launch_command_parser().parse_args(words)
    assert (program, launch) == ("accelerate", "launch")
    assert (parsed.num_processes, parsed.num_machines, parsed.multi_gpu) == (processes, 1, processes > 1)
    assert (parsed.mixed_precision, parsed.dynamo_backend) == ("no", "no")
    assert (parsed.module, parsed.training_script) == (True, "fewstep.cli")
    assert parsed.training_script_args == [*NASTY, "--overwrite"]


def test_fewstep_s_own_line() -> None:
    assert shlex.split(launch_lines("name", Path("run"), 1, NASTY, []).fewstep) == ["fewstep", *NASTY]
    several = shlex.split(launch_lines("name", Path("run"), 4, NASTY, ["--resume"]).fewstep)
    assert several == ["fewstep", *NASTY, "--resume", "--processes", "4"]


def test_the_text_is_a_shell_script_of_the_lines(tmp_path: Path) -> None:
    lines = launch_lines("name", Path("r s"), 2, NASTY, [])
    text = launch_text(lines)
    commands = [line for line in text.partition("#!/bin/bash")[0].splitlines() if line and not line.startswith("#")]
    assert commands == [lines.fewstep, lines.torchrun, lines.accelerate]
    assert text.endswith(lines.slurm)
    assert lines.slurm.startswith("#!/bin/bash\n")
    for script in (text, lines.slurm):
        (tmp_path / "script").write_text(script)
        subprocess.run(["bash", "-n", tmp_path / "script"], check=True)


# Slurm ---------------------------------------------------------------------------------------------------------------


def test_what_slurm_is_asked_for() -> None:
    script = slurm_script("digits", Path("runs/digits"), 4, ["distill", "digits-meanflow"])
    asked = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in script.splitlines()
        if line.startswith("#SBATCH --")
    )
    # Without B: the signal goes to what srun started, and not to the shell alone.
    assert asked["signal"] == "USR1@120"
    assert (asked["job-name"], asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == (
        *("digits", "1", "1", "4"),
    )
    assert "requeue" in asked
    # The time to save ends before the job does.
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110\n" in script
    for line in script.splitlines():
        assert not line.startswith("#SBATCH") or script.index(line) < script.index("run="), "Slurm stops reading there"


def stub(tmp_path: Path, name: str, body: str) -> None:
    """A program of the pretended cluster."""
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}")
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment with a Slurm of one node: srun starts what it is given, scontrol notes what it is told."""
    stub(tmp_path, "srun", 'shift\nexec "$@"\n')  # without its own option
    stub(tmp_path, "scontrol", 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> requeued; fi\n')
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    job = str(os.getpid())
    return process_environment(PATH=path, SLURM_JOB_ID=job, SLURM_JOB_NUM_NODES="1", SLURM_JOB_NODELIST="localhost")


def submit(script: str, tmp_path: Path, environment: dict[str, str], **changes: str) -> subprocess.Popen[str]:
    (tmp_path / "job.sh").write_text(script)
    return subprocess.Popen(
        ["bash", "job.sh"],
        cwd=tmp_path,
        env={**environment, **changes},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("found", "restarts", "status", "flag", "requeued"),
    [
        ("nothing", "0", ("interrupted", 7), [], True),
        ("nothing", "0", ("done", 9), [], False),
        ("nothing", "0", ("failed", 7), [], False),
        ("a checkpoint", "1", ("interrupted", 7), ["--resume"], True),
        ("a checkpoint", "0", ("done", 9), ["--resume"], False),
        ("a checkpoint", "1", ("interrupted", 5), ["--resume"], False),  # no further than before: not for ever
        ("no checkpoint", "1", ("interrupted", 7), ["--overwrite"], True),
        ("no checkpoint", "0", ("done", 9), [], False),  # somebody else's run: fewstep says so
    ],
)
def test_a_job_goes_on_where_it_was_stopped(
    found: str,
    restarts: str,
    status: tuple[str, int],
    flag: list[str],
    requeued: bool,
    tmp_path: Path,
    cluster: dict[str, str],
) -> None:
    state, step = status
    document = json.dumps({"state": state, "step": step}, indent=2)
    stub(
        tmp_path,
        "torchrun",
        f"printf '%s\\n' \"$@\" > words\nmkdir -p 'r s'\necho '{document}' > 'r s/status.json'\nexit 3\n",
    )
    run = tmp_path / "r s"
    if found != "nothing":
        (run / "checkpoints").mkdir(parents=True)
        (run / "status.json").write_text(json.dumps({"state": "interrupted", "step": 5}, indent=2))
    if found == "a checkpoint":
        (run / "checkpoints" / "step-00000005").mkdir()
    job = submit(slurm_script("x", Path("r s"), 2, NASTY), tmp_path, cluster, SLURM_RESTART_COUNT=restarts)
    _, said = job.communicate(timeout=30)
    assert (job.returncode, said) == (3, "")
    words = (tmp_path / "words").read_text().splitlines()
    assert words[words.index("fewstep.cli") + 1 :] == [*NASTY, *flag]
    assert words[words.index("--signals-to-handle") + 1] == FORWARDED
    assert "SIGUSR1" in FORWARDED
    where = tmp_path / "requeued"
    assert where.exists() == requeued
    if requeued:
        assert where.read_text() == f"requeue {cluster['SLURM_JOB_ID']}\n"


def test_torchrun_understands_what_the_job_says(tmp_path: Path, cluster: dict[str, str]) -> None:
    from torch.distributed.run import get_args_parser

    stub(tmp_path, "torchrun", "printf '%s\\n' \"$@\" > words\n")
    submit(slurm_script("x", Path("r s"), 2, NASTY), tmp_path, cluster, SLURM_JOB_ID="12345").communicate(timeout=30)
    parsed = get_args_parser().parse_args((tmp_path / "words").read_text().splitlines())
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_backend) == ("1", "2", "c10d")
    assert (parsed.rdzv_id, parsed.rdzv_endpoint) == ("12345", "localhost:22345")
    assert parsed.training_script_args == NASTY


# On the command line -------------------------------------------------------------------------------------------------


def test_printing_loads_nothing_heavy_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    modules, last = loaded(PROBE, "distill", "digits-meanflow", "--processes", "2", "--print-launch")
    assert last == "exit: 0"
    assert not modules & set(HEAVY)
    assert list(tmp_path.iterdir()) == []


def test_the_lines_of_a_command() -> None:
    command = ("teach", "digits-teacher", "train.steps=5", "--seed", 3, "--processes", 2, "--resume", "--print-launch")
    printed = succeed(*command, "--out", "some where").stdout
    words = ["teach", "digits-teacher", "train.steps=5", "seed=3", "--out", "some where"]
    lines = launch_lines("digits-teacher", Path("some where"), 2, words, ["--resume"])
    assert printed == launch_text(lines)
    document = json.loads(succeed(*command, "--out", "some where", "--json").stdout)
    assert document == {"processes": 2, **vars(lines)}
    default = succeed("teach", "digits-teacher", "name=other", "--print-launch").stdout
    assert "run=runs/other\n" in default


def test_what_is_wrong_with_the_command_is_said_first() -> None:
    refuse("distill", "digits-meanflow", "train.stesp=3", "--print-launch", says=("train.stesp",))
    refuse("distill", "digits-teacher", "--print-launch", says=("fewstep teach",))
    refuse("distill", "digits-meanflow", "--print-launch", "--dry-run", says=("exclude each other",))


# accelerate launch on a CPU ------------------------------------------------------------------------------------------

ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "alone"),
    [
        ({}, False),
        (ACCELERATE, False),  # one was asked for
        (ACCELERATE | MEETING, True),
        (MEETING, False),  # somebody else's
        (ACCELERATE | MEETING | {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, False),  # several GPUs
        (ACCELERATE | MEETING | {"OMPI_COMM_WORLD_SIZE": "2"}, False),  # through MPI
    ],
)
def test_one_process_instead_of_several(environment: dict[str, str], alone: bool) -> None:
    assert launched_alone(environment) == alone


@pytest.mark.parametrize(("processes", "alone"), [(1, False), (2, True)])
def test_the_environment_is_the_one_that_accelerate_sets(processes: int, alone: bool) -> None:
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    words = ["--cpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    parsed = launch_command_parser().parse_args([*words, "--dynamo_backend", "no", "-m", "fewstep.cli"])
    parsed.use_cpu = True
    _, environment = prepare_simple_launcher_cmd_env(parsed)
    assert launched_alone(environment) == alone


def test_one_process_instead_of_several_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (ACCELERATE | MEETING).items():
        monkeypatch.setenv(name, value)
    small = ("train.steps=1", "train.batch_size=4", "student.network.width=8")
    said = succeed("teach", "digits-teacher", *small, "--out", tmp_path / "run").stderr.splitlines()
    assert said[0].startswith("warning: accelerate launch was asked for several processes")
    assert "--print-launch" in said[0]


# Signals and endings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_every_signal_reaches_the_launcher_as_sigterm(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(fewstep.launch, "launch_command", lambda processes, arguments: waits)
    before = signal.getsignal(number)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), number))
    timer.start()
    assert run_launched(2, []) == 128 + signal.SIGTERM
    assert signal.getsignal(number) == before


def wait_for_steps(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 90
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.thorough
def test_the_torchrun_line_runs_two_processes(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITNESS)
    (tmp_path / "seen").mkdir()
    command = ("distill", "digits-meanflow", *student(trained / "teacher"), "train.steps=2", "--out", "r s")
    document = json.loads(succeed(*command, "--processes", 2, "--print-launch", "--json").stdout)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    changes = {"PATH": path, "PYTHONPATH": str(tmp_path / "site"), "WITNESS": str(tmp_path / "seen")}
    done = subprocess.run(
        ["bash", "-c", document["torchrun"]],
        cwd=tmp_path,
        env=process_environment(**changes),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert seen(tmp_path) == {"0-of-2", "1-of-2"}
    assert json.loads((tmp_path / "r s" / "status.json").read_text())["state"] == "done"


@pytest.mark.slow
def test_a_slurm_job_is_saved_when_time_is_up_and_goes_on(
    trained: Path, tmp_path: Path, cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Slurm does it: SIGUSR1 to what srun started, which is torchrun, and the same script once more. What that
    starts then is run here, by one process."""
    stub(tmp_path, "srun", 'shift\necho $$ > pid\nexec "$@"\n')
    arguments = ["distill", "digits-meanflow", *student(trained / "teacher"), "train.steps=200", "--out", "r s"]
    script, run = slurm_script("x", Path("r s"), 2, arguments), tmp_path / "r s"
    job = submit(script, tmp_path, cluster)
    wait_for_steps(run, 5, job)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGUSR1)
    _, said = job.communicate(timeout=90)
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("interrupted", 130), said
    assert 5 <= status["step"] < 200
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{status['step']:08d}"]
    assert (tmp_path / "requeued").read_text().startswith("requeue ")

    stub(tmp_path, "torchrun", "printf '%s\\n' \"$@\" > words\n")
    job = submit(script, tmp_path, cluster, SLURM_RESTART_COUNT="1")
    _, said = job.communicate(timeout=90)
    assert job.returncode == 0, said
    words = (tmp_path / "words").read_text().splitlines()
    monkeypatch.chdir(tmp_path)
    succeed(*words[words.index("fewstep.cli") + 1 :])
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 201))
    assert (tmp_path / "requeued").read_text().count("requeue ") == 1


@pytest.mark.slow
def test_a_killed_process_leaves_a_true_status(trained: Path, tmp_path: Path) -> None:
    """The one that writes the status is killed as by a lack of memory: the launcher says so."""
    command = ("distill", "digits-meanflow", *student(trained / "teacher"), "train.steps=100000", "--processes", "2")
    process = subprocess.Popen(
        [sys.executable, "-m", "fewstep.cli", *command, "--out", "run"],
        cwd=tmp_path,
        env=process_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_steps(tmp_path / "run", 5, process)
    os.kill(json.loads((tmp_path / "run" / "status.json").read_text())["pid"], signal.SIGKILL)
    out, said = process.communicate(timeout=90)
    message = "a process ended without saying why (exit code 137)"
    assert (process.returncode, out) == (1, "")
    assert said.splitlines() == [f"error: {message}"]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert status["message"].startswith(message)


@pytest.mark.parametrize("state", ["running", "failed"])
def test_the_launcher_speaks_for_a_killed_process(state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``running`` is false once all are gone; ``failed`` comes from those who lost the killed one."""
    run = RunDirectory(tmp_path / "run")

    def killed(processes: int, arguments: list[str]) -> int:
        run.path.mkdir()
        run.write_status(state, step=7, message="connection closed" if state == "failed" else "")
        return 137

    monkeypatch.setattr("fewstep.cli.run_launched", killed)
    line = refuse("teach", "digits-teacher", "--processes", 2, "--out", run.path, says=("(exit code 137)",), code=1)
    status = json.loads((run.path / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 7, 1)
    assert line == f"error: {status['message'].partition(';')[0]}"
    assert status["message"].endswith("; then connection closed" if state == "failed" else "(exit code 137)")


def test_the_launcher_leaves_a_status_that_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path / "run")

    def interrupted(processes: int, arguments: list[str]) -> int:
        run.path.mkdir()
        run.write_status("interrupted", step=7, message="stopped", exit_code=130)
        return 1

    monkeypatch.setattr("fewstep.cli.run_launched", interrupted)
    ended = cli("teach", "digits-teacher", "--processes", 2, "--out", run.path)
    assert (ended.exit_code, ended.stdout, ended.stderr) == (130, "", "")
    assert json.loads((run.path / "status.json").read_text())["message"] == "stopped"


def test_a_lost_connection_is_known_by_what_is_said_of_it() -> None:
    """Word for word what gloo raises in the other process of a pair, and an error of another kind."""
    lost = RuntimeError(
        "[/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1957: Connection reset by peer. This is"
    )
    assert _lost_another(lost)
    assert not _lost_another(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not _lost_another(BrokenPipeError("broken pipe"))  # of a pipeline of commands, not of processes
