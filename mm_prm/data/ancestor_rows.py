"""
MM-PRM's own choice of rows, for comparison: all paths of a tree that end wrong, and as many that end right.

A path goes from the root to a leaf, and each of its nodes has one label, its value, which here stands at the node's last
step. Trees that the search grew with `ancestor_compatible` have whole solutions as leaves, as the ancestor's have. Its
rows hold labels of a value once a path: a prefix that was measured twice keeps both values, each on the paths below it.
"""

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from .features import RowError

# The ancestor leaves out shorter paths. Its recorded runs bound the number: they leave out 47 and keep 53.
_FEWEST_CHARACTERS = 50

_Path = list[Mapping[str, Any]]


def ancestor_rows(tree: Mapping[str, Any], prompt: str, seed: int) -> tuple[list[dict[str, Any]], str]:
    """
    The rows of a tree, or why it has none.

    Args:
        tree (`Mapping[str, Any]`):
            A complete tree row.
        prompt (`str`):
            The problem's question, for the rows.
        seed (`int`):
            Seed of the draw among the paths that end right.

    Returns:
        `tuple[list[dict[str, Any]], str]`: The rows, those that end wrong first; and the reason where there are none.
    """
    settings = tree["settings"]
    if not json.loads(settings).get("ancestor_compatible"):
        name = tree["problem_id"]
        raise RowError("tree", name, "settings", settings, "MM-PRM's rows need trees grown with ancestor_compatible")
    root = tree["nodes"][0]
    if root["num_right"] in (0, root["num_judged"]):
        return [], "unanimous"
    paths = [path for path in _paths(tree["nodes"]) if len(_text(path)) >= _FEWEST_CHARACTERS]
    wrong = [path for path in paths if path[-1]["num_right"] == 0]
    right = [path for path in paths if path[-1]["num_right"] > 0]
    if len(right) >= len(wrong):  # where they are equal, their order is drawn
        right = random.Random(seed).sample(right, len(wrong))
    rows = [_row(tree["problem_id"], prompt, root, path) for path in wrong + right]
    return rows, "" if rows else "one_sided"


def _paths(nodes: Sequence[Mapping[str, Any]]) -> list[_Path]:
    """All paths below the root, in the order in which a walk through the tree meets their leaves."""
    children: dict[int, _Path] = {}
    for node in nodes[1:]:
        children.setdefault(node["parent_id"], []).append(node)
    paths: list[_Path] = []
    open_paths: list[_Path] = [[node] for node in reversed(children.get(nodes[0]["node_id"], []))]
    while open_paths:
        path = open_paths.pop()
        below = children.get(path[-1]["node_id"], [])
        open_paths += [[*path, node] for node in reversed(below)]
        if not below:
            paths.append(path)
    return paths


def _text(path: _Path) -> str:
    return "\n\n".join(step for node in path for step in node["steps"])


def _row(problem_id: str, prompt: str, root: Mapping[str, Any], path: _Path) -> dict[str, Any]:
    steps: list[str] = []
    num_right: list[int | None] = []
    num_judged: list[int | None] = []
    labels: list[float | None] = []
    for node in path:
        before = [None] * (len(node["steps"]) - 1)
        steps += node["steps"]
        num_right += [*before, node["num_right"]]
        num_judged += [*before, node["num_judged"]]
        labels += [*before, node["num_right"] / node["num_judged"]]
    return {
        "problem_id": problem_id,
        "prompt": prompt,
        "completions": steps,
        "labels": labels,
        "num_right": num_right,
        "num_judged": num_judged,
        "tree_id": problem_id,
        "path": [root["node_id"], *(node["node_id"] for node in path)],
    }
