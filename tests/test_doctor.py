"""``fewstep doctor``: every check with its remedy, and the exit code 3."""

import json
from pathlib import Path

import pytest
from conftest import cli

from fewstep import doctor
from fewstep.doctor import Check
from fewstep.errors import EnvironmentFault


def test_this_machine_has_what_is_needed() -> None:
    result = cli("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert result.exit_code == 0, checks
    assert {check["status"] for check in checks.values()} <= {"ok", "note"}
    for name in ("torch", "accelerate", "safetensors", "torchvision", "torchmetrics", "cleanfid", "forward-mode AD"):
        assert checks[name]["status"] == "ok"
    for name in checks:
        assert name in result.stderr


def test_something_missing_is_exit_code_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Check("torch", "ok", "2"), Check("soul", "missing", "buy one")])
    result = cli("doctor")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert [line.split() for line in result.stderr.splitlines()] == [
        ["ok", "torch", "2"],
        ["missing", "soul", "buy", "one"],
    ]


def test_a_package_that_is_absent_or_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._package("no-such-package").status == "missing"
    assert "pip install" in doctor._package("no-such-package").detail

    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    check = doctor._import("torchmetrics")
    assert check.status == "missing"
    assert "torchvision::nms" in check.detail


def test_absent_weights_are_a_note_with_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(files: object) -> None:
        raise EnvironmentFault("no weights; put a copy there")

    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "find_weights", absent)
    check = doctor._inception()
    assert check.status == "note"
    assert "put a copy there" in check.detail


def test_weights_that_are_there_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The TorchScript file gives features alone, and the check says so; encoders by the folders that are there."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FEWSTEP_WEIGHTS", str(tmp_path))
    assert doctor._encoders().status == "note"
    script, full = tmp_path / "inception-2015-12-05.pt", tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    script.write_bytes(b"")
    check = doctor._inception()
    assert check.status == "ok"
    assert "no Inception score" in check.detail
    full.write_bytes(b"")
    assert doctor._inception().detail == str(full)
    (tmp_path / "clip").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "clip" / name).write_text("{}")
    check = doctor._encoders()
    assert check.status == "ok"
    assert str(tmp_path / "clip") in check.detail
    assert "dinov2" not in check.detail


@pytest.mark.parametrize(("version", "status"), [("1.17.1", "ok"), ("1.18.0", "note"), ("2.0.0", "note")])
def test_scipy_is_judged_by_its_version(version: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: version)
    assert doctor._scipy().status == status


def test_wrong_forward_derivatives_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.func, "jvp", lambda *arguments: (torch.tensor([8.0]), torch.tensor([0.0])))
    assert doctor._forward_mode().status == "missing"
