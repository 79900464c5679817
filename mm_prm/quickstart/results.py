"""From scored candidates to the numbers of `results.json`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mm_prm.inference import AGGREGATORS
from mm_prm.metrics.best_of_n.best_of_n import BestOfN
from mm_prm.metrics.best_of_n.estimates import best_of_n_curve, bootstrap_interval, bootstrap_means, difference

Row = Mapping[str, Any]
Scores = Sequence[Sequence[Sequence[float]]]


def measure(pools: Sequence[Row], scores: Mapping[str, Scores]) -> dict[str, dict[str, Any]]:
    """
    What the Best-of-N metric says of each process reward model, on the same candidates.

    Args:
        pools (`Sequence[Mapping[str, Any]]`):
            Candidate pools.
        scores (`Mapping[str, Sequence]`):
            Step scores of their candidates, by name of the model.
    """
    columns = {name: [pool[name] for pool in pools] for name in ("correct", "answers", "candidates")}
    return {name: BestOfN().compute(**columns, step_scores=model_scores) for name, model_scores in scores.items()}


def assemble(
    metric: Mapping[str, Mapping[str, Any]],
    pools: Sequence[Row],
    scores: Mapping[str, Scores],
    greedy_correct: Sequence[bool],
    aggregator: str,
) -> dict[str, Any]:
    """
    The estimates of `results.json`.

    Args:
        metric (`Mapping[str, Mapping[str, Any]]`):
            What [`measure`] returned for `prm_before`, `prm_after` and `prm_shipped`.
        pools (`Sequence[Mapping[str, Any]]`):
            Candidate pools.
        scores (`Mapping[str, Sequence]`):
            Step scores of their candidates, by name of the model.
        greedy_correct (`Sequence[bool]`):
            Whether the greedy solution of each problem is right.
        aggregator (`str`):
            Aggregator of the headline.
    """
    first, shipped = metric["prm_before"], metric["prm_shipped"]
    return {
        "pass@1": first["pass@1"],
        "greedy": bootstrap_interval(np.asarray(greedy_correct, dtype=float)),
        "majority": first["majority"],
        "uninformative": first["uninformative"],
        **{name: entry["best_of_n"] for name, entry in metric.items()},
        "weighted_majority": {
            **shipped["weighted_majority"][aggregator],
            "verifier": "prm_shipped",
            "aggregator": aggregator,
        },
        "weighted_majority_by_verifier": {name: entry["weighted_majority"] for name, entry in metric.items()},
        "oracle": first["oracle"],
        "prm_after_minus_prm_before": _paired_difference(pools, scores["prm_after"], scores["prm_before"], aggregator),
        "aggregator": aggregator,
        "num_problems": first["num_problems"],
        "num_candidates": first["num_candidates"],
    }


def _paired_difference(pools: Sequence[Row], scores: Scores, others: Scores, aggregator: str) -> dict[str, float]:
    """How much better one model's choices among all candidates are than another's, paired over problems."""
    gaps = _chosen(pools, scores, aggregator) - _chosen(pools, others, aggregator)
    return difference(gaps, bootstrap_means(gaps[:, None])[:, 0])


def _chosen(pools: Sequence[Row], scores: Scores, aggregator: str) -> np.ndarray:
    """Accuracy of the choice among all candidates of each problem."""
    aggregate = AGGREGATORS[aggregator]
    return np.array(
        [
            best_of_n_curve(
                [bool(right) for right in pool["correct"]], [aggregate(steps) for steps in candidates], [len(candidates)]
            )[0]
            for pool, candidates in zip(pools, scores, strict=True)
        ]
    )
