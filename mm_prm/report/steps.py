"""Step scores beside what is known of the steps: reliability, and scores of right and of wrong steps. Plain data only.

A step's score is the model's probability that a solution which continues from here ends right. Three things tell whether
it is: how the solution itself ended, the mc_value of the same prefix in an annotated tree, and a person's label.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mm_prm.metrics.step_errors.resampling import interval, resampled_sums
from mm_prm.metrics.steps import brier

Row = Mapping[str, Any]
Steps = tuple[str, ...]

NUM_BINS = 10
_NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class StepEvidence:
    """
    Scores of steps, and what is known of each.

    Args:
        name (`str`):
            What is known, as legends say it.
        right (`str`):
            How a step is called whose target is above 0.5.
        wrong (`str`):
            How another step is called.
        problem_ids (`list[str]`):
            Problem of each step.
        scores (`list[float]`):
            Step scores.
        targets (`list[float]`):
            What the score should have been: 0 or 1, or an mc_value.
    """

    name: str
    right: str
    wrong: str
    problem_ids: list[str]
    scores: list[float]
    targets: list[float]


def prefix_values(tree: Row) -> dict[Steps, tuple[int, int]]:
    """
    The counts (num_right, num_judged) of every measured prefix of a tree but the empty one.

    Args:
        tree (`Mapping[str, Any]`):
            Tree row.
    """
    prefixes: dict[int, Steps] = {-1: ()}
    values: dict[Steps, tuple[int, int]] = {}
    for node in tree["nodes"]:
        prefix = prefixes[node["node_id"]] = prefixes[node["parent_id"]] + tuple(node["steps"])
        if prefix and node["num_judged"]:
            num_right, num_judged = values.get(prefix, (0, 0))
            values[prefix] = num_right + node["num_right"], num_judged + node["num_judged"]
    return values


def step_labels(solution: Row) -> list[int]:
    """
    Labels of a benchmark's solution: 1 right, -1 wrong, 0 neither. Steps after the first wrong one are neither.

    Args:
        solution (`Mapping[str, Any]`):
            Solution with `steps` and either `step_labels` or `first_error`.
    """
    if "step_labels" in solution:
        return list(solution["step_labels"])
    size, first = len(solution["steps"]), solution["first_error"]
    return [1] * size if first < 0 else [1] * first + [-1] + [0] * (size - first - 1)


def collect_evidence(
    pools: Iterable[Row], values: Mapping[str, Mapping[Steps, tuple[int, int]]], solutions: Iterable[Row]
) -> list[StepEvidence]:
    """
    Put together what is known of scored steps, the surest knowledge first.

    Args:
        pools (`Iterable[Mapping[str, Any]]`):
            Scored candidate pools.
        values (`Mapping[str, Mapping]`):
            What [`prefix_values`] gave, by problem.
        solutions (`Iterable[Mapping[str, Any]]`):
            Solutions with scores and labels.

    Returns:
        `list[StepEvidence]`: Those of the three kinds that there are.
    """
    labelled = StepEvidence("labels of the steps", "right steps", "wrong steps", [], [], [])
    measured = StepEvidence("mc_value of the same prefix", "mc_value above 0.5", "mc_value of 0.5 or less", [], [], [])
    ended = StepEvidence("end of the solution", "steps of right solutions", "steps of wrong solutions", [], [], [])
    for solution in solutions:
        for score, label in zip(solution["step_scores"], step_labels(solution), strict=False):
            if label:
                _add(labelled, solution["problem_id"], score, float(label > 0))
    for pool in pools:
        known = values.get(pool["problem_id"], {})
        for steps, correct, scores in zip(pool["candidates"], pool["correct"], pool["step_scores"], strict=False):
            for number, score in enumerate(scores):
                if correct is not None:
                    _add(ended, pool["problem_id"], score, float(correct))
                counts = known.get(tuple(steps[: number + 1]))
                if counts is not None:
                    _add(measured, pool["problem_id"], score, counts[0] / counts[1])
    return [evidence for evidence in (labelled, measured, ended) if evidence.scores]


def _add(evidence: StepEvidence, problem_id: str, score: float, target: float) -> None:
    evidence.problem_ids.append(problem_id)
    evidence.scores.append(score)
    evidence.targets.append(target)


@dataclass(frozen=True)
class ReliabilityBin:
    """
    The steps whose scores lie in one bin.

    Args:
        count (`int`):
            Number of steps.
        score (`float`):
            Their mean score.
        target (`dict`):
            `{"value", "low", "high"}` of their mean target, 95 % by bootstrap over problems.
    """

    count: int
    score: float
    target: Mapping[str, float]


def reliability_bins(evidence: StepEvidence, num_bins: int = NUM_BINS) -> list[ReliabilityBin]:
    """
    Mean score against mean target, in bins of equal width; empty bins are left out.

    Args:
        evidence ([`StepEvidence`]):
            Scores and targets.
        num_bins (`int`, *optional*, defaults to `10`):
            Number of bins.
    """
    scores, targets = np.array(evidence.scores), np.array(evidence.targets)
    _, problems = np.unique(evidence.problem_ids, return_inverse=True)
    places = np.minimum((scores * num_bins).astype(int), num_bins - 1)
    sums = np.zeros((problems.max() + 1, 2 * num_bins))
    np.add.at(sums, (problems, places), 1.0)
    np.add.at(sums, (problems, num_bins + places), targets)
    resampled = resampled_sums(sums, _NUM_RESAMPLES, seed=0)
    counts, totals = np.split(sums.sum(axis=0), 2)
    bins = []
    for place in np.flatnonzero(counts):
        with np.errstate(invalid="ignore"):  # a resample without a step in this bin says nothing of it
            means = resampled[:, num_bins + place] / resampled[:, place]
        target = interval(totals[place] / counts[place], means, 0.95)
        assert target is not None  # the bin holds steps
        bins.append(ReliabilityBin(int(counts[place]), float(scores[places == place].mean()), target))
    return bins


def reliability_rows(evidence: Sequence[StepEvidence]) -> list[dict[str, Any]]:
    """
    For each kind of evidence: `name`, number of `steps`, mean score and mean target of them, expected calibration error
    (`ece`, the bins' gaps weighted by their steps) and `brier` score.

    Args:
        evidence (`Sequence[StepEvidence]`):
            What [`collect_evidence`] returned.
    """
    rows = []
    for each in evidence:
        bins, total = reliability_bins(each), len(each.scores)
        rows.append(
            {
                "name": each.name,
                "steps": total,
                "mean_score": float(np.mean(each.scores)),
                "mean_target": float(np.mean(each.targets)),
                "ece": sum(part.count * abs(part.score - part.target["value"]) for part in bins) / total,
                "brier": brier(each.targets, each.scores),
            }
        )
    return rows
