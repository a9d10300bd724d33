"""On what a training ran, over its resumptions: a run may go on on other devices, and on more or fewer of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Leg:
    """``seconds`` by the clock on ``processes`` devices of one name. ``device_type`` is torch's, ``cuda`` or ``cpu``.

    The device is None where a checkpoint does not say it.
    """

    device: str | None
    device_type: str | None
    processes: int
    seconds: float = 0.0


def up_to(legs: Sequence[Leg], here: Leg, seconds: float) -> tuple[Leg, ...]:
    """The legs of a training that has taken ``seconds`` in all, the last of them on the devices of ``here``."""
    rest = max(0.0, seconds - sum(leg.seconds for leg in legs))
    if legs and replace(legs[-1], seconds=here.seconds) == here:
        return (*legs[:-1], replace(legs[-1], seconds=legs[-1].seconds + rest))
    return (*legs, replace(here, seconds=rest))


def cost(legs: Sequence[Leg]) -> dict[str, Any]:
    """What a model's card says: ``seconds`` in all, ``processes`` of the last leg, ``device`` (the names of all, in the
    order of use) and ``device_type`` (None of several). Where the number of processes changed it also has
    ``device_seconds``, the sum of seconds times processes. Devices that are not known of every leg are not named."""
    seconds = {"seconds": round(sum(leg.seconds for leg in legs), 3)}
    if not legs:
        return seconds
    names = list(dict.fromkeys(leg.device for leg in legs))
    kinds = {leg.device_type for leg in legs}
    document: dict[str, Any] = {**seconds, "processes": legs[-1].processes}
    if None in names:
        return document
    document |= {"device": ", ".join(map(str, names)), "device_type": kinds.pop() if len(kinds) == 1 else None}
    if len({leg.processes for leg in legs}) > 1:
        document["device_seconds"] = round(sum(leg.seconds * leg.processes for leg in legs), 3)
    return document


def read_legs(state: Mapping[str, Any]) -> tuple[Leg, ...]:
    """The legs of a checkpoint; of one that has none, its time on a device that is not known."""
    if "legs" not in state:
        return (Leg(None, None, 1, state["seconds"]),)
    found: Iterable[Mapping[str, Any]] = state["legs"]
    return tuple(Leg(**leg) for leg in found)
