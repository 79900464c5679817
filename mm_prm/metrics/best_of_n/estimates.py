"""Accuracy of choosing among n of N candidates of one problem, and means over problems with bootstrap intervals.

Pure functions on plain lists and arrays; numpy is all they need.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike


def subset_sizes(num_candidates: int) -> list[int]:
    """The powers of two up to `num_candidates`, and `num_candidates` itself."""
    sizes = [2**exponent for exponent in range(num_candidates.bit_length()) if 2**exponent < num_candidates]
    return [*sizes, num_candidates]


def best_of_n_curve(correct: Sequence[bool], scores: Sequence[float], sizes: Sequence[int]) -> np.ndarray:
    """
    Exact expected accuracy of the highest score among n candidates, over all subsets of size n.

    The candidate at rank r (0 is best; equal scores rank in candidate order) wins a subset of n out of N if it is in it
    and no better one is, so with probability C(N-1-r, n-1) / C(N, n).

    Args:
        correct (`Sequence[bool]`):
            Whether each of the N candidates is right.
        scores (`Sequence[float]`):
            One aggregated score for each candidate; NaN counts as `-inf`.
        sizes (`Sequence[int]`):
            Subset sizes n. A size above N means N.

    Returns:
        `np.ndarray` of one accuracy for each size.
    """
    total = len(correct)
    keys = np.where(np.isnan(scores), -np.inf, scores)
    ranked = np.asarray(correct, dtype=float)[np.argsort(-keys, kind="stable")]
    curve = []
    for size in (min(size, total) for size in sizes):
        weights = [math.comb(total - 1 - rank, size - 1) / math.comb(total, size) for rank in range(total)]
        curve.append(float(ranked @ np.asarray(weights)))
    return np.asarray(curve)


def oracle_curve(correct: Sequence[bool], sizes: Sequence[int]) -> np.ndarray:
    """Exact pass@n: the probability that a random subset of n candidates holds a right one."""
    total, wrong = len(correct), len(correct) - sum(correct)
    return np.asarray([1.0 - math.comb(wrong, min(n, total)) / math.comb(total, min(n, total)) for n in sizes])


def _subset_masks(total: int, size: int, num_subsets: int, seed: int) -> np.ndarray:
    """(subsets, candidates) boolean membership. Depends on nothing but its arguments, so problems may come in any order."""
    if size >= total:
        return np.ones((1, total), dtype=bool)
    if size == 1:
        return np.eye(total, dtype=bool)
    keys = np.random.default_rng([seed, total, size]).random((num_subsets, total))
    return keys.argsort(axis=1).argsort(axis=1) < size


def majority_curve(
    correct: Sequence[bool],
    answers: Sequence[str | None],
    sizes: Sequence[int],
    weights: Sequence[float] | None = None,
    num_subsets: int = 256,
    seed: int = 0,
) -> np.ndarray:
    """
    Accuracy of the answer with most votes, or with the highest sum of weights, among n candidates.

    Exact for n = 1 and n = N, and the mean over `num_subsets` random subsets between. Equal sums go to the answer that
    comes first. A candidate without an answer does not vote; where nobody votes, nothing is answered, which is wrong.

    Args:
        correct (`Sequence[bool]`):
            Whether each of the N candidates is right.
        answers (`Sequence[str | None]`):
            Canonical answer of each candidate; `None` or `""` is no answer.
        sizes (`Sequence[int]`):
            Subset sizes n. A size above N means N.
        weights (`Sequence[float]`, *optional*):
            Weight of each candidate's vote; 1 if not given. Negative and NaN weights (unscored candidates) count as 0.
        num_subsets (`int`, *optional*, defaults to `256`):
            Number of random subsets for 1 < n < N.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the subsets.

    Returns:
        `np.ndarray` of one accuracy for each size.
    """
    same_answer, has_answer, vote_weights = _votes(answers, weights)
    right = np.asarray(correct, dtype=float)
    curve = []
    for size in sizes:
        masks = _subset_masks(len(answers), size, num_subsets, seed)
        support = (masks * vote_weights) @ same_answer  # for each member, the votes for its answer
        support = np.where(masks & has_answer, support, -1.0)
        winners = support.argmax(axis=1)  # the first of equals
        answered = support[np.arange(len(masks)), winners] >= 0
        curve.append(float((right[winners] * answered).mean()))
    return np.asarray(curve)


def _votes(
    answers: Sequence[str | None], weights: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    has_answer = np.asarray([bool(answer) for answer in answers])
    same_answer = np.asarray([[a == b for b in answers] for a in answers], dtype=float)
    vote_weights = np.ones(len(answers)) if weights is None else np.asarray(weights, dtype=float)
    # What is scored, be it 0, outweighs what is not (NaN or -inf).
    vote_weights = np.where(vote_weights >= 0, np.maximum(vote_weights, np.finfo(float).tiny), 0.0)
    return same_answer, has_answer, vote_weights


def majority_is_tied(answers: Sequence[str | None], weights: Sequence[float] | None = None) -> bool:
    """Whether two different answers share the most votes (or the highest sum of weights) among all candidates."""
    same_answer, _, vote_weights = _votes(answers, weights)
    support = {answer: votes for answer, votes in zip(answers, same_answer @ vote_weights, strict=True) if answer}
    return list(support.values()).count(max(support.values(), default=0.0)) > 1


def best_is_tied(scores: Sequence[float], texts: Sequence[Hashable]) -> bool:
    """Whether the highest score is shared by different solutions (copies of one text share it of course)."""
    keys = np.where(np.isnan(scores), -np.inf, scores)
    return len({text for key, text in zip(keys, texts, strict=True) if key == keys.max()}) > 1


def uninformative_accuracy(correct: Sequence[bool], texts: Sequence[Hashable | None]) -> float:
    """
    Expected accuracy of the highest score if scores are random, but equal for equal solutions.

    That is (distinct right solutions) / (distinct solutions), and it lies *below* mean pass@1 where right solutions
    repeat one text while every wrong one differs. `None` (no solution, so never scored) only counts if all are `None`.
    A text that the judge called both right and wrong counts as its first candidate.
    """
    first: dict[Hashable | None, bool] = {}
    for text, right in zip(texts, correct, strict=True):
        first.setdefault(text, bool(right))
    verdicts = [right for text, right in first.items() if text is not None] or list(first.values())
    return sum(verdicts) / len(verdicts)


def bootstrap_means(values: np.ndarray, num_resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """
    Means over resampled problems, the same resamples for each method, so that differences are paired.

    Args:
        values (`np.ndarray`):
            (problems, methods) accuracies of single problems. Their order says which problems a resample draws.
        num_resamples (`int`, *optional*, defaults to `2000`):
            Number of resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed.

    Returns:
        `np.ndarray` of shape (resamples, methods).
    """
    values = np.asarray(values, dtype=float)
    total = len(values)
    generator = np.random.default_rng(seed)
    block = max(1, 4_000_000 // total)  # bounds the memory at any number of problems
    means = []
    for start in range(0, num_resamples, block):
        rows = min(block, num_resamples - start)
        drawn = generator.integers(total, size=(rows, total)) + np.arange(rows)[:, None] * total
        counts = np.bincount(drawn.ravel(), minlength=rows * total).reshape(rows, total)
        means.append(counts @ values / total)
    return np.concatenate(means)


def estimate(values: np.ndarray, means: np.ndarray, confidence: float = 0.95) -> dict[str, float]:
    """Mean of `values` with the percentile interval of its bootstrap `means`."""
    value = float(np.mean(values))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    # Rounding alone could put a value that all problems share outside of its own interval.
    return {"value": value, "low": min(float(low), value), "high": max(float(high), value)}


def difference(values: np.ndarray, means: np.ndarray, confidence: float = 0.95) -> dict[str, float]:
    """An `estimate` of paired differences with the two-sided bootstrap p-value of "no difference"."""
    below, above = (means <= 1e-12).sum() + 1, (means >= -1e-12).sum() + 1  # + 1: a p-value is never 0
    return estimate(values, means, confidence) | {"p_value": min(1.0, float(2 * min(below, above) / (len(means) + 1)))}


def bootstrap_interval(
    values: ArrayLike, num_resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> dict[str, float]:
    """Mean of one value for each problem as `{"value", "low", "high"}`, by the percentile bootstrap over problems."""
    column = np.asarray(values, dtype=float)
    return estimate(column, bootstrap_means(column[:, None], num_resamples, seed)[:, 0], confidence)
