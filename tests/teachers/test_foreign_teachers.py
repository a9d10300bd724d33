"""Checkpoints of every project as a user meets them: looked at, checked, converted, taught from."""

import json
import pickle
from pathlib import Path
from typing import Any

import foreign_checkpoints as made
import pytest
import torch
from conftest import cli, refuse, succeed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.conversion import canonical_velocity
from fewstep.data.config import DigitsConfig
from fewstep.data.load import digits
from fewstep.networks.foreign.converted import ForeignNetwork
from fewstep.sampling import sample_ode
from fewstep.students.load import load_model
from fewstep.teachers.config import CheckpointTeacher
from fewstep.teachers.containers import by_order
from fewstep.teachers.formats.table import FORMATS
from fewstep.teachers.guided import GuidedField
from fewstep.teachers.load import Teacher, load_teacher

KINDS = sorted(made.KINDS)
CONFIG = """\
name: mine
data: {kind: digits}
teacher: {kind: KIND, path: teacher.pt}
student: {kind: average_velocity}
objective: {kind: meanflow, velocity: teacher}
train: {steps: 3, batch_size: 8, warmup_steps: 0, log_every: 1}
evaluate: {steps: [1], teacher_steps: [2], n: 64, features: [pixels]}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path


def said(kind: str) -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in made.KINDS[kind].said.items()]


def config(kind: str, folder: Path) -> Path:
    """A config with that teacher, on data that have its classes."""
    file = folder / "mine.yaml"
    text = CONFIG.replace("KIND", kind)
    if not made.KINDS[kind].classes:
        torch.manual_seed(0)
        save_file({"latents": digits().x[:64].clone()}, folder / "latents.safetensors")
        text = text.replace("{kind: digits}", "{kind: latents, path: ., scale: 1, shift: 0}")
    told = made.KINDS[kind].said
    file.write_text(text.replace("path: teacher.pt", f"path: teacher.pt, architecture: {json.dumps(told)}"))
    return file


def teacher(kind: str, **settings: Any) -> Teacher:
    given = {"kind": kind, "path": "teacher.pt", "architecture": made.KINDS[kind].said, **settings}
    data = digits()
    if not made.KINDS[kind].classes:
        from dataclasses import replace

        data = replace(data, label=None, num_classes=0)
    return load_teacher(CheckpointTeacher.model_validate(given), DigitsConfig(), data, torch.device("cpu"))


def test_every_kind_of_a_config_has_a_format_and_a_checkpoint_here() -> None:
    kinds = CheckpointTeacher.model_fields["kind"].annotation.__args__  # type: ignore[union-attr]
    assert set(kinds) == set(FORMATS) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_average_of_its_container_is_read_in_its_convention(kind: str, here: Path) -> None:
    """To 1e-6: the project's own network, with the average and not the raw weights, called as that project calls it."""
    raw = made.write(kind, here / "teacher.pt")
    found = teacher(kind)
    x = torch.randn(6, *made.SHAPE, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.05, 0.95, 6)
    label = torch.arange(6) if made.KINDS[kind].classes else None

    def model(z: Tensor, tau_B: Tensor) -> Tensor:
        return raw(z, tau_B, label)

    with torch.no_grad():
        expected = canonical_velocity(FORMATS[kind].convention, model, x, t)
        torch.testing.assert_close(found.field(x, t, label), expected, rtol=1e-6, atol=1e-6)
    assert found.objective == kind
    assert found.net is not None


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_says_what_it_is(kind: str, here: Path) -> None:
    net = made.write(kind, here / "teacher.pt")
    of = made.KINDS[kind]
    found = json.loads(succeed("teacher", "inspect", "teacher.pt", *said(kind), "--kind", kind, "--json").stdout)
    assert found["kind"] == kind
    assert found["averaged"] == (of.place is not None)
    assert found["place"] == (of.place or "the file itself")
    assert (found["channels"], found["num_classes"]) == (1, of.classes)
    assert found["side"] in (8, None)
    assert found["params"] == sum(value.numel() for value in net.state_dict().values())
    assert len(found["digest"]) == 64
    expected = FORMATS[kind].convention.model_dump(mode="json", exclude_none=True)
    assert found["convention"] == expected
    assert {**of.network.model_dump(mode="json"), **found["network"]} == of.network.model_dump(mode="json")


@pytest.mark.parametrize(("kind", "kinds"), [("sit", {"sit", "dit"}), ("edm", {"edm"}), ("repa", {"repa"})])
def test_what_names_and_shapes_tell_need_not_be_said(kind: str, kinds: set[str], here: Path) -> None:
    made.write(kind, here / "teacher.pt")
    result = succeed("teacher", "inspect", "teacher.pt", *said(kind), "--json")
    assert set(json.loads(result.stdout)["kinds"]) == kinds
    assert ("say which by --kind" in result.stderr) == (len(kinds) > 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_of_it_starts_as_it_and_is_loaded_again(kind: str, here: Path) -> None:
    """Ten lines of config from a checkpoint to a table."""
    made.write(kind, here / "teacher.pt")
    file = config(kind, here)
    succeed("distill", file, "--out", "run", "train.lr=1e-12", "train.weight_decay=0")
    model = load_model(here / "run", torch.device("cpu"))
    found = teacher(kind)
    x = torch.randn(4, *made.SHAPE, generator=torch.Generator().manual_seed(0))
    label = torch.arange(4) if made.KINDS[kind].classes else None
    # With no learning a jump is the teacher's Euler step, whatever its end.
    student = model.sampler.maps[0].net  # type: ignore[attr-defined]
    t = torch.full((4,), 0.7)
    with torch.no_grad():
        u = student(x, t, torch.full((4,), 0.2), label)
        torch.testing.assert_close(u, found.field(x, t, label), rtol=1e-4, atol=1e-4)
    assert model.card["teacher_digest"] == found.digest
    if kind in ("sit", "edm"):
        succeed("evaluate", "run")
        rows = json.loads((here / "run" / "results.json").read_text())["rows"]
        assert {(row["role"], row["steps"], row["nfe"]) for row in rows} == {("teacher", 2, 2), ("student", 1, 1)}
        succeed("sample", "run", "--steps", 2, "--n", 4)


class Disguise(nn.Module):
    """The exact Gaussian teacher of data ``N(mean, std^2)`` as a perfect network of some convention."""

    condition = 8

    def __init__(self, kind: str, mean: float, std: float) -> None:
        super().__init__()
        from test_convention import disguised

        self.model = disguised(FORMATS[kind].convention, mean, std)

    def forward(self, x: Tensor, tau_B: Tensor, label: Tensor | None = None, added_BE: Tensor | None = None) -> Tensor:
        return self.model(x, tau_B, label)


@pytest.mark.parametrize("kind", KINDS)
def test_check_confirms_what_is_right_and_names_what_is_wrong(
    kind: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that knows the digits' mean and deviation exactly: confirmed as its project has it, and of each wrong
    declaration the way back is said."""
    made.write(kind, here / "teacher.pt")
    file = config(kind, here)
    x = digits().x
    perfect = Disguise(kind, float(x.mean()), float(x.std()))
    monkeypatch.setattr(
        "fewstep.teachers.identify.Checkpoint.network",
        lambda self, shape: ForeignNetwork(perfect, self.found.network.convention, self.inputs),
    )
    right = FORMATS[kind].convention
    assert "is read right" in succeed("teacher", "check", file, "--n", 256).stderr
    wrong: dict[str, dict[str, Any]] = {"scale": {"time_scale": 1000.0 if right.time_scale == 1 else 1.0}}
    if right.prediction == "velocity":
        sign = {"velocity_to": "data" if right.velocity_to == "noise" else "noise"}
        wrong |= {
            "sign": sign,
            "time": {"noise_at": 1 - right.noise_at},
            "both": {**sign, "noise_at": 1 - right.noise_at},
        }
    else:
        wrong["prediction"] = {"prediction": "noise" if right.prediction == "data" else "data", "earliest": 0.001}
    for name, change in wrong.items():
        declared = json.dumps({**right.model_dump(), **change})
        result = cli("teacher", "check", file, f"teacher.convention={declared}", "--n", 256)
        assert result.exit_code == 4, (name, result.stderr)
        if name != "scale" or right.time_scale == 1:
            fields = {field: right.model_dump()[field] for field in change if field != "earliest"}
            for field, value in fields.items():
                shown = f"{value:g}" if isinstance(value, float) else value
                assert f"{field}: {shown}" in result.stderr, (name, result.stderr)


def test_guidance_moves_the_channels_that_the_project_guides(here: Path) -> None:
    made.write("sit", here / "teacher.pt")
    of_one = teacher("sit", guidance=2.0)
    assert of_one.contrast is not None
    assert of_one.contrast.channels is None  # one channel is all of them
    given = teacher("sit", guidance=2.0, guided_channels="all")
    x, t, label = torch.randn(3, *made.SHAPE), torch.full((3,), 0.5), torch.arange(3)
    assert torch.equal(given.field(x, t, label), of_one.field(x, t, label))
    # 3 of 4: the fourth stays what it is without guidance.
    from fewstep.teachers.guided import ClassContrast

    def field(x: Tensor, t_B: Tensor, label_B: Any = None) -> Tensor:
        return x * label_B[:, None, None, None]

    x = torch.randn(3, 4, 2, 2)
    found = GuidedField(ClassContrast(field, 10, 3), 2.0)(x, t, label)  # type: ignore[arg-type]
    torch.testing.assert_close(found[:, :3], 2 * field(x, t, label)[:, :3] - 10 * x[:, :3])
    assert torch.equal(found[:, 3], field(x, t, label)[:, 3])


def test_guidance_of_another_count_is_one_more() -> None:
    given = {"kind": "flow_matching", "path": "x", "guidance": 0.5, "guidance_form": "excess"}
    assert CheckpointTeacher.model_validate(given).guidance == 1.5
    assert CheckpointTeacher.model_validate({**given, "guidance_form": "scale"}).guidance == 0.5
    # What was resolved once stays what it is.
    again = CheckpointTeacher.model_validate(CheckpointTeacher.model_validate(given).model_dump())
    assert again.guidance == 1.5


# Converting ----------------------------------------------------------------------------------------------------------


def test_converted_it_is_found_by_the_digest_of_its_file(here: Path) -> None:
    made.write("sit", here / "teacher.pt")
    before = teacher("sit")
    first = json.loads(succeed("teacher", "convert", "teacher.pt", "heads=3", "--kind", "sit", "--json").stdout)
    folder = Path(first["folder"])
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "teacher.json"]
    assert folder.is_relative_to(here / "cache")
    changed = (folder / "model.safetensors").stat().st_mtime_ns
    succeed("teacher", "convert", "teacher.pt", "heads=3", "--kind", "sit")
    assert (folder / "model.safetensors").stat().st_mtime_ns == changed
    # The config that names the file needs nothing said any more, and the folder will do as well.
    for path in ("teacher.pt", str(folder)):
        after = teacher("sit", architecture={}, path=path)
        assert after.digest == before.digest
        assert after.net is not None
        assert before.net is not None
        for name, value in before.net.state_dict().items():
            assert torch.equal(after.net.state_dict()[name], value), name
    assert "converted already" in succeed("teacher", "inspect", "teacher.pt", "heads=3").stderr
    assert "converted from teacher.pt" in succeed("teacher", "inspect", folder).stderr
    refuse("teacher", "check", config("dit", here), f"teacher.path={folder}", says=("holds a teacher of kind sit",))


def test_conversions_do_not_cover_other_things(here: Path) -> None:
    made.write("sit", here / "teacher.pt")
    convert = ("teacher", "convert", "teacher.pt", "heads=3", "--kind", "sit", "--out", "out")
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").touch()
    refuse(*convert, says=("out is not empty",))
    (here / "out" / "thesis.tex").unlink()
    succeed(*convert)
    succeed(*convert)
    made.write("dit", here / "teacher.pt")
    refuse(*convert, says=("out holds another teacher", "give another --out"))
    weights = load_file(here / "out" / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, here / "out" / "model.safetensors")
    refuse("teacher", "inspect", "out", says=("damaged or truncated",))


# What goes wrong -----------------------------------------------------------------------------------------------------


def plain(**changes: Any) -> dict[str, Tensor]:
    return {**made.network("dit").state_dict(), **changes}


def refused(here: Path, weights: Any, *texts: str, kind: str = "sit") -> None:
    torch.save(weights, here / "teacher.pt")
    refuse("teacher", "inspect", "teacher.pt", "heads=3", "--kind", kind, says=texts)
    refuse("distill", config(kind, here), "--out", "run", says=texts)
    assert not (here / "run").exists()


def test_half_of_a_checkpoint(here: Path) -> None:
    weights = plain()
    dropped = [name for name in weights if name.startswith("blocks.1.mlp")]
    for name in dropped:
        del weights[name]
    refused(here, weights, "teacher.pt is not a whole SiT checkpoint", "4 missing (blocks.1.mlp.fc1.weight,")


def test_weights_beyond_it(here: Path) -> None:
    refused(here, plain(extra=torch.zeros(2)), "1 unexpected (extra)")


def test_weights_of_another_shape(here: Path) -> None:
    changed = plain(**{"blocks.0.attn.proj.bias": torch.zeros(5)})
    refused(here, changed, "1 of another shape (blocks.0.attn.proj.bias [5] for [24])")


def test_quantised_weights(here: Path) -> None:
    changed = plain(**{"blocks.0.attn.proj.bias": torch.zeros(24, dtype=torch.int8)})
    refused(here, changed, "blocks.0.attn.proj.bias is int8", "quantised weights are not read")


def test_weights_that_are_not_numbers(here: Path) -> None:
    changed = plain(**{"blocks.0.attn.proj.bias": torch.full((24,), torch.nan)})
    refused(here, changed, "blocks.0.attn.proj.bias holds numbers that are not finite")


def test_another_projects_checkpoint(here: Path) -> None:
    refused(here, made.network("torchcfm").state_dict(), "teacher.pt is no SiT checkpoint")
    torch.save(nn.Linear(3, 3).state_dict(), here / "teacher.pt")
    refuse("teacher", "inspect", "teacher.pt", says=("no known project names its weights so (weight, bias, ...)",))


def test_a_file_without_weights(here: Path) -> None:
    torch.save({"epoch": 3, "lr": 1e-4}, here / "teacher.pt")
    refuse("teacher", "inspect", "teacher.pt", says=("has no weights where any known project keeps them", "epoch, lr"))


@pytest.mark.parametrize("kind", ["sit", "edm"])
def test_a_file_that_was_cut_short(kind: str, here: Path) -> None:
    made.write(kind, here / "teacher.pt")
    content = (here / "teacher.pt").read_bytes()
    (here / "teacher.pt").write_bytes(content[: len(content) // 2])
    refuse("teacher", "inspect", "teacher.pt", says=("teacher.pt is cut short or damaged",))


class Malicious:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> Any:
        return exec, ("open('harm', 'w')",)


@pytest.mark.parametrize("save", [torch.save, lambda held, path: path.write_bytes(pickle.dumps(held))])
def test_what_a_pickle_names_is_listed_and_not_run(save: Any, here: Path) -> None:
    save({"ema": plain(), "step": Malicious()}, here / "teacher.pt")
    wanted = ("teacher.pt names builtins.exec, which would run as code", "--trust-pickle", "teacher.trust_pickle: true")
    refuse("teacher", "inspect", "teacher.pt", "heads=3", says=wanted)
    refuse("teacher", "convert", "teacher.pt", "heads=3", "--kind", "dit", says=wanted)
    refuse("teacher", "check", config("dit", here), says=wanted)
    refuse("distill", config("dit", here), says=wanted)
    assert not (here / "harm").exists()
    # Somebody who trusts its maker says so, once: the conversion needs no trust any more.
    succeed("teacher", "convert", "teacher.pt", "heads=3", "--kind", "dit", "--trust-pickle")
    assert (here / "harm").exists()
    (here / "harm").unlink()
    succeed("distill", config("dit", here), "teacher.architecture={}", "--out", "run")
    assert not (here / "harm").exists()


def test_missing_and_empty_paths(here: Path) -> None:
    refuse("teacher", "inspect", "nowhere.pt", says=("nowhere.pt is missing",))
    refuse("distill", config("sit", here), says=("teacher.path: teacher.pt is missing",))
    (here / "empty").mkdir()
    refuse("teacher", "inspect", "empty", says=("empty",))


def test_other_data_than_it_was_made_for(here: Path) -> None:
    made.write("sit", here / "teacher.pt")
    file = config("sit", here)
    toy = "data={kind: toy, name: two_moons}"
    refuse("distill", file, toy, says=("teacher.pt takes 1 x 8 x 8, the data toy-two_moons are 2",))
    made.write("torchcfm", here / "teacher.pt")
    told = f"teacher.architecture={json.dumps(made.KINDS['torchcfm'].said)}"
    refuse("distill", file, "teacher.kind=torchcfm", told, says=("has 0 classes", "have 10", "set data.labels=false"))


def test_which_weights_can_be_chosen(here: Path) -> None:
    raw = made.write("torchcfm", here / "teacher.pt")
    averaged, plain_ones = (
        teacher("torchcfm", weights=each).net.state_dict()
        for each in ("ema", "raw")  # type: ignore[union-attr]
    )
    torch.testing.assert_close(averaged["net.out.2.bias"], raw.state_dict()["out.2.bias"])
    torch.testing.assert_close(plain_ones["net.out.2.bias"], raw.state_dict()["out.2.bias"] + 0.5)
    made.write("dit", here / "teacher.pt")
    refuse("distill", config("dit", here), "teacher.weights=ema", says=("has no average (teacher.weights ema)",))


def test_lists_of_averages_follow_their_order_and_skip_buffers() -> None:
    like = {"a": torch.zeros(2), "buffer": torch.ones(3), "b": torch.zeros(2, 2)}
    found = by_order([torch.full((2,), 5.0), torch.full((2, 2), 6.0)], like, "here")
    assert {name: float(value.flatten()[0]) for name, value in found.items()} == {"a": 5, "buffer": 1, "b": 6}
    from fewstep.errors import UsageError

    with pytest.raises(UsageError, match="do not follow the order"):
        by_order([torch.zeros(2, 2), torch.zeros(2)], like, "here")


def test_half_precision_weights_are_read(here: Path) -> None:
    half = {name: value.to(torch.bfloat16) for name, value in plain().items()}
    save_file(half, here / "teacher.pt")
    found = teacher("sit")
    assert found.net is not None
    assert {value.dtype for value in found.net.state_dict().values()} == {torch.float32}
    x, t, label = torch.randn(3, *made.SHAPE), torch.full((3,), 0.5), torch.arange(3)
    low = teacher("sit", precision="bf16").field(x, t, label)
    torch.testing.assert_close(low, found.field(x, t, label), rtol=0.1, atol=0.1)
    sampled = sample_ode(found.field, x, torch.tensor([1.0, 0.5, 0.0]), label)
    assert bool(sampled.x.isfinite().all())


def test_away_from_a_weaker_checkpoint(here: Path) -> None:
    """EDM2's way: one step beyond the better of two networks, the worse of which may know no classes."""
    made.write("edm2", here / "teacher.pt")
    for classes in (made.CLASSES, 0):
        torch.manual_seed(8)
        worse = made.raw_network(made.KINDS["edm2"].network, made.SHAPE, classes)
        made.randomise(worse)
        made.KINDS["edm2"].save(here / "worse.pt", worse, worse.state_dict(), {})
        good = teacher("edm2").field
        found = teacher("edm2", guidance=1.5, weak="worse.pt")
        x, t, label = torch.randn(3, *made.SHAPE), torch.tensor([0.2, 0.5, 0.8]), torch.arange(3)
        convention = FORMATS["edm2"].convention
        told = label if classes else None
        with torch.no_grad():
            bad = canonical_velocity(convention, lambda z, tau_B, net=worse, to=told: net(z, tau_B, to), x, t)
            torch.testing.assert_close(found.field(x, t, label), bad + 1.5 * (good(x, t, label) - bad))
        assert found.digest != teacher("edm2").digest


def test_a_network_that_always_had_a_class_is_not_guided(here: Path) -> None:
    always = made.KINDS["torchcfm"].network.model_copy(update={"null_row": False})
    net = made.raw_network(always, made.SHAPE, made.CLASSES)
    torch.save({"ema_model": net.state_dict()}, here / "teacher.pt")
    file = config("flow_matching", here)
    told = ("teacher.kind=torchcfm",)
    succeed("distill", file, *told, "--out", "run", "train.steps=1")
    refuse("distill", file, *told, "teacher.guidance=2", says=("trained with a class always",))
    own = ("objective={kind: meanflow, velocity: data, guidance: {scale: 2}}",)
    refuse("distill", file, *told, *own, says=("(adm) has nothing that stands for no class",))
