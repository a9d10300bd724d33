"""Metrics in TensorBoard, read back with TensorBoard itself, and what Weights & Biases is asked for."""

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import process_environment

import fewstep.distill.trackers
from fewstep.config import RunConfig, config_yaml, load_config
from fewstep.distill.trackers import Trackers, check_trackers, open_trackers
from fewstep.distill.train import make_accelerator
from fewstep.errors import EnvironmentFault


def config(*names: str) -> RunConfig:
    make_accelerator()  # as in a run: accelerate's trackers log through its state
    return load_config("digits-teacher", [f"train.report_to=[{', '.join(names)}]"])


# TensorBoard ---------------------------------------------------------------------------------------------------------


def scalars(folder: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def test_tensorboard_shows_what_was_logged(tmp_path: Path) -> None:
    trackers = open_trackers(config("tensorboard"), tmp_path / "trackers", 0)
    for step in (10, 20, 30):
        trackers.log({"loss": 1 / step, "lr": 0.5}, step)
    trackers.close()
    shown = tmp_path / "trackers" / "tensorboard"
    assert scalars(shown, "loss") == pytest.approx({10: 0.1, 20: 0.05, 30: 1 / 30})
    assert scalars(shown, "lr") == {10: 0.5, 20: 0.5, 30: 0.5}
    assert all(path.parent == shown for path in tmp_path.rglob("*") if path.is_file()), "one folder, one run"


def test_tensorboard_keeps_the_config(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = config("tensorboard")
    open_trackers(settings, tmp_path, 0).close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (kept,) = events.Tensors("config/text_summary")
    text = kept.tensor_proto.string_val[0].decode()
    # Four blanks ahead of each line are a block of code in Markdown.
    assert "".join(line[4:] + "\n" for line in text.splitlines()) == config_yaml(settings)


def test_a_resumed_run_goes_on_in_the_same_place(tmp_path: Path) -> None:
    """Killed at step 35 with its last checkpoint at 20: what came after is not shown twice."""
    settings = config("tensorboard")
    killed = open_trackers(settings, tmp_path, 0)
    for step in (10, 20, 30):
        killed.log({"loss": float(step)}, step)
    killed.close()
    resumed = open_trackers(settings, tmp_path, 20)
    for step in (25, 35):
        resumed.log({"loss": -float(step)}, step)
    resumed.close()
    assert scalars(tmp_path / "tensorboard", "loss") == {10: 10, 20: 20, 25: -25, 35: -35}


# Weights & Biases ----------------------------------------------------------------------------------------------------


class Account:
    """Stands in for the package: notes what it is asked for."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, float], int]] = []
        self.settings: dict[str, Any] = {}
        self.finished = 0

    def init(self, **arguments: Any) -> "Account":
        self.begun.append(arguments)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished += 1

    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
        self.settings.update(values)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Account:
    account, module = Account(), ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None, origin="here")
    module.init, module.config = account.init, account  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return account


def test_wandb_is_told_what_was_logged(wandb: Account, tmp_path: Path) -> None:
    settings = config("wandb")
    check_trackers(settings.train.report_to)
    trackers = open_trackers(settings, tmp_path / "trackers", 0)
    trackers.log({"loss": 0.5}, 10)
    trackers.close()
    assert wandb.logged == [({"loss": 0.5}, 10)]
    assert wandb.finished == 1
    (begun,) = wandb.begun
    assert (begun["project"], begun["name"], begun["resume"]) == ("fewstep", "digits-teacher", "allow")
    assert begun["dir"] == str(tmp_path / "trackers")
    assert wandb.settings["train.lr"] == settings.train.lr
    assert wandb.settings["train.report_to"] == '["wandb"]'
    assert all(value is None or isinstance(value, (bool, int, float, str)) for value in wandb.settings.values())


def test_a_run_keeps_its_id_and_another_has_another(wandb: Account, tmp_path: Path) -> None:
    for folder, step in (("a", 0), ("a", 20), ("b", 0)):
        open_trackers(config("wandb"), tmp_path / folder, step).close()
    first, resumed, other = (begun["id"] for begun in wandb.begun)
    assert first == resumed != other


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, "", "offline"),
        ({}, "machine elsewhere.org login user password secret\n", "offline"),
        ({}, "machine api.wandb.ai login user password secret\n", None),
        ({"WANDB_BASE_URL": "https://wandb.example.org"}, "machine wandb.example.org login u password s\n", None),
        ({"WANDB_BASE_URL": "https://wandb.example.org"}, "machine api.wandb.ai login u password s\n", "offline"),
        ({}, "nonsense", "offline"),
        ({"WANDB_MODE": "online"}, "", None),
        ({"WANDB_API_KEY": "secret"}, "", None),
    ],
)
def test_nothing_is_sent_unless_the_user_has_said_where(
    environment: dict[str, str],
    netrc: str,
    mode: str | None,
    wandb: Account,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "netrc").write_text(netrc)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    open_trackers(config("wandb"), tmp_path, 0).close()
    assert wandb.begun[0]["mode"] == mode


# Not asked for, not there --------------------------------------------------------------------------------------------


def test_nothing_is_opened_or_imported_unasked(tmp_path: Path) -> None:
    trackers = open_trackers(config(), tmp_path / "trackers", 0)
    assert trackers == Trackers()
    trackers.log({"loss": 1.0}, 1)
    trackers.close()
    assert not (tmp_path / "trackers").exists()
    code = (
        "import sys, fewstep.distill.run, fewstep.distill.trackers; print(*{n.partition('.')[0] for n in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=process_environment(), capture_output=True, text=True, check=True, timeout=60
    )
    assert not {"tensorboard", "wandb"} & set(done.stdout.split())


def test_a_missing_package_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_trackers(())
    check_trackers(("tensorboard",))
    monkeypatch.setattr(fewstep.distill.trackers, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(EnvironmentFault, match=f"{name} is not installed: pip install {name}$") as fault:
            check_trackers((name,))
        assert fault.value.exit_code == 3


def test_a_folder_of_that_name_is_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """W&B leaves one where it runs, and Python takes it for a package."""
    (tmp_path / "metricshub").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EnvironmentFault, match="metricshub"):
        check_trackers(("metricshub",))
