"""Step metrics on small cases worked out by hand."""

import math

import numpy as np
import pytest

from mm_prm.metrics.steps import best_wrong_step_threshold, brier, within_problem_auc, wrong_step_f1


def test_a_score_that_only_knows_the_problem_is_useless_within():
    labels = [1, 1, 1, 0, 1, 0, 0, 0]
    problem_ids = ["easy"] * 4 + ["hard"] * 4
    result = within_problem_auc(labels, [0.9] * 4 + [0.2] * 4, problem_ids)
    assert result["within_problem_auc"] == 0.5
    assert result["auc"] == 0.75
    assert result["num_pairs"] == 6 and result["num_mixed_problems"] == 2


def test_pairs_are_pooled_over_problems():
    # problem a: 2 of 2 pairs won; problem b: 0 of 1; problem c has no pair
    labels, scores = [1, 1, 0, 1, 0, 1], [0.8, 0.7, 0.6, 0.1, 0.9, 0.5]
    result = within_problem_auc(labels, scores, ["a", "a", "a", "b", "b", "c"])
    assert result["within_problem_auc"] == pytest.approx(2 / 3)
    assert result["num_mixed_problems"] == 2


def test_within_equals_overall_for_one_problem():
    generator = np.random.default_rng(0)
    labels, scores = generator.integers(0, 2, 50), generator.random(50).round(1)
    result = within_problem_auc(labels, scores, ["one"] * 50)
    assert result["within_problem_auc"] == pytest.approx(result["auc"])


def test_one_kind_of_step_has_no_auc():
    assert math.isnan(within_problem_auc([1, 1], [0.5, 0.6], ["a", "a"])["within_problem_auc"])


def test_f1_of_wrong_steps():
    labels, scores = [1, 0, 0, 1], [0.9, 0.2, 0.7, 0.4]  # found: the second and the fourth; wrong: second and third
    assert wrong_step_f1(labels, scores) == 0.5
    assert wrong_step_f1([1, 1], [0.9, 0.8]) == 0.0


def test_best_threshold_beats_every_other():
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 2, 60)
    scores = np.clip(0.5 * labels + generator.random(60) * 0.7, 0, 1).round(2)
    threshold, f1 = best_wrong_step_threshold(labels, scores)
    assert f1 == wrong_step_f1(labels, scores, threshold)
    assert f1 == pytest.approx(max(wrong_step_f1(labels, scores, cut) for cut in np.linspace(0, 1.01, 102)))


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        ([0, 0], [0.5, 0.5], 1.0),
        ([1, 0], [np.nextafter(0.5, 1), 0.5], 1.0),
        ([1, 1], [0.1, 0.2], 0.0),
        ([0], [1.0], 1.0),
    ],
)
def test_best_threshold_at_the_borders(labels, scores, expected):
    assert best_wrong_step_threshold(labels, scores)[1] == expected


def test_brier_takes_soft_labels():
    assert brier([0.25, 1.0], [0.75, 1.0]) == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([1, 0], [0.5], "one length"),
        ([1, 0], [0.5, 1.5], "score at index 1 is 1.5"),
        ([1, float("nan")], [0.5, 0.5], "label at index 1 is nan"),
    ],
)
def test_bad_input_is_named(labels, scores, message):
    with pytest.raises(ValueError, match=message):
        brier(labels, scores)
