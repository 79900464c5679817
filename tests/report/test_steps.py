"""What is known of scored steps, and how well scores fit it: numbers worked out by hand."""

import pytest

from mm_prm.report.annotation import annotation_cost
from mm_prm.report.steps import collect_evidence, prefix_values, reliability_bins, reliability_rows, step_labels

from .test_report import tree_row

POOL = {
    "problem_id": "p",
    "candidates": [["a", "b"], ["a", "c"], ["d"], []],
    "answers": ["", "", "", ""],
    "correct": [True, False, None, False],
    "step_scores": [[0.9, 1.0], [0.9, 0.05], [0.5], []],
}


def test_evidence_of_all_three_kinds():
    values = {"p": {("a",): (3, 4), ("d",): (0, 2), ("b",): (1, 1)}}
    solution = {"problem_id": "q", "steps": ["x", "y", "z"], "step_scores": [0.7, 0.6, 0.1], "first_error": 1}
    labelled, measured, ended = collect_evidence([POOL], values, [solution])
    assert (labelled.scores, labelled.targets) == ([0.7, 0.6], [1.0, 0.0])  # what follows the error is neither
    # the same prefix is measured wherever it is scored; a step alone is no prefix
    assert (measured.scores, measured.targets) == ([0.9, 0.9, 0.5], [0.75, 0.75, 0.0])
    assert (ended.scores, ended.targets) == ([0.9, 1.0, 0.9, 0.05], [1.0, 1.0, 0.0, 0.0])  # unknown is not wrong
    assert [each.name for each in collect_evidence([POOL], {}, [])] == ["end of the solution"]
    assert collect_evidence([POOL | {"step_scores": []}], values, []) == []


def test_labels_of_both_kinds():
    assert step_labels({"steps": ["x"] * 3, "first_error": -1}) == [1, 1, 1]
    assert step_labels({"steps": ["x"] * 3, "first_error": 0}) == [-1, 0, 0]
    assert step_labels({"steps": ["x"] * 3, "step_labels": [1, 0, -1]}) == [1, 0, -1]


def test_bins_and_calibration_error():
    ended = collect_evidence([POOL], {}, [])[0]
    low, high = reliability_bins(ended)  # 1.0 belongs to the last bin
    assert (low.count, low.score, low.target["value"]) == (1, 0.05, 0.0)
    assert (high.count, high.score, high.target["value"]) == (3, pytest.approx(2.8 / 3), pytest.approx(2 / 3))
    # one problem: every resample is the same
    assert high.target["low"] == high.target["high"] == pytest.approx(2 / 3)
    row = reliability_rows([ended])[0]
    assert row["ece"] == pytest.approx((0.05 + 3 * (2.8 / 3 - 2 / 3)) / 4)
    assert row["brier"] == pytest.approx((0.01 + 0 + 0.81 + 0.0025) / 4)


def test_intervals_are_over_problems():
    pools = [POOL | {"problem_id": str(number), "correct": [number % 2 == 0] * 4} for number in range(20)]
    target = reliability_bins(collect_evidence(pools, {}, [])[0])[-1].target
    assert target["value"] == 0.5
    # 20 problems of 3 steps that share their end: as wide as for 20 steps, not for 60
    assert 0.15 < target["high"] - 0.5 < 0.3 and 0.15 < 0.5 - target["low"] < 0.3


def test_prefix_values_and_cost_of_a_tree():
    tree = tree_row("p")
    values = prefix_values(tree)
    assert list(values.values()) == [(4, 16), (4, 16)] and () not in values  # the unmeasured node is left out
    assert [len(prefix) for prefix in values] == [2, 4]
    cost = annotation_cost([tree, tree | {"status": "failed", "reason": "x", "nodes": [], "rollouts": []}])
    assert cost.trees == {"complete": 1, "failed": 1} and cost.verdicts == {"wrong": 1, "unknown": 1}
    assert cost.rollouts_per_label == [24.0] and cost.mc_values == [0.25, 0.25]
    assert cost.rows()[0] == ("rollouts", 96.0, 48.0) and cost.rows()[-1] == ("seconds", 2.0, 1.0)
    assert annotation_cost([]).rows()[0] == ("rollouts", 0.0, None)
