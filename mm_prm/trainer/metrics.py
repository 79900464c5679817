"""How well step scores agree with labels: pure functions over flat arrays."""

import numpy as np

from ..metrics.steps import best_wrong_step_threshold, brier, within_problem_auc, wrong_step_f1

_NUM_BINS = 10


def step_metrics(
    scores: np.ndarray, labels: np.ndarray, problems: np.ndarray, rows: np.ndarray | None = None
) -> dict[str, float]:
    """
    Compares step scores with labels. A step counts as right if its label is above 0.5.

    Args:
        scores (`np.ndarray` of shape `(num_steps,)`):
            P(right) of each labelled step.
        labels (`np.ndarray` of shape `(num_steps,)`):
            Labels in [0, 1].
        problems (`np.ndarray` of shape `(num_steps,)`):
            What tells problems apart, one entry a step.
        rows (`np.ndarray` of shape `(num_steps,)`, *optional*):
            What tells solutions apart, one entry a step; the steps of a solution stand together, in their order.

    Returns:
        `dict[str, float]`: What is not defined (no label, no pair, no wrong step) is left out.

        - `num_labels`, and `accuracy` at the threshold 0.5;
        - `cross_entropy`; `brier`, the mean squared difference; `calibration_error`, the mean difference between scores
          and labels within ten bins of scores, weighted by their steps;
        - `auc`, the share of all (right, wrong) pairs of steps in the right order; `auc_within_problems`, the same over
          pairs of one problem only. Without problems told apart, `auc` alone rewards a model that only knows which
          problems are hard;
        - `f1_wrong`, the F1 of wrong steps at the threshold 0.5; `f1_wrong_calibrated`, that of every other problem at
          `threshold`, which is the best one on the problems between;
        - `first_error_accuracy`, the share of solutions whose first step below 0.5 is their first wrong one, or which have
          neither (with `rows`).
    """
    metrics = {"num_labels": float(len(labels))}
    if len(labels) == 0:
        return metrics
    scores, labels = scores.astype(np.float64), labels.astype(np.float64)
    right = labels > 0.5
    clipped = np.clip(scores, 1e-7, 1 - 1e-7)
    metrics["accuracy"] = float(np.mean((scores > 0.5) == right))
    metrics["brier"] = brier(labels, scores)
    metrics["cross_entropy"] = float(-np.mean(labels * np.log(clipped) + (1 - labels) * np.log(1 - clipped)))
    metrics["calibration_error"] = _calibration_error(scores, labels)
    aucs = within_problem_auc(labels, scores, problems.tolist())
    metrics |= {"auc": aucs["auc"], "auc_within_problems": aucs["within_problem_auc"]}
    if not right.all():
        metrics["f1_wrong"] = wrong_step_f1(labels, scores)
    # Every other problem, in the order of their keys, which depends on nothing else
    in_validation = np.unique(problems, return_inverse=True)[1] % 2 == 0
    if not right[in_validation].all() and not right[~in_validation].all():
        threshold, _ = best_wrong_step_threshold(labels[in_validation], scores[in_validation])
        metrics["threshold"] = threshold
        metrics["f1_wrong_calibrated"] = wrong_step_f1(labels[~in_validation], scores[~in_validation], threshold)
    if rows is not None:
        metrics["first_error_accuracy"] = _first_error_accuracy(scores, right, rows)
    return {name: value for name, value in metrics.items() if not np.isnan(value)}


def _calibration_error(scores: np.ndarray, labels: np.ndarray) -> float:
    bins = np.minimum((scores * _NUM_BINS).astype(int), _NUM_BINS - 1)
    differences = np.bincount(bins, weights=scores - labels, minlength=_NUM_BINS)
    return float(np.abs(differences).sum() / len(scores))


def _first_error_accuracy(scores: np.ndarray, right: np.ndarray, rows: np.ndarray) -> float:
    found = []
    for steps in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows)) + 1):
        predicted, wrong = np.flatnonzero(scores[steps] < 0.5), np.flatnonzero(~right[steps])
        found.append(predicted[:1].tolist() == wrong[:1].tolist())
    return float(np.mean(found))
