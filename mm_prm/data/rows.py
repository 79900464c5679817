"""Trees → stepwise rows: the solutions in a tree, with a label at every step whose value is known.

A solution is a path from the root to a leaf, or a finished rollout (the path to its node and what the policy wrote
from there). Its step i has a label where a node's prefix ends with that step, and then the label is that node's
mc_value = num_right / num_judged. The last step of a finished rollout has the certain label 1 or 0: it states the
answer, and Best-of-N scores it, so that it must occur in training.

Of all solutions of a tree those are chosen, right and wrong in balance, that bring the most labels that no solution
chosen before has brought. A solution that brings none is left out: its text and its labels are contained in the others.
"""

import hashlib
import itertools
import os
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets

from .ancestor_rows import ancestor_rows
from .features import STEPWISE_FEATURES, RowError, validate_row
from .selection import Steps, best_share, information_score, path_scores, without_consensus
from .text import question_text


@dataclass
class RowConfig:
    """
    How trees become rows.

    Args:
        max_rows_per_tree (`int`, *optional*, defaults to `16`):
            Largest number of rows of one tree.
        balance (`bool`, *optional*, defaults to `True`):
            Whether the rows of a tree that end right and those that end wrong are kept equal in number (they differ by
            at most one). What a row ends with is its last label.
        right_threshold (`float`, *optional*, defaults to `0.0`):
            A row ends right if its last label lies above this value.
        keep_unanimous (`bool`, *optional*, defaults to `False`):
            Whether to keep trees in which all rollouts from the root ended alike, and trees that have rows of one kind
            only. They say how hard the problem is rather than which step is wrong. With `balance`, such a tree gives at
            most half of `max_rows_per_tree`.
        include_rollouts (`str`, *optional*, defaults to `"balanced"`):
            Which rollouts become rows: `"balanced"` for up to `rollouts_per_node` right and as many wrong ones of each
            node, `"none"` for paths of measured nodes only. Without rollouts hardly any step that states an answer has
            a label.
        rollouts_per_node (`int`, *optional*, defaults to `2`):
            Largest number of right, and of wrong, rollouts taken from a node.
        step_values (`str`, *optional*, defaults to `"pooled"`):
            What labels a step: `"pooled"` for all judged rollouts of the tree that pass through it, wherever they were
            sampled from, `"measured"` for those alone that were sampled from it. Given a prefix, a rollout that came
            through it is a sample like one that began at it. OmegaPRM measures prefixes of wrong rollouts only, so that
            with `"measured"` the late steps of right solutions have no label, and late steps look wrong as such.
        keep (`str`, *optional*, defaults to `"all"`):
            Which labels are kept: `"all"`, or by `"consensus"` those on which Monte Carlo (above `right_threshold`) and
            the judge of `mm-prm judge-steps` (above `judge_threshold`, at every node up to the step) agree. A step that
            the judge was not asked about, or could not tell, then has no label. The verdict on a final answer stays.
        judge_threshold (`float`, *optional*, defaults to `0.5`):
            For the judge of steps, steps with a higher score are right.
        keep_share (`float`, *optional*, defaults to `1.0`):
            Share of all rows to keep: the most informative ones, by [p (1 - p) + 0.05] R with p the share of steps
            labelled right and R their mean label (arXiv 2602.04145, where a tenth is as good as all). A tree's rows then
            depend on the other trees, and the balance of right and wrong rows is not kept.
        sampler (`str`, *optional*, defaults to `"labels"`):
            `"labels"` chooses the solutions that bring the most labels, as said above; `"ancestor"` makes the rows that
            MM-PRM makes of a tree, for comparison: all paths that end wrong and, drawn from those that end right, as
            many. It reads no setting but `seed`, and wants trees grown with `ancestor_compatible`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of all choices. The rows of a tree depend on the seed and on this tree alone.
    """

    max_rows_per_tree: int = 16
    balance: bool = True
    right_threshold: float = 0.0
    keep_unanimous: bool = False
    include_rollouts: Literal["none", "balanced"] = "balanced"
    rollouts_per_node: int = 2
    step_values: Literal["pooled", "measured"] = "pooled"
    keep: Literal["all", "consensus"] = "all"
    judge_threshold: float = 0.5
    keep_share: float = 1.0
    sampler: Literal["labels", "ancestor"] = "labels"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_rows_per_tree < 1:
            raise ValueError(f"max_rows_per_tree = {self.max_rows_per_tree}: give a number above 0")
        if self.rollouts_per_node < 1:
            raise ValueError(f"rollouts_per_node = {self.rollouts_per_node}: give a number above 0")
        if not 0 <= self.right_threshold < 1:
            raise ValueError(f"right_threshold = {self.right_threshold}: give a number from 0 up to, not including, 1")
        if self.keep not in ("all", "consensus"):
            raise ValueError(f"keep = {self.keep!r}: use 'all' or 'consensus'")
        if self.sampler == "ancestor" and (self.keep != "all" or self.keep_share != 1):
            raise ValueError(
                f"keep = {self.keep!r}, keep_share = {self.keep_share}: sampler 'ancestor' keeps what MM-PRM keeps; leave "
                "them out"
            )
        if not 0 <= self.judge_threshold < 1:
            raise ValueError(f"judge_threshold = {self.judge_threshold}: give a number from 0 up to, not including, 1")
        if not 0 < self.keep_share <= 1:
            raise ValueError(f"keep_share = {self.keep_share}: give a number above 0 and up to 1")
        if self.include_rollouts not in ("none", "balanced"):
            raise ValueError(f"include_rollouts = {self.include_rollouts!r}: use 'none' or 'balanced'")
        if self.step_values not in ("pooled", "measured"):
            raise ValueError(f"step_values = {self.step_values!r}: use 'pooled' or 'measured'")
        if self.sampler not in ("labels", "ancestor"):
            raise ValueError(f"sampler = {self.sampler!r}: use 'labels' or 'ancestor'")


@dataclass
class _Values:
    """What a tree knows of every sequence of steps in it: the counts (num_right, num_judged), the node, and the verdict."""

    counts: dict[Steps, tuple[int, int]] = field(default_factory=dict)
    nodes: dict[Steps, int] = field(default_factory=dict)
    certain: dict[Steps, tuple[int, int]] = field(default_factory=dict)


@dataclass
class _Candidate:
    """A solution, the labels on its way (equal numbers for a way that solutions share), and what the last one says."""

    solution: Steps
    labels: set[int]
    ends_right: bool


def trees_to_rows(
    trees: Iterable[Mapping[str, Any]],
    config: RowConfig | None = None,
    problems: Iterable[Mapping[str, Any]] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """
    Turn tree rows into stepwise rows.

    Args:
        trees (`Iterable[Mapping[str, Any]]`):
            Tree rows; of those that are not complete nothing is used.
        config ([`RowConfig`], *optional*):
            Which rows to make.
        problems (`Iterable[Mapping[str, Any]]`, *optional*):
            Problem rows, for the rows' `prompt`. Without them it is left empty, and [`join_problems`] fills it.

    Returns:
        `tuple[list[dict[str, Any]], dict[str, Any]]`: The rows, and the counts: `trees`, `trees_kept`, `trees_dropped`
        by reason, `solutions` found, `duplicates` (contained in the rows already), `left_out` (over the limit or the
        balance), `rows`, of which `rows_right` and `rows_wrong`, `labels`, and of these `distinct_labels` (a step that
        several rows share counts once). With `keep="consensus"`, `labels_dropped`: labels where the judge of steps
        disagrees, and where its opinion is unknown. With a `keep_share`, `rows_before_selection`.
    """
    config = config or RowConfig()
    questions = _questions(problems) if problems is not None else None
    made: list[tuple[dict[str, Any], _Candidate, int]] = []  # each row, and the number of its tree
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    seen: set[str] = set()
    is_judged = False
    for number, tree in enumerate(trees):
        validate_row("tree", tree, number)
        is_judged = is_judged or any(node.get("judge_score") is not None for node in tree["nodes"])
        problem_id = tree["problem_id"]
        if problem_id in seen:
            raise RowError(
                "tree", f"row {number}", "problem_id", problem_id, "a problem has one tree; remove the other"
            )
        seen.add(problem_id)
        if questions is not None and problem_id not in questions:
            raise RowError("tree", f"row {number}", "problem_id", problem_id, "there is no problem with this id")
        prompt = questions[problem_id] if questions is not None else ""
        if config.sampler == "ancestor" and tree["status"] == "complete":
            new_rows, reason = ancestor_rows(tree, prompt, config.seed)
            dropped.update([reason] if reason else [])
            counts["solutions"] += len(new_rows)
            for row in new_rows:
                labelled = _Candidate(tuple(row["completions"]), set(row["path"][1:]), row["num_right"][-1] > 0)
                made.append((row, labelled, number))
            continue
        chosen, values, reason = _choose(tree, config, counts)
        if reason:
            dropped[reason] += 1
        made += [(_row(problem_id, prompt, candidate.solution, values), candidate, number) for candidate in chosen]
    if config.keep == "consensus" and not is_judged:
        raise ValueError(
            "keep = 'consensus': no node of the trees has a judge_score; run `mm-prm judge-steps` on them"
        )
    extra: dict[str, Any] = {}
    if config.keep == "consensus":
        extra["labels_dropped"] = {reason: counts[reason] for reason in ("disagree", "unknown")}
    if config.keep_share < 1:
        extra["rows_before_selection"] = len(made)
        scores = [information_score(row["labels"], config.right_threshold) for row, _, _ in made]
        made = [made[place] for place in best_share(scores, config.keep_share)]
    for _, of_tree in itertools.groupby(made, key=lambda entry: entry[2]):
        kept = [candidate for _, candidate, _ in of_tree]
        counts["rows_right"] += sum(candidate.ends_right for candidate in kept)
        counts["rows_wrong"] += sum(not candidate.ends_right for candidate in kept)
        counts["labels"] += sum(len(candidate.labels) for candidate in kept)
        counts["distinct_labels"] += len(set().union(*(candidate.labels for candidate in kept)))
    names = ("solutions", "duplicates", "left_out", "rows_right", "rows_wrong", "labels", "distinct_labels")
    report = {
        "trees": len(seen),
        "trees_kept": len(seen) - dropped.total(),
        "trees_dropped": dict(sorted(dropped.items())),
        "rows": len(made),
        **{name: counts[name] for name in names},
        **extra,
    }
    return [row for row, _, _ in made], report


def step_counts(tree: Mapping[str, Any], step_values: Literal["pooled", "measured"]) -> dict[Steps, tuple[int, int]]:
    """
    The Monte Carlo labels of a tree: (num_right, num_judged) of every prefix of steps.

    Whole solutions are left out: their label is the verdict on their answer.

    Args:
        tree (`Mapping[str, Any]`):
            Tree row.
        step_values (`str`):
            Which rollouts count, see [`RowConfig`].
    """
    values = _Values()
    _solutions(tree, RowConfig(step_values=step_values), values, random.Random(0))
    return {prefix: pair for prefix, pair in values.counts.items() if prefix not in values.certain}


def _choose(tree: Mapping[str, Any], config: RowConfig, counts: Counter[str]) -> tuple[list[_Candidate], _Values, str]:
    """Choose the solutions of a tree that become rows, or say why the tree gives none."""
    values = _Values()
    if tree["status"] != "complete":
        return [], values, tree["status"]
    root = tree["nodes"][0]
    if not config.keep_unanimous and root["num_judged"] and root["num_right"] in (0, root["num_judged"]):
        return [], values, "unanimous"

    rng = random.Random(f"{config.seed} {tree['problem_id']}")
    solutions = _solutions(tree, config, values, rng)
    if config.keep == "consensus":
        by_node = path_scores(tree["nodes"], config.judge_threshold)
        judged = {prefix: by_node.get(node_id) for prefix, node_id in values.nodes.items()}
        dropped = without_consensus(
            values.counts, judged, values.certain, config.right_threshold, config.judge_threshold
        )
        counts.update(dropped.values())
        values.counts = {prefix: pair for prefix, pair in values.counts.items() if prefix not in dropped}
    candidates = _candidates(solutions, values, config.right_threshold)
    rng.shuffle(candidates)
    counts["solutions"] += len(candidates)
    if not candidates:
        return [], values, "no_labels"
    waiting = {side: [candidate for candidate in candidates if candidate.ends_right == side] for side in (True, False)}
    one_sided = not waiting[True] or not waiting[False]
    limit = config.max_rows_per_tree
    if config.balance and one_sided:
        if not config.keep_unanimous:
            counts["left_out"] += len(candidates)
            return [], values, "one_sided"
        limit = (limit + 1) // 2

    chosen: list[_Candidate] = []
    covered: set[int] = set()
    surplus = 0  # rows that end right more than rows that end wrong
    while len(chosen) < limit:
        behind = config.balance and not one_sided and surplus != 0
        pool = waiting[surplus < 0] if behind else waiting[True] + waiting[False]
        best = max(pool, key=lambda candidate: len(candidate.labels - covered), default=None)
        if best is None or best.labels <= covered:
            break
        chosen.append(best)
        waiting[best.ends_right].remove(best)
        surplus += 1 if best.ends_right else -1
        covered |= best.labels
    duplicates = sum(candidate.labels <= covered for candidate in waiting[True] + waiting[False])
    counts["duplicates"] += duplicates
    counts["left_out"] += len(candidates) - len(chosen) - duplicates
    return chosen, values, ""


def _candidates(solutions: Iterable[Steps], values: _Values, right_threshold: float) -> list[_Candidate]:
    """The solutions that have a label at all."""
    candidates = []
    numbers: dict[Steps, int] = {}
    for solution in solutions:
        labelled = [prefix for prefix in _prefixes(solution) if prefix in values.counts]
        if labelled:
            num_right, num_judged = values.counts[labelled[-1]]
            labels = {numbers.setdefault(prefix, len(numbers)) for prefix in labelled}
            candidates.append(_Candidate(solution, labels, num_right / num_judged > right_threshold))
    return candidates


def _prefixes(solution: Steps) -> list[Steps]:
    return [solution[: index + 1] for index in range(len(solution))]


def _solutions(tree: Mapping[str, Any], config: RowConfig, values: _Values, rng: random.Random) -> list[Steps]:
    """List the distinct solutions of a tree, and note in `values` what is known of their steps."""
    prefixes: dict[int, Steps] = {-1: ()}
    parents = {node["parent_id"] for node in tree["nodes"]}
    solutions: dict[Steps, None] = {}  # a set that keeps its order
    for node in tree["nodes"]:
        prefix = prefixes[node["parent_id"]] + tuple(node["steps"])
        prefixes[node["node_id"]] = prefix
        values.nodes.setdefault(prefix, node["node_id"])
        if prefix and node["num_judged"]:
            # Two nodes can hold the same text; their rollouts measure the same thing.
            num_right, num_judged = values.counts.get(prefix, (0, 0))
            values.counts[prefix] = num_right + node["num_right"], num_judged + node["num_judged"]
        if prefix and node["node_id"] not in parents:
            solutions[prefix] = None
    if config.step_values == "pooled":
        _pool(tree["rollouts"], prefixes, values)
    if config.include_rollouts == "none":
        return list(solutions)

    finished: dict[tuple[int, str], dict[Steps, None]] = {}
    certain: dict[Steps, tuple[int, int]] = {}
    for rollout in tree["rollouts"]:
        solution = prefixes[rollout["node_id"]] + tuple(rollout["steps"])
        if solution and rollout["status"] == "finished" and rollout["verdict"] != "unknown":
            certain.setdefault(solution, (int(rollout["verdict"] == "right"), 1))
            finished.setdefault((rollout["node_id"], rollout["verdict"]), {})[solution] = None
    # What was judged is certain, even where the policy, sent on from a finished answer, talked itself out of it.
    values.certain = certain
    values.counts |= certain
    for alike in finished.values():
        sample = list(alike)
        rng.shuffle(sample)
        solutions |= dict.fromkeys(sample[: config.rollouts_per_node])
    return list(solutions)


def _pool(rollouts: Iterable[Mapping[str, Any]], prefixes: Mapping[int, Steps], values: _Values) -> None:
    """Count each judged rollout at every step it passes through behind its node, which has counted it already."""
    for rollout in rollouts:
        if rollout["status"] != "finished" or rollout["verdict"] == "unknown":
            continue
        start = prefixes[rollout["node_id"]]
        for prefix in _prefixes(start + tuple(rollout["steps"]))[len(start) :]:
            num_right, num_judged = values.counts.get(prefix, (0, 0))
            values.counts[prefix] = num_right + (rollout["verdict"] == "right"), num_judged + 1


def _row(problem_id: str, prompt: str, solution: Steps, values: _Values) -> dict[str, Any]:
    prefixes = _prefixes(solution)
    counts = [values.counts.get(prefix) for prefix in prefixes]
    return {
        "problem_id": problem_id,
        "prompt": prompt,
        "completions": list(solution),
        "labels": [count and count[0] / count[1] for count in counts],
        "num_right": [count and count[0] for count in counts],
        "num_judged": [count and count[1] for count in counts],
        "tree_id": problem_id,
        "path": [values.nodes[()]] + [values.nodes[prefix] for prefix in prefixes if prefix in values.nodes],
    }


def join_problems(
    rows: datasets.Dataset | Iterable[Mapping[str, Any]],
    problems: datasets.Dataset,
    *,
    cache_dir: str | Path | None = None,
) -> datasets.Dataset:
    """
    Give rows their problems' images, in the flat form that trainers take.

    The pictures are not copied to a problem's many rows. Each is written once to a file that is named by its content,
    the rows refer to it, and it is unpacked when a row is read. Saving the rows or pushing them embeds the pictures.

    Args:
        rows (`datasets.Dataset` or `Iterable[Mapping[str, Any]]`):
            Stepwise rows.
        problems (`datasets.Dataset`):
            Problem rows, as `load_problems` gives them.
        cache_dir (`str` or `Path`, *optional*):
            Where the pictures are written, in a folder `mm_prm_images`; the cache of `datasets` if not given.

    Returns:
        `datasets.Dataset`: The rows with a column `images`, and with the problem's question as `prompt`.

    Raises:
        `ValueError`: If problems are missing, naming them.
        [`RowError`]: If a row was made from another question than the problem's.
    """
    if not isinstance(rows, datasets.Dataset):
        rows = datasets.Dataset.from_list([dict(row) for row in rows], features=STEPWISE_FEATURES)
    questions = _questions(problems)
    problem_ids = rows["problem_id"][:]
    missing = sorted(set(problem_ids) - set(questions))
    if missing:
        shown = ", ".join(map(repr, missing[:10])) + (", …" if len(missing) > 10 else "")
        raise ValueError(f"{len(missing)} problems of the rows are not in the problem table: {shown}")
    for number, (problem_id, prompt) in enumerate(zip(problem_ids, rows["prompt"][:], strict=True)):
        if prompt not in ("", questions[problem_id]):
            advice = f"the question of problem {problem_id!r} reads otherwise; make the rows anew from its tree"
            raise RowError("stepwise", f"row {number}", "prompt", prompt, advice)
    images = _image_files(problems, set(problem_ids), Path(cache_dir or datasets.config.HF_DATASETS_CACHE))
    prompts = [questions[problem_id] for problem_id in problem_ids]
    rows = rows.remove_columns("prompt").add_column("prompt", prompts, feature=datasets.Value("string"))
    references = [images[problem_id] for problem_id in problem_ids]
    return rows.add_column("images", references, feature=datasets.List(datasets.Image()))


def _image_files(problems: datasets.Dataset, needed: set[str], cache_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Write the pictures of the problems that are needed, and give references to them, as `datasets` stores images."""
    folder = cache_dir / "mm_prm_images"
    folder.mkdir(parents=True, exist_ok=True)
    references: dict[str, list[dict[str, Any]]] = {}
    table = problems.select_columns(["id", "images"])
    for problem in table.cast_column("images", datasets.List(datasets.Image(decode=False))):
        if problem["id"] in needed:
            paths = [_image_file(image, folder) for image in problem["images"]]
            references[problem["id"]] = [{"bytes": None, "path": path} for path in paths]
    return references


def _image_file(image: Mapping[str, Any], folder: Path) -> str:
    content = image["bytes"]
    if content is None:
        return image["path"]
    path = folder / (hashlib.sha256(content).hexdigest() + Path(image["path"] or "").suffix)
    if not path.exists():
        # Written beside its place and moved there, so that no other process ever sees half a picture.
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_bytes(content)
        part.replace(path)
    return str(path)


def _questions(problems: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    if isinstance(problems, datasets.Dataset):
        problems = problems.select_columns(["id", "question", "choices"])  # no picture need be unpacked
    return {problem["id"]: question_text(problem) for problem in problems}
