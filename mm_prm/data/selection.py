"""Which labels and which solutions are worth training on: consensus with a judge of steps, and the most informative share.

Both look at what annotation has paid for already; nothing is sampled or asked.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

Steps = tuple[str, ...]

# arXiv 2602.04145: what a solution of one kind of steps is worth at least, beside those that hold both.
_LEAST_MIXTURE = 0.05


def path_scores(nodes: Sequence[Mapping[str, Any]], threshold: float = 0.5) -> dict[int, float | None]:
    """
    What a judge of steps says of each node's whole prefix.

    The judge scores a node's own steps. A prefix is right as long as all of its steps are, so its score is the lowest on
    the path from the root. Where one on the path is not known, neither is the prefix's; unless another is at or below
    the threshold, and so decides.

    Args:
        nodes (`Sequence[Mapping[str, Any]]`):
            Nodes of a tree, with or without `judge_score`.
        threshold (`float`, *optional*, defaults to `0.5`):
            Steps with a higher score are right.

    Returns:
        `dict[int, float | None]`: By node id; the root is not in it.
    """
    lowest: dict[int, tuple[float, bool]] = {}  # of what is known on the path, and whether all of it is
    scores: dict[int, float | None] = {}
    for node in nodes:
        if node["parent_id"] == -1:
            lowest[node["node_id"]] = 1.0, True
            continue
        score = node.get("judge_score")
        before, known = lowest[node["parent_id"]]
        lowest[node["node_id"]] = low, known = (
            min(before, 1.0 if score is None else score),
            known and score is not None,
        )
        scores[node["node_id"]] = low if known or low <= threshold else None
    return scores


def without_consensus(
    counts: Mapping[Steps, tuple[int, int]],
    scores: Mapping[Steps, float | None],
    certain: Collection[Steps],
    right_threshold: float,
    judge_threshold: float,
) -> dict[Steps, str]:
    """
    Find the labels on which Monte Carlo and the judge of steps do not agree.

    Args:
        counts (`Mapping[tuple, tuple[int, int]]`):
            (num_right, num_judged) of each labelled prefix.
        scores (`Mapping[tuple, float | None]`):
            The judge's score of the prefixes it was asked about, see [`path_scores`].
        certain (`Collection[tuple]`):
            Whole solutions, whose label is the verdict on their answer and no estimate; they need no second opinion.
        right_threshold (`float`):
            By Monte Carlo a prefix is right if its label lies above this value.
        judge_threshold (`float`):
            By the judge a prefix is right if its score lies above this value.

    Returns:
        `dict[tuple, str]`: The prefixes whose labels have to go: `"disagree"`, or `"unknown"` where the judge was not
        asked or could not tell.
    """
    dropped = {}
    for prefix, (num_right, num_judged) in counts.items():
        if prefix in certain:
            continue
        score = scores.get(prefix)
        if score is None:
            dropped[prefix] = "unknown"
        elif (num_right / num_judged > right_threshold) != (score > judge_threshold):
            dropped[prefix] = "disagree"
    return dropped


def information_score(labels: Sequence[float | None], right_threshold: float = 0.0) -> float:
    """
    The Balanced-Information Score of a solution (arXiv 2602.04145): [p (1 - p) + 0.05] R.

    p is the share of steps labelled right, R the mean label of these. Where no step is right, R is 1: that a wrong step
    never led to a right answer is not in doubt.

    Args:
        labels (`Sequence[float | None]`):
            Label of each step, `None` where it has none.
        right_threshold (`float`, *optional*, defaults to `0.0`):
            A step is right if its label lies above this value.
    """
    known = [label for label in labels if label is not None]
    right = [label for label in known if label > right_threshold]
    share = len(right) / len(known) if known else 0.0
    reliability = sum(right) / len(right) if right else 1.0
    return (share * (1 - share) + _LEAST_MIXTURE) * reliability


def best_share(scores: Sequence[float], share: float) -> list[int]:
    """
    Choose the best share, at least one.

    Args:
        scores (`Sequence[float]`):
            One score for each candidate.
        share (`float`):
            Above 0 and at most 1.

    Returns:
        `list[int]`: Numbers of those chosen, in ascending order. Of equals the first are chosen.
    """
    # The epsilon undoes what binary fractions add: 0.07 of 100 are 7.
    size = min(len(scores), max(1, math.floor(share * len(scores) + 1e-9)))
    return sorted(sorted(range(len(scores)), key=lambda number: -scores[number])[:size])
