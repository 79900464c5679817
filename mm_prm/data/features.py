"""What the rows are: the columns of problems, trees, stepwise rows and candidate pools, and the one validator for all.

Every stage hands on one of these four kinds of row. The `datasets.Features` say the types; [`validate_rows`] checks
those types on plain Python rows, before Arrow turns a mistake into a null or a confusing message, and then what types
cannot say (a tree has one root, a step has one label, counts add up).
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import PIL.Image
from datasets import Features, Image, List, Value

RowKind = Literal["problem", "tree", "stepwise", "pool"]

ANSWER_TYPES = ("", "integer", "decimal", "fraction", "choice", "expression", "text")
NODE_KINDS = ("root", "measured")
STRATEGIES = ("omegaprm", "flat")
TREE_STATUSES = ("complete", "skipped", "failed")
VERDICTS = ("right", "wrong", "unknown")
ROLLOUT_STATUSES = ("finished", "length", "unparsable")

PROBLEM_FEATURES = Features(
    {
        "id": Value("string"),
        "images": List(Image()),
        "question": Value("string"),
        "answer": Value("string"),
        "choices": List(Value("string")),
        "answer_type": Value("string"),
        "source": Value("string"),
        "subject": Value("string"),
    }
)

# A node holds only the steps that it adds to its parent; its prefix is the concatenation along the path from the root.
# `judge_score` is what `mm-prm judge-steps` adds: P(the node's steps are valid) according to a language model.
TREE_FEATURES = Features(
    {
        "problem_id": Value("string"),
        "nodes": List(
            {
                "node_id": Value("int32"),
                "parent_id": Value("int32"),
                "steps": List(Value("string")),
                "num_right": Value("int32"),
                "num_judged": Value("int32"),
                "visits": Value("int32"),
                "kind": Value("string"),
                "judge_score": Value("float32"),
            }
        ),
        "rollouts": List(
            {
                "node_id": Value("int32"),
                "steps": List(Value("string")),
                "verdict": Value("string"),
                "status": Value("string"),
            }
        ),
        "strategy": Value("string"),
        "settings": Value("string"),
        "cost": {
            "rollouts": Value("int64"),
            "prompt_tokens": Value("int64"),
            "generated_tokens": Value("int64"),
            "judge_calls": Value("int64"),
            "judge_cache_hits": Value("int64"),
            "seconds": Value("float64"),
        },
        "status": Value("string"),
        "reason": Value("string"),
    }
)

STEPWISE_FEATURES = Features(
    {
        "problem_id": Value("string"),
        "prompt": Value("string"),
        "completions": List(Value("string")),
        "labels": List(Value("float32")),
        "num_right": List(Value("int32")),
        "num_judged": List(Value("int32")),
        "tree_id": Value("string"),
        "path": List(Value("int32")),
    }
)

POOL_FEATURES = Features(
    {
        "problem_id": Value("string"),
        "candidates": List(List(Value("string"))),
        "answers": List(Value("string")),
        "correct": List(Value("bool")),
        "step_scores": List(List(Value("float32"))),
    }
)

FEATURES: dict[RowKind, Features] = {
    "problem": PROBLEM_FEATURES,
    "tree": TREE_FEATURES,
    "stepwise": STEPWISE_FEATURES,
    "pool": POOL_FEATURES,
}

# The only places where null is a value: a step that was not measured, a candidate whose correctness is unknown.
_NULLABLE = {("stepwise", "labels"), ("stepwise", "num_right"), ("stepwise", "num_judged"), ("pool", "correct")}

# Fields of structs that rows are complete without, because a later stage or version adds them: they may be missing, or null.
_OPTIONAL_FIELDS = {"judge_score", "judge_cache_hits"}

_LARGEST_FLOAT = sys.float_info.max

# The column that names a row in messages.
_NAME_COLUMN: dict[RowKind, str] = {
    "problem": "id",
    "tree": "problem_id",
    "stepwise": "problem_id",
    "pool": "problem_id",
}


class RowError(ValueError):
    """
    A row that is not what its kind demands.

    Args:
        kind (`str`):
            Kind of row: `"problem"`, `"tree"`, `"stepwise"` or `"pool"`.
        row (`str`):
            How the row is called: its problem id, or `row 3` where it has none.
        field (`str`):
            Field at fault, with its place, for example `nodes[2].num_right`.
        value (`Any`):
            The value found there.
        advice (`str`):
            What is wrong with it and what to do.
    """

    def __init__(self, kind: str, row: str, field: str, value: Any, advice: str):
        self.kind, self.row, self.field, self.value, self.advice = kind, row, field, value, advice
        shown = repr(value)
        shown = shown if len(shown) <= 200 else f"{shown[:98]}...{shown[-99:]}"  # a path ends with what matters
        super().__init__(f"{kind} {row}: {field} = {shown}: {advice}")

    def __reduce__(self) -> tuple:
        # The default would rebuild the exception from its message alone; workers send these errors back pickled.
        return type(self), (self.kind, self.row, self.field, self.value, self.advice)


def validate_rows(kind: RowKind, rows: Iterable[Mapping[str, Any]]) -> int:
    """
    Check that every row is a valid row of its kind, and that problems and trees occur once.

    Args:
        kind (`str`):
            One of `"problem"`, `"tree"`, `"stepwise"` and `"pool"`.
        rows (`Iterable[Mapping[str, Any]]`):
            Plain Python rows, or a `datasets.Dataset`.

    Returns:
        `int`: Number of rows checked.

    Raises:
        [`RowError`]: At the first row that is not valid, naming row, field, value and what to do.
    """
    seen: dict[str, int] = {}
    index = -1
    for index, row in enumerate(rows):
        validate_row(kind, row, index)
        if kind in ("problem", "tree"):
            column = _NAME_COLUMN[kind]
            name = row[column]
            if name in seen:
                advice = f"already used by row {seen[name]}; each {kind} needs an id of its own"
                raise RowError(kind, f"row {index}", column, name, advice)
            seen[name] = index
    return index + 1


def validate_row(kind: RowKind, row: Mapping[str, Any], index: int | str = 0) -> None:
    """
    Check one row; see [`validate_rows`].

    Args:
        kind (`str`):
            One of `"problem"`, `"tree"`, `"stepwise"` and `"pool"`.
        row (`Mapping[str, Any]`):
            The row.
        index (`int` or `str`, *optional*, defaults to `0`):
            Its number, or its number and file, used to name it where it has no id.
    """
    if kind not in get_args(RowKind):
        raise ValueError(f"kind = {kind!r}: there is no such kind of row; use one of {', '.join(get_args(RowKind))}")
    if not isinstance(row, Mapping):
        raise RowError(kind, f"row {index}", "row", row, "must be a mapping of column names to values")
    name = row.get(_NAME_COLUMN[kind])
    called = repr(name) if isinstance(name, str) and name.strip() else f"row {index}"

    def fail(field: str, value: Any, advice: str) -> None:
        raise RowError(kind, called, field, value, advice)

    for column, feature in _checked_columns(FEATURES[kind], row, "", fail):
        nullable = (kind, column) in _NULLABLE
        _check_type(feature, row[column], column, nullable, fail)
    if not row[_NAME_COLUMN[kind]].strip():
        fail(_NAME_COLUMN[kind], name, "must not be empty")
    _CHECKS[kind](row, fail)


def validate_problem(row: Mapping[str, Any], index: int | str = 0) -> None:
    """Check one problem row; see [`validate_row`]."""
    validate_row("problem", row, index)


_Fail = Callable[[str, Any, str], None]


def _checked_columns(features: Mapping, row: Mapping, place: str, fail: _Fail) -> Iterable[tuple[str, Any]]:
    """Go through the columns of a struct that hold a value; a missing or an unknown one is an error."""
    for column in row:
        if column not in features:
            fail(f"{place}{column}", row[column], f"there is no such field; the fields are {', '.join(features)}")
    left_out = {column for column in _OPTIONAL_FIELDS if row.get(column) is None}
    for column in features:
        if column not in row and column not in left_out:
            fail(f"{place}{column}", None, "the field is missing")
    return [(column, feature) for column, feature in features.items() if column not in left_out]


def _check_type(feature: Any, value: Any, place: str, nullable: bool, fail: _Fail) -> None:
    """Check `value` against `feature`; `nullable` holds for the items of the outermost list."""
    if isinstance(feature, List):
        if not isinstance(value, list | tuple):
            fail(place, value, "must be a list")
        for number, item in enumerate(value):
            if item is not None or not nullable:
                _check_type(feature.feature, item, f"{place}[{number}]", False, fail)
    elif isinstance(feature, Image):
        _check_image(value, place, fail)
    elif isinstance(feature, Mapping):
        if not isinstance(value, Mapping):
            fail(place, value, "must be a mapping")
        for column, inner in _checked_columns(feature, value, f"{place}.", fail):
            _check_type(inner, value[column], f"{place}.{column}", False, fail)
    else:
        _check_value(feature.dtype, value, place, fail)


def _check_value(dtype: str, value: Any, place: str, fail: _Fail) -> None:
    if dtype == "string":
        if not isinstance(value, str):
            fail(place, value, "must be text")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            fail(place, value, "holds half of a surrogate pair, which no file can store; remove that character")
    elif dtype == "bool":
        if not isinstance(value, bool):
            fail(place, value, "must be true or false")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        fail(place, value, "must be a number")
    elif dtype.startswith("int"):
        bound = 2 ** (int(dtype.removeprefix("int")) - 1)
        if not isinstance(value, int) or not -bound <= value < bound:
            fail(place, value, f"must be a whole number that fits {dtype}")
    elif not -_LARGEST_FLOAT <= value <= _LARGEST_FLOAT:  # whole numbers have no limit in Python; NaN is in no range
        fail(place, value, "must be a finite number")


def _check_image(value: Any, place: str, fail: _Fail) -> None:
    if isinstance(value, PIL.Image.Image):
        return
    if isinstance(value, Mapping) and (value.get("bytes") or value.get("path")):
        return
    fail(place, value, "must be a PIL image or a mapping with `bytes` or `path`")


def _check_choice(value: str, choices: tuple[str, ...], place: str, fail: _Fail) -> None:
    if value not in choices:
        fail(place, value, f"must be one of {', '.join(repr(choice) for choice in choices)}")


def _check_steps(steps: list[str], place: str, fail: _Fail) -> None:
    for number, step in enumerate(steps):
        if not step or step != step.strip():
            fail(f"{place}[{number}]", step, "a step is text without white space around it; use `clean_steps`")


def _check_counts(num_right: int, num_judged: int, place: str, fail: _Fail) -> None:
    if not 0 <= num_right <= num_judged:
        fail(place, num_right, f"must lie between 0 and num_judged, which is {num_judged}")


def _check_length(value: list, length: int, place: str, of: str, fail: _Fail) -> None:
    if len(value) != length:
        fail(place, value, f"has {len(value)} entries but {of} has {length}; they belong together one by one")


def _check_problem(row: Mapping, fail: _Fail) -> None:
    if not row["question"].strip() and not row["images"]:
        fail("question", row["question"], "must not be empty where there is no image either")
    if not row["answer"].strip():
        fail("answer", row["answer"], "must not be empty: without a gold answer nothing can be judged")
    _check_choice(row["answer_type"], ANSWER_TYPES, "answer_type", fail)


def _check_tree(row: Mapping, fail: _Fail) -> None:
    _check_choice(row["strategy"], STRATEGIES, "strategy", fail)
    _check_choice(row["status"], TREE_STATUSES, "status", fail)
    if row["status"] != "complete" and not row["reason"].strip():
        fail("reason", row["reason"], f"a tree with status {row['status']!r} says why")
    try:
        settings = json.loads(row["settings"])
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        fail("settings", row["settings"], "must be a JSON object")
    for column, value in row["cost"].items():
        if value is not None and value < 0:
            fail(f"cost.{column}", value, "must not be negative")
    if row["status"] == "complete" and not row["nodes"]:
        fail("nodes", row["nodes"], "a complete tree has at least its root")

    seen: set[int] = set()
    for number, node in enumerate(row["nodes"]):
        place = f"nodes[{number}]."
        is_root = number == 0
        _check_choice(node["kind"], NODE_KINDS, f"{place}kind", fail)
        if node["node_id"] in seen:
            fail(f"{place}node_id", node["node_id"], "already used by an earlier node of this tree")
        if is_root != (node["kind"] == "root"):
            fail(f"{place}kind", node["kind"], "the first node, and only it, is the root")
        if is_root and node["parent_id"] != -1:
            fail(f"{place}parent_id", node["parent_id"], "the root has no parent: -1")
        if not is_root and node["parent_id"] not in seen:
            fail(f"{place}parent_id", node["parent_id"], "must be the node_id of an earlier node")
        if is_root == bool(node["steps"]):
            fail(f"{place}steps", node["steps"], "the root adds no step, every other node at least one")
        _check_steps(node["steps"], f"{place}steps", fail)
        _check_counts(node["num_right"], node["num_judged"], f"{place}num_right", fail)
        if node["visits"] < 0:
            fail(f"{place}visits", node["visits"], "must not be negative")
        score = node.get("judge_score")
        if score is not None and (is_root or not 0 <= score <= 1):
            fail(f"{place}judge_score", score, "is a probability, between 0 and 1; the root adds no step and has none")
        seen.add(node["node_id"])
    for number, rollout in enumerate(row["rollouts"]):
        place = f"rollouts[{number}]."
        if rollout["node_id"] not in seen:
            fail(f"{place}node_id", rollout["node_id"], "must be the node_id of a node of this tree")
        _check_steps(rollout["steps"], f"{place}steps", fail)
        _check_choice(rollout["verdict"], VERDICTS, f"{place}verdict", fail)
        _check_choice(rollout["status"], ROLLOUT_STATUSES, f"{place}status", fail)


def _check_stepwise(row: Mapping, fail: _Fail) -> None:
    steps = row["completions"]
    if not steps:
        fail("completions", steps, "a row has at least one step")
    _check_steps(steps, "completions", fail)
    for column in ("labels", "num_right", "num_judged"):
        _check_length(row[column], len(steps), column, "completions", fail)
    for number, (label, num_right, num_judged) in enumerate(
        zip(row["labels"], row["num_right"], row["num_judged"], strict=True)
    ):
        if label is not None and not 0 <= label <= 1:
            fail(f"labels[{number}]", label, "must lie between 0 and 1, or be null")
        if (num_right is None) != (num_judged is None):
            fail(f"num_right[{number}]", num_right, "num_right and num_judged are both null or both counts")
        if num_right is not None:
            _check_counts(num_right, num_judged, f"num_right[{number}]", fail)
        if num_judged == 0 and label is not None:
            fail(f"labels[{number}]", label, "must be null: none of the step's rollouts was judged")


def _check_pool(row: Mapping, fail: _Fail) -> None:
    candidates = row["candidates"]
    for number, candidate in enumerate(candidates):
        _check_steps(candidate, f"candidates[{number}]", fail)
    for column in ("answers", "correct"):
        _check_length(row[column], len(candidates), column, "candidates", fail)
    if not row["step_scores"]:
        return  # not scored yet
    _check_length(row["step_scores"], len(candidates), "step_scores", "candidates", fail)
    for number, (scores, candidate) in enumerate(zip(row["step_scores"], candidates, strict=True)):
        place = f"step_scores[{number}]"
        if scores:  # one candidate may be left unscored
            _check_length(scores, len(candidate), place, f"candidates[{number}]", fail)
        for step, score in enumerate(scores):
            if not 0 <= score <= 1:
                fail(f"{place}[{step}]", score, "a step score is a probability, between 0 and 1")


_CHECKS: dict[RowKind, Callable[[Mapping, _Fail], None]] = {
    "problem": _check_problem,
    "tree": _check_tree,
    "stepwise": _check_stepwise,
    "pool": _check_pool,
}
