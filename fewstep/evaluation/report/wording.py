"""Numbers and metric names as text: every figure shown anywhere is formatted here."""

import math
from collections.abc import Sequence
from typing import Literal

from fewstep.evaluation.results import Measured, Report, Row

DASH = "–"
ARROWS = {"lower": " ↓", "higher": " ↑", None: ""}
"""Which way is better, behind the name of a metric."""
INCEPTION = frozenset(("fid", "fid_debiased", "kid", "sfid", "is", "precision", "recall", "density", "coverage"))


def number(value: float | None) -> str:
    """Three significant digits; a dash for what was not measured (None, NaN or infinite)."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    rounded = float(f"{value:.2e}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:#.3g}".rstrip(".")


def spread(value: float, sd: float | None) -> str:
    """``± sd`` to as many decimals as ``number`` gives the value, in one or two digits of its own; else nothing."""
    if sd is None or not math.isfinite(sd) or not math.isfinite(value):
        return ""
    decimals = len(number(value).partition(".")[2])
    if sd > 0:
        magnitude = math.floor(math.log10(sd))
        decimals = max(0, min(max(decimals, -magnitude), 1 - magnitude))
    return f"± {sd:,.{decimals}f}"


def with_spread(found: Measured | None) -> str:
    """A measured number with its standard deviation where it has one."""
    return " ".join(filter(None, (number(found.value), spread(found.value, found.sd)))) if found else DASH


def interval(low: float | None, high: float | None) -> str:
    """``[low, high]``; nothing where there is none."""
    return "" if low is None or high is None else f"[{number(low)}, {number(high)}]"


def ends(found: Measured) -> tuple[float, float] | None:
    """The ends of a measurement's bar: its interval, or one standard deviation to both sides.

    An interval that leaves its own value out is around another one, and not given.
    """
    if found.low is not None and found.high is not None and found.low <= found.value <= found.high:
        return found.low, found.high
    return None if found.sd is None else (found.value - found.sd, found.value + found.sd)


def bar(row: Row, metric: str) -> tuple[float, float] | None:
    """``ends`` of a row's metric. A Fréchet distance whose interval is that of its debiased value has none of its own:
    the plain value lies above by its bias."""
    found, better = measured(row, metric), measured(row, debiased(metric) or "")
    if found is None or (better is not None and better.low is not None):
        return None
    return ends(found)


def trainings(report: Report) -> str:
    """What the rows of several trainings are, in words; nothing where each is of one."""
    counts = sorted({row.seeds for row in report.rows})
    if not counts or counts[-1] == 1:
        return ""
    return f"mean and standard deviation over {'–'.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} trainings"


def low_precision(report: Report) -> str:
    """What networks were evaluated in, in words; nothing where that was float32."""
    words = {"tf32": "networks in float32 with TF32 products", "bf16": "networks in bfloat16"}
    return "; ".join(words[each] for each in words if any(row.precision == each for row in report.rows))


def count(value: float) -> str:
    """A large count with its unit, as in ``675 M``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if float(f"{value:.2e}") >= size:
            return f"{number(value / size)} {unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds)} s"


def times_as_long(speed_up: float) -> str:
    """The sentence's clause about time, from how many times faster the student is."""
    if 0.95 < speed_up < 1.05:
        return "in the same time"
    if speed_up > 1:
        return f"in 1/{speed_up:.0f} of the time" if speed_up >= 9.5 else f"in 1/{speed_up:.2g} of the time"
    return f"in {number(1 / speed_up)}× the time"


def first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def shortened(label: str, most: int = 44) -> str:
    """Both ends of a long name: its beginning and its end tell siblings apart."""
    return label if len(label) <= most else f"{label[: most - most // 2 - 1]}…{label[-(most // 2) :]}"


def plural(steps: int) -> str:
    if not steps:  # samples from elsewhere
        return "unknown steps"
    return f"{steps} step" if steps == 1 else f"{steps} steps"


# --- metrics and extractors --------------------------------------------------------------------------------------


def measured(row: Row, metric: str) -> Measured | None:
    """A row's measurement, or None where it is missing, null or not finite."""
    found = row.metrics.get(metric)
    return found if found is not None and found.value is not None and math.isfinite(found.value) else None


def value(row: Row, metric: str) -> float | None:
    found = measured(row, metric)
    return found.value if found else None


def metric_names(report: Report) -> list[str]:
    return list(dict.fromkeys(name for row in report.rows for name in row.metrics))


def extractors(report: Report) -> list[str]:
    """The extractors with metrics in some row, in the order of the reference: the first one leads."""
    names = metric_names(report)
    known = list(report.reference.get("extractors") or {})
    if not known:
        suffixes = [name.removeprefix("fd_") for name in names if name.startswith("fd_")]
        # fd_pixels_debiased and fd_debiased_pixels name no extractor of their own.
        known = [a for a in suffixes if not any(a.endswith(f"_{b}") or a.startswith(f"{b}_") for b in suffixes)]
    if "inception" not in known:
        known.insert(0, "inception")
    return [name for name in known if any(split(metric, known)[1] == name for metric in names)]


def split(metric: str, known: Sequence[str]) -> tuple[str, str | None]:
    """``fd_pixels`` -> ``("fd", "pixels")``; a metric on no extractor keeps its name and gets None."""
    for extractor in sorted(known, key=len, reverse=True):
        if metric.endswith(f"_{extractor}"):
            return metric.removesuffix(f"_{extractor}"), extractor
    return metric, "inception" if metric in INCEPTION else None


def of_extractor(name: str, extractor: str) -> str:
    """The metric's name on an extractor: only Inception's Fréchet distance is called FID."""
    if extractor == "inception":
        return {"fd": "fid", "kd": "kid", "fd_debiased": "fid_debiased"}.get(name, name)
    return f"{name}_{extractor}"


def debiased(metric: str) -> str | None:
    """The name of a Fréchet distance's estimate without the bias of a finite sample."""
    if metric == "fid":
        return "fid_debiased"
    plain = metric.startswith("fd_") and not metric.startswith("fd_debiased_")
    return f"fd_debiased_{metric.removeprefix('fd_')}" if plain else None


def counted(metric: str, rows: Sequence[Row]) -> str:
    """A metric's name with its sample count where that is custom: ``fid50k``, ``fid10k_debiased``; ``fid@n`` of many.

    Only Inception's distances are called so.
    """
    stem = next((stem for stem in ("sfid", "fid") if metric in (stem, f"{stem}_debiased")), None)
    if stem is None:
        return metric
    counts = {row.n for row in rows}
    least = min(counts, default=0)
    at = "@n" if len(counts) != 1 else f"{least // 1000}k" if least % 1000 == 0 else str(least)
    return f"{stem}{at}{metric.removeprefix(stem)}"


def is_gap(metric: str) -> bool:
    return "gap" in metric or "teacher" in metric


def main_metrics(report: Report, extractor: str) -> list[str]:
    """The columns of one extractor's table; the teacher gaps that need no extractor stand in the primary table."""
    known = extractors(report)
    here = [
        of_extractor(base, extractor) for base in ("fd", "fd_debiased", "recall", "precision", "density", "coverage")
    ]
    homes = (extractor, None) if extractor == known[0] else (extractor,)
    gaps = [name for name in metric_names(report) if is_gap(name) and split(name, known)[1] in homes]
    gaps = [name for name in gaps if not name.endswith(("_p50", "_p95"))]
    return [name for name in here if name in metric_names(report)] + gaps


def other_metrics(report: Report) -> list[str]:
    shown = {metric for extractor in extractors(report) for metric in main_metrics(report, extractor)}
    return [name for name in metric_names(report) if name not in shown]


def primary(report: Report) -> str | None:
    """The Fréchet distance that the headline and the ratios are about."""
    distances = [of_extractor("fd", extractor) for extractor in extractors(report)]
    return next((metric for metric in distances if metric in metric_names(report)), None)


def direction(metric: str) -> Literal["lower", "higher"] | None:
    """Which way is better. Density has no better way: its ideal is one."""
    if metric.startswith(("precision", "recall", "coverage", "is_")) or metric in ("is", "images_per_s"):
        return "higher"
    distance = metric.startswith(("fid", "fd_", "sfid", "kid", "kd_", "cmmd", "w2", "memorised"))
    distance = distance or metric in ("straightness", "curvature", "self_consistency", "semigroup_error", "latency_ms")
    return "lower" if distance or is_gap(metric) else None


def describe(metric: str, known: Sequence[str]) -> str:
    """A metric's name in words."""
    base, extractor = split(metric, known)
    words = {
        **{"fid": "FID", "kid": "KID", "sfid": "sFID", "fid_debiased": "FID, debiased"},
        **{"fd": "Fréchet distance", "kd": "kernel distance", "fd_debiased": "Fréchet distance, debiased,"},
        "is": "Inception score" if extractor == "inception" else "classifier score",
    }.get(base)
    words = words or base.replace("_", " ")
    return words if extractor in (None, "inception") else f"{words} on {extractor}"
