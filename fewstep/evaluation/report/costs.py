"""What training took: time by the clock, devices, and the minutes of all devices together."""

from collections.abc import Sequence

from fewstep.evaluation.report.tables import Column, Table, column, kept
from fewstep.evaluation.report.wording import DASH, count, duration, number
from fewstep.evaluation.results import Model, Report, Row

_KINDS = {"cpu": "CPU", "cuda": "GPU", "mps": "GPU", "xpu": "GPU"}
"""What torch's types of devices are."""


def minutes_head(models: Sequence[Model]) -> str:
    """``GPU-minutes`` or ``CPU-minutes`` where all whose devices are known were trained on such, else
    ``device-minutes``."""
    kinds = {_KINDS.get(model.device_type or "") for model in models if model.device_minutes is not None}
    return f"{kind}-minutes" if len(kinds) == 1 and (kind := kinds.pop()) else "device-minutes"


def costs_table(report: Report) -> Table:
    """What training each model took, and a student with the teacher that it learnt from."""
    models = sorted(report.models, key=lambda model: model.role != "teacher")
    head, teachers = minutes_head(models), _teachers(report)

    def time_of_both(model: Model) -> str:
        teacher = teachers.get(model.name)
        return duration(model.train_s + teacher.train_s) if teacher is not None and teacher.train_s else DASH

    columns = [
        column("model", [model.name for model in models], words=True),
        column("role", [model.role for model in models], words=True),
        column("objective", [model.objective or DASH for model in models], words=True),
        column("params", [count(model.params) for model in models]),
        column("training steps", [f"{model.train_steps:,}" for model in models]),
        column("samples seen", [count(model.train_samples) for model in models]),
        column("training time", [duration(model.train_s) for model in models]),
        column("with its teacher's", [time_of_both(model) for model in models]),
        column(head, [number(model.device_minutes) for model in models]),
        column(
            f"{head} with its teacher's", [number(minutes_of_both(model, teachers.get(model.name))) for model in models]
        ),
        *([_devices(models)] if len({model.device for model in models}) > 1 else []),
    ]
    return Table(kept(columns), tuple(model.role for model in models))


def training_columns(report: Report, rows: Sequence[Row]) -> list[Column]:
    """The minutes that training each row's model took, its teacher's apart; with the devices where they are of several
    kinds, because such minutes do not compare."""
    named = {model.name: model for model in report.models}
    found = [named.get(row.model) for row in rows]
    models = [model for model in found if model is not None]
    head = minutes_head(models)
    minutes = column(head, [number(model.device_minutes if model else None) for model in found])
    if head != "device-minutes":
        return [minutes]
    return [minutes, column("trained on", [(model and model.device) or DASH for model in found], words=True)]


def costs_caption(report: Report) -> str:
    """What the table of costs says, and on what was trained where that is one device."""
    parts = ["What it took to train each model", "A student's cost comes on top of its teacher's"]
    known = [model for model in report.models if model.device_minutes is not None]
    if known:
        parts.append(f"{minutes_head(known)}: time by the clock times the number of devices")
    names = list(dict.fromkeys(model.device for model in known))
    parts += [f"Trained on {names[0]}"] if len(names) == 1 else []
    return f"{'. '.join(parts)}."


def training_words(model: Model) -> str:
    """A model's training in one clause, for its card."""
    said = [f"{model.train_steps:,} optimiser steps", f"{count(model.train_samples)} samples", duration(model.train_s)]
    if model.device_minutes is not None:
        on = f"{model.processes} × {model.device}" if model.processes > 1 else str(model.device)
        said[-1] += f" on {on}"
        said.append(f"{number(model.device_minutes)} {minutes_head([model])}")
    return ", ".join(said)


def minutes_of_both(model: Model, teacher: Model | None) -> float | None:
    """A student's device-minutes with its teacher's; None unless both are known and of one kind of device."""
    if teacher is None or model.device_minutes is None or teacher.device_minutes is None:
        return None
    if _KINDS.get(model.device_type or "") != _KINDS.get(teacher.device_type or ""):
        return None
    return model.device_minutes + teacher.device_minutes


def _teachers(report: Report) -> dict[str, Model]:
    """The teacher of each student that was distilled from one of the report's."""
    digests = {row.digest: row.model for row in report.rows if row.role == "teacher"}
    named = {model.name: model for model in report.models}
    found = {model.name: named.get(digests.get(model.teacher_digest or "", "")) for model in report.models}
    return {name: teacher for name, teacher in found.items() if teacher is not None}


def _devices(models: Sequence[Model]) -> Column:
    return column("trained on", [model.device or DASH for model in models], words=True)
