"""How well step scores agree with labels: pure functions over flat arrays."""

import numpy as np

from ..metrics.steps import brier, within_problem_auc


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
    metrics["brier"] = brier(labels, scores)
    metrics["cross_entropy"] = float(-np.mean(labels * np.log(clipped) + (1 - labels) * np.log(1 - clipped)))
    aucs = within_problem_auc(labels, scores, problems.tolist())
    metrics |= {"auc": aucs["auc"], "auc_within_problems": aucs["within_problem_auc"]}
    return {name: value for name, value in metrics.items() if not np.isnan(value)}
