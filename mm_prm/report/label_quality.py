"""The audit of labels as a picture: calibration, error by depth, and what fewer rollouts would have cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's blue and vermilion, which colour-blind readers tell apart.
_BLUE, _RED = "#0072b2", "#d55e00"


def plot_label_quality(quality: Mapping[str, Any], path: str | Path) -> Path:
    """
    Draw an audit with its 95 % intervals, and save it as a picture.

    Args:
        quality (`Mapping[str, Any]`):
            What [`~mm_prm.annotation.label_quality.label_quality`] returned.
        path (`str` or `Path`):
            File to write; its suffix says the format.

    Returns:
        `Path`: The file.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    path = Path(path)
    figure = Figure(figsize=(11.0, 3.8), layout="constrained")
    reliability, depth, rollouts = figure.subplots(1, 3)
    bins = quality["calibration"]
    reliability.plot([0, 1], [0, 1], color="#888888", linestyle=":", label="calibrated")
    _draw(reliability, [row["mean_label"] for row in bins], [row["mean_reference"] for row in bins], _BLUE, "labels")
    reliability.set_xlabel("label")
    reliability.set_ylabel("reference")
    reliability.set_title("calibration")

    rows = quality["by_depth"]
    _draw(depth, list(range(len(rows))), [row["disagreement"] for row in rows], _BLUE, "on the wrong side")
    _draw(depth, list(range(len(rows))), [row["mean_squared_error"] for row in rows], _RED, "mean squared error", "--")
    depth.set_xticks(range(len(rows)), [row["depth"] for row in rows])
    depth.set_xlabel("steps")
    depth.set_title("error by depth")

    rows = quality["at_fewer_rollouts"]
    sizes = [row["rollouts"] for row in rows]
    _draw(rollouts, sizes, [row["disagreement"] for row in rows], _BLUE, "on the wrong side")
    _draw(rollouts, sizes, [row["mean_squared_error"] for row in rows], _RED, "mean squared error", "--")
    rollouts.set_xscale("log", base=2)
    rollouts.set_xticks(sizes, [str(size) for size in sizes])
    rollouts.set_xlabel("rollouts for each label")
    rollouts.set_title("error by rollouts")
    for axes in (reliability, depth, rollouts):
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.2)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150, facecolor="white")
    return path


def _draw(
    axes: "Axes",
    places: Sequence[float],
    estimates: Sequence[Mapping[str, float] | None],
    color: str,
    name: str,
    dashes: str = "-",
) -> None:
    known = [(place, estimate) for place, estimate in zip(places, estimates, strict=True) if estimate is not None]
    values = [estimate["value"] for _, estimate in known]
    below = [estimate["value"] - estimate["low"] for _, estimate in known]
    above = [estimate["high"] - estimate["value"] for _, estimate in known]
    axes.errorbar(
        [place for place, _ in known],
        values,
        yerr=[below, above],
        color=color,
        linestyle=dashes,
        marker="o",
        markersize=4,
        capsize=2,
        label=name,
    )
