"""Step errors: does a process reward model find the steps that are wrong?

A metric for the `evaluate` library that stands alone: `evaluate.load("path/to/step_errors")` needs this folder, numpy,
scikit-learn, datasets and evaluate, and no network.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from .resampling import interval, resampled_sums
from .thresholds import Count, auc, best_threshold, count_first_errors, count_steps, first_error_figures, step_figures

_DESCRIPTION = """\
How well a process reward model finds wrong steps. A step is held to be wrong where its score lies below a threshold.
With `first_error` (ProcessBench): accuracy of the predicted first wrong step on erroneous and on correct solutions, and
their harmonic mean. With `step_labels` (VisualProcessBench): F1 of right and of wrong steps, and their mean. Thresholds
are 0.5, a fixed one, one calibrated on a validation part, and the best on the test set itself, which is called oracle.
"""

_KWARGS_DESCRIPTION = """
Args:
    step_scores (`list[list[float]]`):
        For each solution the P(right) of each step, in [0, 1]. A solution without scores, or with NaN among them, is
        counted as unscored; its first error, or the steps without a score, are never found.
    first_error (`list[int]`, *optional*):
        For each solution the index of its first wrong step, -1 if all are right. Give this or `step_labels`.
    step_labels (`list[list[int]]`, *optional*):
        For each solution and step: 1 right, -1 wrong, 0 neutral.
    subset (`list[str]`, *optional*):
        Part of the benchmark to which each solution belongs; one part if not given.
    problem_ids (`list[str]`, *optional*):
        Problem of each solution; solutions of one problem are resampled together. Each stands alone if not given.
    threshold (`float`, *optional*):
        A threshold fixed beforehand.
    validation (`dict`, *optional*):
        `step_scores` with `first_error` or `step_labels` of solutions on which to calibrate a threshold (highest pooled
        `f1`). They should not be among those that are measured.
    neutral (`str`, *optional*, defaults to `"leave_out"`):
        `"leave_out"` neutral steps, or count them as `"wrong"`.
    num_resamples (`int`, *optional*, defaults to `2000`):
        Number of bootstrap resamples of the problems, drawn within each subset.
    confidence (`float`, *optional*, defaults to `0.95`):
        Coverage of the intervals.
    seed (`int`, *optional*, defaults to `0`):
        Seed of the resampling.
Returns:
    `dict`, where a *figure* is `{"value", "low", "high"}` in [0, 1], or `None` where it is not defined:
    - `thresholds`: for `"0.5"`, `"fixed"` (with `threshold`), `"calibrated"` (with `validation`) and `"oracle"` (highest
      pooled `f1` on the solutions measured): `threshold`, and figures by name (`erroneous`, `correct`, `f1`, or
      `f1_right`, `f1_wrong`, `f1`) for each of `subsets`, and over all by the conventions in use: `pooled` (all solutions
      as one set), `mean_of_subsets` (ProcessBench's) and `weighted_mean_of_subsets` (by number of solutions).
    - `auc`: `pooled` and `subsets`: probability that a right step scores higher than a wrong one; without interval. With
      `first_error`, steps after the first wrong one count as neither.
    - `num_solutions`, `num_steps` (labelled right or wrong), `num_right`, `num_wrong`, `num_neutral`, `num_unscored`.
Examples:
    >>> step_errors = evaluate.load("step_errors")
    >>> results = step_errors.compute(step_scores=[[0.9, 0.2], [0.8, 0.7]], first_error=[1, -1])
    >>> results["thresholds"]["0.5"]["pooled"]["f1"]["value"]
    1.0
"""

_CITATION = """\
@inproceedings{zheng2025processbench,
  title={ProcessBench: Identifying Process Errors in Mathematical Reasoning},
  author={Zheng, Chujie and others},
  booktitle={Annual Meeting of the Association for Computational Linguistics},
  year={2025}
}
@article{wang2025visualprm,
  title={VisualPRM: An Effective Process Reward Model for Multimodal Reasoning},
  author={Wang, Weiyun and others},
  journal={arXiv preprint arXiv:2503.10291},
  year={2025}
}
"""

FEATURES = datasets.Features(
    {
        "step_scores": datasets.Sequence(datasets.Value("float64")),
        "first_error": datasets.Value("int64"),
        "step_labels": datasets.Sequence(datasets.Value("int64")),
        "subset": datasets.Value("string"),
        "problem_ids": datasets.Value("string"),
    }
)

# What stands in a column that was not given: `evaluate` asks for every column, and Arrow's scalars take no `None` there.
ABSENT: dict[str, Any] = {"first_error": -2, "step_labels": None, "subset": "", "problem_ids": ""}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class StepErrors(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=FEATURES,
            reference_urls=["https://arxiv.org/abs/2412.06559", "https://arxiv.org/abs/2503.10291"],
        )

    def add_batch(self, *, predictions=None, references=None, **columns):
        """Add a batch of solutions by the columns that `compute` takes."""
        given = {name: column for name, column in columns.items() if column is not None}
        if "step_scores" not in given:
            raise ValueError("step_errors: `step_scores` is missing: for each solution, the score of each step")
        super().add_batch(**({name: [value] * len(given["step_scores"]) for name, value in ABSENT.items()} | given))

    def add(self, *, prediction=None, reference=None, **columns):
        """Add one solution by the columns that `compute` takes."""
        self.add_batch(**{name: [value] for name, value in columns.items()})

    def _compute(
        self,
        step_scores,
        first_error,
        step_labels,
        subset,
        problem_ids,
        threshold=None,
        validation=None,
        neutral="leave_out",
        num_resamples=2000,
        confidence=0.95,
        seed=0,
    ) -> dict:
        if neutral not in ("leave_out", "wrong"):
            raise ValueError(f"step_errors: neutral = {neutral!r}: use 'leave_out' or 'wrong'")
        # An order of their own, so that resamples do not depend on the order in which solutions come.
        rows = sorted(zip(subset, problem_ids, step_scores, first_error, step_labels, strict=True), key=repr)
        subset, problem_ids, step_scores, first_error, step_labels = ([*column] for column in zip(*rows, strict=True))
        solutions = _Solutions(step_scores, first_error, step_labels, neutral)
        thresholds = {"0.5": 0.5}
        if threshold is not None:
            thresholds["fixed"] = float(threshold)
        if validation is not None:
            size = len(validation["step_scores"])
            first, each = (validation.get(name) or [ABSENT[name]] * size for name in ("first_error", "step_labels"))
            part = _Solutions(validation["step_scores"], first, each, neutral, "validation, ")
            if part.figures is not solutions.figures:
                raise ValueError("step_errors: `validation` needs the kind of labels that is measured")
            thresholds["calibrated"] = best_threshold(part.counts, part.figures, "f1")
        thresholds["oracle"] = best_threshold(solutions.counts, solutions.figures, "f1")

        names = np.asarray([name or "all" for name in subset])
        groups = {
            str(name): (np.flatnonzero(names == name), _clusters(problem_ids, names == name))
            for name in np.unique(names)
        }
        measure = _Measure(solutions, groups, num_resamples, confidence, seed)
        is_right, scores = solutions.is_right, solutions.scores
        scored = ~np.isnan(scores)
        parts = {name: scored & np.isin(solutions.rows, rows) for name, (rows, _) in groups.items()}
        return {
            "thresholds": {name: {"threshold": cut} | measure.at(cut) for name, cut in thresholds.items()},
            "auc": {
                "pooled": _defined(auc(is_right[scored], scores[scored])),
                "subsets": {name: _defined(auc(is_right[part], scores[part])) for name, part in parts.items()},
            },
            "num_solutions": len(names),
            "num_steps": len(is_right),
            "num_right": int(is_right.sum()),
            "num_wrong": int((~is_right).sum()),
            "num_neutral": solutions.num_neutral,
            "num_unscored": solutions.num_unscored,
        }


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def _clusters(problem_ids: Sequence[str], chosen: np.ndarray) -> np.ndarray:
    """For each chosen solution the number of its problem."""
    keys = [problem_ids[row] or f"\0{row}" for row in map(int, np.flatnonzero(chosen))]
    return np.unique(keys, return_inverse=True)[1]


class _Measure:
    """Figures with intervals at a threshold, for each subset and over all."""

    def __init__(self, solutions: "_Solutions", groups: Mapping, num_resamples: int, confidence: float, seed: int):
        self.solutions, self.groups = solutions, groups
        self.num_resamples, self.confidence, self.seed = num_resamples, confidence, seed

    def at(self, threshold: float) -> dict[str, Any]:
        counts, figures = self.solutions.counts, self.solutions.figures
        by_row = np.stack(
            [count.by_row(threshold, self.solutions.num_rows) for count in counts.values()], axis=1
        ).astype(float)
        # The first row holds the sums themselves, the others those of the resamples, in all of them alike.
        sums = {}
        for number, (name, (rows, clusters)) in enumerate(self.groups.items()):
            by_cluster = np.zeros((clusters.max() + 1, len(counts)))
            np.add.at(by_cluster, clusters, by_row[rows])
            resampled = resampled_sums(by_cluster, self.num_resamples, self.seed + number)
            sums[name] = np.concatenate([by_row[rows].sum(axis=0, keepdims=True), resampled])

        def of(columns: np.ndarray) -> Mapping[str, np.ndarray]:
            return figures(dict(zip(counts, columns.T, strict=True)))

        subsets = {name: of(columns) for name, columns in sums.items()}
        weights = np.asarray([len(rows) for rows, _ in self.groups.values()], dtype=float)
        stacked = {name: np.stack([each[name] for each in subsets.values()]) for name in next(iter(subsets.values()))}
        return {
            "pooled": self._report(of(np.sum(list(sums.values()), axis=0))),
            "mean_of_subsets": self._report({name: values.mean(axis=0) for name, values in stacked.items()}),
            "weighted_mean_of_subsets": self._report(
                {name: weights @ values / weights.sum() for name, values in stacked.items()}
            ),
            "subsets": {name: self._report(each) for name, each in subsets.items()},
        }

    def _report(self, figures: Mapping[str, np.ndarray]) -> dict[str, dict[str, float] | None]:
        return {name: interval(values[0], values[1:], self.confidence) for name, values in figures.items()}


class _Solutions:
    """Checked solutions: what is counted in them, and their labelled steps one after the other."""

    def __init__(
        self,
        step_scores: Sequence[Sequence[float] | None],
        first_errors: Sequence[int],
        step_labels: Sequence[Sequence[int] | None],
        neutral: str,
        place: str = "",
    ):
        self.num_rows = len(step_scores)
        self.figures: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
        self.counts: dict[str, Count]
        has_first_error = any(value != ABSENT["first_error"] for value in first_errors)
        if has_first_error == any(labels is not None for labels in step_labels):
            raise ValueError(f"step_errors: {place}give either `first_error` or `step_labels`")
        all_scores = [
            _checked_scores(scores, f"{place}solution at index {row}") for row, scores in enumerate(step_scores)
        ]
        labels = []
        for row, scores in enumerate(all_scores):
            where = f"step_errors: {place}solution at index {row}"
            labels.append(
                _labels_up_to_error(first_errors[row], len(scores), where)
                if has_first_error
                else _checked_labels(step_labels[row], len(scores), where)
            )
        self.num_neutral = sum(list(each).count(0) for each in labels)
        self.num_unscored = sum(len(scores) == 0 or bool(np.isnan(scores).any()) for scores in all_scores)
        rows, values, is_right = [], [], []
        for row, (scores, each) in enumerate(zip(all_scores, labels, strict=True)):
            for step, label in enumerate(each):
                if label != 0 or neutral == "wrong":
                    rows.append(row)
                    values.append(scores[step] if step < len(scores) else math.nan)
                    is_right.append(label == 1)
        self.rows, self.scores = np.asarray(rows, dtype=int), np.asarray(values, dtype=float)
        self.is_right = np.asarray(is_right, dtype=bool)
        if has_first_error:
            self.figures, self.counts = first_error_figures, count_first_errors(all_scores, list(first_errors))
        else:
            self.figures, self.counts = step_figures, count_steps(self.rows, self.scores, self.is_right)


def _checked_scores(scores: Sequence[float] | None, where: str) -> list[float]:
    values = [math.nan if score is None else float(score) for score in scores or []]
    for score in values:
        if not (math.isnan(score) or 0.0 <= score <= 1.0):
            raise ValueError(
                f"step_errors: {where}: `step_scores` holds {score}; step scores are probabilities in [0, 1]"
            )
    return values


def _labels_up_to_error(first_error: int, num_scores: int, where: str) -> list[int]:
    """1 for each step before the first wrong one, which is -1; what follows it is not labelled."""
    if first_error < -1 or (num_scores and first_error >= num_scores):
        raise ValueError(
            f"{where}: `first_error` is {first_error}, with {num_scores} step scores; give -1 or an index"
        )
    return [1] * num_scores if first_error < 0 else [1] * first_error + [-1]


def _checked_labels(labels: Sequence[int] | None, num_scores: int, where: str) -> list[int]:
    if labels is None or any(label not in (-1, 0, 1) for label in labels):
        raise ValueError(f"{where}: `step_labels` is {labels}; give 1, 0 or -1 for each step")
    if num_scores not in (0, len(labels)):
        raise ValueError(f"{where}: {num_scores} step scores for {len(labels)} `step_labels`; give one for each")
    return list(labels)
