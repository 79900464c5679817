"""How well do step scores tell right steps from wrong ones? Pure functions for the trainer's evaluation and the study.

Labels are 1 (or True, or a soft label above 0.5) for a right step; scores are P(right). What the `step_errors` metric
computes, too, lives there, because it must stand alone.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from .step_errors import thresholds
from .step_errors.thresholds import Count, best_threshold, count_steps, step_figures


def _arrays(labels: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    label_values, score_values = np.asarray(labels, dtype=float), np.asarray(scores, dtype=float)
    if label_values.shape != score_values.shape or label_values.ndim != 1:
        raise ValueError(
            f"labels and scores must be flat and of one length, but have the shapes {label_values.shape} and "
            f"{score_values.shape}"
        )
    for name, values in (("label", label_values), ("score", score_values)):
        invalid = np.flatnonzero(~((values >= 0) & (values <= 1)))
        if len(invalid):
            raise ValueError(
                f"{name} at index {invalid[0]} is {values[invalid[0]]}, outside [0, 1]; leave out steps without a {name}"
            )
    return label_values, score_values


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Probability that a right step scores higher than a wrong one, over all pairs; NaN without both kinds."""
    label_values, score_values = _arrays(labels, scores)
    return thresholds.auc(label_values > 0.5, score_values)


def within_problem_auc(labels: ArrayLike, scores: ArrayLike, problem_ids: Sequence[Hashable]) -> dict[str, float]:
    """
    AUC over pairs of steps of the same problem, pooled over problems, beside the AUC over all pairs.

    Over all pairs a score that only knows how hard a problem is looks good, and is of no use for choosing between
    solutions of one problem; within problems it is at 0.5.

    Args:
        labels (`Sequence[float]`):
            Whether each step is right (above 0.5).
        scores (`Sequence[float]`):
            P(right) of each step.
        problem_ids (`Sequence[Hashable]`):
            The problem that each step belongs to.

    Returns:
        `dict` with `within_problem_auc` (NaN if no problem has both kinds), `auc`, `num_pairs` (pairs of a right and a
        wrong step of one problem) and `num_mixed_problems` (problems with both kinds).
    """
    label_values, score_values = _arrays(labels, scores)
    if len(problem_ids) != len(label_values):
        raise ValueError(f"{len(problem_ids)} problem_ids do not fit {len(label_values)} labels")
    groups: dict[Hashable, list[int]] = {}
    for index, problem_id in enumerate(problem_ids):
        groups.setdefault(problem_id, []).append(index)
    won, num_pairs, num_mixed = 0.0, 0, 0
    for indices in groups.values():
        right = label_values[indices] > 0.5
        num_right, num_wrong = int(right.sum()), int((~right).sum())
        # Mann-Whitney: the rank sum of the right steps, with half a win for a tie
        won += rankdata(score_values[indices])[right].sum() - num_right * (num_right + 1) / 2
        num_pairs += num_right * num_wrong
        num_mixed += num_right > 0 and num_wrong > 0
    return {
        "within_problem_auc": float(won / num_pairs) if num_pairs else float("nan"),
        "auc": auc(labels, scores),
        "num_pairs": num_pairs,
        "num_mixed_problems": num_mixed,
    }


def wrong_step_f1(labels: ArrayLike, scores: ArrayLike, threshold: float = 0.5) -> float:
    """F1 of finding wrong steps, where a step counts as wrong if its score is *below* the threshold; 0 if none is."""
    counts = _counts(*_arrays(labels, scores))
    return float(
        step_figures({name: count.totals(np.array([threshold])) for name, count in counts.items()})["f1_wrong"][0]
    )


def best_wrong_step_threshold(labels: ArrayLike, scores: ArrayLike) -> tuple[float, float]:
    """
    Threshold with the highest F1 of wrong steps, and that F1.

    Tuned on the labels it is given: on a test set the result is an *oracle* threshold and must be called so.

    Returns:
        `tuple[float, float]`: the threshold, half-way between two neighbouring scores, and the F1; (0.5, 0.0) if no step
        is wrong.
    """
    threshold = best_threshold(_counts(*_arrays(labels, scores)), step_figures, "f1_wrong")
    return threshold, wrong_step_f1(labels, scores, threshold)


def _counts(labels: np.ndarray, scores: np.ndarray) -> dict[str, Count]:
    return count_steps(np.zeros(len(scores), dtype=int), scores, labels > 0.5)


def brier(labels: ArrayLike, scores: ArrayLike) -> float:
    """Mean squared difference of score and label, which may be soft (sklearn's takes hard labels only)."""
    label_values, score_values = _arrays(labels, scores)
    return float(np.mean((score_values - label_values) ** 2))
