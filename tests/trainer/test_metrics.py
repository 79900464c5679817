import math

import numpy as np
import pytest
from transformers import EvalPrediction

from mm_prm.trainer import compute_step_metrics, step_metrics


def test_metrics_by_hand():
    scores = np.array([0.9, 0.2, 0.6, 0.4])
    labels = np.array([1.0, 0.0, 0.25, 0.75])
    metrics = step_metrics(scores, labels, np.array([0, 0, 1, 1]))
    assert metrics["num_labels"] == 4
    assert metrics["accuracy"] == 0.5
    assert metrics["brier"] == pytest.approx((0.01 + 0.04 + 0.1225 + 0.1225) / 4)
    entropies = [-math.log(0.9), -math.log(0.8)]
    entropies += [-0.25 * math.log(0.6) - 0.75 * math.log(0.4), -0.75 * math.log(0.4) - 0.25 * math.log(0.6)]
    assert metrics["cross_entropy"] == pytest.approx(sum(entropies) / 4)
    # Pairs (right, wrong): .9 > .2, .9 > .6, .4 > .2 in order, .4 < .6 not
    assert metrics["auc"] == 0.75
    # Within problems: .9 > .2 in order, .4 < .6 not
    assert metrics["auc_within_problems"] == 0.5


def test_knowing_hard_problems_only_shows_in_the_auc_within_problems():
    problems = np.repeat(np.arange(50), 4)
    easy = problems % 2 == 0
    scores = np.where(easy, 0.9, 0.1)
    right_steps = np.tile([0, 0, 0, 1], 50)
    labels = np.where(easy, 1 - right_steps, right_steps).astype(float)
    metrics = step_metrics(scores, labels, problems)
    assert metrics["auc"] == 0.75
    assert metrics["auc_within_problems"] == 0.5


def test_what_is_not_defined_is_left_out():
    assert step_metrics(np.array([]), np.array([]), np.array([])) == {"num_labels": 0}
    one_class = step_metrics(np.array([0.4, 0.6]), np.array([1.0, 1.0]), np.array([0, 0]))
    assert "auc" not in one_class and "auc_within_problems" not in one_class
    across = step_metrics(np.array([0.4, 0.6]), np.array([0.0, 1.0]), np.array([0, 1]))
    assert across["auc"] == 1 and "auc_within_problems" not in across


def test_wrong_steps_calibration_and_first_errors_by_hand():
    # Two solutions of one problem, two of another
    scores = np.array([0.9, 0.45, 0.2, 0.8, 0.9, 0.6, 0.3, 0.2])
    labels = np.array([1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.25, 1.0])
    rows = np.array([0, 0, 0, 1, 2, 2, 2, 3])
    metrics = step_metrics(scores, labels, np.array([7, 7, 7, 7, 9, 9, 9, 9]), rows)
    # Wrong: 2, 5, 6; below 0.5: 1, 2, 6, 7
    assert metrics["f1_wrong"] == pytest.approx(2 * 2 / (3 + 4))
    # On problem 7 any threshold in (0.2, 0.45) is perfect; on 9, wrong are 0.6 and 0.3, below it are 0.3 and 0.2 or 0.2
    assert 0.2 < metrics["threshold"] < 0.45
    found = 1 if metrics["threshold"] > 0.3 else 0
    assert metrics["f1_wrong_calibrated"] == pytest.approx(2 * found / (2 + 1 + found))
    # Solution 0 errs at its third step and seems to at its second; 1 is seen right; 2 is seen late; 3 seems wrong
    assert metrics["first_error_accuracy"] == 0.25
    differences = [(0.9 + 0.9) - 2, 0.45 - 1, (0.2 + 0.2) - 1, 0.8 - 1, 0.6, 0.3 - 0.25]
    assert metrics["calibration_error"] == pytest.approx(sum(map(abs, differences)) / 8)
    assert "first_error_accuracy" not in step_metrics(scores, labels, rows)


def test_padding_does_not_count():
    scores = np.array([[0.9, 0.1, -100], [0.2, np.nan, -100]])
    labels = np.array([[1.0, np.nan, -100], [0.0, np.nan, -100]])
    metrics = compute_step_metrics(EvalPrediction(predictions=scores, label_ids=(labels, np.array([3, 3]))))
    assert metrics["num_labels"] == 2
    assert metrics["accuracy"] == metrics["auc_within_problems"] == 1
