"""Selection, groups of equivalent answers, pools."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_prm.annotation.protocols import Verdict
from mm_prm.data.features import validate_rows
from mm_prm.inference import AGGREGATORS, PROBABILITY_AGGREGATORS, build_pools, group_answers, select, vote
from mm_prm.metrics.best_of_n.best_of_n import BestOfN
from mm_prm.metrics.best_of_n.estimates import best_is_tied, best_of_n_curve, majority_curve, majority_is_tied


class FractionJudge:
    """Reads the last word as a number; counts what it is asked."""

    def __init__(self):
        self.comparisons: list[tuple[str, str]] = []

    def judge(self, problem, solution):
        answer = solution[-1].split()[-1].rstrip(".")
        if answer == "nothing":
            return Verdict("unknown", "", "there is no answer")
        right = Fraction(answer) == Fraction(problem["answer"])
        return Verdict("right" if right else "wrong", answer, "compared")

    def equivalent(self, a, b, choices):
        assert choices == []
        self.comparisons.append((a, b))
        return Fraction(a) == Fraction(b)


PROBLEM = {"id": "p", "answer": "1/2", "choices": []}
SOLUTIONS = [[f"It is {answer}."] for answer in ("2/4", "1/3", "0.5", "nothing", "3/9", "1/2", "2/4")] + [[]]


def test_equivalent_answers_share_the_text_of_the_first():
    judge = FractionJudge()
    assert group_answers(PROBLEM, SOLUTIONS, judge) == ["2/4", "1/3", "2/4", "", "1/3", "2/4", "2/4", ""]
    # Only distinct texts of one verdict are compared, each with one representative of a group
    assert judge.comparisons == [("2/4", "0.5"), ("1/3", "3/9"), ("2/4", "1/2")]


def test_pools_are_valid_rows():
    scores = [[[0.5]] * 7 + [[]]]
    [pool] = build_pools([PROBLEM], [SOLUTIONS], FractionJudge(), scores)
    assert pool["correct"] == [True, False, True, None, False, True, True, False]
    assert pool["step_scores"] == scores[0]
    [unscored] = build_pools([PROBLEM], [SOLUTIONS], FractionJudge())
    assert unscored["step_scores"] == []
    assert validate_rows("pool", [pool, unscored]) == 2


def test_the_highest_score_is_selected_and_ties_go_to_the_first():
    candidates = [["a"], ["b", "c"], ["d"], ["b", "c"], ["e"]]
    scores = [[0.2], [0.9, 0.7], [0.7], [0.9, 0.7], []]
    selection = select(candidates, scores, "min")
    assert (selection.index, selection.score, selection.num_tied) == (1, 0.7, 1)  # a copy of the text is no tie
    assert select(candidates, scores, "mean").num_tied == 0


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_an_unscored_candidate_never_wins(aggregator):
    assert select([["x"], ["a", "b"], []], [[math.nan], [0.0, 0.0], []], aggregator).index == 1
    assert select([[], []], [[], []], aggregator) == select([["x"], ["x"]], [[], []], aggregator)


# Candidates without scores, with a NaN, and with scores of exactly 0 and 1. Binary fractions, so that sums are exact in
# whatever order they are taken.
STEP_SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan]), max_size=2)
POOLS = st.lists(st.tuples(st.sampled_from(["", "1", "2", "3"]), STEP_SCORES), min_size=1, max_size=6)


def is_scored(step_scores):
    return bool(step_scores) and not any(map(math.isnan, step_scores))


@given(pool=POOLS, aggregator=st.sampled_from(list(AGGREGATORS)))
def test_selection_is_total_and_that_of_the_metric(pool, aggregator):
    candidates = [[str(number)] * len(scores) for number, (_, scores) in enumerate(pool)]
    scores = [step_scores for _, step_scores in pool]
    chosen = select(candidates, scores, aggregator)
    values = [AGGREGATORS[aggregator](step_scores) for step_scores in scores]
    assert not any(map(math.isnan, values))
    assert chosen.index == values.index(max(values)) and chosen.score == max(values)
    assert is_scored(scores[chosen.index]) == any(map(is_scored, scores))
    correct = [number == chosen.index for number in range(len(pool))]
    assert best_of_n_curve(correct, values, [len(pool)])[0] == 1.0
    assert best_is_tied(values, [tuple(steps) for steps in candidates]) == (chosen.num_tied > 0)


@given(pool=POOLS, aggregator=st.sampled_from([None, *PROBABILITY_AGGREGATORS]))
def test_votes_are_total_and_those_of_the_metric(pool, aggregator):
    answers, scores = [answer for answer, _ in pool], [step_scores for _, step_scores in pool]
    chosen = vote(answers) if aggregator is None else vote(answers, scores, aggregator)
    weights = None if aggregator is None else [AGGREGATORS[aggregator](step_scores) for step_scores in scores]
    correct = [bool(answer) and answer == answers[chosen.index] for answer in answers]
    assert majority_curve(correct, answers, [len(pool)], weights)[0] == any(answers)
    assert majority_is_tied(answers, weights) == (chosen.num_tied > 0)
    if not any(answers):
        assert (chosen.index, chosen.score) == (0, -math.inf)
        return
    assert answers.index(answers[chosen.index]) == chosen.index and answers[chosen.index]
    voters = {answer for answer, step_scores in pool if answer and is_scored(step_scores)}
    if aggregator is not None and voters:
        assert answers[chosen.index] in voters  # one vote with a score, be it 0, outweighs any number without


@settings(max_examples=25, deadline=None)
@given(pools=st.lists(POOLS, min_size=1, max_size=3))
def test_the_metric_is_total(pools):
    """No scores, one score, 0, 1 and NaN give fractions everywhere, and an unscored right answer no credit."""
    metric = BestOfN()
    results = metric.compute(
        correct=[[not is_scored(step_scores) for _, step_scores in pool] for pool in pools],
        step_scores=[[step_scores for _, step_scores in pool] for pool in pools],
        answers=[[answer for answer, _ in pool] for pool in pools],
        num_resamples=4,
        num_subsets=4,
    )
    share_unscored = sum(not any(is_scored(scores) for _, scores in pool) for pool in pools) / len(pools)
    for name, entry in results["best_of_n"].items():
        assert entry["value"] == pytest.approx(share_unscored), name
        assert 0 <= entry["num_ties"] <= len(pools)


def test_votes_by_hand():
    answers, scores = ["", "a", "b", "a", "b", "b"], [[1.0], [0.75], [], [0.75], [0.5], [math.nan]]
    assert (vote(answers).index, vote(answers).score, vote(answers).num_tied) == (2, 3.0, 0)
    weighted = vote(answers, scores, "mean")
    assert (weighted.index, weighted.score, weighted.num_tied) == (1, 1.5, 0)
    tied = vote(["b", "a", "a", "b", ""])
    assert (tied.index, tied.num_tied) == (0, 1)
    assert vote(["a", "b"], [[], [0.0]], "min").index == 1
    with pytest.raises(ValueError, match=r"aggregator = 'sum_logit': votes are weighted by one of min, last"):
        vote(answers, scores, "sum_logit")
    with pytest.raises(ValueError, match="6 answers and 1 lists"):
        vote(answers, [[0.5]])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"aggregator = 'median'.*min, last"):
        select([["a"]], [[0.5]], "median")
    with pytest.raises(ValueError, match="2 candidates and 1 lists"):
        select([["a"], ["b"]], [[0.5]], "min")
    with pytest.raises(ValueError, match="0 candidates"):
        select([], [], "min")
