"""The faithful mode against recorded runs of the ancestor: same prefixes in the same order, same tree, same values."""

import json
from pathlib import Path

import pytest

from mm_prm.annotation.config import AnnotationConfig
from mm_prm.annotation.omegaprm import OmegaPRM
from mm_prm.annotation.protocols import Rollout
from mm_prm.data.features import RowError, validate_row, validate_rows
from mm_prm.data.rows import RowConfig, trees_to_rows

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


def as_ancestor_rows(rows):
    """Rows in the ancestor's form: `<prm>` after each step that has a label."""
    return [
        {
            "process": "\n\n".join(
                step if label is None else step + "<prm>"
                for step, label in zip(row["completions"], row["labels"], strict=True)
            ),
            "labels": [label for label in row["labels"] if label is not None],
        }
        for row in rows
    ]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_recorded_rows(path):
    recording = json.loads(path.read_text())
    rows, counts = trees_to_rows([replay(recording).to_row()], RowConfig(sampler="ancestor", seed=0))
    validate_rows("stepwise", rows)
    recorded = recording["rows_with_random_seed_0"]
    expected = [{"process": row["process"], "labels": row["labels"]} for row in recorded or []]
    assert as_ancestor_rows(rows) == expected
    assert counts["rows"] == len(expected) == counts["rows_right"] + counts["rows_wrong"]
    assert counts["labels"] == sum(len(row["labels"]) for row in expected)
    assert (counts["trees_dropped"] == {"unanimous": 1}) is (recorded is None)


def test_another_seed_draws_other_rows():
    recording = json.loads(PATHS[3].read_text())
    tree = replay(recording).to_row()
    first, second = (trees_to_rows([tree], RowConfig(sampler="ancestor", seed=seed))[0] for seed in (0, 1))
    assert len(first) == len(second) and first != second


def test_trees_of_the_default_search_are_refused():
    tree = replay(json.loads(PATHS[1].read_text())).to_row()
    tree["settings"] = "{}"
    with pytest.raises(RowError, match="need trees grown with ancestor_compatible"):
        trees_to_rows([tree], RowConfig(sampler="ancestor"))
