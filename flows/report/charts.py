"""Inline SVG for the report. Colours are the page's CSS variables, so pictures follow its light and dark themes."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_POINTS = 400
"""Longer curves are averaged over equal spans of steps."""

_INK, _GRID, _FAINT, _LINE = "#010101", "#020202", "#030303", "#040404"
_THEME = {_INK: "var(--muted)", _GRID: "var(--rule)", _FAINT: "var(--curve-faint)", _LINE: "var(--accent)"}
_LOG_SCALE_RATIO = 50


def curve_svg(steps: Sequence[int], values: Sequence[float], label: str) -> str:
    """Draw one training curve: the values and, if there are many, a smoothed line over them.

    Args:
        steps: of the optimiser, ascending.
        values: one a step; those that are not finite are left out.
        label: unique on the page; names the picture for screen readers.

    Returns:
        An `<svg>` element without a fixed size.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    x, y = _thinned(np.asarray(steps, dtype=float), np.asarray(values, dtype=float))
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 10}
    with rc_context(style):
        figure = Figure(figsize=(3.2, 1.9), layout="constrained")
        axes = figure.add_subplot()
        smoothed = len(y) >= 30
        axes.plot(x, y, color=_FAINT if smoothed else _LINE, linewidth=1.0, marker="o" if len(y) < 12 else None, ms=3)
        if smoothed:
            axes.plot(x, _smooth(y), color=_LINE, linewidth=1.6)
        if len(y) and y[-1] < y[0] and y.min() > 0 and y.max() / y.min() > _LOG_SCALE_RATIO:
            axes.set_yscale("log")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        axes.grid(axis="y", color=_GRID, linewidth=0.7)
        axes.tick_params(colors=_INK, length=0)
        axes.locator_params(axis="x", nbins=4, integer=True)
        axes.margins(x=0.02)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _themed(buffer.getvalue(), label)


def lineage_svg(stages: Sequence[str], inputs: dict[str, Sequence[str]], notes: dict[str, tuple[str, str]]) -> str:
    """Draw the pipeline as a column of stages with an arc from each input to the stage that it feeds.

    Args:
        stages: names in pipeline order.
        inputs: names of the stages that feed each stage.
        notes: two short texts for each stage: its digest (empty when it is missing) and how it came about.
    """
    row_height, gutter, width = 48, 118, 440
    y_of = {name: 30 + row * row_height for row, name in enumerate(stages)}
    parts = [
        f'<svg class="lineage" viewBox="0 0 {width} {20 + len(stages) * row_height}" role="img" '
        'aria-label="Which artifact was made from which">'
    ]
    rows = {name: row for row, name in enumerate(stages)}
    for name in stages:
        for feeder in inputs.get(name, ()):
            if feeder not in y_of:
                continue
            span = rows[name] - rows[feeder]
            reach = 0 if span == 1 else gutter - 12 - 95 * min(1.0, span / max(2, len(stages) - 1)) ** 0.8
            start, end = y_of[feeder] + 8, y_of[name] - 8
            if span == 1:
                path = f"M{gutter} {start}V{end - 4}"
            else:
                path = (
                    f"M{gutter - 6} {start - 4}C{reach:.0f} {start + 6} {reach:.0f} {end - 6} {gutter - 10} {end + 2}"
                )
            parts.append(f'<path class="arc" d="{path}"/>')
    for name in stages:
        y = y_of[name]
        digest, how = notes.get(name, ("", ""))
        state, how = ("", f" · {how}" if how else "") if digest else (" absent", "")
        parts.append(
            f'<circle class="node{state}" cx="{gutter}" cy="{y}" r="6"/>'
            f'<text class="name" x="{gutter + 18}" y="{y - 1}">{_escape(name.replace("_", " "))}</text>'
            f'<text class="note" x="{gutter + 18}" y="{y + 14}">'
            f'<tspan class="mono">{_escape(digest or "not made yet")}</tspan>{_escape(how)}</text>'
        )
    parts.append("</svg>")
    return "".join(parts)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= MAX_POINTS:
        return x, y
    spans = np.array_split(np.arange(len(x)), MAX_POINTS)
    return np.array([x[span].mean() for span in spans]), np.array([y[span].mean() for span in spans])


def _smooth(y: np.ndarray) -> np.ndarray:
    """Return a centred moving average over about a fifteenth of the curve, over fewer points at its ends."""
    half = max(1, len(y) // 30)
    return np.array([y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))])


def _themed(svg: str, label: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"(font: [\d.]+px )[^;\"]+", r"\1var(--font)", svg)
    for colour, variable in _THEME.items():
        svg = svg.replace(colour, variable)
    svg = svg.replace("#000000", "var(--muted)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{_escape(label)}"', 1).strip()


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
