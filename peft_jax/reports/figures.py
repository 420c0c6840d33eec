"""Pictures as SVG, which stand in a page as they are. The same values give the same text."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Series = Mapping[str, Sequence[tuple[float, float]]]


class Point(NamedTuple):
    """A named place, with the spread of its y, and whether it is the one to compare with."""

    name: str
    x: float
    y: float
    spread: float = 0.0
    reference: bool = False


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # takes long to load

    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.subplots()
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _svg(figure: Any, name: str) -> str:
    """The figure as an <svg> element; `name` keeps its ids apart from other figures'."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # element ids are of one page: a figure's own name stands before each
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)


def curves(name: str, series: Series, *, x: str, y: str) -> str | None:
    """Lines over steps; None without any point."""
    known = {k: [p for p in points if _finite(*p)] for k, points in series.items()}
    if not any(known.values()):
        return None
    figure, axis = _figure(7.5, 3.6)
    for i, (label, points) in enumerate(known.items()):
        marker = "o" if len(points) < 3 else None
        line = ("-", "--", ":")[i // 10 % 3]
        axis.plot(*zip(*points, strict=True), line, marker=marker, label=label, linewidth=1.6)
    axis.set(xlabel=x, ylabel=y)
    if len(known) > 1:
        axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _svg(figure, name)


def scatter(
    name: str, points: Sequence[Point], *, x: str, y: str, lower: bool, log: bool
) -> str | None:
    """Points with their names and spreads, and the line of those that no other one beats in both:
    less of x, and of y less where `lower`, else more.
    """
    points = [p for p in points if _finite(p.x, p.y)]
    if not points:
        return None
    figure, axis = _figure(7.5, 4.4)
    best = front(points, lower=lower)
    axis.plot([p.x for p in best], [p.y for p in best], "--", color="0.5", zorder=1)
    for p in points:
        color = "tab:red" if p.reference else "tab:blue" if p in best else "0.6"
        axis.errorbar(p.x, p.y, yerr=p.spread or None, fmt="o", color=color, capsize=3, zorder=2)
    if log:
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter("")  # numbers between powers of ten would overlap
    axis.margins(x=0.2, y=0.15)
    axis.set(xlabel=x, ylabel=y)
    figure.draw_without_rendering()  # so that it is known where points lie
    _name(axis, points)
    return _svg(figure, name)


# Where a name may stand beside its point: on which side, how far right and up, in points.
BESIDE = (("left", 6, 4), ("left", 6, -11), ("right", -6, 4), ("right", -6, -11), ("left", 6, 14))
LETTER, LINE = 5.0, 9.0  # the size of a letter, in points
Box = tuple[float, float, float, float]  # left, bottom, right, top


def _name(axis: Any, points: Sequence[Point]) -> None:
    """Write each point's name where it covers no other point and no name, if there is such a
    place.
    """
    scale = 72.0 / axis.figure.dpi
    at = {p: axis.transData.transform((p.x, p.y)) * scale for p in points}
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in at.values()]
    for p, (x, y) in at.items():
        boxes = [_box(x, y, p.name, *where) for where in BESIDE]
        own = (x - 4, y - 4, x + 4, y + 4)
        hits = [sum(_meet(box, t) for t in taken if t != own) for box in boxes]
        best = hits.index(min(hits))
        side, right, up = BESIDE[best]
        taken.append(boxes[best])
        offset = {"textcoords": "offset points", "xytext": (right, up)}
        axis.annotate(p.name, (p.x, p.y), ha=side, fontsize="small", **offset)


def _box(x: float, y: float, name: str, side: str, right: float, up: float) -> Box:
    """Where a name lies."""
    width, start = LETTER * len(name), x + right
    left = start if side == "left" else start - width
    return (left, y + up, left + width, y + up + LINE)


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def bars(name: str, values: Mapping[str, float], *, x: str, line: float | None = None) -> str:
    """Horizontal bars, the first one on top, with a line at a value to compare with."""
    figure, axis = _figure(7.5, 0.6 + 0.32 * len(values))
    drawn = axis.barh(list(values), list(values.values()), color="tab:blue")
    axis.bar_label(drawn, fmt="%.3g", padding=3, fontsize="small")
    if line is not None:
        axis.axvline(line, color="tab:red", linewidth=1)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set(xlabel=x)
    return _svg(figure, name)


def front(points: Sequence[Point], *, lower: bool) -> list[Point]:
    """The Pareto front, from the smallest x on: no other point has as little of x and as good a
    y.
    """
    sign = 1.0 if lower else -1.0
    best: list[Point] = []
    for p in sorted(points, key=lambda p: (p.x, sign * p.y)):
        if not best or sign * p.y < sign * best[-1].y:
            best.append(p)
    return best


def _finite(*values: Any) -> bool:
    return all(v is not None and math.isfinite(v) for v in values)
