"""What the labels of trees are held against: exact correctness where the world knows it, fresh rollouts elsewhere."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from mm_prm.annotation.protocols import Judge, Policy, Problem, Rollout, RolloutRequest
from mm_prm.data.mini import problem_from_id
from mm_prm.data.mini_check import UnparsableStep, check_steps
from mm_prm.data.rows import step_counts
from mm_prm.data.selection import path_scores

Steps = tuple[str, ...]

# Rollouts asked for in one call, so that an engine has something to batch and progress shows.
_ROLLOUTS_AT_ONCE = 4096


@dataclass(frozen=True)
class Label:
    """
    The Monte Carlo label of a prefix of steps.

    Args:
        problem_id (`str`):
            Its problem.
        prefix (`tuple[str, ...]`):
            The steps, the last of which has the label.
        num_right (`int`):
            Rollouts that ended right.
        num_judged (`int`):
            Rollouts that the judge could tell, at least one.
        judge_score (`float`, *optional*):
            What a judge of steps says of the prefix, see [`~mm_prm.data.selection.path_scores`].
    """

    problem_id: str
    prefix: Steps
    num_right: int
    num_judged: int
    judge_score: float | None = None

    @property
    def value(self) -> float:
        return self.num_right / self.num_judged


def tree_labels(
    trees: Iterable[Mapping[str, Any]], step_values: Literal["pooled", "measured"] = "pooled"
) -> list[Label]:
    """
    The labels of complete trees.

    Args:
        trees (`Iterable[Mapping[str, Any]]`):
            Tree rows.
        step_values (`str`, *optional*, defaults to `"pooled"`):
            Which rollouts count, see [`~mm_prm.data.RowConfig`].
    """
    labels = []
    for tree in trees:
        if tree["status"] != "complete":
            continue
        by_node = path_scores(tree["nodes"])
        prefixes: dict[int, Steps] = {-1: ()}
        scores: dict[Steps, float | None] = {}
        for node in tree["nodes"]:
            prefix = prefixes[node["parent_id"]] + tuple(node["steps"])
            prefixes[node["node_id"]] = prefix
            scores.setdefault(prefix, by_node.get(node["node_id"]))
        labels += [
            Label(tree["problem_id"], prefix, num_right, num_judged, scores.get(prefix))
            for prefix, (num_right, num_judged) in step_counts(tree, step_values).items()
        ]
    return labels


def sample_labels(labels: Sequence[Label], number: int, seed: int = 0) -> list[Label]:
    """A random choice of labels, in their order; all where there are no more than `number`."""
    if number >= len(labels):
        return list(labels)
    chosen = np.random.default_rng(seed).choice(len(labels), number, replace=False)
    return [labels[place] for place in sorted(chosen)]


def exact_correctness(labels: Iterable[Label]) -> np.ndarray:
    """1 where a prefix in the mini world is right, 0 where it is not, NaN where a step is not in that world's language."""
    correct = []
    find = lru_cache(maxsize=16)(problem_from_id)  # the labels of a problem follow one another
    for label in labels:
        try:
            correct.append(float(check_steps(find(label.problem_id), label.prefix)[-1]))
        except UnparsableStep:
            correct.append(float("nan"))
    return np.asarray(correct)


def fresh_values(
    labels: Sequence[Label],
    problems: Mapping[str, Problem] | Callable[[str], Problem],
    policy: Policy,
    judge: Judge,
    *,
    num_rollouts: int = 64,
    seed: int = 0,
    judge_concurrency: int = 1,
    on_progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """
    Measure prefixes anew, with rollouts that no label has seen.

    Args:
        labels (`Sequence[Label]`):
            What is measured; their counts are not looked at.
        problems (`Mapping[str, Mapping]` or `Callable`):
            Problem row, its images decoded, by problem id.
        policy ([`~mm_prm.annotation.Policy`]):
            The policy; that of the annotation, or the labels are held against something else.
        judge ([`~mm_prm.annotation.Judge`]):
            The judge.
        num_rollouts (`int`, *optional*, defaults to `64`):
            Rollouts for each prefix.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the rollouts; none is a seed of the annotation.
        judge_concurrency (`int`, *optional*, defaults to `1`):
            Solutions shown to the judge at a time.
        on_progress (`Callable`, *optional*):
            Called with the number of prefixes that are measured.

    Returns:
        `np.ndarray`: Share of each prefix's judged rollouts that end right; NaN where none could be judged.
    """
    find = problems if callable(problems) else problems.__getitem__
    values: list[float] = []
    at_once = max(1, _ROLLOUTS_AT_ONCE // num_rollouts)
    with ThreadPoolExecutor(judge_concurrency) as threads:
        for start in range(0, len(labels), at_once):
            slice_ = labels[start : start + at_once]
            requests = [
                (find(label.problem_id), _fresh_request(label, num_rollouts, seed, start + number))
                for number, label in enumerate(slice_)
            ]
            generations = policy.generate(requests)
            whole = [
                [label.prefix + rollout.steps for rollout in generation.rollouts if _is_finished(rollout)]
                for label, generation in zip(slice_, generations, strict=True)
            ]
            # A solution that several rollouts wrote is judged once.
            distinct = [
                (problem, solution)
                for (problem, _), solutions in zip(requests, whole, strict=True)
                for solution in dict.fromkeys(solutions)
            ]
            verdicts = list(threads.map(lambda pair: judge.judge(*pair).verdict, distinct))
            known = {(pair[0]["id"], pair[1]): verdict for pair, verdict in zip(distinct, verdicts, strict=True)}
            for label, solutions in zip(slice_, whole, strict=True):
                found = [known[label.problem_id, solution] for solution in solutions]
                judged = [verdict == "right" for verdict in found if verdict != "unknown"]
                values.append(sum(judged) / len(judged) if judged else float("nan"))
            if on_progress is not None:
                on_progress(len(values))
    return np.asarray(values)


def _is_finished(rollout: Rollout) -> bool:
    return rollout.status == "finished"


def _fresh_request(label: Label, num_rollouts: int, seed: int, number: int) -> RolloutRequest:
    identity = ["audit", seed, number, label.problem_id, label.prefix]
    digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=8).digest()
    # 63 bits, with room for one seed a rollout behind it
    start = min(int.from_bytes(digest) >> 1, 2**63 - 1 - num_rollouts)
    return RolloutRequest(label.problem_id, label.prefix, num_rollouts, start)
