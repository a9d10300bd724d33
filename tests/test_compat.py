"""The torchvision repair, each branch in a fresh interpreter, since what it does cannot be undone."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fewstep import compat

STAND_IN = "import torch; torch.library.register_fake('torchvision::nms')(lambda dets, scores, threshold: dets)\n"


def run(code: str, path: Path | None = None) -> str:
    """The last line that ``code`` prints in a new interpreter, with ``path`` searched first for modules."""
    code = f"import sys; sys.path.insert(0, {str(path)!r})\n{code}" if path else code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def stand_in(folder: Path) -> Path:
    """A torchvision whose import attaches a fake kernel to an operator that only its binary declares."""
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(STAND_IN)
    return folder / "torchvision" / "_C.so"


def test_the_installed_torchvision_and_its_dependents_import():
    if find_spec("torchvision") is None or find_spec("cleanfid") is None:
        pytest.skip("torchvision and clean-fid are not both installed")
    out = run(
        "from fewstep.compat import prepare_torchvision as p; first = p()\n"
        "import torchvision.transforms, cleanfid.fid\n"
        "print(first == p(), first)"
    )
    assert out.startswith("True torchvision" if torch.version.cuda is None else "True CUDA")


def test_a_binary_that_does_not_load_is_replaced_by_declarations(tmp_path):
    """Without the repair the stand-in fails just as the real one does; with it, it imports."""
    stand_in(tmp_path).write_bytes(b"no library")
    out = run(
        "import gc, torch; torch.version.cuda = None\n"
        "try:\n    import torchvision\n"
        "except RuntimeError as error: assert 'operator torchvision::nms does not exist' in str(error)\n"
        "else: raise AssertionError('the stand-in needs no repair')\n"
        "from fewstep.compat import prepare_torchvision as p; p(); gc.collect()\n"
        "import torchvision\n"
        "print(p(), '|', torch.ops.torchvision.nms.default, torch.ops.torchvision.qnms.default)",
        tmp_path,
    )
    assert "declared" in out
    assert out.endswith("| torchvision.nms.default torchvision.qnms.default")


def test_a_binary_that_loads_is_left_to_declare_its_own(tmp_path):
    """torch's own extension stands in for a binary that fits: it loads, so nothing may be declared beside it."""
    shutil.copy(torch._C.__file__, stand_in(tmp_path))
    out = run(
        "import torch; torch.version.cuda = None\n"
        "from fewstep.compat import prepare_torchvision as p\n"
        "print(p(), '|', hasattr(torch.ops.torchvision, 'nms'))",
        tmp_path,
    )
    assert out == "torchvision's own operators loaded | False"


@pytest.fixture
def fresh(monkeypatch):
    """As if torchvision had not been imported, and nothing may be loaded or declared."""
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(torch.ops, "load_library", lambda _: pytest.fail("loaded a library"))
    monkeypatch.setattr(torch.library, "Library", lambda *_: pytest.fail("declared operators"))


@pytest.mark.usefixtures("fresh")
def test_cuda_torch_is_left_alone(monkeypatch):
    """The real operators exist there; a declaration would clash."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert compat._prepare.__wrapped__() == ("CUDA build of torch, nothing to do", None)


@pytest.mark.usefixtures("fresh")
def test_torchvision_may_be_missing(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(compat.util, "find_spec", lambda _: None)
    assert compat._prepare.__wrapped__() == ("torchvision not installed", None)
