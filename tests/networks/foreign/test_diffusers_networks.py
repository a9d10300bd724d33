"""Networks of diffusers: called as their pipelines call them, differentiable, with room for a second time; adapters."""

import copy
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_diffusers import CONFIGS, FLOW, TEXT, TOKENS, batch, config_of, network, shape_of
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.condition import Embeddings
from fewstep.errors import EnvironmentFault, UsageError
from fewstep.networks.condition import Inputs
from fewstep.networks.foreign.config import LoRAConfig
from fewstep.networks.foreign.converted import ForeignNetwork
from fewstep.networks.foreign.diffusers import DiffusersNetwork, build, class_count
from fewstep.networks.foreign.diffusers_families import FAMILIES
from fewstep.networks.foreign.lora import FILE, save_lora, with_adapters

families = pytest.mark.parametrize("family", CONFIGS)


@pytest.fixture(scope="module")
def nets() -> dict[str, DiffusersNetwork]:
    return {family: network(family) for family in CONFIGS}


def by_hand(family: str, net: nn.Module, x: Tensor, tau: Tensor, label: Any) -> Tensor:
    """As the pipeline of the family has it."""
    if family in ("DiTTransformer2DModel", "UNet2DModel"):
        return net(x, timestep=tau, class_labels=label).sample[:, : x.shape[1]]
    told = label.told()
    text = {"encoder_hidden_states": told["encoder_hidden_states"]}
    if family == "SD3Transformer2DModel":
        return net(x, **text, pooled_projections=told["pooled_projections"], timestep=tau).sample
    if family == "AuraFlowTransformer2DModel":
        return net(x, **text, timestep=tau).sample
    if family == "FluxTransformer2DModel":
        tokens, places = [], []
        for i in range(x.shape[2] // 2):
            for j in range(x.shape[3] // 2):
                tokens.append(x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1))
                places.append([0, i, j])
        output = net(
            torch.stack(tokens, dim=1),
            **text,
            pooled_projections=told["pooled_projections"],
            timestep=tau,
            img_ids=torch.tensor(places).to(x),
            txt_ids=x.new_zeros(TOKENS, 3),
            guidance=torch.full_like(tau, 3.5),
        ).sample
        result = torch.empty_like(x)
        for (_, i, j), token in zip(places, output.unbind(dim=1), strict=True):
            result[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = token.unflatten(1, (x.shape[1], 2, 2))
        return result
    mask = told["encoder_attention_mask"]
    if family == "PixArtTransformer2DModel":
        size = {
            "resolution": torch.tensor([[8.0 * x.shape[2], 8.0 * x.shape[3]]] * len(x)),
            "aspect_ratio": torch.tensor([[1.0]] * len(x)),
        }
        output = net(x, **text, timestep=tau, encoder_attention_mask=mask, added_cond_kwargs=size).sample
        return output.chunk(2, dim=1)[0]
    return net(x, **text, timestep=tau, encoder_attention_mask=mask).sample


@families
@pytest.mark.parametrize("size", [1, 3])
def test_it_is_the_network_called_by_hand(nets: dict[str, DiffusersNetwork], family: str, size: int) -> None:
    net = nets[family]
    x, t, label = batch(family, size)
    found = net(x, t * 10, label)
    assert found.shape == x.shape
    torch.testing.assert_close(found, by_hand(family, net.net, x, t * 10, label), rtol=0, atol=0)
    assert float((found - net(x, t * 5, label)).abs().max()) > 1e-3
    # Samples do not see each other. Rows of one batch and of another are rounded differently.
    torch.testing.assert_close(net(x[:1], t[:1] * 10, label[:1]), found[:1], rtol=1e-4, atol=1e-4)


def test_guidance_that_sana_is_told() -> None:
    family = "SanaTransformer2DModel"
    config = {**CONFIGS[family], "guidance_embeds": True, "guidance_embeds_scale": 0.1}
    net = network(family, config=config, embedded_guidance=4.5)
    x, t, label = batch(family)
    assert isinstance(label, Embeddings)
    wanted = net.net(x, timestep=t, **label.told(), guidance=torch.full_like(t, 0.45)).sample
    torch.testing.assert_close(net(x, t, label), wanted, rtol=1e-6, atol=1e-6)


@families
def test_what_is_added_acts_as_a_bias_of_the_embedding_of_time(nets: dict[str, DiffusersNetwork], family: str) -> None:
    net = nets[family]
    x, t, label = batch(family)
    added = torch.linspace(-1, 1, net.condition)
    plain = net(x, t, label)
    assert torch.equal(net(x, t, label, torch.zeros(len(x), net.condition)), plain)
    moved = net(x, t, label, added.expand(len(x), -1))
    biased = copy.deepcopy(net)
    embedders = [m for m in biased.net.modules() if type(m).__name__ == "TimestepEmbedding"]
    others = ("guidance", "resolution", "aspect")
    names = [name for name, m in biased.net.named_modules() if type(m).__name__ == "TimestepEmbedding"]
    for name, module in zip(names, embedders, strict=True):
        if not any(other in name for other in others):
            module.linear_2.bias.data += added
    torch.testing.assert_close(biased(x, t, label), moved, rtol=1e-5, atol=1e-5)
    assert float((moved - plain).abs().max()) > 1e-3
    # Nothing is left of it, after errors neither.
    assert torch.equal(by_hand(family, net.net, x, t, label), plain)
    with pytest.raises(RuntimeError):
        net(x[:, :1], t, label, torch.ones(len(x), net.condition))
    assert torch.equal(by_hand(family, net.net, x, t, label), plain)


@families
def test_a_copy_is_told_by_itself(nets: dict[str, DiffusersNetwork], family: str) -> None:
    net = nets[family]
    x, t, label = batch(family)
    added = torch.ones(len(x), net.condition)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x, t, label, added), net(x, t, label, added))


def finite_differences(function: Any, at: tuple[Tensor, ...], along: tuple[Tensor, ...], h: float) -> Tensor:
    """Of fourth order."""

    def there(k: int) -> Tensor:
        return function(*(value + k * h * way for value, way in zip(at, along, strict=True)))

    return (8 * (there(1) - there(-1)) - (there(2) - there(-2))) / (12 * h)


@families
def test_forward_derivatives(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """In float64, of which diffusers would make float32 in places."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    net = network(family).double()
    x, t, label = batch(family, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    ways = (torch.randn(x.shape, generator=generator, dtype=x.dtype), torch.ones_like(t))
    ways = (*ways, torch.randn(len(x), net.condition, generator=generator, dtype=x.dtype))
    at = (x, t, torch.zeros_like(ways[2]))

    def function(x: Tensor, t: Tensor, added: Tensor) -> Tensor:
        return net(x, t, label, added)

    with sdpa_kernel(SDPBackend.MATH):
        u, du = torch.func.jvp(function, at, ways)
        torch.testing.assert_close(u, function(*at), rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            # FLUX and AuraFlow see a thousand times that time, and Sana has kinks.
            wanted = finite_differences(function, at, ways, h=2e-6)
        torch.testing.assert_close(du, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))
        (u.square().sum() + du.square().sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in net.parameters())


def test_group_norm_is_given_contiguous_input_whatever_comes() -> None:
    net = network("UNet2DModel")
    x, t, label = batch("UNet2DModel")
    with sdpa_kernel(SDPBackend.MATH):
        plain = torch.func.jvp(lambda x: net(x, t, label), (x,), (torch.ones_like(x),))
        net = net.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
        last = torch.func.jvp(lambda x: net(x, t, label), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-5)


@families
def test_a_copy_of_a_teacher_with_a_second_time_is_the_teacher(nets: dict[str, DiffusersNetwork], family: str) -> None:
    net = nets[family]
    x, t, label = batch(family)
    teacher = ForeignNetwork(net, net.config.convention, Inputs(net.num_classes, two_times=False))
    student = ForeignNetwork(net, net.config.convention, Inputs(net.num_classes, two_times=True, guidance=True))
    assert torch.equal(student(x, t, t / 3, label), teacher(x, t, t, label))


@families
def test_a_fresh_network_learns(family: str) -> None:
    config = config_of(family)
    torch.manual_seed(0)
    net = DiffusersNetwork(shape_of(family), config, class_count(config))
    x, t, label = batch(family)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = (net(x, t, label) - x).square().mean()
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.97 * losses[0]


def test_labels_are_dropped_by_nobody_but_the_caller() -> None:
    net = network("DiTTransformer2DModel").train()
    x, t, _ = batch("DiTTransformer2DModel", 64)
    label = torch.zeros(64, dtype=torch.long)
    torch.manual_seed(0)
    assert torch.equal(net(x, t, label), net.eval()(x, t, label))
    assert torch.equal(net(x, t, None), net(x, t, label + 5))
    assert not torch.equal(net(x, t, None), net(x, t, label))


@pytest.mark.parametrize("family", ["FluxTransformer2DModel", "SanaTransformer2DModel", "UNet2DModel"])
def test_times_are_not_rounded_under_autocast(nets: dict[str, DiffusersNetwork], family: str) -> None:
    """Embeddings of time and guidance are those of full precision: bfloat16 would make 3504 of FLUX's 3500."""
    net = copy.deepcopy(nets[family])
    x, t, label = batch(family)
    seen: list[Tensor] = []
    for module in net.net.modules():
        if type(module).__name__ == "TimestepEmbedding":
            module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    net(x, t, label)
    with torch.autocast("cpu", torch.bfloat16):
        output = net(x, t, label)
    assert output.dtype == torch.float32
    whole, cast = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    torch.testing.assert_close(cast, whole, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@families
def test_weights_of_other_precisions(nets: dict[str, DiffusersNetwork], family: str, dtype: torch.dtype) -> None:
    """With states in float32. Rounding to 8 bits and back through a few layers stays within some percent."""
    x, t, label = batch(family)
    net = copy.deepcopy(nets[family]).to(dtype)
    found, wanted = net(x, t, label), nets[family](x, t, label)
    assert found.dtype == torch.float32
    error = (found - wanted).norm() / wanted.norm()
    # FLUX's own way rounds time and guidance to bfloat16 before it multiplies them by 1000.
    rounds = family == "FluxTransformer2DModel" and dtype == torch.bfloat16
    assert float(error) < (0.6 if rounds else 0.06 if dtype == torch.bfloat16 else 1e-5)


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TEXT)
def test_every_missing_embedding_is_named(nets: dict[str, DiffusersNetwork], family: str) -> None:
    net = nets[family]
    x, t, label = batch(family)
    assert isinstance(label, Embeddings)
    for missing in net.wanted():
        values = {name: value for name, value in label.values.items() if name != missing} | {"other": x}
        none = {name: value for name, value in label.none.items() if name != missing} | {"other": x[:1]}
        with pytest.raises(UsageError) as refused:
            net(x, t, Embeddings(values, none, label.lost_B))
        assert all(name in str(refused.value) for name in net.wanted())
        assert "other" in str(refused.value)
    for given, says in ((None, "given nothing"), (torch.zeros(3, dtype=torch.long), "given class labels")):
        with pytest.raises(UsageError, match=says):
            net(x, t, given)


def test_embeddings_of_another_width() -> None:
    net = network("SD3Transformer2DModel")
    x, t, label = batch("SD3Transformer2DModel")
    assert isinstance(label, Embeddings)
    narrow = {name: value[..., :5] for name, value in label.values.items()}
    none = {name: value[..., :5] for name, value in label.none.items()}
    with pytest.raises(UsageError, match=r"pooled_projections \[B, 10\]; it was given .*pooled_projections \[3, 5\]"):
        net(x, t, Embeddings(narrow, none, label.lost_B))


def test_classes_and_embeddings_are_told_apart() -> None:
    x, t, label = batch("SD3Transformer2DModel")
    with pytest.raises(UsageError, match="takes class labels or nothing, and was given encoder_hidden_states"):
        network("DiTTransformer2DModel")(x, t, label)
    x, t, labels = batch("UNet2DModel")
    unguided = network("UNet2DModel", null_class=False)
    assert unguided.num_classes == 6
    unguided(x, t, labels)
    for none in (None, labels + 1):
        with pytest.raises(UsageError, match="no embedding for no class"):
            unguided(x, t, none)
    without = network("UNet2DModel", config={**CONFIGS["UNet2DModel"], "num_class_embeds": None}, null_class=False)
    assert torch.equal(without(x, t, labels), without(x, t))


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        (
            "SD3Transformer2DModel",
            {"config": {**CONFIGS["SD3Transformer2DModel"], "num_layer": 2}},
            "mean 'num_layers'",
        ),
        ("FluxTransformer2DModel", {"embedded_guidance": None}, "say embedded_guidance"),
        ("SanaTransformer2DModel", {"embedded_guidance": 2.0}, "leave embedded_guidance out"),
        (
            "UNet2DModel",
            {"config": {**CONFIGS["UNet2DModel"], "time_embedding_type": "learned", "num_train_timesteps": 10}},
            "none between them",
        ),
        ("UNet2DModel", {"config": {**CONFIGS["UNet2DModel"], "class_embed_type": "identity"}}, "is told no classes"),
        ("UNet2DModel", {"config": {**CONFIGS["UNet2DModel"], "up_block_types": []}}, "UNet2DModel: ValueError"),
        ("DiTTransformer2DModel", {"lora": LoRAConfig()}, "leave lora out"),
        ("PixArtTransformer2DModel", {"lora": LoRAConfig()}, "leave lora out"),
        ("UNet2DModel", {"lora": LoRAConfig()}, "leave lora out"),
        ("SD3Transformer2DModel", {"lora": LoRAConfig(targets=("to_nothing",))}, "lora.targets to_nothing"),
    ],
)
def test_configs_that_are_refused(family: str, changes: dict[str, Any], says: str) -> None:
    config = config_of(family, **changes)
    with pytest.raises(UsageError, match=says):
        DiffusersNetwork(shape_of(family), config, class_count(config))


def test_shapes_and_classes_that_do_not_fit() -> None:
    config = config_of("DiTTransformer2DModel")
    with pytest.raises(UsageError, match=r"\[4, H, W\] whose sides are multiples of 2, not \[4, 8, 7\]"):
        DiffusersNetwork((4, 8, 7), config, 5)
    with pytest.raises(UsageError, match="has 5 classes, not 10"):
        DiffusersNetwork((4, 8, 8), config, 10)


def test_what_other_versions_write_for_nothing_is_no_obstacle() -> None:
    said = {**CONFIGS["DiTTransformer2DModel"], "num_vector_embeds": None, "only_cross_attention": False}
    build(config_of("DiTTransformer2DModel", config={**said, "attention_type": "default", "_name_or_path": "x"}))


def test_all_families_are_tried() -> None:
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize(
    ("error", "says"),
    [(ImportError("no such"), r"pip install 'fewstep\[diffusers\]'"), (RuntimeError("a\nb"), "does not import: a b")],
)
def test_diffusers_that_does_not_import(monkeypatch: pytest.MonkeyPatch, error: Exception, says: str) -> None:
    def load() -> Any:
        raise error

    monkeypatch.setitem(FAMILIES, "UNet2DModel", dataclasses.replace(FAMILIES["UNet2DModel"], load=load))
    with pytest.raises(EnvironmentFault, match=says):
        build(config_of("UNet2DModel"))


def test_peft_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(EnvironmentFault, match="LoRA students need the package peft"):
        network("SD3Transformer2DModel", lora=LoRAConfig())


# Adapters ------------------------------------------------------------------------------------------------------------

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.mark.parametrize("family", FLOW)
def test_adapters_are_loaded_by_diffusers(tmp_path: Path, family: str) -> None:
    """With an alpha that is not the rank, which only the metadata say."""
    base = network(family)
    x, t, label = batch(family)
    student = network(family, lora=LoRAConfig(rank=2, alpha=3.0, targets=TARGETS))
    student.load_state_dict({f"net.{k}": v for k, v in with_adapters(base.net.state_dict(), student.net).items()})
    generator = torch.Generator().manual_seed(3)
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        if parameter.requires_grad:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    save_lora(student.net, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    wanted = student(x, t, label)
    assert float((wanted - base(x, t, label)).abs().max()) > 1e-3
    base.net.load_lora_adapter(tmp_path, prefix="transformer", weight_name=FILE)
    torch.testing.assert_close(base(x, t, label), wanted, rtol=1e-6, atol=1e-6)


def test_a_fresh_adapter_changes_nothing_and_learns() -> None:
    family = "SD3Transformer2DModel"
    base, student = network(family), network(family, lora=LoRAConfig(rank=2))
    x, t, label = batch(family)
    for name, parameter in student.net.named_parameters():
        if ".lora_B." in name:
            parameter.data.zero_()
    student.net.load_state_dict(with_adapters(base.net.state_dict(), student.net))
    # The memory of the two lies differently, and a matrix product rounds by that.
    torch.testing.assert_close(student(x, t, label), base(x, t, label), rtol=1e-5, atol=2e-6)
    with sdpa_kernel(SDPBackend.MATH):
        _, du = torch.func.jvp(lambda t: student(x, t, label), (t,), (torch.ones_like(t),))
        du.square().sum().backward()
    grown = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert grown == {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert any(
        float(parameter.grad.abs().max()) > 0 for parameter in student.parameters() if parameter.grad is not None
    )


def test_fresh_adapters_begin_at_zero() -> None:
    config = config_of("SD3Transformer2DModel", lora=LoRAConfig(rank=2))
    torch.manual_seed(0)
    student = DiffusersNetwork(shape_of("SD3Transformer2DModel"), config, 0)
    fresh = [parameter for name, parameter in student.named_parameters() if ".lora_B." in name]
    assert len(fresh) == 12  # four layers in the attention of each of two blocks, four more in a second attention
    assert not any(parameter.any() for parameter in fresh)


def test_weights_of_another_network_do_not_pass_for_the_base() -> None:
    student = network("SD3Transformer2DModel", lora=LoRAConfig(rank=2))
    weights = with_adapters({"unknown.weight": torch.zeros(1)}, student.net)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*base_layer.*Unexpected key.*unknown.weight"):
        student.net.load_state_dict(weights)


def test_the_file_of_adapters_says_how_it_was_made(tmp_path: Path) -> None:
    from safetensors import safe_open

    save_lora(network("SD3Transformer2DModel", lora=LoRAConfig(rank=2, alpha=5.0)).net, tmp_path)
    with safe_open(tmp_path / FILE, "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
        assert all(name.startswith("transformer.") for name in file.keys())  # noqa: SIM118
    assert (said["transformer.r"], said["transformer.lora_alpha"]) == (2, 5.0)


def test_adapters_are_for_those_that_diffusers_loads_them_into() -> None:
    for family in CONFIGS:
        facts = FAMILIES[config_of(family).family]
        assert facts.adapters == hasattr(facts.load(), "load_lora_adapter")
