"""Turns report data into one self-contained HTML page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from flows.report.charts import curve_svg, lineage_svg
from flows.report.code_pictures import CodeStrip
from flows.report.comparison import Comparison, SideBySide
from flows.report.data import (
    Benchmark,
    Curve,
    MetricLine,
    Picture,
    ReportData,
    StageLine,
    duration,
)
from infra.terminal import printable

MAX_HEADLINES = 6
_TEMPLATES = Path(__file__).parent / "templates"


def write_page(page: str, folder: Path) -> Path:
    """Write `index.html` in a folder, which is made if needed; the page appears whole. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    private = folder / f".index.{os.getpid()}.html"
    private.write_text(page, encoding="utf-8")
    private.replace(path)
    return path


def render_page(data: ReportData) -> str:
    """Render the report of a recipe as HTML without scripts and network resources, with embedded images."""
    return _render(
        "report.html.j2",
        data=data,
        headlines=_headlines(data.benchmarks or []),
        curve=_curve,
        lineage=_lineage(data.stages),
    )


def render_comparison(
    data: Comparison,
    pictures: list[SideBySide],
    codes: list[tuple[str, list[tuple[CodeStrip, Picture]]]],
    written: str,
) -> str:
    """Render a comparison of tokenizers as HTML, as `render_page` does."""
    return _render("comparison.html.j2", data=data, pictures=pictures, codes=codes, written=written)


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        # a page has no more use for control characters and changes of direction than a terminal
        finalize=lambda value: printable(value, lines=True) if type(value) is str else value,
    )
    environment.filters |= {"words": _words, "metric_name": _metric_name, "duration": duration, "bytes": _bytes}
    return environment.get_template(template).render(**values)


def _headlines(benchmarks: list[Benchmark]) -> list[tuple[Benchmark, MetricLine]]:
    """Return the first metric of each benchmark, which evaluation writes in order of importance."""
    return [(benchmark, benchmark.lines[0]) for benchmark in benchmarks if benchmark.lines][:MAX_HEADLINES]


def _curve(stage: str, curve: Curve) -> Markup:
    return Markup(curve_svg(curve.steps, curve.values, f"{stage}: {curve.name}"))


def _lineage(stages: list[StageLine]) -> Markup:
    svg = lineage_svg(
        [stage.name for stage in stages],
        {stage.name: list(stage.inputs) for stage in stages},
        {stage.name: (stage.short, stage.how) for stage in stages},
    )
    return Markup(svg)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _metric_name(name: str) -> str:
    return _words(name).replace(".", ", ")


def _bytes(size: int) -> str:
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
