"""Networks that diffusers defines, called as networks of ours are.

Under forward-mode differentiation their attention needs torch's math kernel, as ours does. GroupNorm, whose derivative
takes contiguous input alone, is given that.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.compat import prepare_torchvision
from fewstep.condition import Condition, Embeddings
from fewstep.errors import EnvironmentFault, UsageError, nearest
from fewstep.networks.foreign.config import DiffusersConfig
from fewstep.networks.foreign.diffusers_families import FAMILIES, Family
from fewstep.networks.foreign.lora import apply_lora

MASK = "encoder_attention_mask"

UNUSED = (None, False, "default")
"""What other versions write for features that a network does not have."""


class DiffusersNetwork(nn.Module):
    """``(x [B, C, H, W], tau [B], condition, added [B, E]) -> prediction [B, C, H, W]``, where ``tau`` is what the
    network is given in diffusers' pipelines: see ``Family``.

    Class-conditional networks take labels, and ``num_classes`` or None for no class; the others take ``Embeddings``
    with the names of ``wanted``. ``net`` is diffusers' module; a learned variance that it may give beside its
    prediction is left out. Its labels are dropped by the caller alone, in training too.
    """

    def __init__(self, shape: tuple[int, ...], config: DiffusersConfig, num_classes: int) -> None:
        super().__init__()
        self.family: Family = FAMILIES[config.family]
        self.config = config
        self.num_classes = num_classes
        self.net: Any = build(config)
        _check(shape, config, num_classes, self.net.config)
        embedders = _matching(self.net, self.family.embedder)
        self.condition = int(embedders[0].linear_2.out_features)
        self._time = _Seam(_matching(self.net, self.family.waves)[0], self.family.wave_scale)
        for module in embedders:
            module.register_forward_hook(self._time.embedded)
        self._guidance: _Seam | None = None
        self._scale = 1.0
        if config.embedded_guidance is not None and self.family.guidance is not None:
            embedder, waves = (_matching(self.net, name)[0] for name in self.family.guidance)
            self._guidance = _Seam(waves, self.family.wave_scale)
            self._scale = config.embedded_guidance * self.net.config.get("guidance_embeds_scale", 1.0)
            embedder.register_forward_hook(self._guidance.embedded)
        for module in self.net.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(_contiguous)
            elif type(module).__name__ == "LabelEmbedding":
                module.dropout_prob = 0.0  # every block of a DiT would drop the labels of other samples
        if config.lora is not None:
            if not self.family.adapters:
                raise UsageError(f"diffusers loads no LoRA weights into a {config.family}: leave lora out")
            apply_lora(self.net, config.lora)

    def forward(
        self, x: Tensor, tau_B: Tensor, label: Condition | None = None, added_BE: Tensor | None = None
    ) -> Tensor:
        dtype = next(self.net.parameters()).dtype
        told = self._told(label, dtype, len(x))
        guided: AbstractContextManager[None] = nullcontext()
        if self._guidance is not None:
            told["guidance"] = torch.full_like(tau_B, self._scale)
            guided = self._guidance.given(told["guidance"], None)
        with self._time.given(tau_B, added_BE), guided:
            output = self.family.call(self.net, self.config, x.to(dtype), tau_B, told)
        return output[:, : x.shape[1]].to(x.dtype)

    def _told(self, label: Condition | None, dtype: torch.dtype, size: int) -> dict[str, Tensor]:
        """The condition as keyword arguments of the network."""
        name = self.config.family
        if not self.family.told:
            if isinstance(label, Embeddings):
                raise UsageError(f"{name} takes class labels or nothing, and was given {', '.join(label.values)}")
            if not self.num_classes:
                return {}
            if label is None:
                label = torch.full((size,), self.num_classes, device=next(self.net.parameters()).device)
            if name == "UNet2DModel" and not self.config.null_class and bool((label == self.num_classes).any()):
                raise UsageError(
                    "this UNet2DModel has no embedding for no class, so it cannot be guided or asked without a label "
                    "(if its last one is that, say null_class: true)"
                )
            return {"class_labels": label}
        found = label.told() if isinstance(label, Embeddings) else {}
        wanted = self.wanted()
        for key, axes in wanted.items():
            fits = key in found and found[key].dim() == 1 + len(axes)
            sizes = zip(axes, found[key].shape[1:], strict=True) if fits else ()
            if not fits or any(axis not in ("length", there) for axis, there in sizes):
                raise UsageError(f"{name} takes {_listed(wanted)}; it was given {_given(found, label)}")
        return {key: found[key].bool() if key == MASK else found[key].to(dtype) for key in wanted}

    def wanted(self) -> dict[str, tuple[str | int, ...]]:
        """The tensors of ``Embeddings`` that the network takes, with their shapes behind the batch; ``"length"`` is any
        number of tokens. Empty for a network of classes."""
        built = self.net.config
        return {key: tuple(built.get(axis) or axis for axis in axes) for key, axes in self.family.told.items()}


def build(config: DiffusersConfig) -> Any:
    """The module of diffusers, freshly initialised. ``UsageError`` for a config that it does not take, and
    ``EnvironmentFault`` without diffusers."""
    prepare_torchvision()
    try:
        network = FAMILIES[config.family].load()
    except ImportError as error:
        raise EnvironmentFault(
            f"{config.family} needs the package diffusers, not older than that: pip install 'fewstep[diffusers]'"
        ) from error
    except RuntimeError as error:  # from diffusers, when something that it imports is broken
        raise EnvironmentFault(f"diffusers does not import: {' '.join(str(error).split())}") from error
    known = set(inspect.signature(network.__init__).parameters) - {"self"}
    said = {}
    for name, value in config.config.items():
        if name in known:
            said[name] = value
        elif not name.startswith("_") and value not in UNUSED:
            raise UsageError(f"the {config.family} of this diffusers knows no {name} ({nearest(name, known)})")
    if said.get("time_embedding_type") == "learned":
        raise UsageError("a UNet2DModel with a table of times (time_embedding_type learned) has none between them")
    if said.get("class_embed_type") is not None:
        raise UsageError(f"a UNet2DModel whose class_embed_type is {said['class_embed_type']} is told no classes")
    try:
        return network(**said)
    except Exception as error:  # diffusers, on whatever it does not like
        raise UsageError(f"{config.family}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def class_count(config: DiffusersConfig) -> int:
    """How many classes the network knows beside that of no class."""
    if config.family == "DiTTransformer2DModel":
        return int(config.config.get("num_embeds_ada_norm", 1000))
    if config.family == "UNet2DModel":
        return max(0, int(config.config.get("num_class_embeds") or 0) - config.null_class)
    return 0


def _check(shape: tuple[int, ...], config: DiffusersConfig, num_classes: int, built: Mapping[str, Any]) -> None:
    family = FAMILIES[config.family]
    channels, multiple = family.channels(built), family.multiple(built)
    if len(shape) != 3 or shape[0] != channels or any(side % multiple for side in shape[1:]):
        raise UsageError(
            f"this {config.family} takes samples [{channels}, H, W] whose sides are multiples of {multiple}, "
            f"not {list(shape)}"
        )
    if num_classes != class_count(config):
        raise UsageError(f"this {config.family} has {class_count(config)} classes, not {num_classes}")
    if config.embedded_guidance is None and built.get("guidance_embeds"):
        raise UsageError(
            f"this {config.family} is told its guidance: say embedded_guidance (FLUX.1-dev is used with 3.5)"
        )
    if config.embedded_guidance is not None and not built.get("guidance_embeds"):
        raise UsageError(f"this {config.family} is not told any guidance: leave embedded_guidance out")


class _Seam:
    """What is given at an embedding of time, or of guidance, while the network runs.

    A plain object whose method is the hook: a copy of the network gets a copy of it.
    """

    def __init__(self, waves: nn.Module, scale: float) -> None:
        self.waves = waves
        self.scale = scale
        self.tau_B: Tensor | None = None
        self.added_BE: Tensor | None = None

    @contextmanager
    def given(self, tau_B: Tensor, added_BE: Tensor | None) -> Iterator[None]:
        self.tau_B, self.added_BE = tau_B, added_BE
        try:
            yield
        finally:
            self.tau_B = self.added_BE = None

    def embedded(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The embedding, computed in the precision of the weights under autocast too, with what is added."""
        if self.tau_B is not None and torch.is_autocast_enabled(self.tau_B.device.type):
            with torch.autocast(self.tau_B.device.type, enabled=False):
                waves_BF = self.waves(self.tau_B * self.scale)
                output = module.forward(waves_BF.to(next(module.parameters()).dtype))
        return output if self.added_BE is None else output + self.added_BE.to(output.dtype)


def _matching(net: nn.Module, pattern: str) -> list[Any]:
    return [module for name, module in net.named_modules() if fnmatchcase(name, pattern)]


def _contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(), *inputs[1:])


def _listed(wanted: Mapping[str, tuple[str | int, ...]]) -> str:
    return " and ".join(f"{name} [{', '.join(map(str, ('B', *axes)))}]" for name, axes in wanted.items())


def _given(found: Mapping[str, Tensor], label: Condition | None) -> str:
    if found:
        return " and ".join(f"{name} {list(value.shape)}" for name, value in found.items())
    return "nothing" if label is None else "class labels"
