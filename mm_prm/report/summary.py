"""What a report says in numbers: the rows of its table and the lines of its curve, from the Best-of-N metric's results.

Pure functions on plain data, shared by the HTML report, the plot and the terminal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Mapping[str, Any]]

# Names of what needs no verifier, in the order in which tables show them.
BASELINES = {
    "pass@1": "mean pass@1",
    "majority": "majority vote",
    "uninformative": "uninformative verifier",
    "oracle": "oracle",
}


@dataclass(frozen=True)
class SummaryRow:
    """
    One line of the table.

    Args:
        verifier (`str`):
            Name of the process reward model, `""` for a baseline.
        method (`str`):
            `"Best-of-N"`, `"weighted vote"`, or the baseline's name.
        aggregator (`str`):
            How step scores became one number, `""` for a baseline.
        accuracy (`dict`):
            `{"value", "low", "high"}`.
        minus_pass_at_1 (`dict`, *optional*):
            Paired difference to mean pass@1, with `"p_value"`.
        minus_majority (`dict`, *optional*):
            Paired difference to the majority vote, with `"p_value"`.
    """

    verifier: str
    method: str
    aggregator: str
    accuracy: Mapping[str, float]
    minus_pass_at_1: Mapping[str, float] | None = None
    minus_majority: Mapping[str, float] | None = None


def summary_rows(results: Results, baselines: Mapping[str, Mapping[str, float]] | None = None) -> list[SummaryRow]:
    """
    List baselines first, then each process reward model by aggregator, then its weighted votes.

    Args:
        results (`Mapping[str, Mapping]`):
            What the `best_of_n` metric returned, by the name of the process reward model. All on the same candidates,
            so that the baselines are the same; they are read from the first.
        baselines (`Mapping[str, Mapping[str, float]]`, *optional*):
            Further estimates that need no verifier, such as `{"greedy": {"value", "low", "high"}}`.

    Returns:
        `list[SummaryRow]`
    """
    first = next(iter(results.values()))
    rows = [_row("", title, "", first[key]) for key, title in BASELINES.items() if key in first and key != "oracle"]
    rows[1:1] = [_row("", name, "", estimate) for name, estimate in (baselines or {}).items()]
    for verifier, result in results.items():
        rows += [_row(verifier, "Best-of-N", name, entry) for name, entry in result["best_of_n"].items()]
        rows += [_row(verifier, "weighted vote", name, entry) for name, entry in result["weighted_majority"].items()]
    return [*rows, _row("", BASELINES["oracle"], "", first["oracle"])]


def _row(verifier: str, method: str, aggregator: str, entry: Mapping[str, Any]) -> SummaryRow:
    accuracy = {key: entry[key] for key in ("value", "low", "high")}
    return SummaryRow(verifier, method, aggregator, accuracy, entry.get("minus_pass@1"), entry.get("minus_majority"))


@dataclass(frozen=True)
class CurveLine:
    """Accuracy against the number of candidates: `points` are (n, `{"value", "low", "high"}`)."""

    name: str
    points: list[tuple[int, Mapping[str, float]]]


def curve_lines(results: Results, aggregator: str) -> list[CurveLine]:
    """
    Accuracy against N for the oracle, each process reward model, the majority vote and mean pass@1.

    Args:
        results (`Mapping[str, Mapping]`):
            What the `best_of_n` metric returned, by the name of the process reward model.
        aggregator (`str`):
            Aggregator of the step scores, one for all models, fixed in advance.

    Returns:
        `list[CurveLine]`
    """
    first = next(iter(results.values()))
    lines = [CurveLine(BASELINES["oracle"], _points(first["oracle"]["by_n"]))]
    lines += [
        CurveLine(f"{verifier} ({aggregator})", _points(result["best_of_n"][aggregator]["by_n"]))
        for verifier, result in results.items()
        if result["best_of_n"]
    ]
    if "majority" in first:
        lines.append(CurveLine(BASELINES["majority"], _points(first["majority"]["by_n"])))
    return [*lines, CurveLine(BASELINES["pass@1"], [(n, first["pass@1"]) for n, _ in lines[0].points])]


def _points(by_n: Mapping[str, Mapping[str, float]]) -> list[tuple[int, Mapping[str, float]]]:
    return [(int(n), estimate) for n, estimate in by_n.items()]


def format_estimate(estimate: Mapping[str, float]) -> str:
    """`41.2 % [38.0, 44.5]`"""
    return f"{100 * estimate['value']:.1f} % [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


def format_difference(difference: Mapping[str, float] | None) -> str:
    """`+3.1 [+0.4, +5.9], p = 0.021` in percentage points; empty where there is none."""
    if difference is None:
        return ""
    value, low, high = (100 * difference[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}], p = {difference['p_value']:.3f}"


def format_share(figure: Mapping[str, float] | None) -> str:
    """Like [`format_estimate`], and a dash where a figure is not defined."""
    return "–" if figure is None else format_estimate(figure)


def step_error_rows(results: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """
    For each threshold the figures over all by each convention, then those of each subset.

    Args:
        results (`Mapping[str, Any]`):
            What the `step_errors` metric returned.

    Returns:
        `list[tuple[str, str, Mapping]]`: Threshold, part, and figures by name.
    """
    rows = []
    for name, at in results["thresholds"].items():
        threshold = name if name == "0.5" else f"{name} ({at['threshold']:.3f})"
        overall = ("mean_of_subsets", "pooled", "weighted_mean_of_subsets")
        parts = {part.replace("_", " "): at[part] for part in overall} | at["subsets"]
        rows += [(threshold, part, figures) for part, figures in parts.items()]
    return rows
