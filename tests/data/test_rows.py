import copy
import json
import pickle
import shutil
from pathlib import Path

import datasets
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_prm.cli import main
from mm_prm.data.features import PROBLEM_FEATURES, STEPWISE_FEATURES, RowError, validate_rows
from mm_prm.data.rows import RowConfig, join_problems, trees_to_rows


def node(node_id, parent_id, steps, num_right, num_judged=4):
    kind = "root" if parent_id == -1 else "measured"
    counts = {"num_right": num_right, "num_judged": num_judged, "visits": 0}
    return {"node_id": node_id, "parent_id": parent_id, "steps": steps, **counts, "kind": kind}


def rollout(node_id, steps, verdict, status="finished"):
    return {"node_id": node_id, "steps": steps, "verdict": verdict, "status": status}


def tree(nodes, rollouts=(), problem_id="q1", status="complete", reason=""):
    return {
        "problem_id": problem_id,
        "nodes": nodes,
        "rollouts": list(rollouts),
        "strategy": "omegaprm",
        "settings": json.dumps({}),
        "cost": {"rollouts": 0, "prompt_tokens": 0, "generated_tokens": 0, "judge_calls": 0, "seconds": 0.0},
        "status": status,
        "reason": reason,
    }


def problem(problem_id="q1", question="What is x?", colors=("red",)):
    images = [PIL.Image.new("RGB", (4, 4), color) for color in colors]
    texts = {"answer": "4", "choices": [], "answer_type": "", "source": "", "subject": ""}
    return {"id": problem_id, "images": images, "question": question, **texts}


MEASURED = RowConfig(step_values="measured")
PATHS_ONLY = RowConfig(include_rollouts="none", balance=False, keep_unanimous=True)
# Root ── a b ── c          (measured 1/4, then 0/4)
#     └── d                 (measured 3/4)
FORK = [node(0, -1, [], 2), node(1, 0, ["a", "b"], 1), node(2, 1, ["c"], 0), node(3, 0, ["d"], 3)]


def by_text(rows):
    return {" ".join(row["completions"]): row for row in rows}


def test_paths_carry_a_label_where_a_value_was_measured():
    rows, report = trees_to_rows([tree(FORK)], PATHS_ONLY)
    assert len(rows) == 2
    long, short = by_text(rows)["a b c"], by_text(rows)["d"]
    assert long == {
        "problem_id": "q1",
        "prompt": "",
        "completions": ["a", "b", "c"],
        "labels": [None, 0.25, 0.0],
        "num_right": [None, 1, 0],
        "num_judged": [None, 4, 4],
        "tree_id": "q1",
        "path": [0, 1, 2],
    }
    assert (short["labels"], short["path"]) == ([0.75], [0, 3])
    assert report == {
        "trees": 1,
        "trees_kept": 1,
        "trees_dropped": {},
        "rows": 2,
        "solutions": 2,
        "duplicates": 0,
        "left_out": 0,
        "rows_right": 1,
        "rows_wrong": 1,
        "labels": 3,
        "distinct_labels": 3,
    }


def test_a_step_without_a_judged_rollout_has_no_label():
    nodes = [node(0, -1, [], 2), node(1, 0, ["a"], 1), node(2, 1, ["b"], 0, num_judged=0)]
    [row] = trees_to_rows([tree(nodes)], PATHS_ONLY)[0]
    assert (row["completions"], row["labels"], row["num_judged"]) == (["a", "b"], [0.25, None], [4, None])
    assert row["path"] == [0, 1, 2]


def test_rollouts_label_the_step_that_states_the_answer():
    rollouts = [rollout(3, ["x = 4"], "right"), rollout(3, ["so", "x = 5"], "wrong"), rollout(2, ["x = 6"], "wrong")]
    rows, _ = trees_to_rows([tree(FORK, rollouts)], MEASURED)
    texts = by_text(rows)
    assert texts["d x = 4"]["labels"] == [0.75, 1.0]
    assert texts["d x = 4"]["num_judged"] == [4, 1]
    assert texts["d x = 4"]["path"] == [0, 3]
    assert texts["a b c x = 6"]["labels"] == [None, 0.25, 0.0, 0.0]
    assert texts["d so x = 5"]["labels"] == [0.75, None, 0.0]
    assert len(rows) == 3  # "a b c" and "d" are contained


def test_a_rollout_is_labelled_where_it_runs_through_a_node():
    rollouts = [rollout(0, ["a", "b", "z", "x = 4"], "right"), rollout(2, ["x = 5"], "wrong")]
    rows, _ = trees_to_rows([tree(FORK, rollouts)], MEASURED)
    row = by_text(rows)["a b z x = 4"]
    assert row["labels"] == [None, 0.25, None, 1.0]
    assert row["path"] == [0, 1]


def test_pooled_rollouts_count_at_every_step_they_pass_through():
    rollouts = [
        rollout(0, ["a", "b", "z", "x = 4"], "right"),
        rollout(0, ["a", "y", "x = 5"], "wrong"),
        rollout(0, ["a", "y", "x = 6"], "unknown"),
        rollout(1, ["z", "x = 7"], "wrong"),
        rollout(2, ["x = 5"], "wrong"),
    ]
    texts = by_text(trees_to_rows([tree(FORK, rollouts)])[0])
    # "a": two rollouts from the root; "a b": one more beside the node's own four; "a b z": one each way
    assert texts["a b z x = 4"]["num_right"] == [1, 2, 1, 1]
    assert texts["a b z x = 4"]["num_judged"] == [2, 5, 2, 1]
    assert texts["a b z x = 7"]["labels"] == [0.5, 0.4, 0.5, 0.0]
    assert texts["a b c x = 5"]["num_judged"] == [2, 5, 4, 1]


def test_unknown_unfinished_and_unparsable_rollouts_give_nothing():
    rollouts = [
        rollout(3, ["x = 4"], "unknown"),
        rollout(3, ["x = 5"], "wrong", status="length"),
        rollout(3, ["x = 6"], "wrong", status="unparsable"),
    ]
    assert set(by_text(trees_to_rows([tree(FORK, rollouts)])[0])) == {"a b c", "d"}


def test_the_verdict_on_a_finished_solution_is_certain():
    nodes = [*FORK, node(4, 3, ["x = 4"], 2)]  # sent on from a right answer, half of the rollouts changed it
    rows, _ = trees_to_rows([tree(nodes, [rollout(3, ["x = 4"], "right")])])
    row = by_text(rows)["d x = 4"]
    assert (row["labels"], row["num_judged"]) == ([0.75, 1.0], [4, 1])


def test_nodes_with_the_same_text_are_measured_together_and_their_path_occurs_once():
    nodes = [node(0, -1, [], 2), node(1, 0, ["a"], 1), node(2, 0, ["a"], 3), node(3, 0, ["b"], 0)]
    rows, report = trees_to_rows([tree(nodes)], PATHS_ONLY)
    assert sorted(by_text(rows)) == ["a", "b"]
    assert (by_text(rows)["a"]["num_right"], by_text(rows)["a"]["num_judged"]) == ([4], [8])
    assert report["solutions"] == 2


def test_a_row_that_says_nothing_new_is_left_out():
    rollouts = [rollout(2, ["x = 5"], "wrong"), rollout(0, ["x = 4"], "right"), rollout(3, ["x = 4"], "right")]
    rows, report = trees_to_rows([tree(FORK, rollouts)], RowConfig(balance=False))
    # "a b c" and "d" are contained in the solutions that go on from there.
    assert sorted(by_text(rows)) == ["a b c x = 5", "d x = 4", "x = 4"]
    assert report["duplicates"] == 2


@pytest.mark.parametrize("num_right", [0, 4])
def test_unanimous_trees_are_kept_by_a_setting(num_right):
    verdict = "right" if num_right else "wrong"
    nodes = [node(0, -1, [], num_right)]
    rollouts = [rollout(0, [f"x = {index}"], verdict) for index in range(20)]
    rows, report = trees_to_rows([tree(nodes, rollouts)])
    assert (rows, report["trees_dropped"], report["trees_kept"]) == ([], {"unanimous": 1}, 0)
    config = RowConfig(keep_unanimous=True, rollouts_per_node=20, max_rows_per_tree=5)
    rows, _ = trees_to_rows([tree(nodes, rollouts)], config)
    assert [row["labels"] for row in rows] == [[float(num_right > 0)]] * 3


def test_trees_are_dropped_by_reason():
    trees = [
        tree([], problem_id="s", status="skipped", reason="no image"),
        tree(FORK, problem_id="f", status="failed", reason="server gone"),
        tree([node(0, -1, [], 2)], problem_id="n"),
        tree([node(0, -1, [], 2), node(1, 0, ["a"], 0)], problem_id="o"),
        tree(FORK, problem_id="k"),
    ]
    rows, report = trees_to_rows(trees)
    assert {row["problem_id"] for row in rows} == {"k"}
    assert report["trees_dropped"] == {"failed": 1, "no_labels": 1, "one_sided": 1, "skipped": 1}
    assert (report["trees"], report["trees_kept"]) == (5, 1)


def test_threshold_decides_what_ends_right():
    _, low = trees_to_rows([tree(FORK)], PATHS_ONLY)
    _, high = trees_to_rows([tree(FORK)], RowConfig(**{**vars(PATHS_ONLY), "right_threshold": 0.75}))
    assert (low["rows_right"], high["rows_right"]) == (1, 0)


def test_prompts_come_from_the_problems():
    rows, _ = trees_to_rows([tree(FORK)], problems=[problem()])
    assert {row["prompt"] for row in rows} == {"What is x?"}
    with pytest.raises(RowError, match="problem_id = 'q2': there is no problem with this id"):
        trees_to_rows([tree(FORK, problem_id="q2")], problems=[problem()])


def test_bad_trees_are_named():
    with pytest.raises(RowError, match="tree row 1: problem_id = 'q1': a problem has one tree"):
        trees_to_rows([tree(FORK), tree(FORK)])
    broken = copy.deepcopy(FORK)
    broken[1]["num_right"] = 9
    with pytest.raises(RowError, match=r"nodes\[1\].num_right = 9"):
        trees_to_rows([tree(broken)])


@pytest.mark.parametrize(
    "wrong",
    [{"max_rows_per_tree": 0}, {"rollouts_per_node": 0}, {"right_threshold": 1.0}, {"include_rollouts": "all"}],
)
def test_bad_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RowConfig(**wrong)


steps = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=3)


@st.composite
def random_trees(draw):
    nodes = [node(0, -1, [], draw(st.integers(0, 4)))]
    for node_id in range(1, draw(st.integers(0, 12)) + 1):
        num_judged = draw(st.sampled_from([0, 1, 4]))
        parent = draw(st.integers(0, node_id - 1))
        nodes.append(node(node_id, parent, draw(steps), draw(st.integers(0, num_judged)), num_judged))
    rollouts = [
        rollout(
            draw(st.integers(0, len(nodes) - 1)),
            draw(steps),
            draw(st.sampled_from(["right", "wrong", "unknown"])),
            draw(st.sampled_from(["finished", "finished", "length"])),
        )
        for _ in range(draw(st.integers(0, 12)))
    ]
    return tree(nodes, rollouts)


configs = st.builds(
    RowConfig,
    max_rows_per_tree=st.integers(1, 20),
    balance=st.booleans(),
    right_threshold=st.sampled_from([0.0, 0.5]),
    keep_unanimous=st.booleans(),
    include_rollouts=st.sampled_from(["none", "balanced"]),
    rollouts_per_node=st.integers(1, 3),
    step_values=st.sampled_from(["pooled", "measured"]),
    seed=st.integers(0, 3),
)


def last_label(row):
    return [label for label in row["labels"] if label is not None][-1]


@settings(deadline=None)
@given(tree=random_trees(), config=configs)
def test_rows_of_any_tree(tree, config):
    rows, report = trees_to_rows([tree], config)
    validate_rows("stepwise", rows)
    assert len(rows) <= config.max_rows_per_tree
    assert len({tuple(row["completions"]) for row in rows}) == len(rows)
    right = sum(last_label(row) > config.right_threshold for row in rows)
    if config.balance and right not in (0, len(rows)):
        assert abs(2 * right - len(rows)) <= 1
    assert (report["rows"], report["rows_right"]) == (len(rows), right)
    assert report["rows"] + report["duplicates"] + report["left_out"] == report["solutions"]
    assert report["labels"] == sum(label is not None for row in rows for label in row["labels"])

    prefixes = {-1: []}
    for node in tree["nodes"]:
        prefixes[node["node_id"]] = prefixes[node["parent_id"]] + node["steps"]
    judged, passing = {}, {}
    for entry in tree["rollouts"]:
        if entry["status"] == "finished" and entry["verdict"] != "unknown":
            start = len(prefixes[entry["node_id"]])
            text = tuple(prefixes[entry["node_id"]] + entry["steps"])
            verdict = float(entry["verdict"] == "right")
            if config.include_rollouts != "none":
                judged.setdefault(text, verdict)
            if config.step_values == "pooled":
                for end in range(start + 1, len(text) + 1):
                    passing.setdefault(text[:end], []).append(verdict)
    for row in rows:
        assert row["path"][0] == 0
        for index, label in enumerate(row["labels"]):
            prefix = row["completions"][: index + 1]
            same = [node for node in tree["nodes"] if prefixes[node["node_id"]] == prefix]
            through = passing.get(tuple(prefix), [])
            num_judged = sum(node["num_judged"] for node in same) + len(through)
            if tuple(prefix) in judged:
                assert label == judged[tuple(prefix)]
            elif num_judged:
                num_right = sum(node["num_right"] for node in same) + sum(through)
                assert label == pytest.approx(num_right / num_judged)
            else:
                assert label is None


@settings(deadline=None)
@given(tree=random_trees())
def test_without_limits_every_measured_value_is_in_some_row(tree):
    rows, report = trees_to_rows([tree], RowConfig(max_rows_per_tree=1000, balance=False, keep_unanimous=True))
    prefixes = {-1: ()}
    for node in tree["nodes"]:
        prefixes[node["node_id"]] = prefixes[node["parent_id"]] + tuple(node["steps"])
    measured = {prefixes[node["node_id"]] for node in tree["nodes"] if node["num_judged"]} - {()}
    labelled = {
        tuple(row["completions"][: index + 1])
        for row in rows
        for index, label in enumerate(row["labels"])
        if label is not None
    }
    assert measured <= labelled
    assert report["distinct_labels"] == len(labelled)
    assert report["left_out"] == 0


@settings(deadline=None, max_examples=30)
@given(tree=random_trees(), other=random_trees(), config=configs)
def test_rows_of_a_tree_depend_on_no_other_tree(tree, other, config):
    other["problem_id"] = "q2"
    alone, _ = trees_to_rows([tree], config)
    together, _ = trees_to_rows([other, tree], config)
    assert [row for row in together if row["problem_id"] == "q1"] == alone


def test_the_seed_chooses():
    rollouts = [rollout(0, [f"x = {index}"], "right" if index % 2 else "wrong") for index in range(40)]

    def texts(seed):
        config = RowConfig(seed=seed, rollouts_per_node=8, max_rows_per_tree=8)
        return sorted(by_text(trees_to_rows([tree(FORK, rollouts)], config)[0]))

    assert texts(1) == texts(1)
    assert len({tuple(texts(seed)) for seed in range(5)}) > 1


@pytest.fixture
def joined(tmp_path):
    problems = [
        problem(colors=("red", "blue")),
        problem("q2", "What is y?", colors=()),
        problem("q3", "z?", ("green",)),
    ]
    problems = datasets.Dataset.from_list(problems, features=PROBLEM_FEATURES)
    trees = [tree(FORK), tree(FORK, problem_id="q2"), tree(FORK, problem_id="q3")]
    return join_problems(trees_to_rows(trees)[0], problems, cache_dir=tmp_path / "cache")


def colors(images):
    return [image.convert("RGB").getpixel((0, 0)) for image in images]


EXPECTED = {"q1": [(255, 0, 0), (0, 0, 255)], "q2": [], "q3": [(0, 128, 0)]}


def test_join_gives_images_and_prompts(joined):
    assert set(joined.column_names) == {*STEPWISE_FEATURES, "images"}
    assert len(joined) == 6
    for row in joined:
        assert colors(row["images"]) == EXPECTED[row["problem_id"]]
        assert row["prompt"] == {"q1": "What is x?", "q2": "What is y?", "q3": "z?"}[row["problem_id"]]
    batch = joined[1:4]
    assert [colors(images) for images in batch["images"]] == [EXPECTED[name] for name in batch["problem_id"]]


def test_join_goes_along_with_what_trainers_do(joined):
    shuffled = pickle.loads(pickle.dumps(joined.shuffle(seed=3).select(range(5))))
    mapped = joined.map(lambda row: {"num_images": len(row["images"])})
    assert mapped["num_images"][:] == [len(EXPECTED[row["problem_id"]]) for row in joined]
    split = joined.train_test_split(test_size=2, seed=0)["test"]
    twice = datasets.concatenate_datasets([joined, mapped])
    for data in (shuffled, mapped, split, twice):
        assert [colors(row["images"]) for row in data] == [EXPECTED[row["problem_id"]] for row in data]
    assert [colors(row["images"]) for row in joined.__getitems__([5, 0])] == [EXPECTED["q3"], EXPECTED["q1"]]
    assert set(joined.select_columns(["images"])[0]) == {"images"}
    assert set(joined.remove_columns(["images"])[0]) == set(STEPWISE_FEATURES)


def test_each_picture_is_written_once_and_the_rows_refer_to_it(joined, tmp_path):
    files = sorted(path.name for path in (tmp_path / "cache" / "mm_prm_images").iterdir())
    assert len(files) == 3
    assert joined.features["images"] == datasets.List(datasets.Image())
    stored = joined.with_format("arrow")[:]["images"].to_pylist()
    assert [len(images) for images in stored] == [len(EXPECTED[name]) for name in joined["problem_id"]]
    assert {Path(image["path"]).name for images in stored for image in images} == set(files)
    assert all(image["bytes"] is None for images in stored for image in images)


def test_saved_rows_hold_their_pictures(joined, tmp_path):
    joined.save_to_disk(tmp_path / "saved")
    shutil.rmtree(tmp_path / "cache")
    loaded = datasets.load_from_disk(tmp_path / "saved")
    assert [colors(row["images"]) for row in loaded] == [EXPECTED[row["problem_id"]] for row in loaded]


def test_join_takes_datasets_of_rows_and_names_what_is_missing(tmp_path):
    problems = datasets.Dataset.from_list([problem()], features=PROBLEM_FEATURES)
    rows, _ = trees_to_rows([tree(FORK)], problems=problems)
    data = join_problems(datasets.Dataset.from_list(rows, features=STEPWISE_FEATURES), problems, cache_dir=tmp_path)
    assert colors(data[0]["images"]) == [(255, 0, 0)]
    rows, _ = trees_to_rows([tree(FORK, problem_id=f"p{index:02}") for index in range(12)])
    with pytest.raises(ValueError, match=r"12 problems of the rows are not in the problem table: 'p00', .*'p09', …"):
        join_problems(rows, problems)


def test_join_refuses_rows_made_from_another_question():
    rows, _ = trees_to_rows([tree(FORK)], problems=[problem(question="What was x?")])
    problems = datasets.Dataset.from_list([problem()], features=PROBLEM_FEATURES)
    with pytest.raises(RowError, match=r"prompt = 'What was x.*question of problem 'q1' reads otherwise"):
        join_problems(rows, problems)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no trees"),
        ('{"question": "q"}', "question = 'q': there is no such field"),
        ("[1, 2]", "must be a mapping"),
        ('{"problem_id": ["a"]}', "the field is missing"),
    ],
)
@pytest.mark.parametrize("with_problems", [False, True])
def test_the_command_names_what_is_no_tree_in_one_line(content, message, with_problems, tmp_path, capsys):
    trees, problems, output = tmp_path / "trees.jsonl", tmp_path / "problems.json", tmp_path / "rows.parquet"
    trees.write_text(content)
    good = {"id": "a", "question": "How many?", "correct_answer": "5"}
    problems.write_text(json.dumps([good, {**good, "id": "b", "correct_answer": ""}]))
    options = ["--problems", str(problems), "--on_bad_row", "skip"] if with_problems else []
    assert main(["rows", "--trees", str(trees), "--output", str(output), *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"mm-prm rows: {trees}: ") and message in error
    assert not output.exists()
