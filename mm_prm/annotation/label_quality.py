"""
How good labels are: ranking, calibration and error against a reference, each with its bootstrap interval over problems.

Pure functions over arrays.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.stats import rankdata

from mm_prm.annotation.audit import Label
from mm_prm.metrics.step_errors.resampling import interval, resampled_sums

_CONFIDENCE = 0.95
_NUM_BINS = 10
# Deeper prefixes are taken together.
_DEEPEST = 8
_JUDGE_THRESHOLD = 0.5
# With fewer, the bootstrap knows nothing of how they differ.
_FEWEST_MIXED_PROBLEMS = 10

Estimate = dict[str, float] | None


def label_quality(
    labels: Sequence[Label],
    reference: np.ndarray,
    *,
    right_threshold: float = 0.0,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Hold labels against a reference.

    Args:
        labels (`Sequence[Label]`):
            The labels.
        reference (`np.ndarray`):
            For each label the truth or a better estimate of it, in [0, 1]; NaN where there is none, and then the label
            is left out.
        right_threshold (`float`, *optional*, defaults to `0.0`):
            A label, and a reference, above this value says that the step is right.
        num_resamples (`int`, *optional*, defaults to `1000`):
            Bootstrap resamples of problems.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap, and of the choice among a label's rollouts.

    Returns:
        `dict`: `labels`, `left_out` (no reference), `problems`; estimates with `value`, `low` and `high` (95 %), `None`
        where not defined: `share_right` by the reference, `auc` of the label for "right by the reference",
        `auc_within_problems` (pairs of one problem only; at least ten problems have to hold one), `mean_absolute_error` (against a reference of 0 and 1 it does
        not depend on the number of rollouts), `mean_squared_error`, `disagreement` (label and reference on different
        sides of the threshold), `expected_calibration_error` over ten bins. Lists of these by group:
        `calibration`, `by_depth` (number of steps), `by_num_judged` (rollouts behind the label), and
        `at_fewer_rollouts`, where the same labels are computed again from a random choice of their rollouts. `judge`:
        what the judge of steps adds, `None` without one.
    """
    known = ~np.isnan(reference)
    kept = [label for label, is_known in zip(labels, known, strict=True) if is_known]
    if not kept:
        raise ValueError("no label has a reference to hold it against")
    audit = _Audit(kept, reference[known], right_threshold, num_resamples, seed)
    values = np.array([label.value for label in kept])
    num_judged = np.array([label.num_judged for label in kept])
    depths = np.minimum([len(label.prefix) for label in kept], _DEEPEST)
    everything = np.ones(len(kept), dtype=bool)
    return {
        "labels": len(kept),
        "left_out": len(labels) - len(kept),
        "problems": audit.num_problems,
        "right_threshold": right_threshold,
        "share_right": audit.mean(audit.right, everything),
        "auc": audit.auc(values, everything),
        "auc_within_problems": audit.auc_within_problems(values),
        **audit.errors(values, everything),
        **audit.calibration(values),
        "by_depth": [
            {"depth": f"{depth}" if depth < _DEEPEST else f"{depth}+", **audit.errors(values, depths == depth)}
            for depth in np.unique(depths)
        ],
        "by_num_judged": [
            {"num_judged": f"{low}" if high == low + 1 else f"{low}-{high - 1}", **audit.errors(values, chosen)}
            for low, high in pairwise(2 ** np.arange(int(num_judged.max()).bit_length() + 1))
            if (chosen := (num_judged >= low) & (num_judged < high)).any()
        ],
        "at_fewer_rollouts": audit.at_fewer_rollouts(kept, num_judged, seed),
        "judge": audit.judge(kept, values),
    }


class _Audit:
    """What every figure needs: the reference, and which problem each label belongs to."""

    def __init__(
        self, labels: Sequence[Label], reference: np.ndarray, right_threshold: float, num_resamples: int, seed: int
    ):
        self.reference, self.right_threshold = reference, right_threshold
        self.right = reference > right_threshold
        self.num_resamples, self.seed = num_resamples, seed
        ids, self.problems = np.unique([label.problem_id for label in labels], return_inverse=True)
        self.num_problems = len(ids)

    def _by_problem(self, *columns: np.ndarray) -> np.ndarray:
        """(problems, columns): sums over each problem's labels."""
        sums = [np.bincount(self.problems, column.astype(float), self.num_problems) for column in columns]
        return np.stack(sums, axis=1)

    def _ratio(self, above: np.ndarray, below: np.ndarray) -> Estimate:
        """Ratio of two sums over problems."""
        sums = resampled_sums(np.stack([above, below], axis=1), self.num_resamples, self.seed)
        with np.errstate(invalid="ignore", divide="ignore"):
            return interval(float(np.divide(above.sum(), below.sum())), sums[:, 0] / sums[:, 1], _CONFIDENCE)

    def mean(self, column: np.ndarray, chosen: np.ndarray) -> Estimate:
        sums = self._by_problem(column * chosen, chosen)
        return self._ratio(sums[:, 0], sums[:, 1])

    def errors(self, values: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
        disagree = (values > self.right_threshold) != self.right
        return {
            "labels": int(chosen.sum()),
            "mean_absolute_error": self.mean(np.abs(values - self.reference), chosen),
            "mean_squared_error": self.mean((values - self.reference) ** 2, chosen),
            "disagreement": self.mean(disagree, chosen),
        }

    def calibration(self, values: np.ndarray) -> dict[str, Any]:
        bins = np.minimum((values * _NUM_BINS).astype(int), _NUM_BINS - 1)
        inside = [bins == number for number in range(_NUM_BINS)]
        table = []
        for number, chosen in enumerate(inside):
            if chosen.any():
                table.append(
                    {
                        "from": number / _NUM_BINS,
                        "to": (number + 1) / _NUM_BINS,
                        "labels": int(chosen.sum()),
                        "mean_label": float(values[chosen].mean()),
                        "mean_reference": self.mean(self.reference, chosen),
                    }
                )
        gaps = self._by_problem(*[(values - self.reference) * chosen for chosen in inside], np.ones(len(values)))
        sums = resampled_sums(gaps, self.num_resamples, self.seed)
        resampled = np.abs(sums[:, :-1]).sum(axis=1) / sums[:, -1]
        value = float(np.abs(gaps[:, :-1].sum(axis=0)).sum() / len(values))
        return {"expected_calibration_error": interval(value, resampled, _CONFIDENCE), "calibration": table}

    def auc(self, values: np.ndarray, chosen: np.ndarray) -> Estimate:
        """AUC over all pairs. A resample counts each label as often as its problem was drawn."""
        levels = np.unique(values[chosen], return_inverse=True)[1]
        right, problems = self.right[chosen], self.problems[chosen]
        generator = np.random.default_rng(self.seed)
        draws = (generator.integers(self.num_problems, size=self.num_problems) for _ in range(self.num_resamples))
        counts = (np.bincount(draw, minlength=self.num_problems)[problems] for draw in draws)
        resampled = np.array([_weighted_auc(levels, right, count) for count in counts])
        return interval(_weighted_auc(levels, right, np.ones(len(right))), resampled, _CONFIDENCE)

    def auc_within_problems(self, values: np.ndarray) -> Estimate:
        won, pairs = np.zeros(self.num_problems), np.zeros(self.num_problems)
        order = np.argsort(self.problems, kind="stable")
        ends = np.cumsum(np.bincount(self.problems, minlength=self.num_problems))
        for problem, places in enumerate(np.split(order, ends[:-1])):
            right = self.right[places]
            num_right = int(right.sum())
            # Mann-Whitney: the rank sum of the right steps, with half a win for a tie
            won[problem] = rankdata(values[places])[right].sum() - num_right * (num_right + 1) / 2
            pairs[problem] = num_right * (len(right) - num_right)
        return self._ratio(won, pairs) if (pairs > 0).sum() >= _FEWEST_MIXED_PROBLEMS else None

    def at_fewer_rollouts(self, labels: Sequence[Label], num_judged: np.ndarray, seed: int) -> list[dict[str, Any]]:
        """At least half of the labels, the same at every number, from ever more of their rollouts."""
        sizes = 2 ** np.arange(int(np.median(num_judged)).bit_length())
        chosen = num_judged >= sizes[-1]
        num_right = np.array([label.num_right for label in labels])
        generator = np.random.default_rng(seed)
        table = []
        for size in sizes:
            drawn = generator.hypergeometric(num_right, num_judged - num_right, np.minimum(size, num_judged))
            values = drawn / size
            table.append({"rollouts": int(size), **self.errors(values, chosen), "auc": self.auc(values, chosen)})
        return table

    def judge(self, labels: Sequence[Label], values: np.ndarray) -> dict[str, Any] | None:
        """What a judge of steps knows, and what its consensus with Monte Carlo is worth."""
        scores = np.array([np.nan if label.judge_score is None else label.judge_score for label in labels])
        judged = ~np.isnan(scores)
        if not judged.any():
            return None
        agree = judged & ((scores > _JUDGE_THRESHOLD) == (values > self.right_threshold))
        return {
            "labels": int(judged.sum()),
            "auc": self.auc(np.nan_to_num(scores), judged),
            "disagreement": self.mean((scores > _JUDGE_THRESHOLD) != self.right, judged),
            "consensus": self.mean(agree, judged),
            "monte_carlo": self.errors(values, judged),
            "monte_carlo_in_consensus": self.errors(values, agree),
        }


def _weighted_auc(levels: np.ndarray, right: np.ndarray, weights: np.ndarray) -> float:
    """AUC where label i counts `weights[i]` times; `levels` are the values' ranks from 0 on, ties alike."""
    positive, negative = np.bincount(levels, weights * right), np.bincount(levels, weights * ~right)
    pairs = positive.sum() * negative.sum()
    below = np.cumsum(negative) - negative
    return float(positive @ (below + negative / 2) / pairs) if pairs else float("nan")
