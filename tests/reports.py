"""Reports made by hand: four models at several step counts, with the keys of older files or with all there are."""

import base64
import io
from dataclasses import replace

import numpy as np
from PIL import Image

from fewstep.evaluation.results import Measured, Model, Report, Row

TEACHER_STEPS = (1, 2, 4, 8, 16, 32, 64)
STUDENT_STEPS = (1, 2, 4, 8)
# fd_pixels by steps. At 4 steps meanflow has 0.43 against the teacher's 0.54 at 64: 0.796 of it.
FD_PIXELS = {
    "digits-teacher": (27.1, 11.2, 3.61, 1.42, 0.871, 0.62, 0.54),
    "digits-meanflow": (0.91, 0.62, 0.43, 0.46),
    "digits-progressive": (1.84, 0.95, 0.66, 0.51),
    "digits-consistency": (1.22, 1.31, 1.28, 1.35),
}
OBJECTIVES = dict(zip(FD_PIXELS, ("flow_matching", "meanflow", "progressive", "consistency"), strict=True))


def strip(quality: float, k: int = 10, side: int = 8) -> str:
    """k rings of growing size side by side, drowned in noise as quality falls. Base64 PNG."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    noise = np.random.default_rng(0).normal(size=(side, k * side))
    rings = [np.exp(-((np.hypot(x, y) - 1 - 0.2 * i) ** 2)) for i in range(k)]
    image = np.concatenate(rings, axis=1) * 255 + noise * 90 / quality
    out = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8), "L").save(out, format="PNG")
    return base64.b64encode(out.getvalue()).decode()


def make_row(model: str, steps: int, fd: float) -> Row:
    teacher = model == "digits-teacher"
    recall = 0.93 / (1 + 0.11 * fd) - (0.0 if teacher else 0.05)
    metrics = {
        "fd_pixels": Measured(fd, fd * 0.96, fd * 1.05),
        "kd_pixels": Measured(0.002 * fd - 0.0015),
        "recall_pixels": Measured(recall),
        "precision_pixels": Measured(0.9 / (1 + 0.05 * fd)),
        "density_pixels": Measured(1.04 / (1 + 0.07 * fd)),
        "coverage_pixels": Measured(0.95 / (1 + 0.1 * fd)),
        "fd_digits": Measured(fd * 3.1 + 0.4),
        "recall_digits": Measured(recall - 0.03),
    }
    if not teacher:
        metrics["teacher_gap_pixels"] = Measured(0.2 * fd)
    return Row(
        model=model,
        role="teacher" if teacher else "student",
        objective=OBJECTIVES.get(model, ""),
        steps=steps,
        nfe=2 * steps if teacher else steps,
        sampler="euler" if teacher else "map",
        guidance=2.0 if teacher else 1.0,
        n=10_000,
        seed=0,
        metrics=metrics,
        latency_ms=0.4 * steps if teacher else 0.4 * steps + 0.05,
        images_per_s=48_000 / steps,
        params=84_480,
        digest=f"sha256:{model}",
        samples_png=strip(3 / fd**0.5),
    )


def make_report() -> Report:
    """As files of the first versions have it: no differences, classes or speed beside the median."""
    rows = [
        make_row(model, steps, fd)
        for model, line in FD_PIXELS.items()
        for steps, fd in zip(TEACHER_STEPS if model == "digits-teacher" else STUDENT_STEPS, line, strict=True)
    ]
    models = tuple(
        Model(model, rows[i * 4 + 3].role if i else "teacher", OBJECTIVES[model], 84_480, 4000, 512_000, 95.0 + 60 * i)
        for i, model in enumerate(FD_PIXELS)
    )
    reference = {
        "dataset": "digits 8x8",
        "n": 1797,
        "floor": {"fd_pixels": 0.021, "recall_pixels": 0.94, "fd_digits": 0.08},
        "extractors": {"pixels": {"dim": 64, "digest": "a1b2"}, "digits": {"dim": 32, "digest": "c3d4"}},
        "protocol": {"quantise": "once, to uint8, before features", "neighbours": "k = 3", "covariance": "ddof = 1"},
    }
    environment = {"torch": "2.13.0", "cpu": "2 cores", "commit": "0123abcd", "date": "2026-01-01"}
    return Report(tuple(rows), models, reference, environment)


def rich_report() -> Report:
    """The same with every key that rows may have. Differences to the teacher at 64 steps are within 0.02 of theirs,
    debiased distances are 0.01 below the plain ones, whose intervals are around them."""
    plain = make_report()
    rows = [_with_intervals(row) for row in plain.rows]
    teacher = next(row for row in rows if row.role == "teacher" and row.steps == TEACHER_STEPS[-1])
    rows = [row if row is teacher else _with_differences(row, teacher) for row in rows]
    digests = {row.model: row.digest for row in rows}
    trained = {"processes": 2, "device": "NVIDIA H100 80GB HBM3", "device_type": "cuda"}
    models = [
        replace(model, **trained, teacher_digest=None if model.role == "teacher" else digests["digits-teacher"])
        for model in plain.models
    ]
    return replace(plain, rows=tuple(rows), models=tuple(models))


def _with_intervals(row: Row) -> Row:
    metrics = dict(row.metrics)
    value = metrics["fd_pixels"].value
    low, high = value - 0.01 - 0.03, value - 0.01 + 0.03
    metrics |= {
        "fd_pixels": Measured(value, low, high),
        "fd_debiased_pixels": Measured(value - 0.01, low, high),
        "recall_pixels": Measured(
            metrics["recall_pixels"].value,
            max(0.0, metrics["recall_pixels"].value - 0.01),
            metrics["recall_pixels"].value + 0.01,
        ),
        "memorised_pixels": Measured(0.001),
    }
    return replace(
        row,
        metrics=metrics,
        latency_p95_ms=1.25 * (row.latency_ms or 0.0),
        batch=512,
        peak_memory_mb=130.0,
        flops=6.0e5 * row.nfe,
        decode_ms=0.1,
        per_class={"accuracy_digits": [0.99 - 0.01 * i for i in range(10)]} if row.steps == 1 else {},
        heavy=("fd_pixels",) if row.steps == 1 else (),
        neighbours_png=row.samples_png if row.role == "student" else None,
    )


def _with_differences(row: Row, teacher: Row) -> Row:
    found = {}
    for name in ("fd_debiased_pixels", "recall_pixels"):
        value = row.metrics[name].value - teacher.metrics[name].value
        found[name] = Measured(value, value - 0.02, value + 0.02)
    return replace(row, differences=found)
