"""Selection, groups of equivalent answers, pools."""

import math
from fractions import Fraction

import pytest

from mm_prm.annotation.protocols import Verdict
from mm_prm.data.features import validate_rows
from mm_prm.inference import AGGREGATORS, build_pools, group_answers, select


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


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"aggregator = 'median'.*min, last"):
        select([["a"]], [[0.5]], "median")
    with pytest.raises(ValueError, match="2 candidates and 1 lists"):
        select([["a"], ["b"]], [[0.5]], "min")
    with pytest.raises(ValueError, match="0 candidates"):
        select([], [], "min")
