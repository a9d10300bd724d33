"""Where in a checkpoint the weights are: the average that samples are drawn with, under plain names.

=================== ==========================================================================
plain state dict     SiT's and DiT's releases, minRF, safetensors
``ema``              SiT, REPA (beside ``model``); EDM's pickles
``ema_model``        torchcfm (beside ``net_model``)
``ema.shadow_params`` RectifiedFlow: a list in the order of the parameters of ``model``
``shadow_params.N``  flow_matching: the same as entries of ``model``, beside ``model.NAME``
=================== ==========================================================================
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fewstep.errors import UsageError

WRAPPERS = ("module.", "_orig_mod.")
"""What DataParallel and ``torch.compile`` put before every name."""

RAW = ("model", "net_model", "net", "state_dict", "network", "params")
AVERAGES = ("ema", "ema_model", "model_ema", "ema_state_dict")
SHADOW = "shadow_params"


@dataclass(frozen=True)
class Chosen:
    """The weights to be read, by plain names, and what they are: ``source`` is their place in the file, ``averaged``
    whether that is an average. ``beside`` are the places of other weights, ``said`` what else the file records of how
    the model was made."""

    weights: dict[str, Tensor]
    source: str
    averaged: bool
    beside: tuple[str, ...] = ()
    said: Mapping[str, Any] = field(default_factory=dict)


def choose(tree: Any, want: str, where: str) -> Chosen:
    """The weights in a checkpoint's ``tree`` of mappings and lists. ``want`` is ``auto`` (the average if there is one),
    ``ema`` or ``raw``; what is not there is a ``UsageError``."""
    if not isinstance(tree, Mapping):
        raise UsageError(f"{where} holds a {type(tree).__name__}, not weights by name")
    raw, averages = _places(tree)
    if not raw and not averages:
        keys = ", ".join(sorted(map(str, tree))[:8]) or "nothing"
        raise UsageError(f"{where} has no weights where any known project keeps them: it holds {keys}")
    if want == "ema" and not averages:
        raise UsageError(f"{where} has no average (teacher.weights ema): there are {', '.join(raw)}")
    if want == "raw" and not raw:
        raise UsageError(f"{where} has only an average (teacher.weights raw): {', '.join(averages)}")
    averaged = bool(averages) and want != "raw"
    places = averages if averaged else raw
    source = next(iter(places))
    found = places[source]
    if isinstance(found, Sequence):
        like = next(iter(raw.values()), None)
        if not isinstance(like, Mapping):
            raise UsageError(f"{where}: {source} is a list, and there are no weights whose order would name it")
        weights = by_order(found, plain(like), f"{where}: {source}")
    else:
        weights = plain(found)
    beside = tuple(name for name in (*averages, *raw) if name != source)
    return Chosen(weights, source, averaged, beside, {key: tree[key] for key in ("args",) if key in tree})


def _places(tree: Mapping[Any, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Raw weights and averages by where they are."""
    if _are_weights(tree):
        shadows = _numbered(tree)
        if shadows:
            inner = {str(name).removeprefix("model."): value for name, value in tree.items() if _is_inner(name)}
            return {"model": inner}, {SHADOW: shadows}
        return {"the file itself": tree}, {}
    raw: dict[str, Any] = {}
    averages: dict[str, Any] = {}
    for name in RAW:
        if _are_weights(tree.get(name)):
            inner_raw, inner_averages = _places(tree[name])
            raw[name] = next(iter(inner_raw.values()))
            averages |= {f"{name}.{inner}": value for inner, value in inner_averages.items()}
    for name in AVERAGES:
        held = tree.get(name)
        if _are_weights(held):
            averages[name] = held
        elif isinstance(held, Mapping) and isinstance(held.get(SHADOW), Sequence):
            averages[f"{name}.{SHADOW}"] = held[SHADOW]
    return raw, averages


def _are_weights(found: Any) -> bool:
    return isinstance(found, Mapping) and bool(found) and all(isinstance(value, Tensor) for value in found.values())


def _is_inner(name: Any) -> bool:
    return str(name).startswith("model.")


def _numbered(tree: Mapping[Any, Any]) -> list[Tensor]:
    """``shadow_params.0, shadow_params.1, ...`` as a list, empty without them."""
    shadows: list[Tensor] = []
    while f"{SHADOW}.{len(shadows)}" in tree:
        shadows.append(tree[f"{SHADOW}.{len(shadows)}"])
    return shadows


def plain(weights: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    """The weights without what wrappers put before their names."""
    named = {str(name): value for name, value in weights.items()}
    while named:
        prefix = next((each for each in WRAPPERS if all(name.startswith(each) for name in named)), None)
        if prefix is None:
            return named
        named = {name.removeprefix(prefix): value for name, value in named.items()}
    return named


def by_order(values: Sequence[Tensor], like: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """A list of averaged parameters under the names of ``like``, which has buffers among them that the list has not.

    Buffers keep the value that they have in ``like``. A ``UsageError`` unless shapes make the order plain.
    """
    found: dict[str, Tensor] = {}
    waiting = list(values)
    for name, tensor in like.items():
        if waiting and waiting[0].shape == tensor.shape:
            found[name] = waiting.pop(0)
        else:
            found[name] = tensor
    if waiting:
        raise UsageError(f"{where}: {len(values)} tensors do not follow the order of the {len(like)} weights beside it")
    return found
