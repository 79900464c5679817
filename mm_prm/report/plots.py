"""The plots of a report, each as a PNG file and as SVG for the page. matplotlib loads when something is drawn."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .annotation import AnnotationCost
from .steps import NUM_BINS, StepEvidence, reliability_bins
from .summary import CurveLine, Results, curve_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Lines differ in marker and dash as well as in colour (Okabe and Ito's palette, which colour-blind readers tell apart).
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES = ("-", "--", "-.", ":")
# A colour that nothing else has. In the SVG it becomes the text colour of the page, which may be light or dark.
_INK = "#010203"


def save_plot(figure: "Figure", path: str | Path) -> Path:
    """
    Save a plot as a picture on white.

    Args:
        figure (`Figure`):
            What a function of this file drew.
        path (`str` or `Path`):
            File to write; its suffix says the format.
    """
    path = Path(path)
    figure.savefig(path, dpi=200, facecolor="white")
    return path


def plot_svg(figure: "Figure", name: str) -> str:
    """
    A plot as an SVG element to put into HTML: text as text, in the colour of the page.

    Args:
        figure (`Figure`):
            What a function of this file drew.
        name (`str`):
            Name of the plot. Ids within the element depend on it, so that those of two plots of a page differ.

    Returns:
        `str`: `<svg …>…</svg>`, without links, fonts or name spaces from elsewhere.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"mm-prm {name}"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", svg)
    # Groups have the same ids in every plot; only what is referred to needs one.
    svg = re.sub(r'(<g) id="[^"]*"', r"\1", svg)
    return svg.replace(_INK, "currentColor")


def draw_curve(results: Results, aggregator: str) -> "Figure":
    """
    Accuracy against the number of candidates with 95 % bands.

    Args:
        results (`Mapping[str, Mapping]`):
            What the `best_of_n` metric returned, by the name of the process reward model.
        aggregator (`str`):
            Aggregator of the step scores.
    """
    figure, [axes] = _figure()
    for index, line in enumerate(lines := curve_lines(results, aggregator)):
        _draw_line(axes, index, line)
    sizes = [n for n, _ in lines[0].points]
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.minorticks_off()
    _percent(axes)
    axes.set_xlabel("candidates N", color=_INK)
    axes.set_ylabel("accuracy", color=_INK)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=_INK)
    return figure


def _draw_line(axes: "Axes", index: int, line: CurveLine) -> None:
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
        label=_plain(line.name),
    )


def draw_reliability(evidence: Sequence[StepEvidence]) -> "Figure":
    """
    Mean score against how often steps of that score are right, with 95 % bars, beside the diagonal.

    Args:
        evidence (`Sequence[StepEvidence]`):
            Scores and what is known of the steps.
    """
    figure, [axes] = _figure()
    axes.plot([0, 1], [0, 1], color=_INK, linewidth=1, linestyle=":", label="calibrated")
    for index, each in enumerate(evidence):
        bins = reliability_bins(each)
        values = [part.target["value"] for part in bins]
        bars = [[part.target["value"] - part.target["low"] for part in bins]]
        bars += [[part.target["high"] - part.target["value"] for part in bins]]
        axes.errorbar(
            [part.score for part in bins],
            values,
            yerr=bars,
            color=_COLORS[index],
            marker=_MARKERS[index],
            linestyle=_DASHES[index],
            capsize=3,
            label=_plain(each.name),
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("step score, mean of each bin", color=_INK)
    axes.set_ylabel("share that is right", color=_INK)
    figure.legend(loc="outside lower center", ncols=1, frameon=False, labelcolor=_INK)
    return figure


def draw_distributions(evidence: Sequence[StepEvidence]) -> "Figure":
    """
    How the scores of right and of wrong steps are distributed, by each kind of evidence.

    Args:
        evidence (`Sequence[StepEvidence]`):
            Scores and what is known of the steps.
    """
    figure, all_axes = _figure(len(evidence))
    for axes, each in zip(all_axes, evidence, strict=True):
        right = [score for score, target in zip(each.scores, each.targets, strict=True) if target > 0.5]
        wrong = [score for score, target in zip(each.scores, each.targets, strict=True) if target <= 0.5]
        sides = [(each.right, right, _COLORS[0], ""), (each.wrong, wrong, _COLORS[1], "////")]
        sides = [side for side in sides if side[1]]
        axes.hist(
            [scores for _, scores, _, _ in sides],
            bins=2 * NUM_BINS,
            range=(0, 1),
            weights=[
                [1 / len(scores)] * len(scores) for _, scores, _, _ in sides
            ],  # so that few wrong steps show, too
            color=[color for _, _, color, _ in sides],
            hatch=[hatch for _, _, _, hatch in sides],
            label=[f"{name} ({len(scores):,})" for name, scores, _, _ in sides],
            edgecolor="white",
            linewidth=0,
        )
        _percent(axes)
        axes.set_xlim(0, 1)
        axes.set_xlabel("step score", color=_INK)
        axes.set_ylabel("share of each kind", color=_INK)
        axes.legend(frameon=False, labelcolor=_INK, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    return figure


def draw_annotation(cost: AnnotationCost) -> "Figure":
    """
    Above, what the labels of each tree cost; below, which values the labels have.

    Args:
        cost (`AnnotationCost`):
            What annotation cost and gave.
    """
    figure, [above, below] = _figure(2)
    above.hist(cost.rollouts_per_label, bins=2 * NUM_BINS, color=_COLORS[0])
    above.set_xlim(left=0)
    above.set_xlabel("rollouts for a label", color=_INK)
    above.set_ylabel("trees", color=_INK)
    below.hist(cost.mc_values, bins=2 * NUM_BINS, range=(0, 1), color=_COLORS[2])
    below.set_xlim(0, 1)
    below.set_xlabel("mc_value", color=_INK)
    below.set_ylabel("labels", color=_INK)
    return figure


def _figure(rows: int = 1) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    # Small, so that its text is of readable size on a phone
    figure = Figure(figsize=(4.8, 3.9 if rows == 1 else 2.6 * rows), layout="constrained")
    all_axes = list(figure.subplots(rows, squeeze=False).ravel())
    for axes in all_axes:
        axes.tick_params(colors=_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color(_INK)
        axes.grid(axis="y", color=_INK, alpha=0.12)
        axes.set_axisbelow(True)
    return figure, all_axes


def _percent(axes: "Axes") -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _plain(name: str) -> str:
    return name.replace("$", r"\$")  # a name is no formula
