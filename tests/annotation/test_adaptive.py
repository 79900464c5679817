"""Rollouts until a label is decided: what the documented test promises, on a policy whose values are known."""

import random
from statistics import pstdev

import pytest

from mm_prm.annotation import AnnotationConfig, annotate
from mm_prm.annotation.adaptive import ROLLOUTS_AT_ONCE, is_decided, most_rollouts
from mm_prm.data.features import validate_rows
from tests.annotation.scripted import ScriptedJudge, ScriptedPolicy, make_problem


def grow(policy, judge=None, count=30, **settings):
    config = AnnotationConfig(**{"num_rollouts": 16, "rollout_budget": 400, "adaptive_rollouts": True, **settings})
    problems = [make_problem(f"p{number}") for number in range(count)]
    rows = list(annotate(problems, policy, judge or ScriptedJudge(), config))
    validate_rows("tree", rows)
    return {row["problem_id"]: {**row, "cost": {**row["cost"], "seconds": 0.0}} for row in rows}


@pytest.mark.parametrize("strategy", ["omegaprm", "flat"])
def test_nodes_get_four_rollouts_and_more_only_while_undecided(strategy):
    policy = ScriptedPolicy(p_wrong=0.2, p_recover=0.1, variants=2, num_words=1)
    rows = grow(policy, strategy=strategy)
    most, sizes = most_rollouts(16), set()
    for row in rows.values():
        prefixes = {-1: ()}
        for node in row["nodes"]:
            prefixes[node["node_id"]] = prefixes[node["parent_id"]] + tuple(node["steps"])
        whole = [(prefixes[r["node_id"]], prefixes[r["node_id"]] + tuple(r["steps"]), r) for r in row["rollouts"]]
        for node in row["nodes"][1:]:
            own = [r for r in row["rollouts"] if r["node_id"] == node["node_id"]]
            assert len(own) == node["num_judged"] and len(own) % ROLLOUTS_AT_ONCE == 0 and 4 <= len(own) <= most
            sizes.add(len(own))
            prefix = prefixes[node["node_id"]]
            verdicts = [
                r["verdict"] == "right"
                for start, steps, r in whole
                if steps[: len(prefix)] == prefix and len(start) <= len(prefix) < len(steps)
            ]
            if strategy == "flat":  # OmegaPRM may later send others through a prefix that was decided
                assert is_decided(sum(verdicts), len(verdicts), 16) or len(own) == most
        assert row["cost"]["rollouts"] == len(row["rollouts"]) <= 400
    assert {4, 8} <= sizes and max(sizes) > 8
    assert sum(len(row["nodes"]) for row in rows.values()) > 100


@pytest.mark.parametrize("strategy", ["omegaprm", "flat"])
def test_the_tree_does_not_depend_on_its_company(strategy):
    settings = {"strategy": strategy, "num_rollouts": 8, "rollout_budget": 90, "flat_num_solutions": 8}
    policy = ScriptedPolicy(p_recover=0.1, variants=2)
    alone = grow(policy, trees_in_flight=1, **settings)
    assert alone == grow(policy, trees_in_flight=256, **settings)
    seeds = [(r.problem_id, r.seed + i) for call in policy.calls for r in call for i in range(r.num_rollouts)]
    assert len(set(seeds)) == len(seeds) // 2, "the same ones twice, in two runs, and no other twice"


def test_the_error_bounds_hold():
    draw = random.Random(0)
    for p in (0.1, 0.3, 0.5, 0.9):
        ends, labels = 0, []
        for _ in range(4000):
            num_right = num_judged = 0
            while num_judged < most_rollouts(16) and not is_decided(num_right, num_judged, 16):
                num_right += sum(draw.random() < p for _ in range(ROLLOUTS_AT_ONCE))
                num_judged += ROLLOUTS_AT_ONCE
            ends += num_right == 0
            labels.append(num_right / num_judged)
        assert ends / 4000 <= (1 - p) ** 6 + 0.01
        if p == 0.5:
            between = [label for label in labels if 0 < label < 1]
            assert pstdev(between) <= 1 / (2 * most_rollouts(16) ** 0.5) + 0.005


def test_labels_cost_less():
    policy = ScriptedPolicy(p_wrong=0.3, variants=2)
    fixed, adaptive = grow(policy, adaptive_rollouts=False), grow(policy)

    def cost_of_labels(rows):
        labels = sum(len(row["nodes"]) - 1 for row in rows.values())
        return sum(row["cost"]["rollouts"] - 16 for row in rows.values()) / labels

    assert cost_of_labels(fixed) == 16
    assert cost_of_labels(adaptive) < 12


def test_a_judge_that_cannot_tell_ends_too():
    rows = grow(ScriptedPolicy(), ScriptedJudge(unknown_every=2), count=10)
    assert any(node["num_judged"] < most_rollouts(16) for row in rows.values() for node in row["nodes"])
    assert all(row["status"] == "complete" for row in rows.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"ancestor_compatible": True}, "the ancestor's search has none"), ({"num_rollouts": 4}, "must be at least 8")],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        AnnotationConfig(adaptive_rollouts=True, **settings)
