"""Folders of diffusers as a user meets them: looked at, checked, taught from, adapted."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_diffusers as tiny
import torch
from conftest import cli, refuse, succeed
from safetensors.torch import load_file, save_file
from test_diffusers_folders import MEAN, STD, perfect

from fewstep.checkpoint import RunDirectory
from fewstep.compat import prepare_torchvision
from fewstep.condition import Embeddings
from fewstep.config import load_config
from fewstep.distill.run import Interrupted, run_training
from fewstep.networks.foreign.diffusers import DiffusersNetwork
from fewstep.networks.foreign.lora import FILE
from fewstep.students.load import load_model

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
DIFFUSION = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}
VAE = {"_class_name": "AutoencoderKL", "scaling_factor": 1.5305, "shift_factor": 0.0609, "latent_channels": 4}
COUNT = 12
CONFIG = """\
name: mine
data: {kind: latents, path: data, scale: 1, shift: 0, DATA}
teacher: {kind: diffusers, path: teacher, TEACHER}
student: {kind: average_velocity}
objective: {kind: meanflow, velocity: teacher}
train: {steps: 10, batch_size: 4, warmup_steps: 0, log_every: 1}
evaluate: {steps: [1], teacher_steps: [2], n: 12, features: [identity]}
"""


def prepare(family: str, folder: Path) -> Path:
    """A pipeline, data for it, and a config of both."""
    tiny.pipeline(folder / "teacher", family, FLOW if family in tiny.FLOW else DIFFUSION, VAE)
    (folder / "data").mkdir()
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(COUNT, *tiny.shape_of(family), generator=generator)
    data, said = "labels: false", []
    if family in tiny.TEXT:
        condition = tiny.batch(family, COUNT)[2]
        assert isinstance(condition, Embeddings)
        none = {f"none.{name}": value.contiguous() for name, value in condition.none.items()}
        save_file({**{k: v.contiguous() for k, v in condition.values.items()}, **none}, folder / "texts.safetensors")
        data = "labels: false, embeddings: texts.safetensors"
        save_file({"latents": latents}, folder / "data" / "latents.safetensors")
    else:
        data = "num_classes: 5"
        labels = torch.arange(COUNT) % 5
        save_file({"latents": latents, "labels": labels}, folder / "data" / "latents.safetensors")
    if tiny.CONFIGS[family].get("guidance_embeds"):
        said.append("embedded_guidance: 3.5")
    if family == "UNet2DModel":
        said.append("null_class: true")
    (folder / "mine.yaml").write_text(CONFIG.replace("DATA", data).replace("TEACHER", ", ".join(said)))
    return folder / "mine.yaml"


@pytest.fixture(params=tiny.CONFIGS)
def family(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    prepare(request.param, tmp_path)
    monkeypatch.chdir(tmp_path)
    return str(request.param)


def test_it_is_inspected_trains_a_student_and_that_samples(family: str, tmp_path: Path) -> None:
    """Ten steps of MeanFlow through the network's own forward derivative, from the folder to samples."""
    inspected = succeed("teacher", "inspect", "teacher", "--json")
    found = json.loads(inspected.stdout)
    assert found["title"] == f"diffusers {family}"
    assert found["convention"]["path"] == ("linear" if family in tiny.FLOW else "betas")
    assert found["num_classes"] == (0 if family in tiny.TEXT else 5 if family == "DiTTransformer2DModel" else 6)
    assert "data.scale 1.5305, data.shift 0.0609" in inspected.stderr
    if family in tiny.TEXT:
        assert "data.embeddings has to hold encoder_hidden_states" in inspected.stderr
    trained = succeed("distill", "mine.yaml", "--out", "run")
    assert "warning: the latents have scale 1, and the autoencoder of teacher says 1.53" in trained.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 10
    assert all(0 < loss < 1e4 for loss in losses)
    succeed("sample", "run", "--steps", 2, "--n", 4)
    # Loaded again it is the network that was trained, with its condition.
    model = load_model(tmp_path / "run", torch.device("cpu"))
    net = model.sampler.maps[0].net  # type: ignore[attr-defined]
    x, t, condition = tiny.batch(family)
    with torch.no_grad():
        here = net(x, t, t / 2, condition)
        there = net(x, t, t, condition)
    assert here.shape == x.shape
    assert bool(here.isfinite().all())
    assert not torch.equal(here, there)  # the second time has been learned


def test_a_teacher_of_texts_is_guided_evaluated_and_straightened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done with classes is done with embeddings: guidance, evaluation beside the teacher, pairs, progressive
    halving, resumed to the same bits."""
    file = prepare("SD3Transformer2DModel", tmp_path)
    monkeypatch.chdir(tmp_path)
    guided = ("teacher.guidance=0.5", "teacher.guidance_form=excess")
    progressive = ("objective={kind: progressive, start_steps: 4}", "train.steps=3", *guided)
    succeed("distill", file, *progressive, "--out", "halved")
    card = json.loads((tmp_path / "halved" / "model" / "config.json").read_text())
    assert card["guidance"] == 1.5
    reflow = ("student.kind=velocity", "objective={kind: reflow, pairs: {count: 8, steps: 2}}", "train.steps=3")
    succeed("distill", file, *reflow, "--out", "straight")
    data = "data={kind: latents, path: data, scale: 1, shift: 0, labels: false, embeddings: texts.safetensors}"
    consistency = ("student.kind=consistency", "objective={kind: consistency, nodes: 4}", "train.steps=4")
    succeed("distill", file, *consistency, data, "--out", "whole")
    again = ("train.checkpoint_every=2", *consistency, data)
    succeed("distill", file, *again, "--out", "kept")
    whole, kept = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "kept"))
    assert all(torch.equal(value, kept[name]) for name, value in whole.items())
    succeed("sample", "straight", "--steps", 1, "--n", 4)
    refuse(
        "distill",
        file,
        "data={kind: latents, path: data, scale: 1, shift: 0, labels: false}",
        says=("is told encoder_hidden_states and pooled_projections: give them in data.embeddings",),
    )


def test_a_student_that_trains_its_adapters_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts as its teacher, leaves its weights as they are, and diffusers loads what it learned."""
    prepare_torchvision()
    from diffusers import SD3Transformer2DModel

    file = prepare("SD3Transformer2DModel", tmp_path)
    monkeypatch.chdir(tmp_path)
    lora = "student.lora={rank: 2, alpha: 4}"
    velocity = ("student.kind=velocity", "objective={kind: reflow, pairs: {count: 8, steps: 2}}", "train.lr=0.05")
    succeed("distill", file, lora, *velocity, "--out", "run")
    adapters = load_file(tmp_path / "run" / "model" / "pytorch_lora_weights.safetensors")
    assert adapters
    assert all(name.startswith("transformer.") and ".lora_" in name for name in adapters)
    assert any(bool(value.any()) for name, value in adapters.items() if "lora_B" in name)

    model = load_model(tmp_path / "run", torch.device("cpu"))
    ours = model.sampler.fields[0].field.net.net.net  # type: ignore[attr-defined]
    theirs = SD3Transformer2DModel.from_pretrained(tmp_path / "teacher" / "transformer")
    own = {name.replace(".base_layer.", "."): value for name, value in ours.state_dict().items()}
    for name, value in theirs.state_dict().items():
        assert torch.equal(own[name], value), name
    x, t, condition = tiny.batch("SD3Transformer2DModel")
    assert isinstance(condition, Embeddings)
    arguments: dict[str, Any] = {**condition.told(), "timestep": 1000 * t}
    with torch.no_grad():
        before = theirs(x, **arguments).sample
        theirs.load_lora_adapter(tmp_path / "run" / "model", prefix="transformer", weight_name=FILE)
        after = theirs(x, **arguments).sample
        expected = ours(x, **arguments).sample
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(after, before, atol=1e-4)

    # Two times: what is new to the network is trained beside the adapters; stopped and resumed to the same bits.
    succeed("distill", file, lora, "--out", "jumps")
    said = load_config(str(file), [lora])
    halfway = run_training(
        said, RunDirectory(tmp_path / "again"), resume=False, overwrite=False, stopped=iter([0] * 4 + [1] * 9).__next__
    )
    with pytest.raises(Interrupted):
        list(halfway)
    succeed("distill", file, lora, "--out", "again", "--resume")
    whole, resumed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("jumps", "again"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    succeed("evaluate", "jumps")
    weights = load_file(tmp_path / "jumps" / "model" / "model.safetensors")
    assert bool(weights["embed_gap.outer.weight"].any())
    refuse(
        "distill",
        "digits-meanflow",
        lora,
        "teacher={kind: analytic}",
        "student.init=scratch",
        says=("needs init teacher",),
    )


def test_check_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random network says nothing of the data, and the check says that."""
    file = prepare("DiTTransformer2DModel", tmp_path)
    monkeypatch.chdir(tmp_path)
    result = cli("teacher", "check", file, "--n", 16)
    assert result.exit_code == 4
    assert "says nothing of these data in any reading" in result.stderr
    (tmp_path / "teacher" / "scheduler" / "scheduler_config.json").unlink()
    refuse("teacher", "check", file, says=("no scheduler beside it", "teacher.convention"))


@pytest.mark.parametrize("family", ["SD3Transformer2DModel", "Lumina2Transformer2DModel", "DiTTransformer2DModel"])
def test_check_confirms_what_a_scheduler_says_and_names_what_is_wrong(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that knows its data exactly, in the convention of its family and scheduler."""
    file = prepare(family, tmp_path)
    monkeypatch.chdir(tmp_path)
    x = MEAN + STD * torch.randn(COUNT * 20, *tiny.shape_of(family), generator=torch.Generator().manual_seed(3))
    labels = {"labels": torch.arange(len(x)) % 5} if family not in tiny.TEXT else {}
    save_file({"latents": x, **labels}, tmp_path / "data" / "latents.safetensors")
    if family in tiny.TEXT:
        condition = tiny.batch(family, len(x))[2]
        assert isinstance(condition, Embeddings)
        none = {f"none.{name}": value.contiguous() for name, value in condition.none.items()}
        save_file({**{k: v.contiguous() for k, v in condition.values.items()}, **none}, tmp_path / "texts.safetensors")
    exact = perfect(family, FLOW if family in tiny.FLOW else DIFFUSION)
    monkeypatch.setattr(
        DiffusersNetwork, "forward", lambda self, x, tau, label=None, added=None: exact(x, tau)[0][:, : x.shape[1]]
    )
    found = json.loads(succeed("teacher", "inspect", "teacher", "--json").stdout)["convention"]
    assert "is read right" in succeed("teacher", "check", file).stderr
    wrong = [{"noise_at": 1 - found["noise_at"]}]
    if found["prediction"] == "velocity":
        turned = {"velocity_to": "data" if found["velocity_to"] == "noise" else "noise"}
        wrong += [turned, {**turned, **wrong[0]}]
        if found["time_scale"] == 1000:  # to this perfect network 1/1000 of the clock is hardly any time
            wrong.append({"time_scale": 1.0})
    for change in wrong:
        result = cli("teacher", "check", file, f"teacher.convention={json.dumps({**found, **change})}")
        assert result.exit_code == 4, change
        for field in change:
            right = found[field] if isinstance(found[field], str) else f"{found[field]:g}"
            assert f"{field}: {right}" in result.stderr, change
