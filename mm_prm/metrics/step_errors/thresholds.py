"""What a threshold on step scores decides, counted for every threshold at once. Pure functions on numpy arrays.

A step is held to be wrong where its score lies *below* the threshold. Whatever is counted (a wrong step that is found, a
first error that is hit) is so for the thresholds of one interval (low, high], so that all thresholds cost one sort.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import roc_auc_score


@dataclass(frozen=True)
class Count:
    """
    How many of something there are, as a function of the threshold.

    Args:
        rows (`np.ndarray`):
            For each of them, the number of its solution.
        low (`np.ndarray`):
            It counts at thresholds above this,
        high (`np.ndarray`):
            up to and including this.
    """

    rows: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, entries: Sequence[tuple[int, float, float]]) -> "Count":
        """From (row, low, high) of each."""
        columns = np.asarray(entries, dtype=float).reshape(-1, 3).T
        return cls(columns[0].astype(int), columns[1], columns[2])

    def by_row(self, threshold: float, num_rows: int) -> np.ndarray:
        """How many in each solution at one threshold."""
        counted = (self.low < threshold) & (threshold <= self.high)
        return np.bincount(self.rows[counted], minlength=num_rows)

    def totals(self, thresholds: np.ndarray) -> np.ndarray:
        """How many in all at each threshold."""
        return np.searchsorted(np.sort(self.low), thresholds) - np.searchsorted(np.sort(self.high), thresholds)


def count_first_errors(step_scores: Sequence[Sequence[float]], first_errors: Sequence[int]) -> dict[str, Count]:
    """
    ProcessBench's counts: solutions with and without an error, and those whose first error is predicted exactly.

    Predicted is the first step whose score lies below the threshold, -1 if there is none. That is the step i whose
    score is a new minimum, for thresholds above that minimum and up to the minimum before it.

    Args:
        step_scores (`Sequence[Sequence[float]]`):
            Step scores of each solution. One without scores, or with a NaN among them, predicts nothing and is missed.
        first_errors (`Sequence[int]`):
            Index of the first wrong step, -1 if all are right.
    """
    entries: dict[str, list[tuple[int, float, float]]] = {
        name: [] for name in ("erroneous", "correct", "found", "passed")
    }
    for row, (scores, first_error) in enumerate(zip(step_scores, first_errors, strict=True)):
        entries["correct" if first_error < 0 else "erroneous"].append((row, -math.inf, math.inf))
        if len(scores) == 0 or any(math.isnan(score) for score in scores):
            continue
        minima = [math.inf, *np.minimum.accumulate(scores)]
        if first_error < 0:
            entries["passed"].append((row, -math.inf, minima[-1]))
        else:
            entries["found"].append((row, minima[first_error + 1], minima[first_error]))
    return {name: Count.of(each) for name, each in entries.items()}


def first_error_figures(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """ProcessBench's accuracies on erroneous and on correct solutions, and `f1`, their harmonic mean; NaN without any."""
    with np.errstate(divide="ignore", invalid="ignore"):
        erroneous, correct = sums["found"] / sums["erroneous"], sums["passed"] / sums["correct"]
        f1 = 2 * erroneous * correct / (erroneous + correct)
    return {"erroneous": erroneous, "correct": correct, "f1": np.where(erroneous + correct == 0, 0.0, f1)}


def count_steps(rows: np.ndarray, scores: np.ndarray, is_right: np.ndarray) -> dict[str, Count]:
    """
    Counts of right and wrong steps, of those held to be right and wrong, and of those held so rightly.

    Args:
        rows (`np.ndarray`):
            Number of the solution of each step.
        scores (`np.ndarray`):
            Score of each step. NaN is held to be neither.
        is_right (`np.ndarray`):
            Whether each step is right.
    """
    scored = ~np.isnan(scores)
    everything, nothing = np.full(len(scores), np.inf), np.full(len(scores), -np.inf)

    def count(chosen: np.ndarray, low: np.ndarray, high: np.ndarray) -> Count:
        return Count(rows[chosen], low[chosen], high[chosen])

    return {
        "right": count(is_right, nothing, everything),
        "wrong": count(~is_right, nothing, everything),
        "held_right": count(scored, nothing, scores),
        "held_wrong": count(scored, scores, everything),
        "right_found": count(scored & is_right, nothing, scores),
        "wrong_found": count(scored & ~is_right, scores, everything),
    }


def step_figures(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """F1 of right steps, F1 of wrong steps, and `f1`, their mean (macro-F1); 0 where there are none."""
    figures = {}
    for kind in ("right", "wrong"):
        # 2 precision recall / (precision + recall), without the two divisions that may be by zero
        figures[f"f1_{kind}"] = 2 * sums[f"{kind}_found"] / np.maximum(sums[kind] + sums[f"held_{kind}"], 1)
    return figures | {"f1": (figures["f1_right"] + figures["f1_wrong"]) / 2}


def auc(is_right: np.ndarray, scores: np.ndarray) -> float:
    """Probability that a right step scores higher than a wrong one, over all pairs; NaN without both kinds."""
    return float(roc_auc_score(is_right, scores)) if 0 < is_right.sum() < len(is_right) else math.nan


def best_threshold(
    counts: Mapping[str, Count], figures: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]], figure: str
) -> float:
    """
    Threshold at which a figure is highest, half-way between two neighbouring scores.

    Tuned on what it is given: on a test set the result is an *oracle* threshold and must be called so.

    Args:
        counts (`Mapping[str, Count]`):
            What [`count_first_errors`] or [`count_steps`] returned.
        figures (`Callable`):
            [`first_error_figures`] or [`step_figures`].
        figure (`str`):
            Name of the figure. Of equal thresholds the lowest is taken; 0.5 if the figure is never above 0.
    """
    ends = np.concatenate([np.concatenate([count.low, count.high]) for count in counts.values()])
    scores = np.unique(ends[np.isfinite(ends)])
    if not len(scores):
        return 0.5
    # Strictly above the lower score at any rounding: what lies *below* the threshold is held to be wrong.
    between = np.maximum((scores[:-1] + scores[1:]) / 2, np.nextafter(scores[:-1], np.inf))
    thresholds = np.concatenate([scores[:1], between, np.nextafter(scores[-1:], np.inf)])
    values = figures({name: count.totals(thresholds) for name, count in counts.items()})[figure]
    best = int(np.argmax(np.nan_to_num(values)))
    return float(thresholds[best]) if values[best] > 0 else 0.5
