"""The figures: quality against steps, and against time. Drawn without global state, the same bytes every time."""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from fewstep.evaluation.report import answer, wording
from fewstep.evaluation.report.answer import Series
from fewstep.evaluation.report.significance import beats
from fewstep.evaluation.results import Measured, Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colour-blind-safe hues that read on white and on near-black; teachers are drawn in ink.
# A brown that differs from them in lightness is the seventh; after it they come again, hollow and dashed.
HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7B4B2A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES = ("-", "--", "-.", ":")
SIDESTEP_OCTAVES, MOST_OCTAVES = 0.02, 0.36  # between neighbours with bars, which would cover each other; between all
ROOM = (16, 11)  # of a number beside a point, in pixels at matplotlib's 100 to the inch
LABEL_INCHES = 0.195  # between names beside the ends of curves
MOST_IN_LEGEND = 6
"""With more students than this a figure is wide, and names its curves beside their ends."""
# A page puts its own light or dark colour in the place of each of these and of the hues.
INK, MUTED, GRID, PAPER = "#1b1b1f", "#6a6d75", "#dcdde1", "#fefefe"
WIDTH_INCHES, WIDE_INCHES = 5.0, 7.8
HEIGHT_INCHES, TALL_INCHES, AROUND_INCHES = 3.4, 4.6, 0.85  # of a figure, of a wide one, of what is not the axes
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
    wide: bool = False

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


def dominated(rows: Sequence[Row], metric: str) -> list[int]:
    """The rows than which another is better in the metric beyond noise (``significance.beats``) and no slower."""
    timed = [(i, row, row.latency_ms) for i, row in enumerate(rows) if row.latency_ms]
    return [
        i
        for i, row, ms in timed
        if any(other_ms <= ms and beats(other, row, metric) for j, other, other_ms in timed if j != i)
    ]


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
            again = students // len(HUES)
            looks[curve.label] = {"color": HUES[students % len(HUES)], "marker": marker}
            looks[curve.label]["linestyle"] = DASHES[again % len(DASHES)]
            if again:
                looks[curve.label]["markerfacecolor"] = PAPER
            students += 1
    return looks


def _against_steps(report: Report, metric: str) -> Drawn | None:
    curves, known = answer.series(report), wording.extractors(report)
    lines = {c.label: [(r.steps, m) for r in c.rows if (m := wording.measured(r, metric)) and r.steps] for c in curves}
    found = [m.value for line in lines.values() for _, m in line]
    if not found:
        return None
    # Of many curves the students take the axes for themselves: a teacher at few steps is far from all of them.
    wide = is_wide(curves)
    bars = {curve.label: _bars(curve, metric) for curve in curves}
    framed_curves = [c for c in curves if c.role == "student" or not wide]
    values = [m.value for c in framed_curves for _, m in lines[c.label]] or found
    reference = answer.reference_row(report)
    target = wording.value(reference, metric) if reference else None
    floor = floor_of(report, metric)
    logarithmic = wording.direction(metric) == "lower" and any(value > 0 for value in found)
    ends = [end for c in framed_curves for _, *both in bars[c.label] for end in both]
    levels = [level for level in (floor, target) if level]
    # A band that reaches below a tenth of every value is cut off there instead of squeezing all curves together.
    least = min([value for value in values if value > 0], default=0.0) / 10
    shown = [*values, *(end for end in ends if end > least), *levels]
    height, bottom = _heights(shown) if logarithmic else (float, None)
    figure, axes = _canvas(wide, len(curves))
    drawn = {}
    spread_out = any(m.sd is not None for line in lines.values() for _, m in line)
    banded = not wide
    sidestep = min(SIDESTEP_OCTAVES, MOST_OCTAVES / len(curves))
    for i, curve in enumerate(curves):
        if lines[curve.label]:
            aside = 1.0 if banded or not spread_out else 2 ** (sidestep * (i - (len(curves) - 1) / 2))
            look = look_of(curves)[curve.label]
            drawn[curve.label] = _curve(axes, lines[curve.label], look, curve.label, height, aside)
            _noise(axes, bars[curve.label], look["color"], height, aside, banded)
    levels_drawn = []
    if reference is not None and target is not None and (target > 0 or not logarithmic):
        label = f"teacher at {wording.plural(reference.steps)}"
        levels_drawn.append(axes.axhline(target, color=INK, linestyle=":", linewidth=1.1, zorder=1.6, label=label))
    if floor is not None and (floor > 0 or not logarithmic):
        floor_line = axes.axhline(floor, color=MUTED, dashes=(4, 3), linewidth=1.2, label="real against real")
        levels_drawn.append(floor_line)
    axes.set_xlabel("solver steps")
    axes.set_ylabel(wording.describe(metric, known))
    _step_axis(axes, [steps for c in framed_curves for steps, _ in lines[c.label]] or [1])
    caption = (
        f"{wording.first_upper(wording.describe(metric, known))} ({metric}) against solver steps, {_samples(report)}."
    )
    if logarithmic:
        _log_axis(axes, "y", [height(value) for value in shown if value > 0 or value in values])
    else:
        axes.set_ylim(*(_close_limits([*values, *ends, *levels]) if wide else _unit_limits([*values, *ends])))
    named = _name_at_ends(axes, drawn, figure.get_figheight()) if wide else []
    handles = [*(line for label, line in drawn.items() if label not in named), *levels_drawn]
    if bottom is not None and min(found) <= 0:
        caption += " A value of 0 has no place on the logarithmic axis: it is drawn hollow at the bottom."
    if floor is not None:
        caption += f" Dashed: real data against other real data, {wording.number(floor)}."
    if wide:
        caption += " The axes hold the students; what they leave out of the teacher is in the table."
    if spread_out:
        aside_words = "" if banded else ", set apart sideways to be seen"
        caption += f" Points and {'bands' if banded else 'bars'}: {wording.trainings(report)}{aside_words}."
    elif any(bars.values()):
        caption += f" {'Bands' if banded else 'Bars'}: 95% intervals{_around_what(report, metric)}."
    title = f"{wording.first_upper(wording.describe(metric, known))} against steps"
    return _finish(figure, handles, f"{metric}-steps", title, caption, wide, beside=not named)


def _against_latency(report: Report, metric: str) -> Drawn | None:
    curves, known = answer.series(report), wording.extractors(report)
    looks = look_of(curves)
    # Row by row: label, row, milliseconds, value.
    points = [
        (curve.label, row, row.latency_ms, value)
        for curve in curves
        for row in curve.rows
        if row.latency_ms and (value := wording.value(row, metric)) is not None
    ]
    if not points:
        return None
    height, bottom = _heights([value for *_, value in points])
    wide = is_wide(curves)
    figure, axes = _canvas(wide, len(curves))
    beaten = set(dominated([row for _, row, *_ in points], metric))
    front = [points[i] for i in pareto_front([(ms, value) for *_, ms, value in points])]
    xs, ys = [ms for _, _, ms, _ in front], [height(value) for *_, value in front]
    # Wide and pale, beneath everything: a band that joins the points nothing beats.
    band = axes.plot(xs, ys, color=MUTED, alpha=0.35, linewidth=6, solid_capstyle="round", zorder=1.5)
    band[0].set_label("not beaten by any other")
    handles = []
    numbered: list[tuple[int, float, float]] = []
    crossed: list[tuple[int, float, float]] = []
    for curve in curves:
        mine = [(i, *point) for i, point in enumerate(points) if point[0] == curve.label]
        if not mine:
            continue
        look = {**looks[curve.label], "linestyle": "none"}
        xs, ys = [ms for *_, ms, _ in mine], [height(value) for *_, value in mine]
        axes.plot(xs, ys, color=look["color"], linewidth=0.8, alpha=0.5)
        handles += axes.plot([], [], label=wording.shortened(curve.label), **look)
        for (i, _, row, *_), x, y in zip(mine, xs, ys, strict=True):
            unbeaten = i not in beaten
            axes.plot([x], [y], **(look if unbeaten else {**look, "markerfacecolor": PAPER, "alpha": 0.45}))
            (numbered if unbeaten else crossed).append((row.steps, x, y))
    axes.set_xlabel("time of one sample, ms")
    axes.set_ylabel(wording.describe(metric, known))
    _log_axis(axes, "x", [ms for _, _, ms, _ in points])
    if any(value > 0 for *_, value in points):
        _log_axis(axes, "y", [height(value) for *_, value in points])
    _number(axes, [*numbered, *(() if wide else crossed)])
    words = wording.first_upper(wording.describe(metric, known))
    sure = any(_bars(curve, metric) for curve in curves)
    judged = "beyond noise: the 95% interval of the difference excludes 0" if sure else "by the values alone"
    caption = (
        f"{words} ({metric}) against the median time of one sample at batch size 1, {_samples(report)}. Numbers are "
        f"solver steps{', of filled points' if wide else ''}. The band joins the points of the front; a point is "
        f"hollow and pale where another is as fast and better {judged}."
    )
    if wording.trainings(report):
        caption += " Distances are means, and times medians, over the trainings."
    if bottom is not None and any(value <= 0 for *_, value in points):
        caption += " A value of 0 has no place on the logarithmic axis: it is drawn at the bottom."
    return _finish(figure, [*handles, *band], f"{metric}-latency", f"{words} against time", caption, wide)


def floor_of(report: Report, metric: str) -> float | None:
    """Real data against real data in this metric, where the reference has it."""
    found = (report.reference.get("floor") or {}).get(metric)
    found = found.get("value") if isinstance(found, dict) else found
    return float(found) if isinstance(found, (int, float)) and math.isfinite(found) else None


# --- pieces ------------------------------------------------------------------------------------------------------


def is_wide(curves: Sequence[Series]) -> bool:
    return sum(curve.role == "student" for curve in curves) > MOST_IN_LEGEND


def _canvas(wide: bool, curves: int) -> "tuple[Figure, Axes]":
    """Figure and axes, so high that the names of all curves have room beside a wide one."""
    from matplotlib.figure import Figure

    tall = max(TALL_INCHES, curves * LABEL_INCHES + AROUND_INCHES)
    figure = Figure(figsize=(WIDE_INCHES, tall) if wide else (WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
    return figure, figure.add_subplot()


def _curve(
    axes: "Axes",
    line: list[tuple[int, Measured]],
    look: dict[str, Any],
    label: str,
    height: Callable[[float], float],
    aside: float,
) -> Any:
    """One model's line, ``aside`` times its steps to the right, with hollow markers for values the axis has no place
    for."""
    xs, ys = [steps * aside for steps, _ in line], [height(m.value) for _, m in line]
    handle = axes.plot(xs, ys, label=wording.shortened(label), **look)[0]
    for x, (_, m), y in zip(xs, line, ys, strict=True):
        if y != m.value:
            axes.plot([x], [y], color=look["color"], marker=look["marker"], markerfacecolor=PAPER, zorder=3)
    return handle


Bar = tuple[int, float, float]
"""A step count and the ends of its noise."""


def _bars(curve: Series, metric: str) -> list[Bar]:
    """A curve's intervals or spreads; where a distance has none of its own, those of the debiased one."""
    found = []
    for row in curve.rows:
        for name in (metric, wording.debiased(metric) or metric):
            m = wording.measured(row, name)
            if m is not None and row.steps and (ends := wording.bar(row, name)) is not None:
                found.append((row.steps, *ends))
                break
    return found


def _around_what(report: Report, metric: str) -> str:
    """What intervals are of, where that is not plain."""
    better, rows = wording.debiased(metric), report.rows
    own = any(wording.bar(row, metric) for row in rows)
    if not own and any(better in row.metrics for row in rows):
        return f" of the debiased distance, which lies below the plain one by the bias of {_samples(report)}"
    shares = ("precision", "recall", "density", "coverage")
    return ", given the manifold estimate" if metric.startswith(shares) else ""


def _noise(
    axes: "Axes", bars: Sequence[Bar], colour: str, height: Callable[[float], float], aside: float, banded: bool
) -> None:
    """A band along a curve, or one bar beside each point."""
    xs = [steps * aside for steps, *_ in bars]
    low, high = [height(bar[1]) for bar in bars], [height(bar[2]) for bar in bars]
    if banded and len(bars) > 1:
        axes.fill_between(xs, low, high, color=colour, alpha=0.26, linewidth=0, zorder=1.4)
        return
    for x, bottom, top in zip(xs, low, high, strict=True):
        axes.plot([x, x], [bottom, top], color=colour, linewidth=1.1)


def _number(axes: "Axes", points: Sequence[tuple[int, float, float]]) -> None:
    """Write steps beside points ``(steps, x, y)``, earlier ones first, as far as the numbers leave each other room."""
    taken: list[tuple[float, float]] = []
    for steps, x, y in points:
        a, b = axes.transData.transform((x, y))
        if steps and not any(abs(a - c) < ROOM[0] and abs(b - d) < ROOM[1] for c, d in taken):
            axes.annotate(str(steps), (x, y), xytext=(6.5, 5), textcoords="offset points", fontsize=8)
            taken.append((a, b))


def _name_at_ends(axes: "Axes", drawn: dict[str, Any], figure_height: float) -> list[str]:
    """Name the curves that reach the right end beside it, as near to their ends as the names leave each other room.

    Returns the labels that were named: the others are for a legend.
    """
    end = axes.get_xlim()[1]
    within = {
        label: [(x, y) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True) if x < end]
        for label, line in drawn.items()
    }
    last = {label: points[-1] for label, points in within.items() if points and points[-1][0] > end / 1.8}
    share = axes.transScale + axes.transLimits
    at = {label: float(share.transform(point)[1]) for label, point in last.items()}
    named = sorted((label for label in at if 0 <= at[label] <= 1), key=lambda label: at[label])
    spacing = LABEL_INCHES / (figure_height - AROUND_INCHES)
    for label, y in zip(named, spaced([at[label] for label in named], spacing), strict=True):
        line = drawn[label]
        axes.annotate(
            "",
            xy=last[label],
            xytext=(1.03, y),
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4},
            annotation_clip=False,
        )
        axes.plot(
            [1.045], [y], transform=axes.transAxes, clip_on=False, color=line.get_color(), marker=line.get_marker(),
            markerfacecolor=line.get_markerfacecolor(), linestyle="none",
        )  # fmt: skip
        axes.text(1.065, y, line.get_label(), transform=axes.transAxes, va="center", fontsize=8.5)
    return named


def spaced(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions at least ``gap`` apart and nearest (least squares) to ascending ``wanted`` ones, kept in 0 to 1 where
    there is room."""
    # Less gaps, they have to ascend: neighbours that do not are pooled at their mean.
    pools: list[list[float]] = []
    for i, position in enumerate(wanted):
        pools.append([position - i * gap])
        while len(pools) > 1 and fmean(pools[-2]) > fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    room = max(0.0, 1 - (len(wanted) - 1) * gap)
    level = [min(max(fmean(pool), 0.0), room) for pool in pools for _ in pool]
    return [position + i * gap for i, position in enumerate(level)]


def _heights(values: Sequence[float]) -> tuple[Callable[[float], float], float | None]:
    """Where a logarithmic axis draws a value: itself, or, for 0 and below, a place under the least positive one."""
    positive = [value for value in values if value > 0]
    if not positive:
        return float, None
    bottom = min(positive) / 2
    return lambda value: value if value > 0 else bottom, bottom


def _unit_limits(values: Sequence[float]) -> tuple[float, float]:
    """From 0 to 1 for shares, further for what exceeds it."""
    low, high = min(0.0, *values), max(1.0, *values)
    return low - 0.02 * (high - low), high + 0.04 * (high - low)


def _close_limits(values: Sequence[float]) -> tuple[float, float]:
    """Around the values and no further."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


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


def _finish(
    figure: "Figure", handles: Sequence[Any], name: str, title: str, caption: str, wide: bool, beside: bool = True
) -> Drawn:
    """Put the legend above the axes, or of a wide figure with many curves ``beside`` them, where it covers no data."""
    labels = [str(handle.get_label()) for handle in handles]
    if wide and beside and len(labels) > MOST_IN_LEGEND:
        figure.legend(handles, labels, loc="outside right upper", handlelength=1.9, borderpad=0, labelspacing=0.35)
    elif labels:
        width = WIDE_INCHES if wide else WIDTH_INCHES
        per_line = max(1, min(len(labels), int(width / (0.5 + 0.078 * max(map(len, labels))))))
        figure.set_figheight(
            figure.get_figheight() - (0.2 if wide else 0.25) + 0.21 * math.ceil(len(labels) / per_line)
        )
        # Labels go in by name: a legend made of handles alone leaves out those that start with an underscore.
        figure.legend(
            handles, labels, loc="outside upper left", ncols=per_line, handlelength=1.9, columnspacing=1.4, borderpad=0
        )
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
    return Drawn(slug(name), title, caption, svg.getvalue(), png.getvalue(), wide)


def slug(name: str) -> str:
    """A file name that every system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "unnamed"


def _samples(report: Report) -> str:
    counts = sorted({row.n for row in report.rows})
    return f"n = {counts[0]:,}" if len(counts) == 1 else f"n from {counts[0]:,} to {counts[-1]:,}"
