"""The Best-of-N curve as a PNG file and as SVG for the HTML report. matplotlib loads when something is drawn."""

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .summary import CurveLine, Results, curve_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Lines differ in marker and dash as well as in colour (Okabe and Ito's palette, which colour-blind readers tell apart).
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES = ("-", "--", "-.", ":")
# A colour that nothing else has. In the SVG it becomes the text colour of the page, which may be light or dark.
_INK = "#010203"


def plot_curve(results: Results, path: str | Path, aggregator: str) -> Path:
    """
    Draw accuracy against the number of candidates with 95 % bands, and save it as a picture.

    Args:
        results (`Mapping[str, Mapping]`):
            What the `best_of_n` metric returned, by the name of the process reward model.
        path (`str` or `Path`):
            File to write; its suffix says the format.
        aggregator (`str`):
            Aggregator of the step scores.

    Returns:
        `Path`: The file.
    """
    path = Path(path)
    _draw(curve_lines(results, aggregator)).savefig(path, dpi=150, facecolor="white")
    return path


def curve_svg(results: Results, aggregator: str) -> str:
    """
    Draw the same curve as an SVG element to put into HTML: text as text, in the colour of the page.

    Args:
        results (`Mapping[str, Mapping]`):
            What the `best_of_n` metric returned, by the name of the process reward model.
        aggregator (`str`):
            Aggregator of the step scores.

    Returns:
        `str`: `<svg …>…</svg>`, without links, fonts or name spaces from elsewhere.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mm-prm"}):
        _draw(curve_lines(results, aggregator)).savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None}
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", svg)
    return svg.replace(_INK, "currentColor")


def _draw(lines: list[CurveLine]) -> "Figure":
    from matplotlib.figure import Figure  # not pyplot: no window, no global state
    from matplotlib.ticker import NullLocator, PercentFormatter

    figure = Figure(figsize=(6.0, 4.6), layout="constrained")
    axes = figure.subplots()
    for index, line in enumerate(lines):
        sizes = [n for n, _ in line.points]
        values, lows, highs = ([estimate[key] for _, estimate in line.points] for key in ("value", "low", "high"))
        color = _COLORS[index % len(_COLORS)]
        axes.fill_between(sizes, lows, highs, color=color, alpha=0.15, linewidth=0)
        axes.plot(
            sizes,
            values,
            color=color,
            marker=_MARKERS[index % len(_MARKERS)],
            linestyle=_DASHES[index % len(_DASHES)],
            label=line.name.replace("$", r"\$"),  # a name is no formula
        )
    sizes = [n for n, _ in lines[0].points]
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("candidates N", color=_INK)
    axes.set_ylabel("accuracy", color=_INK)
    axes.tick_params(colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(_INK)
    axes.grid(axis="y", color=_INK, alpha=0.12)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=_INK)
    return figure
