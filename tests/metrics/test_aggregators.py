"""Aggregators are total: every list of step scores gives one comparable number."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_prm.metrics.best_of_n.best_of_n import AGGREGATORS, EPSILON

probabilities = st.floats(0.0, 1.0, allow_nan=False)


def test_values_of_two_steps():
    scores = [0.8, 0.5]
    expected = {
        "min": 0.5,
        "last": 0.5,
        "product": 0.4,
        "mean": 0.65,
        "max": 0.8,
        "sum_logprob": math.log(0.4),
        "sum_logit": math.log(4),
        "mean_odds": 2.5,
    }
    assert {name: aggregate(scores) for name, aggregate in AGGREGATORS.items()} == pytest.approx(expected)


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("scores", [[], [math.nan], [0.9, math.nan], [None, 0.9]])
def test_unscored_is_below_everything(name, scores):
    assert AGGREGATORS[name](scores) == -math.inf
    assert AGGREGATORS[name]([0.0] * 50) > -math.inf


@pytest.mark.parametrize("name", AGGREGATORS)
@given(scores=st.lists(probabilities, min_size=1, max_size=40))
def test_finite_on_probabilities_with_0_and_1(name, scores):
    assert math.isfinite(AGGREGATORS[name](scores))


@pytest.mark.parametrize("name", AGGREGATORS)
@given(scores=st.lists(probabilities, min_size=1, max_size=10), higher=probabilities, position=st.integers(0, 9))
def test_a_higher_step_never_lowers_the_result(name, scores, higher, position):
    raised = list(scores)
    raised[position % len(scores)] = max(higher, raised[position % len(scores)])
    before, after = AGGREGATORS[name](scores), AGGREGATORS[name](raised)
    assert after >= before - 1e-9 * max(1.0, abs(before))


def test_clipping_keeps_neighbours_of_float32_apart():
    just_below_one = 1.0 - 2**-23
    assert just_below_one < 1.0 - EPSILON
    for name in ("sum_logit", "mean_odds"):
        assert AGGREGATORS[name]([1.0]) > AGGREGATORS[name]([just_below_one])
