"""From scored candidates to the numbers of `results.json`, and to the data that `mm-prm push dataset` takes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from mm_prm.commands.files import write_rows
from mm_prm.data import mini
from mm_prm.data.features import FEATURES
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


def write_data(
    folder: Path,
    trees: Sequence[Row],
    rows: Sequence[Row],
    problems: Sequence[Row],
    pools: Sequence[Row],
    scores: Scores,
) -> None:
    """
    Write what this run made: the trees with their rows, the scored candidates, and the problems of both.

    Args:
        folder (`Path`):
            Folder for the tables.
        trees (`Sequence[Mapping[str, Any]]`):
            Trees annotated in this run.
        rows (`Sequence[Mapping[str, Any]]`):
            Stepwise rows; those of other trees are left out.
        problems (`Sequence[Mapping[str, Any]]`):
            Problems of the candidates.
        pools (`Sequence[Mapping[str, Any]]`):
            Candidate pools.
        scores (`Sequence[Sequence[Sequence[float]]]`):
            Step scores of their candidates.
    """
    folder.mkdir(exist_ok=True)
    annotated = {tree["problem_id"]: mini.problem_from_id(tree["problem_id"]).row() for tree in trees}
    own_rows = [{name: row[name] for name in FEATURES["stepwise"]} for row in rows if row["problem_id"] in annotated]
    scored = [{**pool, "step_scores": each} for pool, each in zip(pools, scores, strict=True)]
    all_problems = datasets.Dataset.from_list([*annotated.values(), *problems], features=FEATURES["problem"])
    all_problems.to_parquet(folder / "problems.parquet")
    write_rows("tree", trees, folder / "trees.parquet")
    if own_rows:  # a few small trees may all be unanimous
        write_rows("stepwise", own_rows, folder / "rows.parquet")
    write_rows("pool", scored, folder / "pools.parquet")
