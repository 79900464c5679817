"""The faithful mode against recorded runs of the ancestor: same prefixes in the same order, same tree, same values."""

import json
from pathlib import Path

import pytest

from mm_prm.annotation.config import AnnotationConfig
from mm_prm.annotation.omegaprm import OmegaPRM
from mm_prm.annotation.protocols import Rollout
from mm_prm.data.features import validate_row

RECORDINGS = Path(__file__).parents[2].parent / "shared" / "data" / "ancestor_reference"
PATHS = sorted(RECORDINGS.glob("search_*.json"))

pytestmark = pytest.mark.skipif(not PATHS, reason=f"the recorded runs are not here: {RECORDINGS}")


def strip(rollout):
    return [step.strip() for step in rollout]


def replay(recording):
    config = AnnotationConfig(ancestor_compatible=True, **recording["settings"])
    search = OmegaPRM(recording["question"], config)
    for number, call in enumerate(recording["calls"]):
        requests = search.requests()
        assert [list(request.prefix) for request in requests] == [call["prefix"]], f"call {number}"
        rollouts = [Rollout(tuple(strip(steps)), "finished", 1) for steps in call["rollouts"]]
        verdicts = ["right" if verdict else "wrong" for verdict in call["verdicts"]]
        assert not search.done
        search.receive(requests[0], rollouts, verdicts)
    assert search.done and search.requests() == []
    return search


def as_ancestor_tree(row, node_id=0):
    """The ancestor's nested form of a tree row; it keeps rollouts of one text once."""
    node = row["nodes"][node_id]
    rollouts = [rollout for rollout in row["rollouts"] if rollout["node_id"] == node_id]
    texts = {
        right: list(dict.fromkeys(tuple(r["steps"]) for r in rollouts if (r["verdict"] == "right") is right))
        for right in (True, False)
    }
    return {
        "partial_solution": node["steps"],
        "mc_value": node["num_right"] / node["num_judged"],
        "visit_count": node["visits"],
        "correct_rollouts": [list(steps) for steps in texts[True]],
        "incorrect_rollouts": [list(steps) for steps in texts[False]],
        "children": [
            as_ancestor_tree(row, child["node_id"]) for child in row["nodes"] if child["parent_id"] == node_id
        ],
    }


def stripped_tree(tree):
    return {
        "partial_solution": strip(tree.get("partial_solution", [])),
        "mc_value": tree["mc_value"],
        "visit_count": tree["visit_count"],
        "correct_rollouts": [strip(rollout) for rollout in tree["correct_rollouts"]],
        "incorrect_rollouts": [strip(rollout) for rollout in tree["incorrect_rollouts"]],
        "children": [stripped_tree(child) for child in tree["children"]],
    }


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_recorded_run(path):
    recording = json.loads(path.read_text())
    search = replay(recording)
    row = search.to_row()
    validate_row("tree", row)
    assert search.search_count == recording["search_count"]
    assert row["cost"]["rollouts"] == recording["total_rollouts"]
    assert as_ancestor_tree(row) == stripped_tree(recording["tree"])
