"""Folders of diffusers: what is read from them, the convention that follows, what is wrong with them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_diffusers import CONFIGS, FLOW, batch, network, pipeline, shape_of
from torch import Tensor

from fewstep.conventions import canonical_guidance
from fewstep.conversion import diffusion_path, noise_shares
from fewstep.errors import UsageError
from fewstep.flow import uniform_grid
from fewstep.networks.condition import Inputs
from fewstep.networks.foreign.converted import ForeignNetwork
from fewstep.networks.foreign.diffusers import DiffusersNetwork
from fewstep.sampling import sample_ode
from fewstep.teachers.analytic import GaussianTeacher
from fewstep.teachers.formats.diffusers import PARTS, WEIGHTS, DiffusersFound, read_folder
from fewstep.teachers.formats.schedulers import DIFFUSION, FLOW_MATCHING, read_scheduler
from fewstep.teachers.network import NetworkField

EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
DDIM: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8, 8],
    "scaling_factor": 1.5,
    "shift_factor": 0.25,
}
SD3 = "SD3Transformer2DModel"
CARD = "---\nlicense: other\nlicense_name: some-terms\ntags:\n- x\n---\n# Model\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pipeline of every family, flow matching or a diffusion as it usually is."""
    root = tmp_path_factory.mktemp("pipelines")
    made = {}
    for family in CONFIGS:
        vae = VAE if family == "SD3Transformer2DModel" else None
        made[family] = pipeline(root / family, family, EULER if family in FLOW else DDIM, vae)
    (made["SD3Transformer2DModel"] / "README.md").write_text(CARD)
    return made


def said_of(family: str) -> dict[str, Any]:
    """What no folder says."""
    if family == "UNet2DModel":
        return {"null_class": True}
    return {"embedded_guidance": 3.5} if CONFIGS[family].get("guidance_embeds") else {}


def loaded(found: DiffusersFound) -> ForeignNetwork:
    net = DiffusersNetwork((found.channels, 8, 8), found.network, found.num_classes)
    net.load_state_dict(found.weights())
    return ForeignNetwork(net, found.network.convention, Inputs(found.num_classes, two_times=False)).eval()


# What is read --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_found_and_loads(folders: dict[str, Path], family: str) -> None:
    found = read_folder(folders[family], said_of(family))
    assert found.network.family == family
    assert (found.channels, found.sides) == (shape_of(family)[0], None if "Flux" in family else (8, 8))
    assert found.num_classes == (5 if family in ("DiTTransformer2DModel", "UNet2DModel") else 0)
    net, x_t_label = loaded(found).net, batch(family)
    assert torch.equal(net(*x_t_label), network(family)(*x_t_label))
    bare = read_folder(folders[family] / ("unet" if family == "UNet2DModel" else "transformer"), said_of(family))
    assert [bare.network, bare.files, bare.scheduler] == [found.network, found.files, found.scheduler]


def test_what_lies_beside_the_network(folders: dict[str, Path]) -> None:
    found = read_folder(folders["SD3Transformer2DModel"])
    assert found.latent is not None
    assert found.latent.shift.flatten().tolist() == [0.25] * 4
    assert found.latent.scale.flatten().tolist() == [1.5] * 4
    assert (found.network.pixels, found.license) == (4, "some-terms")
    assert found.scheduler is not None
    assert (found.scheduler.shift, found.scheduler.dynamic, found.scheduler.shifts_twice) == (3.0, False, True)
    other = read_folder(folders["DiTTransformer2DModel"])
    assert (other.latent, other.network.pixels, other.license) == (None, 8, "unknown")


def test_latents_of_one_mean_and_deviation_per_channel(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders, "SD3Transformer2DModel", tmp_path)
    change(folder / "vae" / "config.json", latents_mean=[0, 1, 2, 3], latents_std=[1, 2, 4, 8], scaling_factor=2.0)
    latent = read_folder(folder).latent
    assert latent is not None
    assert latent.shift.flatten().tolist() == [0, 1, 2, 3]
    assert latent.scale.flatten().tolist() == [2, 1, 0.5, 0.25]


def test_the_scheduler_moves_its_last_time_twice() -> None:
    """What ``shifts_twice`` says, in diffusers itself."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    once = 3 * 0.001 / (1 + 2 * 0.001)
    assert float(scheduler.sigmas[-2]) == pytest.approx(3 * once / (1 + 2 * once), rel=1e-3)


def test_weights_in_parts(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = in_parts(copied(folders, "SD3Transformer2DModel", tmp_path))
    assert not (folder / WEIGHTS).exists()
    whole, parts = read_folder(folders["SD3Transformer2DModel"]).weights(), read_folder(folder).weights()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("family", ["DiTTransformer2DModel", "PixArtTransformer2DModel"])
def test_the_class_of_earlier_versions(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    folder = copied(folders, family, tmp_path)
    change(folder / "transformer" / "config.json", _class_name="Transformer2DModel", num_vector_embeds=None)
    found = read_folder(folder)
    assert found.network.family == family
    loaded(found)


def test_an_early_pipeline(folders: dict[str, Path], tmp_path: Path) -> None:
    """Without folders inside it, and with other names for attention: as google/ddpm-cifar10-32 is."""
    old = folders["UNet2DModel"]
    shutil.copy(old / "model_index.json", tmp_path)
    shutil.copy(old / "unet" / "config.json", tmp_path)
    shutil.copy(old / "scheduler" / "scheduler_config.json", tmp_path)
    renamed = {}
    for name, value in load_file(old / "unet" / WEIGHTS).items():
        for now, then in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{now}.", f".{then}.")
        renamed[name] = value
    assert "mid_block.attentions.0.proj_attn.weight" in renamed
    save_file(renamed, tmp_path / WEIGHTS)
    x_t_label = batch("UNet2DModel")
    net = loaded(read_folder(tmp_path, {"null_class": True})).net
    assert torch.equal(net(*x_t_label), network("UNet2DModel")(*x_t_label))


# The convention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FLOW)
def test_a_step_of_flow_matching_is_a_step_of_the_scheduler(folders: dict[str, Path], family: str) -> None:
    """As the family's pipeline makes it, from the network that ``from_pretrained`` loads."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = folders[family]
    theirs = network(family)
    theirs.net = type(theirs.net).from_pretrained(folder / "transformer")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.3])
    x, _, label = batch(family)
    field, state = loaded(read_folder(folder, said_of(family))), x
    with torch.no_grad():
        for step, timestep in enumerate(scheduler.timesteps):
            tau = {
                "FluxTransformer2DModel": timestep / 1000,
                "AuraFlowTransformer2DModel": timestep / 1000,
                "SanaTransformer2DModel": timestep * 0.5,
                "Lumina2Transformer2DModel": 1 - timestep / scheduler.config.num_train_timesteps,
            }.get(family, timestep)
            said = theirs.family.call(theirs.net, theirs.config, state, tau.expand(3), told(theirs, label))
            wanted = scheduler.step(-said if "Lumina" in family else said, timestep, state).prev_sample
            t, r = scheduler.sigmas[step].expand(3), scheduler.sigmas[step + 1].expand(3)
            found = state - (t - r)[:, None, None, None] * field(state, t, t, label)
            # Lumina2's 1 - t is one rounding nearer to t where the pipeline takes it from 1000 t.
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
            state = wanted


def told(net: DiffusersNetwork, label: Any) -> dict[str, Tensor]:
    guidance = {"guidance": torch.full((3,), 3.5)} if net.config.embedded_guidance else {}
    return {**label.told(), **guidance}


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("predicted", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_data_predictions_are_those_of_ddim(schedule: str, predicted: str, zero_snr: bool) -> None:
    """For any network, here one that answers with noise; ``x_vp = (alpha + sigma) x``."""
    from diffusers import DDIMScheduler

    said = {**DDIM, "beta_schedule": schedule, "prediction_type": predicted, "rescale_betas_zero_snr": zero_snr}
    scheduler = DDIMScheduler.from_config({**said, "timestep_spacing": "trailing"})
    scheduler.set_timesteps(10)
    convention = read_scheduler(said, "UNet2DModel", {}, "here").convention
    assert convention.betas is not None
    shares = noise_shares(convention.betas)
    answer = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    asked: list[Tensor] = []

    class Answer(torch.nn.Module):
        condition = 4

        def forward(self, x: Tensor, tau_B: Tensor, label: Any = None, added_BE: Any = None) -> Tensor:
            asked.append(tau_B)
            return answer

    field = ForeignNetwork(Answer(), convention, Inputs(0, two_times=False))
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for k in scheduler.timesteps.tolist()[1:]:
        t = shares[k].expand(3)
        path, tau = diffusion_path(convention.betas), torch.tensor(k / 999, dtype=torch.float64)
        scale = path.alpha(tau) + path.sigma(tau)
        wanted = scheduler.step(answer, k, x * scale).pred_original_sample
        data = x - t[:, None] * field(x, t, t)
        # diffusers keeps its variances in float32: an eighth digit, and a fourth where the data are nearly gone.
        torch.testing.assert_close(data, wanted, rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(asked[-1], torch.full((3,), float(k), dtype=torch.float64), rtol=1e-9, atol=1e-9)


MEAN, STD = 0.4, 0.6


def perfect(family: str, scheduler: dict[str, Any]) -> Any:
    """``forward`` of a network of the family that is right about data ~ N(MEAN, STD^2), in its own convention."""
    # The variances of its scheduler, which itself keeps them in float32.
    variances = torch.linspace(DDIM["beta_start"], DDIM["beta_end"], 1000, dtype=torch.float64)

    def forward(hidden: Tensor, timestep: Tensor, **rest: Any) -> tuple[Tensor]:
        clock = timestep.reshape(-1, *(1,) * (hidden.dim() - 1))
        if scheduler["_class_name"] == "DDIMScheduler":
            bar = (1 - variances).cumprod(0)[clock.round().long()]
            off = (hidden - bar.sqrt() * MEAN) / (bar * STD**2 + 1 - bar)
            noise = (1 - bar).sqrt() * off
            return (torch.cat((noise, torch.full_like(noise, torch.nan)), dim=1),)
        scale = {"SD3Transformer2DModel": 1000, "SanaTransformer2DModel": 500}.get(family, 1)
        t = 1 - clock if "Lumina" in family else clock / scale
        off = (hidden - (1 - t) * MEAN) / ((1 - t) ** 2 * STD**2 + t**2)
        velocity = t * off - (MEAN + (1 - t) * STD**2 * off)
        return (-velocity if "Lumina" in family else velocity,)

    return forward


@pytest.mark.parametrize("family", CONFIGS)
def test_a_perfect_network_is_the_exact_velocity(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], family: str
) -> None:
    found = read_folder(folders[family], said_of(family))
    field = loaded(found).double()
    scheduler = EULER if family in FLOW else DDIM
    monkeypatch.setattr(field.net.net, "forward", perfect(family, scheduler))
    x, _, label = batch(family, 6, torch.float64)
    t = torch.linspace(0.02, 0.98, 6, dtype=torch.float64)
    if found.network.convention.betas is not None:
        shares = noise_shares(found.network.convention.betas)
        t = shares[torch.linspace(0, 999, 6).long()]
    torch.testing.assert_close(field(x, t, t, label), GaussianTeacher(MEAN, STD)(x, t), rtol=1e-7, atol=1e-7)
    # 64 steps of it end at its data; a diffusion's network has no opinion between its steps, and is asked there too.
    e = torch.randn(len(x), *x.shape[1:], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    drawn = sample_ode(NetworkField(field), e, uniform_grid(64), label).x
    exact = sample_ode(GaussianTeacher(MEAN, STD), e, uniform_grid(64)).x
    torch.testing.assert_close(drawn.mean(), exact.mean(), rtol=0, atol=0.01)
    torch.testing.assert_close(drawn.std(), exact.std(), rtol=0.02, atol=0)
    assert float(drawn.mean()) == pytest.approx(MEAN, abs=0.1)
    assert float(drawn.std()) == pytest.approx(STD, rel=0.1)


def test_every_scheduler_of_diffusers_that_is_known_is_read() -> None:
    """From what each writes itself."""
    import diffusers

    for name in (*FLOW_MATCHING, *DIFFUSION):
        scheduler = vars(diffusers).get(name) or diffusers.__getattr__(name)
        written = json.loads(scheduler().to_json_string())
        convention = read_scheduler(written, "PixArtTransformer2DModel", {}, "here").convention
        assert (convention.path == "linear") == (name in FLOW_MATCHING)
        assert convention.time_scale == (1000 if name in FLOW_MATCHING else 999)


def test_flow_matching_by_a_solver_of_diffusions() -> None:
    said = {**DDIM, "_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"}
    with pytest.raises(UsageError, match=r"no use_flow_sigmas: say in teacher.convention"):
        read_scheduler(said, "SanaTransformer2DModel", {}, "here")
    found = read_scheduler(
        {**said, "use_flow_sigmas": True, "flow_shift": 3.0},
        "SanaTransformer2DModel",
        {"timestep_scale": 0.001},
        "here",
    )
    assert (found.shift, found.convention.path, found.convention.time_scale) == (3.0, "linear", 1.0)
    assert not found.shifts_twice


@pytest.mark.parametrize(
    ("family", "steps", "scale"),
    [
        ("SD3Transformer2DModel", 10, 10.0),
        ("FluxTransformer2DModel", 1000, 1.0),
        ("Lumina2Transformer2DModel", 10, 1.0),
    ],
)
def test_the_scale_of_time_is_read(family: Any, steps: int, scale: float) -> None:
    convention = read_scheduler({**EULER, "num_train_timesteps": steps}, family, {}, "here").convention
    assert convention.time_scale == scale
    assert (convention.noise_at, convention.velocity_to) == ((0, "data") if "Lumina" in family else (1, "noise"))


# What is wrong with folders ------------------------------------------------------------------------------------------


def copied(folders: dict[str, Path], family: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders[family], tmp_path / family))


def change(file: Path, **fields: Any) -> None:
    said = json.loads(file.read_text())
    said.update(fields)
    file.write_text(json.dumps({key: value for key, value in said.items() if value != "gone"}))


def in_parts(folder: Path) -> Path:
    net = folder / "transformer"
    (net / WEIGHTS).unlink()
    network("SD3Transformer2DModel").net.save_pretrained(net, max_shard_size="20KB")
    assert len(list(net.glob("*.safetensors"))) > 1
    return folder


def refused(folder: Path, said: dict[str, Any] | None = None) -> str:
    with pytest.raises(UsageError) as error:
        read_folder(folder, said).weights()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"_class_name": "SCMScheduler"}, "is of SCMScheduler"),
        ({"_class_name": "gone"}, "is of None"),
        ({"num_train_timesteps": "gone"}, "has no num_train_timesteps"),
        ({"num_train_timesteps": "many"}, "has a number that is none"),
        ({"invert_sigmas": True}, "has invert_sigmas"),
        ({**DDIM, "beta_start": "gone"}, "has no beta_start"),
        ({**DDIM, "beta_schedule": "sigmoid"}, "variances that are not known here"),
        ({**DDIM, "trained_betas": [0.1, 0.2]}, "variances that are not known here"),
        ({**DDIM, "prediction_type": "guess"}, "unknown prediction_type guess"),
        ({**DDIM, "_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type continuous"),
    ],
)
def test_schedulers_that_do_not_settle_it(
    folders: dict[str, Path], tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    folder = copied(folders, SD3, tmp_path)
    change(folder / "scheduler" / "scheduler_config.json", **fields)
    message = refused(folder)
    assert says in message
    assert "teacher.convention" in message
    declared = read_folder(folder, {"convention": {"time_scale": 1000}})
    assert declared.scheduler is None
    assert declared.network.convention.time_scale == 1000


def test_a_diffusion_of_a_network_whose_time_is_a_share() -> None:
    for family in ("FluxTransformer2DModel", "Lumina2Transformer2DModel"):
        with pytest.raises(UsageError, match="whose steps are no times of"):
            read_scheduler(DDIM, family, {}, "here")  # type: ignore[arg-type]


def test_no_scheduler(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders, SD3, tmp_path)
    shutil.rmtree(folder / "scheduler")
    assert "has no scheduler beside it" in refused(folder)
    (folder / "model_index.json").unlink()
    assert "teacher.convention" in refused(folder / "transformer")
    assert "neither model_index.json nor config.json" in refused(folder)


def test_classes_that_are_not_known(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders, SD3, tmp_path)
    change(folder / "transformer" / "config.json", _class_name="SD3Transformer3DModel")
    assert "of class SD3Transformer3DModel; did you mean 'SD3Transformer2DModel'?" in refused(folder)
    change(folder / "transformer" / "config.json", _class_name="Transformer2DModel", norm_type="layer_norm")
    assert "of class Transformer2DModel" in refused(folder)
    change(folder / "transformer" / "config.json", _class_name="gone")
    assert "of class None" in refused(folder)


def test_weights_that_are_not_there(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders, SD3, tmp_path)
    weights = folder / "transformer" / WEIGHTS
    content = weights.read_bytes()
    for length in (0, 7, 500, len(content) // 2, len(content) - 1):
        weights.write_bytes(content[:length])
        assert f"{weights} is damaged" in refused(folder)
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert "rename the one that is meant" in refused(folder)
    weights.with_name("diffusion_pytorch_model.fp16.safetensors").rename(weights.with_suffix(".bin"))
    assert "pickled" in refused(folder)
    weights.with_suffix(".bin").unlink()
    assert "has no weights" in refused(folder)


def test_a_missing_part(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = in_parts(copied(folders, SD3, tmp_path))
    index = folder / "transformer" / PARTS
    listed = json.loads(index.read_text())["weight_map"]
    first = folder / "transformer" / min(listed.values())
    first.rename(first.with_suffix(".aside"))
    assert f"lists {first.name}, which is not there" in refused(folder)
    first.with_suffix(".aside").rename(first)
    name = next(iter(listed))
    change(index, weight_map={key: file for key, file in listed.items() if key != name})
    assert f"differ in 1 weights, such as {name}" in refused(folder)
    change(index, weight_map={**listed, "nowhere.weight": first.name})
    assert "such as nowhere.weight" in refused(folder)
    change(index, weight_map="gone")
    assert "it has no weight_map" in refused(folder)


def test_weights_too_few_or_too_many_do_not_load(folders: dict[str, Path]) -> None:
    found = read_folder(folders[SD3])
    weights = found.weights()
    name = next(iter(weights))
    net = DiffusersNetwork((4, 8, 8), found.network, 0)
    with pytest.raises(RuntimeError, match=rf"Missing key.*{name}"):
        net.load_state_dict({key: value for key, value in weights.items() if key != name})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*net\.other"):
        net.load_state_dict({**weights, "net.other": torch.zeros(1)})


@pytest.mark.parametrize(
    ("change_to", "says"),
    [
        ({"in_channels": "gone"}, "has no in_channels"),
        ({"in_channels": "many"}, "is damaged"),
        ({"sample_size": [1, 2, 3]}, "is damaged"),
    ],
)
def test_configs_that_lack_something(
    folders: dict[str, Path], tmp_path: Path, change_to: dict[str, Any], says: str
) -> None:
    folder = copied(folders, SD3, tmp_path)
    change(folder / "transformer" / "config.json", **change_to)
    assert says in refused(folder)


def test_a_number_of_classes_that_is_none(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders, "UNet2DModel", tmp_path)
    change(folder / "unet" / "config.json", num_class_embeds="many")
    assert "is damaged" in refused(folder)


def test_what_is_declared_and_not_known(folders: dict[str, Path]) -> None:
    assert "teacher.guidance_embedded: Extra inputs" in refused(folders[SD3], {"guidance_embedded": 2})
    assert "teacher.convention.noise_at" in refused(folders[SD3], {"convention": {"noise_at": 2}})


def test_a_pipeline_that_is_not_whole(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders, SD3, tmp_path)
    shutil.rmtree(folder / "transformer")
    assert "lists transformer, and" in refused(folder)
    (folder / "model_index.json").write_text('{"vae": ["diffusers", "AutoencoderKL"]}')
    assert "lists neither a transformer nor a unet" in refused(folder)


@pytest.mark.parametrize(("form", "off"), [("scale", 1.0), ("excess", 0.0)])
def test_guidance_in_the_one_count(form: Any, off: float) -> None:
    """Both forms of it: ``u + w (c - u)``, and ``(1 + w) c - w u = c + w (c - u)``."""
    assert canonical_guidance(off, form) == 1
    u, c, w = 0.3, 1.7, 2.5
    theirs = u + w * (c - u) if form == "scale" else (1 + w) * c - w * u
    assert u + canonical_guidance(w, form) * (c - u) == pytest.approx(theirs)
