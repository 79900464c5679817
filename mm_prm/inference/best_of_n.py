"""Choosing among the candidates of a problem: the best score, groups of equivalent answers, and candidate pools."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mm_prm.annotation.protocols import Judge, Verdict

from .aggregators import AGGREGATORS, PROBABILITY_AGGREGATORS

Candidates = Sequence[Sequence[str]]
StepScores = Sequence[Sequence[float]]


class EquivalenceJudge(Judge, Protocol):
    """A judge that also compares two answers with each other."""

    def equivalent(self, a: str, b: str, choices: Sequence[str]) -> bool:
        """Whether two final answers to a question with these choices mean the same."""
        ...


@dataclass(frozen=True)
class Selection:
    """
    The candidate that was chosen.

    Args:
        index (`int`):
            Its place among the candidates.
        score (`float`):
            Its aggregated score, or the votes for its answer; `-inf` if no candidate has scores, or an answer.
        num_tied (`int`):
            Number of *other* solutions (copies of its text left out), or of other answers, with the same score; the first
            one won.
    """

    index: int
    score: float
    num_tied: int


def select(candidates: Candidates, scores: StepScores, aggregator: str) -> Selection:
    """
    Choose the candidate with the highest aggregated score; equal scores go to the first.

    Args:
        candidates (`Sequence[Sequence[str]]`):
            Steps of each candidate of one problem.
        scores (`Sequence[Sequence[float]]`):
            Step scores of each candidate. A candidate without scores never wins over a scored one.
        aggregator (`str`):
            Name of one of [`AGGREGATORS`].

    Returns:
        [`Selection`]
    """
    if aggregator not in AGGREGATORS:
        raise ValueError(
            f"aggregator = {aggregator!r}: there is no such aggregator; use one of {', '.join(AGGREGATORS)}"
        )
    if not candidates or len(candidates) != len(scores):
        raise ValueError(
            f"{len(candidates)} candidates and {len(scores)} lists of scores; give one list for each candidate"
        )
    values = [AGGREGATORS[aggregator](step_scores) for step_scores in scores]
    best = max(values)
    index = values.index(best)
    texts = {tuple(steps) for steps, value in zip(candidates, values, strict=True) if value == best}
    return Selection(index=index, score=best, num_tied=len(texts) - 1)


def vote(answers: Sequence[str], scores: StepScores | None = None, aggregator: str = "min") -> Selection:
    """
    Choose the answer with most votes, or with the highest sum of scores; equal sums go to the answer that comes first.

    Args:
        answers (`Sequence[str]`):
            Answer of each candidate of one problem, equivalent ones as one text ([`group_answers`]); a candidate with
            `""` does not vote.
        scores (`Sequence[Sequence[float]]`, *optional*):
            Step scores of each candidate, whose aggregate is the weight of its vote. Votes without scores weigh nothing,
            so they decide only where no vote has any. Each vote counts 1 if not given.
        aggregator (`str`, *optional*, defaults to `"min"`):
            Name of one of [`PROBABILITY_AGGREGATORS`]; a weight must not be negative.

    Returns:
        [`Selection`]: The first candidate with the chosen answer.
    """
    if aggregator not in PROBABILITY_AGGREGATORS:
        raise ValueError(
            f"aggregator = {aggregator!r}: votes are weighted by one of {', '.join(PROBABILITY_AGGREGATORS)}"
        )
    if not answers or (scores is not None and len(scores) != len(answers)):
        raise ValueError(
            f"{len(answers)} answers and {len(scores or [])} lists of scores; give one list for each answer"
        )
    weights = [1.0] * len(answers) if scores is None else [AGGREGATORS[aggregator](each) for each in scores]
    support: dict[str, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer:
            # What is scored, be it 0, outweighs what is not (-inf).
            support[answer] = support.get(answer, 0.0) + (max(weight, sys.float_info.min) if weight >= 0 else 0.0)
    if not support:
        return Selection(index=0, score=-math.inf, num_tied=0)
    best = max(support.values())
    winners = [answer for answer, votes in support.items() if votes == best]
    return Selection(index=list(answers).index(winners[0]), score=best, num_tied=len(winners) - 1)


def group_answers(problem: Mapping[str, Any], solutions: Candidates, judge: EquivalenceJudge) -> list[str]:
    """
    Give equivalent final answers one canonical text, so that votes can be counted by comparing strings.

    Args:
        problem (`Mapping[str, Any]`):
            Problem row.
        solutions (`Sequence[Sequence[str]]`):
            Steps of each candidate.
        judge ([`EquivalenceJudge`]):
            Judge that extracts the answers and compares them.

    Returns:
        `list[str]`: For each candidate the first answer that its own is equivalent to; `""` where there is none.
    """
    return _canonical_answers(problem, _verdicts(problem, solutions, judge), judge)


def _verdicts(problem: Mapping[str, Any], solutions: Candidates, judge: Judge) -> list[Verdict]:
    nothing = Verdict(verdict="wrong", extracted="", reason="the solution has no steps")
    return [judge.judge(problem, steps) if steps else nothing for steps in solutions]


def _canonical_answers(problem: Mapping[str, Any], verdicts: Sequence[Verdict], judge: EquivalenceJudge) -> list[str]:
    # Answers of different verdicts cannot be equivalent, so a group is right or wrong as a whole, and the costly
    # comparison is asked for distinct texts of one verdict only.
    canonical: dict[tuple[str, str], str] = {}
    for verdict in verdicts:
        key = (verdict.verdict, verdict.extracted)
        if not verdict.extracted or key in canonical:
            continue
        representatives = {text: None for (value, _), text in canonical.items() if value == verdict.verdict}
        canonical[key] = next(
            (text for text in representatives if judge.equivalent(text, verdict.extracted, problem["choices"])),
            verdict.extracted,
        )
    return [canonical.get((verdict.verdict, verdict.extracted), "") for verdict in verdicts]


def build_pools(
    problems: Sequence[Mapping[str, Any]],
    candidates: Sequence[Candidates],
    judge: EquivalenceJudge,
    scores: Sequence[StepScores] | None = None,
) -> list[dict[str, Any]]:
    """
    Build candidate pools: solutions with their canonical answers, their correctness and their step scores.

    Args:
        problems (`Sequence[Mapping[str, Any]]`):
            Problem rows.
        candidates (`Sequence[Sequence[Sequence[str]]]`):
            For each problem the steps of each candidate.
        judge ([`EquivalenceJudge`]):
            Judge of the answers. What it cannot tell is `None` in the column `correct`.
        scores (`Sequence[Sequence[Sequence[float]]]`, *optional*):
            Step scores as [`Scorer.score`] returns them.

    Returns:
        `list[dict]`: Rows of `POOL_FEATURES`.
    """
    all_scores: Iterable[StepScores] = [[] for _ in problems] if scores is None else scores
    pools = []
    for problem, solutions, step_scores in zip(problems, candidates, all_scores, strict=True):
        verdicts = _verdicts(problem, solutions, judge)
        pools.append(
            {
                "problem_id": problem["id"],
                "candidates": [list(steps) for steps in solutions],
                "answers": _canonical_answers(problem, verdicts, judge),
                "correct": [{"right": True, "wrong": False, "unknown": None}[v.verdict] for v in verdicts],
                "step_scores": [list(candidate) for candidate in step_scores],
            }
        )
    return pools
