"""How well step scores agree with labels: pure functions over flat arrays."""

import numpy as np
from sklearn.metrics import roc_auc_score


def step_metrics(scores: np.ndarray, labels: np.ndarray, problems: np.ndarray) -> dict[str, float]:
    """
    Compares step scores with labels. A step counts as right if its label is above 0.5.

    Args:
        scores (`np.ndarray` of shape `(num_steps,)`):
            P(right) of each labelled step.
        labels (`np.ndarray` of shape `(num_steps,)`):
            Labels in [0, 1].
        problems (`np.ndarray` of shape `(num_steps,)`):
            What tells problems apart, one entry a step.

    Returns:
        `dict[str, float]`: `num_labels`; `accuracy` at the threshold 0.5; `brier`, the mean squared difference;
        `cross_entropy`; `auc`, the share of all (right, wrong) pairs of steps in the right order; `auc_within_problems`,
        the same over pairs of one problem only. What is not defined (no label, or no pair) is left out. Without
        problems told apart, `auc` alone rewards a model that only knows which problems are hard.
    """
    metrics = {"num_labels": float(len(labels))}
    if len(labels) == 0:
        return metrics
    scores, labels = scores.astype(np.float64), labels.astype(np.float64)
    right = labels > 0.5
    clipped = np.clip(scores, 1e-7, 1 - 1e-7)
    metrics["accuracy"] = float(np.mean((scores > 0.5) == right))
    metrics["brier"] = float(np.mean((scores - labels) ** 2))
    metrics["cross_entropy"] = float(-np.mean(labels * np.log(clipped) + (1 - labels) * np.log(1 - clipped)))
    overall = _pairs_in_order(scores, right)
    if overall is not None:
        metrics["auc"] = overall[0]
    order = np.argsort(problems, kind="stable")
    starts = np.flatnonzero(np.diff(problems[order])) + 1
    within = [_pairs_in_order(scores[part], right[part]) for part in np.split(order, starts)]
    pairs = [entry for entry in within if entry is not None]
    if pairs:
        shares, counts = np.array(pairs).T
        metrics["auc_within_problems"] = float(np.average(shares, weights=counts))
    return metrics


def _pairs_in_order(scores: np.ndarray, right: np.ndarray) -> tuple[float, int] | None:
    """Share of (right, wrong) pairs in the right order, ties half, and their number. `None` without a pair."""
    num_pairs = int(right.sum()) * int((~right).sum())
    if num_pairs == 0:
        return None
    return float(roc_auc_score(right, scores)), num_pairs
