"""Best-of-N: how often does a verifier pick a right solution among N candidates, and what would it be without one?

A metric for the `evaluate` library that stands alone: `evaluate.load("path/to/best_of_n")` needs this folder, numpy,
datasets and evaluate, and no network. The aggregators (step scores -> one number) live here for the same reason.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence

import datasets
import evaluate
import numpy as np

from .estimates import (
    best_is_tied,
    best_of_n_curve,
    bootstrap_means,
    difference,
    estimate,
    majority_curve,
    majority_is_tied,
    oracle_curve,
    subset_sizes,
    uninformative_accuracy,
)

_DESCRIPTION = """\
Accuracy of picking one of N candidate solutions by a process reward model, for each way of aggregating step scores and
for each n <= N, beside the baselines that it has to beat: mean pass@1, an uninformative verifier, majority vote and the
oracle. Every number comes with a bootstrap interval over problems; differences are paired.
"""

_KWARGS_DESCRIPTION = """
Args:
    correct (`list[list[bool]]`):
        For each problem, whether each candidate is right. `None` (the judge does not know) counts as not right.
    step_scores (`list[list[list[float]]]`, *optional*):
        For each problem and candidate, the P(right) of each step, in [0, 1]. A candidate without scores, or with a NaN
        among them, never wins over a scored one. Without this argument only the baselines are computed.
    answers (`list[list[str]]`, *optional*):
        For each problem and candidate the final answer in a canonical form, so that equal strings mean equivalent
        answers. `None` or `""` is no answer and no vote. Without this argument there is no majority vote.
    candidates (`list[list[list[str]]]`, *optional*):
        For each problem and candidate the steps. They tell which solutions are distinct, for the uninformative
        verifier and the count of ties; without them `answers` do, and without both each candidate counts as distinct.
    num_resamples (`int`, *optional*, defaults to `2000`):
        Number of bootstrap resamples of the problems.
    num_subsets (`int`, *optional*, defaults to `256`):
        Number of random subsets from which votes among n < N candidates are estimated.
    confidence (`float`, *optional*, defaults to `0.95`):
        Coverage of the intervals.
    seed (`int`, *optional*, defaults to `0`):
        Seed of both kinds of resampling.
Returns:
    `dict` of fractions in [0, 1], where *estimate* is `{"value", "low", "high"}`, *curve* is `{"2": estimate, ...}` for
    the powers of two up to N and for N itself, and *difference* is an estimate with a two-sided `"p_value"`:
    - `pass@1`: estimate of the mean accuracy of one candidate.
    - `uninformative`: estimate for a verifier that gives each distinct solution an independent random score.
    - `oracle`: estimate, `by_n` (curve): at least one candidate is right.
    - `majority`: estimate, `by_n`, `minus_pass@1` (difference), `num_ties`. Only with `answers`.
    - `best_of_n`: for each aggregator an estimate, `by_n`, `minus_pass@1`, `minus_majority` (with `answers`), `num_ties`.
    - `weighted_majority`: the same for votes weighted by the aggregated score; aggregators that are probabilities only.
    - `num_problems`, `num_candidates` (the largest N; a problem with fewer candidates uses all it has for larger n).
Examples:
    >>> best_of_n = evaluate.load("best_of_n")
    >>> results = best_of_n.compute(correct=[[True, False]], step_scores=[[[0.9, 0.8], [0.9, 0.1]]])
    >>> results["pass@1"]["value"], results["best_of_n"]["min"]["value"]
    (0.5, 1.0)
"""

_CITATION = """\
@article{du2025mmprm,
  title={MM-PRM: Enhancing Multimodal Mathematical Reasoning with Scalable Step-Level Supervision},
  journal={arXiv preprint arXiv:2505.13427},
  year={2025}
}
"""

# A score of exactly 0 or 1 has no finite logarithm or odds. 1e-7 is about the spacing of float32 below 1: there, clipping
# merges 1 with its one neighbour; near 0, where float32 is finer, it merges what is surer than that.
EPSILON = 1e-7

# Aggregators: step scores -> one number. Total on their domain: no scores, or a NaN among them, give -inf, so that a
# candidate that could not be parsed or scored never wins. (The ancestor gave such candidates 0, which is the *maximum*
# of a sum of log-probabilities.)


def _clip(score: float) -> float:
    return min(max(score, EPSILON), 1.0 - EPSILON)


def _unscored(scores: Sequence[float]) -> bool:
    return len(scores) == 0 or any(score is None or math.isnan(score) for score in scores)


def aggregate_min(scores: Sequence[float]) -> float:
    """Lowest step score: a chain is as strong as its weakest step."""
    return -math.inf if _unscored(scores) else float(min(scores))


def aggregate_last(scores: Sequence[float]) -> float:
    """Score of the last step, which sees the whole solution."""
    return -math.inf if _unscored(scores) else float(scores[-1])


def aggregate_product(scores: Sequence[float]) -> float:
    """Product of the step scores: every step is right, were the steps independent."""
    return -math.inf if _unscored(scores) else float(math.prod(scores))


def aggregate_mean(scores: Sequence[float]) -> float:
    """Mean of the step scores."""
    return -math.inf if _unscored(scores) else math.fsum(scores) / len(scores)


def aggregate_max(scores: Sequence[float]) -> float:
    """Highest step score."""
    return -math.inf if _unscored(scores) else float(max(scores))


def aggregate_sum_logprob(scores: Sequence[float]) -> float:
    """Sum of log-probabilities: the product's order, without underflow; scores below `EPSILON` count as `EPSILON`."""
    return -math.inf if _unscored(scores) else math.fsum(math.log(max(score, EPSILON)) for score in scores)


def aggregate_sum_logit(scores: Sequence[float]) -> float:
    """Sum of log-odds, so that more sure steps give more evidence; scores are clipped to `EPSILON` from 0 and 1."""
    if _unscored(scores):
        return -math.inf
    return math.fsum(math.log(p) - math.log1p(-p) for p in map(_clip, scores))


def aggregate_mean_odds(scores: Sequence[float]) -> float:
    """Mean of the odds p / (1 - p), the headline of the MM-PRM paper; a score of 1 counts as 1 - `EPSILON`."""
    if _unscored(scores):
        return -math.inf
    return math.fsum(p / (1.0 - p) for p in (min(score, 1.0 - EPSILON) for score in scores)) / len(scores)


AGGREGATORS: dict[str, Callable[[Sequence[float]], float]] = {
    "min": aggregate_min,
    "last": aggregate_last,
    "product": aggregate_product,
    "mean": aggregate_mean,
    "max": aggregate_max,
    "sum_logprob": aggregate_sum_logprob,
    "sum_logit": aggregate_sum_logit,
    "mean_odds": aggregate_mean_odds,
}

# A vote's weight must not be negative; these stay in [0, 1].
PROBABILITY_AGGREGATORS = ("min", "last", "product", "mean", "max")


FEATURES = datasets.Features(
    {
        "correct": datasets.Sequence(datasets.Value("bool")),
        "step_scores": datasets.Sequence(datasets.Sequence(datasets.Value("float64"))),
        "answers": datasets.Sequence(datasets.Value("string")),
        "candidates": datasets.Sequence(datasets.Sequence(datasets.Value("string"))),
    }
)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class BestOfN(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=FEATURES,
            reference_urls=["https://arxiv.org/abs/2505.13427"],
        )

    # `evaluate` asks for every column; here all but `correct` may be left out.
    def add_batch(self, *, predictions=None, references=None, **columns):
        """Add a batch of problems by the columns that `compute` takes."""
        given = {name: column for name, column in columns.items() if column is not None}
        if "correct" not in given:
            raise ValueError("best_of_n: `correct` is missing: for each problem, whether each candidate is right")
        super().add_batch(**({name: [None] * len(given["correct"]) for name in FEATURES} | given))

    def add(self, *, prediction=None, reference=None, **columns):
        """Add one problem by the columns that `compute` takes."""
        self.add_batch(**{name: [value] for name, value in columns.items()})

    def _compute(
        self, correct, step_scores, answers, candidates, num_resamples=2000, num_subsets=256, confidence=0.95, seed=0
    ) -> dict:
        pools = [
            _Pool(row, *columns)
            for row, columns in enumerate(zip(correct, step_scores, answers, candidates, strict=True))
        ]
        if not pools:
            raise ValueError("best_of_n: there are no problems; give at least one in `correct`")
        # An order of their own: resamples then depend neither on how the problems come nor, for equal candidates, on the
        # scores, so that baselines have the same interval beside every verifier.
        pools.sort(key=_Pool.order)
        with_scores, with_answers = any(map(_Pool.is_scored, pools)), any(pool.answers for pool in pools)
        num_candidates = max(len(pool.correct) for pool in pools)
        sizes = subset_sizes(num_candidates)

        # Accuracies of single problems, (problems, sizes) for each method, and the number of ties at n = N.
        curves: dict[tuple[str, str], list] = {
            ("pass@1", ""): [[np.mean(pool.correct)] * len(sizes) for pool in pools],
            ("uninformative", ""): [[uninformative_accuracy(pool.correct, pool.texts)] * len(sizes) for pool in pools],
            ("oracle", ""): [oracle_curve(pool.correct, sizes) for pool in pools],
        }
        ties: dict[tuple[str, str], int] = {}
        if with_answers:
            curves["majority", ""] = [
                majority_curve(pool.correct, pool.answers, sizes, None, num_subsets, seed) for pool in pools
            ]
            ties["majority", ""] = sum(majority_is_tied(pool.answers) for pool in pools)
        for name in AGGREGATORS if with_scores else ():
            scores = [pool.aggregate(name) for pool in pools]
            both = list(zip(pools, scores, strict=True))
            curves["best_of_n", name] = [best_of_n_curve(pool.correct, score, sizes) for pool, score in both]
            ties["best_of_n", name] = sum(best_is_tied(score, pool.texts) for pool, score in both)
            if with_answers and name in PROBABILITY_AGGREGATORS:
                curves["weighted_majority", name] = [
                    majority_curve(pool.correct, pool.answers, sizes, score, num_subsets, seed) for pool, score in both
                ]
                ties["weighted_majority", name] = sum(majority_is_tied(pool.answers, score) for pool, score in both)

        values = {key: np.asarray(curve, dtype=float) for key, curve in curves.items()}
        stacked = bootstrap_means(np.concatenate(list(values.values()), axis=1), num_resamples, seed)
        means = dict(zip(values, np.split(stacked, len(values), axis=1), strict=True))

        results: dict = {}
        for key in values:
            entry: dict = estimate(values[key][:, -1], means[key][:, -1], confidence)
            if key in ties or key[0] == "oracle":
                entry["by_n"] = {
                    str(n): estimate(values[key][:, i], means[key][:, i], confidence) for i, n in enumerate(sizes)
                }
            for baseline in ("pass@1", "majority") if key in ties else ():
                if (baseline, "") in values and baseline != key[0]:
                    gaps, gap_means = (table[key][:, -1] - table[baseline, ""][:, -1] for table in (values, means))
                    entry[f"minus_{baseline}"] = difference(gaps, gap_means, confidence)
            if key in ties:
                entry["num_ties"] = ties[key]
            method, aggregator = key
            if aggregator:
                results.setdefault(method, {})[aggregator] = entry
            else:
                results[method] = entry
        for method in ("best_of_n", "weighted_majority"):
            results.setdefault(method, {})
        return results | {"num_problems": len(pools), "num_candidates": num_candidates}


class _Pool:
    """One problem, checked. Absent columns and values are `None` or empty, as Arrow hands them over."""

    def __init__(
        self,
        row: int,
        correct: Sequence[bool | None],
        step_scores: Sequence[Sequence[float] | None] | None,
        answers: Sequence[str | None] | None,
        candidates: Sequence[Sequence[str] | None] | None,
    ):
        if not correct:
            raise ValueError(
                f"best_of_n: problem at index {row}: `correct` is empty; drop problems without candidates"
            )
        columns: Mapping = {"step_scores": step_scores, "answers": answers, "candidates": candidates}
        for name, column in columns.items():
            if column is not None and len(column) not in (0, len(correct)):
                raise ValueError(
                    f"best_of_n: problem at index {row}: `{name}` has {len(column)} entries for {len(correct)} "
                    "candidates in `correct`; give one for each"
                )
        self.correct = [bool(right) for right in correct]
        self.step_scores = [list(scores or []) for scores in step_scores or [[]] * len(correct)]
        self.answers = list(answers or [])
        for index, scores in enumerate(self.step_scores):
            for score in scores:
                if score is not None and not math.isnan(score) and not 0.0 <= score <= 1.0:
                    raise ValueError(
                        f"best_of_n: problem at index {row}: `step_scores` of candidate {index} holds {score}; "
                        "step scores are probabilities in [0, 1]"
                    )
        self.texts: list[Hashable | None]
        if candidates:
            self.texts = [tuple(steps) if steps else None for steps in candidates]
        elif answers:
            self.texts = [answer or None for answer in answers]
        else:
            self.texts = list(range(len(correct)))

    def order(self) -> str:
        return repr((self.correct, self.answers, self.texts, self.step_scores))

    def is_scored(self) -> bool:
        return any(self.step_scores)

    def aggregate(self, name: str) -> list[float]:
        return [AGGREGATORS[name](scores) for scores in self.step_scores]
