import copy
import json
import pickle

import datasets
import PIL.Image
import pytest

from mm_prm.data.features import FEATURES, TREE_FEATURES, RowError, validate_problem, validate_row, validate_rows


def problem(**changes):
    row = {
        "id": "q1",
        "images": [PIL.Image.new("RGB", (4, 4))],
        "question": "What is x in <image>?",
        "answer": "4",
        "choices": [],
        "answer_type": "integer",
        "source": "test",
        "subject": "algebra",
    }
    return {**row, **changes}


def tree(**changes):
    def node(node_id, parent_id, steps, num_right, kind="measured", judge_score=None):
        counts = {"num_right": num_right, "num_judged": 4, "visits": 1}
        named = {"node_id": node_id, "parent_id": parent_id, "steps": steps}
        return {**named, **counts, "kind": kind, "judge_score": judge_score}

    row = {
        "problem_id": "q1",
        "nodes": [node(0, -1, [], 2, "root"), node(1, 0, ["a", "b"], 1, judge_score=0.25), node(2, 1, ["c"], 0)],
        "rollouts": [{"node_id": 1, "steps": ["c", "x = 4"], "verdict": "right", "status": "finished"}],
        "strategy": "omegaprm",
        "settings": json.dumps({"seed": 1}),
        "cost": {
            "rollouts": 12,
            "prompt_tokens": 10,
            "generated_tokens": 90,
            "judge_calls": 12,
            "judge_cache_hits": 2,
            "seconds": 0.5,
        },
        "status": "complete",
        "reason": "",
    }
    return {**row, **changes}


def stepwise(**changes):
    row = {
        "problem_id": "q1",
        "prompt": "What is x?",
        "completions": ["a", "b"],
        "labels": [None, 0.25],
        "num_right": [None, 1],
        "num_judged": [None, 4],
        "tree_id": "q1",
        "path": [0, 1],
    }
    return {**row, **changes}


def pool(**changes):
    row = {
        "problem_id": "q1",
        "candidates": [["a", "4"], []],
        "answers": ["4", ""],
        "correct": [True, None],
        "step_scores": [[0.5, 0.25], []],
    }
    return {**row, **changes}


ROWS = {"problem": problem, "tree": tree, "stepwise": stepwise, "pool": pool}


@pytest.mark.parametrize("kind", ROWS)
def test_valid_rows_pass_and_survive_arrow(kind):
    row = ROWS[kind]()
    assert validate_rows(kind, [row]) == 1
    dataset = datasets.Dataset.from_list([row], features=FEATURES[kind])
    assert validate_rows(kind, dataset) == 1
    if kind != "problem":
        assert dataset[0] == row


@pytest.mark.parametrize("kind", ROWS)
def test_every_missing_and_every_unknown_field_is_named(kind):
    for column in ROWS[kind]():
        row = ROWS[kind]()
        del row[column]
        with pytest.raises(RowError, match=f"{column} = None: the field is missing"):
            validate_row(kind, row)
    with pytest.raises(RowError, match="colour = 'red': there is no such field"):
        validate_row(kind, ROWS[kind](colour="red"))


@pytest.mark.parametrize("kind", ROWS)
def test_every_field_of_a_wrong_type_is_named(kind):
    for column in ROWS[kind]():
        for wrong in (object(), None, {"a": 1}, [object()]):
            with pytest.raises(RowError) as caught:
                validate_row(kind, ROWS[kind](**{column: wrong}))
            # Without a name the row goes by its number; the field is named in any case.
            assert caught.value.field.startswith(column)


def changed(build, path, value):
    row = copy.deepcopy(build())
    target = row
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return row


@pytest.mark.parametrize(
    ("kind", "path", "value", "field"),
    [
        ("problem", ["id"], " ", "id"),
        ("problem", ["answer"], "", "answer"),
        ("problem", ["answer_type"], "number", "answer_type"),
        ("problem", ["choices"], ["a", None], r"choices\[1\]"),
        ("problem", ["images"], ["x.png"], r"images\[0\]"),
        ("problem", ["images"], [{"bytes": None, "path": None}], r"images\[0\]"),
        ("problem", ["question"], "half \ud800", "question"),
        ("tree", ["nodes"], [], "nodes"),
        ("tree", ["nodes", 1, "parent_id"], 7, r"nodes\[1\].parent_id"),
        ("tree", ["nodes", 0, "parent_id"], 0, r"nodes\[0\].parent_id"),
        ("tree", ["nodes", 2, "node_id"], 1, r"nodes\[2\].node_id"),
        ("tree", ["nodes", 1, "kind"], "root", r"nodes\[1\].kind"),
        ("tree", ["nodes", 0, "kind"], "measured", r"nodes\[0\].kind"),
        ("tree", ["nodes", 0, "steps"], ["a"], r"nodes\[0\].steps"),
        ("tree", ["nodes", 2, "steps"], [], r"nodes\[2\].steps"),
        ("tree", ["nodes", 2, "steps"], ["c "], r"nodes\[2\].steps\[0\]"),
        ("tree", ["nodes", 2, "num_right"], 5, r"nodes\[2\].num_right"),
        ("tree", ["nodes", 2, "num_right"], True, r"nodes\[2\].num_right"),
        ("tree", ["nodes", 2, "num_right"], 1.0, r"nodes\[2\].num_right"),
        ("tree", ["nodes", 2, "judge_score"], 1.5, r"nodes\[2\].judge_score"),
        ("tree", ["nodes", 2, "judge_score"], float("nan"), r"nodes\[2\].judge_score"),
        ("tree", ["nodes", 2, "judge_score"], "0.5", r"nodes\[2\].judge_score"),
        ("tree", ["nodes", 0, "judge_score"], 0.5, r"nodes\[0\].judge_score"),
        ("tree", ["nodes", 2, "visits"], -1, r"nodes\[2\].visits"),
        ("tree", ["nodes", 2, "visits"], 2**31, r"nodes\[2\].visits"),
        ("tree", ["rollouts", 0, "node_id"], 9, r"rollouts\[0\].node_id"),
        ("tree", ["rollouts", 0, "verdict"], "yes", r"rollouts\[0\].verdict"),
        ("tree", ["rollouts", 0, "status"], "done", r"rollouts\[0\].status"),
        ("tree", ["settings"], "{", "settings"),
        ("tree", ["settings"], "[]", "settings"),
        ("tree", ["strategy"], "beam", "strategy"),
        ("tree", ["status"], "failed", "reason"),
        ("tree", ["cost", "seconds"], float("nan"), "cost.seconds"),
        ("tree", ["cost", "judge_calls"], -1, "cost.judge_calls"),
        ("stepwise", ["completions"], [], "completions"),
        ("stepwise", ["labels"], [0.5], "labels"),
        ("stepwise", ["labels"], [None, 1.5], r"labels\[1\]"),
        ("stepwise", ["labels"], [None, float("nan")], r"labels\[1\]"),
        ("stepwise", ["num_right"], [None, None], r"num_right\[1\]"),
        ("stepwise", ["num_right"], [None, 5], r"num_right\[1\]"),
        ("stepwise", ["num_judged"], [0, 4], r"num_right\[0\]"),
        ("pool", ["answers"], ["4"], "answers"),
        ("pool", ["correct"], [1, None], r"correct\[0\]"),
        ("pool", ["step_scores"], [[0.5], []], r"step_scores\[0\]"),
        ("pool", ["step_scores"], [[0.5, 2.0], []], r"step_scores\[0\]\[1\]"),
        ("pool", ["candidates", 0, 1], "", r"candidates\[0\]\[1\]"),
    ],
)
def test_a_bad_value_is_named_with_row_and_field(kind, path, value, field):
    row = changed(ROWS[kind], path, value)
    with pytest.raises(RowError, match=rf"^{kind} .*{field} = ") as caught:
        validate_rows(kind, [row])
    assert "q1" in str(caught.value) or "row 0" in str(caught.value)


def test_label_without_a_judged_rollout():
    with pytest.raises(RowError, match="none of the step's rollouts was judged"):
        validate_row("stepwise", stepwise(num_right=[None, 0], num_judged=[None, 0]))


def test_unscored_pools_and_skipped_trees_are_valid():
    validate_row("pool", pool(step_scores=[]))
    validate_row("tree", tree(nodes=[], rollouts=[], status="skipped", reason="image missing"))


def test_trees_of_earlier_versions_load_as_they_did(tmp_path):
    old, unknown, before = tree(), tree(), copy.deepcopy(TREE_FEATURES)
    for node in old["nodes"]:
        del node["judge_score"]
    for node in unknown["nodes"]:
        node["judge_score"] = None
    del old["cost"]["judge_cache_hits"], before["nodes"].feature["judge_score"], before["cost"]["judge_cache_hits"]
    unknown["cost"]["judge_cache_hits"] = None
    validate_row("tree", old)
    table = datasets.Dataset.from_list([old], features=before)
    assert validate_rows("tree", table) == 1
    assert table.cast(TREE_FEATURES)[0] == unknown
    table.to_json(tmp_path / "trees.jsonl")
    cache = str(tmp_path / "cache")
    read = datasets.Dataset.from_json(str(tmp_path / "trees.jsonl"), features=TREE_FEATURES, cache_dir=cache)
    assert read[0] == unknown
    table.to_parquet(tmp_path / "trees.parquet")
    assert validate_rows("tree", datasets.Dataset.from_parquet(str(tmp_path / "trees.parquet"), cache_dir=cache)) == 1


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("stepwise", lambda: stepwise(labels=[10**400, None])),
        ("stepwise", lambda: stepwise(labels=[float("nan"), None])),
        ("pool", lambda: pool(step_scores=[[10**400, 0.5], [0.5]])),
        ("tree", lambda: tree(cost={**tree()["cost"], "seconds": -(10**400)})),
    ],
)
def test_numbers_that_no_float_holds_are_named(kind, row):
    with pytest.raises(RowError, match="must be a finite number"):
        validate_row(kind, row())


def test_duplicates_name_both_rows():
    with pytest.raises(RowError, match="problem row 2: id = 'q1': already used by row 0"):
        validate_rows("problem", [problem(), problem(id="q2"), problem()])
    with pytest.raises(RowError, match="tree row 1: problem_id = 'q1': already used by row 0"):
        validate_rows("tree", [tree(), tree()])
    assert validate_rows("stepwise", [stepwise(), stepwise()]) == 2


def test_a_question_may_be_in_the_picture_only():
    validate_problem(problem(question=""))
    with pytest.raises(RowError, match="question"):
        validate_problem(problem(question="", images=[]))


def test_unknown_kind_and_rows_that_are_no_rows():
    with pytest.raises(ValueError, match="use one of problem, tree"):
        validate_rows("problems", [problem()])
    with pytest.raises(RowError, match="row 1: row = 'x'"):
        validate_rows("problem", [problem(), "x"])


def test_errors_travel_between_processes():
    with pytest.raises(RowError) as caught:
        validate_problem(problem(answer=""))
    copied = pickle.loads(pickle.dumps(caught.value))
    assert str(copied) == str(caught.value)
    assert copied.field == "answer"
