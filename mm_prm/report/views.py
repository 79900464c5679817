"""What the page shows of a problem, its candidates, a labelled solution and a tree: plain data for the template."""

import base64
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from PIL import Image

from mm_prm.data.text import split_image_markers
from mm_prm.inference.aggregators import AGGREGATORS
from mm_prm.inference.best_of_n import select

from .steps import Steps, step_labels

Row = Mapping[str, Any]

# Larger pictures are shrunk: the page shows them at most this wide, on a screen of twice the density.
_MAX_PICTURE_SIDE = 720
# Levels of a tree that are unfolded from the start
_OPEN_LEVELS = 4

_VERDICTS = {True: "right", False: "wrong", None: "unknown"}


def problem_view(problem: Row) -> dict[str, Any]:
    """The question in parts of text and pictures, with choices and answer."""
    pictures = iter([_data_url(image) for image in problem["images"]])
    parts = split_image_markers(problem["question"], len(problem["images"]))
    return {
        "id": problem["id"],
        "parts": [(part, None) if part is not None else ("", next(pictures)) for part in parts],
        "answer": problem["answer"],
        "choices": problem["choices"],
    }


def _data_url(image: Any) -> str:
    picture = image if isinstance(image, Image.Image) else datasets.Image().decode_example(image)
    picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    picture.thumbnail((_MAX_PICTURE_SIDE, _MAX_PICTURE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _step_views(
    steps: Sequence[str], scores: Sequence[float], values: Mapping[Steps, tuple[int, int]], labels: Sequence[int] = ()
) -> list[dict[str, Any]]:
    return [
        {
            "text": step,
            "score": scores[number] if scores else None,
            "counts": values.get(tuple(steps[: number + 1])),
            "label": labels[number] if labels else None,
        }
        for number, step in enumerate(steps)
    ]


def pool_view(pool: Row, aggregator: str, values: Mapping[Steps, tuple[int, int]]) -> dict[str, Any]:
    """Distinct candidates, the chosen one first, then by score."""
    chosen = select(pool["candidates"], pool["step_scores"], aggregator)
    counts = Counter(tuple(steps) for steps in pool["candidates"])
    views: dict[tuple[str, ...], dict[str, Any]] = {}
    for index, (steps, scores) in enumerate(zip(pool["candidates"], pool["step_scores"], strict=True)):
        # A copy of the chosen candidate's text *is* the chosen solution.
        score = AGGREGATORS[aggregator](scores)
        views.setdefault(
            tuple(steps),
            {
                "steps": _step_views(steps, scores, values),
                "score": score if math.isfinite(score) else None,
                "count": counts[tuple(steps)],
                "verdict": _VERDICTS[pool["correct"][index]],
                "chosen": tuple(steps) == tuple(pool["candidates"][chosen.index]),
                "order": score,
            },
        )
    candidates = sorted(views.values(), key=lambda view: (view["chosen"], view["order"]), reverse=True)
    return {
        "candidates": candidates,
        "num_candidates": len(pool["candidates"]),
        "num_right": sum(map(bool, pool["correct"])),
        "num_tied": chosen.num_tied,
    }


def solution_view(solution: Row) -> dict[str, Any]:
    """A solution whose steps are labelled."""
    labels = step_labels(solution)
    return {"steps": _step_views(solution["steps"], solution["step_scores"], {}, labels), "is_right": -1 not in labels}


def tree_view(tree: Row) -> dict[str, Any]:
    """The tree as a walk: each node once when it opens, and once (`None`) when it closes, so that no depth is too much."""
    nodes = {node["node_id"]: node for node in tree["nodes"]}
    children: dict[int, list[int]] = {node_id: [] for node_id in (-1, *nodes)}
    for node in tree["nodes"]:
        children[node["parent_id"]].append(node["node_id"])
    rollouts: dict[int, list[Row]] = {node_id: [] for node_id in nodes}
    for rollout in tree["rollouts"]:
        rollouts[rollout["node_id"]].append(rollout)

    walk: list[dict[str, Any] | None] = []
    stack: list[tuple[int | None, int]] = [(node_id, 0) for node_id in reversed(children[-1])]
    while stack:
        node_id, depth = stack.pop()
        if node_id is None:
            walk.append(None)
            continue
        node = nodes[node_id]
        walk.append(
            {
                **node,
                "mc_value": node["num_right"] / node["num_judged"] if node["num_judged"] else None,
                "rollouts": rollouts[node_id],
                "open": depth < _OPEN_LEVELS,
                "branch": len(children[node["parent_id"]]) > 1,
            }
        )
        stack.append((None, depth))
        stack += [(child, depth + 1) for child in reversed(children[node_id])]
    return {
        "walk": walk,
        "strategy": tree["strategy"],
        "num_nodes": len(nodes),
        "num_rollouts": tree["cost"]["rollouts"],
        "status": tree["status"],
        "reason": tree["reason"],
    }
