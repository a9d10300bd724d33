"""The figures: quality against steps, and against time. Drawn without global state, the same bytes every time."""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fewstep.evaluation.report import answer, wording
from fewstep.evaluation.report.answer import Series
from fewstep.evaluation.results import Measured, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colour-blind-safe hues that read on white and on near-black; teachers are drawn in ink.
HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES = ("-", "--", "-.", ":")
# A page puts its own light or dark colour in the place of each of these and of the hues.
INK, MUTED, GRID, PAPER = "#1b1b1f", "#6a6d75", "#dcdde1", "#fefefe"
WIDTH_INCHES = 5.0
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.parse_math": False,  # a model's name may hold a dollar sign
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "fewstep",
}


@dataclass(frozen=True)
class Drawn:
    """A finished figure; ``name`` is its file name without ending."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes

    def inline(self) -> str:
        """The SVG for a page: no prolog, unique ids, the page's own ink and paper, as wide as its place."""
        opening, drawing = self.svg.split("<svg", 1)[1].split(">", 1)
        opening = re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", opening)
        # Matplotlib repeats every text as a comment.
        drawing = re.sub(r"<!--.*?-->\s*", "", drawing, flags=re.DOTALL).replace("xlink:href", "href")
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", f"<svg{opening}>{drawing}")
        named = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {h: f"hue-{i}" for i, h in enumerate(HUES)}
        for colour, variable in named.items():
            svg = svg.replace(colour.lower(), f"var(--{variable})")  # matplotlib writes hexadecimals small
        return svg


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other beats: none is as good in both coordinates and better in one. Smaller is better.

    Returns indices by growing first coordinate. Equal points do not beat each other.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


def figures(report: Report) -> list[Drawn]:
    """For every extractor: distance and recall against steps, and distance against the time of one sample."""
    import matplotlib

    drawn = []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the reader's own style file must not change a report
        matplotlib.rcParams.update(STYLE)
        for extractor in wording.extractors(report):
            fd = wording.of_extractor("fd", extractor)
            recall = wording.of_extractor("recall", extractor)
            drawn += [_against_steps(report, fd), _against_steps(report, recall), _against_latency(report, fd)]
    return [figure for figure in drawn if figure is not None]


def look_of(curves: Sequence[Series]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes of each curve: the same in every figure."""
    looks: dict[str, dict[str, Any]] = {}
    teachers = students = 0
    for curve in curves:
        if curve.role == "teacher":
            style = DASHES[teachers % len(DASHES)]
            looks[curve.label] = {"color": INK, "marker": MARKERS[teachers % len(MARKERS)], "linestyle": style}
            teachers += 1
        else:
            marker = MARKERS[(students + 1) % len(MARKERS)]
            looks[curve.label] = {"color": HUES[students % len(HUES)], "marker": marker, "linestyle": "-"}
            students += 1
    return looks


def _against_steps(report: Report, metric: str) -> Drawn | None:
    curves, known = answer.series(report), wording.extractors(report)
    lines = {c.label: [(r.steps, m) for r in c.rows if (m := wording.measured(r, metric))] for c in curves}
    found = [m.value for line in lines.values() for _, m in line]
    if not found:
        return None
    floor = floor_of(report, metric)
    logarithmic = wording.direction(metric) == "lower" and any(value > 0 for value in found)
    ends = [end for line in lines.values() for _, m in line for end in (m.low, m.high) if end is not None]
    shown = [*found, *(end for end in ends if end > 0), *([floor] if floor else [])]
    height, bottom = _heights(shown) if logarithmic else (float, None)
    figure, axes = _canvas()
    handles = []
    for curve in curves:
        if lines[curve.label]:
            handles.append(_curve(axes, lines[curve.label], look_of(curves)[curve.label], curve.label, height))
    reference = answer.reference_row(report)
    target = wording.value(reference, metric) if reference else None
    if reference is not None and target is not None and (target > 0 or not logarithmic):
        label = f"teacher at {wording.plural(reference.steps)}"
        handles.append(axes.axhline(target, color=INK, linestyle=":", linewidth=1.1, zorder=1.6, label=label))
    if floor is not None and (floor > 0 or not logarithmic):
        handles.append(axes.axhline(floor, color=MUTED, dashes=(4, 3), linewidth=1.2, label="real against real"))
    axes.set_xlabel("solver steps")
    axes.set_ylabel(wording.describe(metric, known))
    _step_axis(axes, [steps for line in lines.values() for steps, _ in line])
    caption = (
        f"{wording.first_upper(wording.describe(metric, known))} ({metric}) against solver steps, {_samples(report)}."
    )
    if logarithmic:
        _log_axis(axes, "y", [height(value) for value in shown if value > 0 or value in found])
    else:
        axes.set_ylim(*_unit_limits(found))
    if bottom is not None and min(found) <= 0:
        caption += " A value of 0 has no place on the logarithmic axis: it is drawn hollow at the bottom."
    if floor is not None:
        caption += f" Dashed: real data against other real data, {wording.number(floor)}."
    if any(m.low is not None and m.high is not None for line in lines.values() for _, m in line):
        caption += " Bars: 95% intervals."
    title = f"{wording.first_upper(wording.describe(metric, known))} against steps"
    return _finish(figure, handles, f"{metric}-steps", title, caption)


def _against_latency(report: Report, metric: str) -> Drawn | None:
    curves, known = answer.series(report), wording.extractors(report)
    looks = look_of(curves)
    # Row by row: label, steps, milliseconds, value.
    points = [
        (curve.label, row.steps, row.latency_ms, value)
        for curve in curves
        for row in curve.rows
        if row.latency_ms and (value := wording.value(row, metric)) is not None
    ]
    if not points:
        return None
    height, bottom = _heights([value for *_, value in points])
    figure, axes = _canvas()
    front = [points[i] for i in pareto_front([(ms, value) for *_, ms, value in points])]
    xs, ys = [ms for _, _, ms, _ in front], [height(value) for *_, value in front]
    # Wide and pale, beneath everything: a band that joins the points nothing beats.
    band = axes.plot(xs, ys, color=MUTED, alpha=0.35, linewidth=6, solid_capstyle="round", zorder=1.5)
    band[0].set_label("not beaten by any other")
    axes.plot(xs, ys, color=MUTED, linestyle="none", marker="o", markersize=11, markerfacecolor="none")
    handles = []
    numbered: list[tuple[int, float, float]] = []
    for curve in curves:
        mine = [point for point in points if point[0] == curve.label]
        if not mine:
            continue
        look = {**looks[curve.label], "linestyle": "none"}
        xs, ys = [ms for _, _, ms, _ in mine], [height(value) for *_, value in mine]
        axes.plot(xs, ys, color=look["color"], linewidth=0.8, alpha=0.5)
        handles += axes.plot(xs, ys, label=wording.shortened(curve.label), **look)
        for (_, steps, *_), x, y in zip(mine, xs, ys, strict=True):
            # Two models often meet at one step count, and one number then serves both.
            if not any(steps == s and _near(x, a) and _near(y, b) for s, a, b in numbered):
                axes.annotate(str(steps), (x, y), xytext=(6.5, 5), textcoords="offset points", fontsize=8)
                numbered.append((steps, x, y))
    axes.set_xlabel("time of one sample, ms")
    axes.set_ylabel(wording.describe(metric, known))
    _log_axis(axes, "x", [ms for _, _, ms, _ in points])
    if any(value > 0 for *_, value in points):
        _log_axis(axes, "y", [height(value) for *_, value in points])
    words = wording.first_upper(wording.describe(metric, known))
    caption = (
        f"{words} ({metric}) against the median time of one sample at batch size 1, {_samples(report)}. Numbers are "
        "solver steps. The band joins the points that no other beats in both, judged by the values alone."
    )
    if bottom is not None and any(value <= 0 for *_, value in points):
        caption += " A value of 0 has no place on the logarithmic axis: it is drawn at the bottom."
    return _finish(figure, [*handles, *band], f"{metric}-latency", f"{words} against time", caption)


def floor_of(report: Report, metric: str) -> float | None:
    """Real data against real data in this metric, where the reference has it."""
    found = (report.reference.get("floor") or {}).get(metric)
    found = found.get("value") if isinstance(found, dict) else found
    return float(found) if isinstance(found, (int, float)) and math.isfinite(found) else None


# --- pieces ------------------------------------------------------------------------------------------------------


def _canvas() -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, 3.1), layout="constrained")
    return figure, figure.add_subplot()


def _curve(
    axes: "Axes", line: list[tuple[int, Measured]], look: dict[str, Any], label: str, height: Callable[[float], float]
) -> Any:
    """One model's line, with bars where there are intervals and hollow markers for values the axis has no place for."""
    xs, ys = [steps for steps, _ in line], [height(m.value) for _, m in line]
    handle = axes.plot(xs, ys, label=wording.shortened(label), **look)[0]
    for (x, m), y in zip(line, ys, strict=True):
        if y != m.value:
            axes.plot([x], [y], color=look["color"], marker=look["marker"], markerfacecolor=PAPER, zorder=3)
        elif m.low is not None and m.high is not None:
            axes.plot([x, x], [height(m.low), height(m.high)], color=look["color"], linewidth=1.1)
    return handle


def _heights(values: Sequence[float]) -> tuple[Callable[[float], float], float | None]:
    """Where a logarithmic axis draws a value: itself, or, for 0 and below, a place under the least positive one."""
    positive = [value for value in values if value > 0]
    if not positive:
        return float, None
    bottom = min(positive) / 2
    return lambda value: value if value > 0 else bottom, bottom


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=0.18)


def _unit_limits(values: Sequence[float]) -> tuple[float, float]:
    """From 0 to 1 for shares, further for what exceeds it."""
    low, high = min(0.0, *values), max(1.0, *values)
    return low - 0.02 * (high - low), high + 0.04 * (high - low)


def _step_axis(axes: "Axes", steps: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = math.floor(math.log2(min(steps))), math.ceil(math.log2(max(steps)))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([2**i for i in range(low, high + 1)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlim(min(steps) / 2**0.4, max(steps) * 2**0.4)


def _log_axis(axes: "Axes", name: Literal["x", "y"], values: Sequence[float]) -> None:
    """A logarithmic axis around these positions with plain numbers, and enough of them however few decades it spans."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    low, high = min(values), max(values)
    margin = max((high / low) ** 0.09, 1.15)
    # Limits first: a change of scale would otherwise look for limits of its own.
    axes.set(**{f"{name}lim": (low / margin, high * margin), f"{name}scale": "log"})
    decades = math.log10(high / low * margin**2)
    axis = axes.xaxis if name == "x" else axes.yaxis
    if decades < 0.6:
        axis.set_major_locator(MaxNLocator(5))
    else:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda x, _: f"{x:g}")


def _finish(figure: "Figure", handles: Sequence[Any], name: str, title: str, caption: str) -> Drawn:
    """Put the legend above the axes, where it covers no data, and render."""
    labels = [str(handle.get_label()) for handle in handles]
    per_line = max(1, min(len(labels), int(WIDTH_INCHES / (0.5 + 0.078 * max(map(len, labels))))))
    figure.set_figheight(2.85 + 0.21 * math.ceil(len(labels) / per_line))
    # Labels go in by name: a legend made of handles alone leaves out those that start with an underscore.
    figure.legend(
        handles, labels, loc="outside upper left", ncols=per_line, handlelength=1.9, columnspacing=1.4, borderpad=0
    )
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
    return Drawn(slug(name), title, caption, svg.getvalue(), png.getvalue())


def slug(name: str) -> str:
    """A file name that every system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "unnamed"


def _samples(report: Report) -> str:
    counts = sorted({row.n for row in report.rows})
    return f"n = {counts[0]:,}" if len(counts) == 1 else f"n from {counts[0]:,} to {counts[-1]:,}"
