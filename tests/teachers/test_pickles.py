"""Files of checkpoints are opened without running what they name: no marker file appears."""

import argparse
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from teachers.persistence import Persistent, persistent, their_modules, write_snapshot
from torch import Tensor, nn

from fewstep.errors import UsageError
from fewstep.teachers.pickles import UntrustedPickle, open_checkpoint

SOURCE = "import pathlib\npathlib.Path({!r}).touch()\n"


class Part(nn.Module):
    """A parameter, a buffer, one that no state dict has, a place without a module, a container."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.bias = None
        self.register_parameter("none", None)
        self.register_buffer("freqs", torch.arange(4.0))
        self.register_buffer("table", torch.zeros(2), persistent=False)
        self.skip = None
        self.scale = np.sqrt(0.5)
        self.enc = nn.ModuleDict({"8x8_conv": nn.Conv2d(1, 2, 3), "8x8_norm": nn.GroupNorm(1, 2)})
        self.last = nn.Linear(2, 2, bias=False)


class Shell:
    """Pickles as a call of ``os.system``."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


# ----------------------------------------------------------------------------------------------- what is read, as it is


def test_a_persistent_pickle_is_read_without_its_code(tmp_path: Path) -> None:
    torch.manual_seed(0)
    marker = tmp_path / "ran"
    net = Part()
    arguments = {"img_resolution": 8, "channel_mult": [1, 2], "scale": np.float64(0.25), "dropout": None}
    held = persistent(net, arguments, SOURCE.format(str(marker)), "EDMPrecond")
    arrays = {"scale": np.float32([2.0, 3.0]), "turned": np.asfortranarray(np.arange(6).reshape(2, 3))}
    loss = Persistent("EDMLoss", {"P_mean": -1.2, **arrays}, {}, "raise SystemExit")
    opened = open_checkpoint(write_snapshot(tmp_path / "snapshot.pkl", ema=held, loss_fn=loss))
    assert opened.kind_of_file == "pickle"
    assert opened.said == {
        "img_resolution": 8,
        "channel_mult": [1, 2],
        "scale": 0.25,
        "dropout": None,
        "class_name": "EDMPrecond",
    }
    same(opened.tree["ema"], net.state_dict())
    assert opened.tree["dataset_kwargs"] == {"path": "data.zip"}
    assert opened.tree["loss_fn"]["P_mean"] == -1.2
    torch.testing.assert_close(opened.tree["loss_fn"]["scale"], torch.tensor([2.0, 3.0]), rtol=0, atol=0)
    assert torch.equal(opened.tree["loss_fn"]["turned"], torch.arange(6).reshape(2, 3))
    assert not marker.exists()


def test_of_several_modules_the_averaged_one_speaks(tmp_path: Path) -> None:
    net, ema = persistent(Part(), {"dropout": 0.1}, "", "A"), persistent(Part(), {"dropout": 0.0}, "", "B")
    opened = open_checkpoint(write_snapshot(tmp_path / "a.pkl", net=net, ema=ema))
    assert opened.said == {"dropout": 0.0, "class_name": "B"}
    assert set(opened.tree) == {"net", "ema", "dataset_kwargs"}


def same(found: Any, wanted: dict[str, Tensor]) -> None:
    """The same tensors under the same names in the same order, to the bit."""
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value.detach()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_tensors_of_plain_pickles(dtype: torch.dtype, protocol: int, tmp_path: Path) -> None:
    """Views of one storage, other strides, no dimensions, no numbers."""
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    held = OrderedDict(whole=whole, view=whole[1:3, ::2], turned=whole.t(), number=whole[2, 2], empty=whole[:0])
    file = tmp_path / "weights.pkl"
    file.write_bytes(pickle.dumps(held, protocol=protocol))
    opened = open_checkpoint(file)
    same(opened.tree, held)
    assert opened.said == {}


@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_torch_with_settings(legacy: bool, tmp_path: Path) -> None:
    args = argparse.Namespace(model="SiT-XL/2", results=Path("out/1"), lr=np.float64(1e-4), sizes=[1, 2])
    held = {"ema": {"w": torch.ones(2)}, "args": args, "step": np.int64(3), "list": [torch.zeros(1)]}
    file = tmp_path / "weights.pt"
    torch.save(held, file, _use_new_zipfile_serialization=not legacy)
    opened = open_checkpoint(file)
    assert opened.kind_of_file == "torch"
    assert opened.said == {"model": "SiT-XL/2", "results": "out/1", "lr": 1e-4, "sizes": [1, 2]}
    assert opened.tree["args"] == opened.said
    assert opened.tree["step"] == 3
    same(opened.tree["ema"], {"w": torch.ones(2)})


def test_safetensors_and_the_digest(tmp_path: Path) -> None:
    from fewstep.files import digest

    file = tmp_path / "weights.bin"
    save_file({"w": torch.ones(2)}, file)
    opened = open_checkpoint(file)
    assert opened.kind_of_file == "safetensors"
    assert opened.digest == digest(file.read_bytes())
    same(opened.tree, {"w": torch.ones(2)})


# -------------------------------------------------------------------------------------------------- what would run code


def plain_pickle(file: Path, culprit: Any) -> None:
    file.write_bytes(pickle.dumps({"ema": culprit}))


def zipped(file: Path, culprit: Any) -> None:
    torch.save({"ema": {"w": torch.ones(2)}, "args": culprit}, file)


def legacy(file: Path, culprit: Any) -> None:
    torch.save({"ema": {"w": torch.ones(2)}, "args": culprit}, file, _use_new_zipfile_serialization=False)


class Storage:
    """A tensor's storage whose bytes are a pickle of something else."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.storage._load_from_bytes, (self.content,)


def in_a_storage(file: Path, culprit: Any) -> None:
    plain_pickle(file, Storage(pickle.dumps(culprit)))


def in_a_saved_storage(file: Path, culprit: Any) -> None:
    content = io.BytesIO()
    torch.save(culprit, content, _use_new_zipfile_serialization=False)
    plain_pickle(file, Storage(content.getvalue()))


def in_a_module(file: Path, culprit: Any) -> None:
    write_snapshot(file, ema=Persistent("EDMPrecond", {"_parameters": {"w": culprit}}, {}, "raise SystemExit"))


WRITERS = [plain_pickle, zipped, legacy, in_a_storage, in_a_saved_storage, in_a_module]


@pytest.mark.parametrize("write", WRITERS)
def test_nothing_is_executed(write: Callable[[Path, Any], None], tmp_path: Path) -> None:
    """The sentence has the name that would have run, and how to run it all the same."""
    file, marker = tmp_path / "weights.pt", tmp_path / "ran"
    write(file, Shell(marker))
    with pytest.raises(UntrustedPickle, match=r"weights\.pt names (nt|posix)\.system.*--trust-pickle") as raised:
        open_checkpoint(file)
    assert not marker.exists()
    assert "\n" not in str(raised.value)
    assert {name.partition(".")[2] for name in raised.value.names} == {"system"}


@pytest.mark.parametrize("write", [plain_pickle, zipped, legacy, in_a_saved_storage])
def test_what_is_trusted_runs(write: Callable[[Path, Any], None], tmp_path: Path) -> None:
    file, marker = tmp_path / "weights.pt", tmp_path / "ran"
    write(file, Shell(marker))
    opened = open_checkpoint(file, trust=True)
    assert marker.exists()
    assert set(opened.tree) == ({"ema", "args"} if write in (zipped, legacy) else {"ema"})


def test_trust_runs_nothing_that_can_be_read_without(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    file = write_snapshot(tmp_path / "a.pkl", ema=persistent(Part(), {}, SOURCE.format(str(marker)), "EDMPrecond"))
    assert set(open_checkpoint(file, trust=True).tree["ema"]) == set(Part().state_dict())
    assert not marker.exists()


def test_a_trusted_file_that_fails(tmp_path: Path) -> None:
    file = tmp_path / "weights.pkl"
    with their_modules():
        file.write_bytes(pickle.dumps({"ema": Persistent("A", {}, {}, ""), "other": Shell(tmp_path / "ran")}))
    with pytest.raises(UsageError, match=r"is trusted and fails: ModuleNotFoundError: No module named 'torch_utils'"):
        open_checkpoint(file, trust=True)


def test_every_name_is_listed(tmp_path: Path) -> None:
    class Call:
        def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
            self.reduced = function, arguments

        def __reduce__(self) -> tuple[Any, ...]:
            return self.reduced

    file = tmp_path / "weights.pkl"
    held = [Call(os.getenv, "HOME"), Call(print, "a"), Shell(tmp_path / "ran"), torch.ones(1)]
    file.write_bytes(pickle.dumps(held))
    with pytest.raises(UntrustedPickle) as raised:
        open_checkpoint(file)
    assert raised.value.names == ("builtins.print", "os.getenv", f"{os.name}.system")


def assembled(*opcodes: bytes) -> bytes:
    return b"\x80\x04" + b"".join(opcodes) + b"."


def named(module: str, name: str) -> bytes:
    return b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name)) + b"\x93"


@pytest.mark.parametrize(
    "program",
    [
        # An attribute of a function: (function, (None, {"__call__": function})), told as a state.
        named("torch._utils", "_rebuild_tensor_v2") + b"N}" + b"\x8c\x05_makeNs" + b"\x86b",
        # The same of a class: of the dictionary's, and of the one that stands for modules.
        named("dnnlib.util", "EasyDict") + b"N}" + b"\x8c\x05itemsNs" + b"\x86b",
        named("torch.nn.modules.container", "ModuleDict") + b"N}" + b"\x8c\x0c__setstate__Ns" + b"\x86b",
    ],
)
def test_a_pickle_cannot_alter_the_reader(program: bytes, tmp_path: Path) -> None:
    from fewstep import inert

    with pytest.raises(pickle.UnpicklingError):
        inert.Record.items = None
    before = dict(vars(inert.Record)), dict(vars(inert._Dictionary)), dict(inert._MAKERS)
    file = tmp_path / "weights.pkl"
    file.write_bytes(assembled(program))
    with pytest.raises(UsageError, match="cut short or damaged"):
        open_checkpoint(file)
    assert (dict(vars(inert.Record)), dict(vars(inert._Dictionary)), dict(inert._MAKERS)) == before


def test_a_name_inside_a_known_one_is_not_known(tmp_path: Path) -> None:
    """Names with dots reach into what is known: they are names of their own here."""
    file = tmp_path / "weights.pkl"
    file.write_bytes(assembled(named("torch._utils", "_rebuild_tensor_v2.__globals__")))
    with pytest.raises(UntrustedPickle, match=r"torch\._utils\._rebuild_tensor_v2\.__globals__"):
        open_checkpoint(file)


# ---------------------------------------------------------------------------------------------- what is no whole file


def test_files_cut_short(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pickled = write_snapshot(tmp_path / "a.pkl", ema=persistent(Part(), {}, "", "EDMPrecond")).read_bytes()
    saved, safe = tmp_path / "a.pt", tmp_path / "a.safetensors"
    torch.save({"w": torch.ones(100)}, saved)
    save_file({"w": torch.ones(100)}, safe)
    old = tmp_path / "old.pt"
    torch.save({"w": torch.ones(100)}, old, _use_new_zipfile_serialization=False)
    for name, content in (("b.pkl", pickled), ("b.pt", saved.read_bytes()), ("b.safetensors", safe.read_bytes())):
        for share in (0.1, 0.5, 0.9, 0.99):
            file = tmp_path / name
            file.write_bytes(content[: int(share * len(content))])
            for trust in (False, True):
                with pytest.raises(UsageError, match="cut short or damaged") as raised:
                    open_checkpoint(file, trust=trust)
                assert not isinstance(raised.value, UntrustedPickle)
                assert "\n" not in str(raised.value)
    content = old.read_bytes()
    for length in range(len(content) // 4, len(content), 97):
        old.write_bytes(content[:length])
        with pytest.raises(UsageError, match="cut short or damaged"):
            open_checkpoint(old)


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_a_tensor_larger_than_its_storage(tmp_path: Path) -> None:
    class Far:
        def __reduce__(self) -> tuple[Any, ...]:
            storage = torch.ones(4).storage()
            return torch._utils._rebuild_tensor_v2, (storage, 0, (1 << 40,), (1,), False, OrderedDict())

    file = tmp_path / "weights.pkl"
    file.write_bytes(pickle.dumps({"w": Far()}))
    with pytest.raises(UsageError, match="in a storage of 4 numbers"):
        open_checkpoint(file)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    def refused(content: bytes | None, says: str, name: str = "weights.pt") -> None:
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UsageError, match=says) as raised:
            open_checkpoint(file)
        assert "\n" not in str(raised.value)

    refused(b"", "is empty")
    refused(b"version https://git-lfs", "neither safetensors, nor .* nor a pickle: it begins with b'version https")
    refused(b"cos\nsystem\n(S'true'\ntR.", "neither safetensors")
    refused(b"{}", "cut short or damaged", "a.safetensors")
    refused(pickle.dumps(3), "holds a int, not a checkpoint")
    refused(None, "is a folder", ".")
    refused(None, "cannot read .*: No such file", "missing.pt")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped_file:
        zipped_file.writestr("readme", "nothing")
    refused(archive.getvalue(), "cut short or damaged")
    itself: list[Any] = []
    itself.append(itself)
    refused(pickle.dumps({"a": itself}), "of another kind: ValueError: it contains itself")
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    opcodes = b"]" * 100_000 + b"a" * 99_999
    refused(b"\x80\x04}\x8c\x01a" + opcodes + b"s.", "of another kind: RecursionError")
