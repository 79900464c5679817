"""Consensus with a judge of steps, and the most informative rows."""

import json

import pyarrow.parquet
import pytest

from mm_prm.data.features import RowError, validate_rows
from mm_prm.data.rows import RowConfig, trees_to_rows
from mm_prm.data.selection import best_share, information_score, path_scores
from mm_prm.embedded import embedded_path


def node(node_id, parent_id, steps, num_right, judge_score=None, num_judged=4):
    kind = "root" if parent_id == -1 else "measured"
    counts = {"num_right": num_right, "num_judged": num_judged, "visits": 0}
    return {
        "node_id": node_id,
        "parent_id": parent_id,
        "steps": steps,
        **counts,
        "kind": kind,
        "judge_score": judge_score,
    }


def tree(nodes, rollouts=(), problem_id="q1"):
    return {
        "problem_id": problem_id,
        "nodes": nodes,
        "rollouts": list(rollouts),
        "strategy": "omegaprm",
        "settings": json.dumps({}),
        "cost": {"rollouts": 0, "prompt_tokens": 0, "generated_tokens": 0, "judge_calls": 0, "seconds": 0.0},
        "status": "complete",
        "reason": "",
    }


def embedded_trees(number):
    return pyarrow.parquet.read_table(embedded_path("mini_trees.parquet")).slice(0, number).to_pylist()


PATHS = {"include_rollouts": "none", "balance": False, "keep_unanimous": True}


def labels(rows):
    return {
        tuple(row["completions"][: place + 1]): label
        for row in rows
        for place, label in enumerate(row["labels"])
        if label is not None
    }


def test_a_prefix_is_as_right_as_its_worst_step():
    chain = [(0.9, 0.9), (0.8, 0.8), (None, None), (0.95, None), (0.3, 0.3), (0.99, 0.3), (None, 0.3)]
    nodes = [node(0, -1, [], 2)]
    nodes += [node(number, number - 1, ["s"], 1, score) for number, (score, _) in enumerate(chain, start=1)]
    # After the unknown step only a wrong one decides.
    assert path_scores(nodes) == {number: expected for number, (_, expected) in enumerate(chain, start=1)}
    assert path_scores(nodes, 0.2)[5] is None


def test_consensus_keeps_labels_on_which_both_agree():
    nodes = [
        node(0, -1, [], 2),
        node(1, 0, ["a"], 3, 0.9),  # both right
        node(2, 1, ["b"], 0, 0.8),  # Monte Carlo wrong, judge right
        node(3, 1, ["c"], 0, 0.1),  # both wrong
        node(4, 3, ["d"], 0, 0.9),  # the step is valid, but what it follows is not: both wrong
        node(5, 1, ["e"], 1, 0.2),  # Monte Carlo right, judge wrong
        node(6, 1, ["f"], 4),  # not known
    ]
    rows, report = trees_to_rows([tree(nodes)], RowConfig(keep="consensus", **PATHS))
    assert labels(rows) == {("a",): 0.75, ("a", "c"): 0.0, ("a", "c", "d"): 0.0}
    assert report["labels_dropped"] == {"disagree": 2, "unknown": 1}
    validate_rows("stepwise", rows)
    # Thresholds of both sides.
    rows, _ = trees_to_rows(
        [tree(nodes)], RowConfig(keep="consensus", judge_threshold=0.1, right_threshold=0.3, **PATHS)
    )
    assert labels(rows) == {("a",): 0.75, ("a", "c"): 0.0, ("a", "c", "d"): 0.0}
    rows, _ = trees_to_rows([tree(nodes)], RowConfig(keep="consensus", judge_threshold=0.15, **PATHS))
    assert labels(rows) == {("a",): 0.75, ("a", "c"): 0.0, ("a", "c", "d"): 0.0, ("a", "e"): 0.25}


def test_the_verdict_on_an_answer_needs_no_second_opinion():
    rollouts = [
        {"node_id": 1, "steps": ["b", "answer"], "verdict": "right", "status": "finished"},
        {"node_id": 1, "steps": ["c", "other answer"], "verdict": "wrong", "status": "finished"},
    ]
    nodes = [node(0, -1, [], 2), node(1, 0, ["a"], 1, 0.9)]
    rows, report = trees_to_rows([tree(nodes, rollouts)], RowConfig(keep="consensus"))
    assert labels(rows) == {("a",): 0.25, ("a", "b", "answer"): 1.0, ("a", "c", "other answer"): 0.0}
    assert report["labels_dropped"] == {"disagree": 0, "unknown": 2}


def test_consensus_needs_a_judge():
    with pytest.raises(ValueError, match=r"no node of the trees has a judge_score; run `mm-prm judge-steps`"):
        trees_to_rows(embedded_trees(2), RowConfig(keep="consensus"))


def test_a_judge_of_monte_carlo_s_opinion_changes_nothing():
    trees = embedded_trees(20)
    for each in trees:
        known = {0: True}
        for one in each["nodes"][1:]:
            known[one["node_id"]] = one["num_right"] > 0
            one["judge_score"] = float(one["num_right"] > 0)
            # A judge that finds a later step right after a wrong one does not undo the wrong one.
            if not known[one["parent_id"]]:
                one["judge_score"], known[one["node_id"]] = 1.0, False
    settings = {"step_values": "measured", "include_rollouts": "none", "balance": False}
    plain, _ = trees_to_rows(trees, RowConfig(**settings))
    rows, report = trees_to_rows(trees, RowConfig(keep="consensus", **settings))
    kept = [
        each
        for each in trees
        if all(
            not (one["num_right"] and not each["nodes"][one["parent_id"]]["num_right"]) for one in each["nodes"][1:]
        )
    ]
    assert kept  # trees in which no step is right after a wrong one: in these both agree on everything
    ids = {each["problem_id"] for each in kept}
    assert [row for row in rows if row["problem_id"] in ids] == [row for row in plain if row["problem_id"] in ids]
    assert report["labels_dropped"]["unknown"] == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 0.5, 0.0, 0.0], (0.25 + 0.05) * 0.75),
        ([1.0, None, 1.0], 0.05),
        ([0.5], 0.025),
        ([0.0, 0.0], 0.05),  # no step is right: R is 1, as in the paper's program
        ([0.125, 0.0], (0.25 + 0.05) * 0.125),
    ],
)
def test_information_score(values, expected):
    assert information_score(values) == pytest.approx(expected)


def test_the_threshold_says_what_is_right():
    assert information_score([0.75, 0.25], 0.5) == pytest.approx((0.25 + 0.05) * 0.75)


def test_best_share_in_order_and_of_equals_the_first():
    assert best_share([1, 3, 2, 3, 0], 0.4) == [1, 3]
    assert best_share([1, 1, 1, 1], 0.5) == [0, 1]
    assert best_share([1, 2], 0.001) == [1]
    assert len(best_share([0.0] * 100, 0.07)) == 7
    assert best_share([], 0.5) == []


def test_the_most_informative_tenth_of_the_embedded_trees():
    trees = embedded_trees(60)
    everything, whole = trees_to_rows(trees)
    rows, report = trees_to_rows(trees, RowConfig(keep_share=0.1))
    assert len(rows) == len(everything) // 10 == report["rows"]
    assert report["rows_before_selection"] == whole["rows"] == len(everything)
    assert report["rows_right"] + report["rows_wrong"] == len(rows)
    scores = [information_score(row["labels"]) for row in everything]
    assert sorted(map(information_score, (row["labels"] for row in rows))) == sorted(scores)[-len(rows) :]
    assert [row for row in everything if row in rows] == rows
    assert report["labels"] == sum(label is not None for row in rows for label in row["labels"])
    assert report["distinct_labels"] == len({(row["problem_id"], *steps) for row in rows for steps in labels([row])})


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": "best"},
        {"keep_share": 0.0},
        {"keep_share": 1.5},
        {"judge_threshold": 1},
        {"keep": "consensus", "sampler": "ancestor"},
        {"keep_share": 0.5, "sampler": "ancestor"},
    ],
)
def test_bad_settings_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        RowConfig(**settings)


def test_a_score_outside_of_probability_is_refused():
    with pytest.raises(RowError, match="judge_score"):
        trees_to_rows([tree([node(0, -1, [], 1), node(1, 0, ["a"], 1, 7.0)])])
