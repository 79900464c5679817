"""One self-contained HTML page: the table, the curve, problems with scored candidates, and a search tree to unfold.

Whatever a model wrote is escaped by the template, which runs with autoescape on; the page holds no script, loads
nothing, and forbids both by its own content policy.
"""

import base64
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from mm_prm.data.text import split_image_markers
from mm_prm.inference.aggregators import AGGREGATORS
from mm_prm.inference.best_of_n import select

from .plots import curve_svg
from .summary import Results, SummaryRow, format_difference, format_estimate, summary_rows

# Larger pictures are shrunk: the page shows them at most this wide, on a screen of twice the density.
_MAX_PICTURE_SIDE = 720
# Levels of a tree that are unfolded from the start
_OPEN_LEVELS = 4

Row = Mapping[str, Any]


def render_report(
    results: Results,
    problems: Iterable[Row],
    pools: Sequence[Row],
    trees: Sequence[Row] = (),
    *,
    verifier: str,
    aggregator: str = "min",
    baselines: Mapping[str, Mapping[str, float]] | None = None,
    facts: Mapping[str, str] | None = None,
    title: str = "Best-of-N with a process reward model",
    max_problems: int = 6,
) -> str:
    """
    Render the report of a Best-of-N run.

    Args:
        results (`Mapping[str, Mapping]`):
            What the `best_of_n` metric returned, by the name of the process reward model, all on the same candidates.
        problems (`Iterable[Mapping[str, Any]]`):
            Problem rows of the pools and trees; others are ignored.
        pools (`Sequence[Mapping[str, Any]]`):
            Candidate pools with the step scores of `verifier`. Shown are the first whose candidates are not all right
            or all wrong.
        trees (`Sequence[Mapping[str, Any]]`, *optional*, defaults to `()`):
            Annotated trees to show.
        verifier (`str`):
            Name of the model whose scores the pools hold.
        aggregator (`str`, *optional*, defaults to `"min"`):
            Aggregator for the curve and for choosing among candidates.
        baselines (`Mapping[str, Mapping[str, float]]`, *optional*):
            Further estimates for the table, such as `{"greedy": {"value", "low", "high"}}`.
        facts (`Mapping[str, str]`, *optional*):
            What a reader should know about the run, such as the policy's name or the seconds of each stage.
        title (`str`, *optional*, defaults to `"Best-of-N with a process reward model"`):
            Title of the page.
        max_problems (`int`, *optional*, defaults to `6`):
            Largest number of problems to show.

    Returns:
        `str`: The page.
    """
    mixed = [pool for pool in pools if pool["step_scores"] and len(set(map(bool, pool["correct"]))) == 2]
    shown_pools = mixed[:max_problems]
    wanted = {row["problem_id"] for row in (*shown_pools, *trees)}
    by_id = {problem["id"]: problem for problem in problems if problem["id"] in wanted}
    missing = wanted - set(by_id)
    if missing:
        raise ValueError(f"problem {min(missing)!r} of a pool or tree is not among the problems; give its row too")
    first = next(iter(results.values()))
    rows = summary_rows(results, baselines)
    environment = Environment(
        loader=PackageLoader("mm_prm.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"estimate": format_estimate, "difference": format_difference}
    return environment.get_template("report.html.jinja").render(
        title=title,
        facts=facts or {},
        groups=_group_by_verifier(row for row in rows if row.aggregator in ("", aggregator)),
        all_groups=_group_by_verifier(row for row in rows if row.verifier),
        curve=Markup(curve_svg(results, aggregator)),
        aggregator=aggregator,
        verifier=verifier,
        num_problems=first["num_problems"],
        num_candidates=first["num_candidates"],
        num_mixed=len(mixed),
        problems=[_problem_view(by_id[pool["problem_id"]]) | _pool_view(pool, aggregator) for pool in shown_pools],
        trees=[_problem_view(by_id[tree["problem_id"]]) | {"tree": _tree_view(tree)} for tree in trees],
    )


def _group_by_verifier(rows: Iterable[SummaryRow]) -> dict[str, list[SummaryRow]]:
    groups: dict[str, list[SummaryRow]] = {}
    for row in rows:
        groups.setdefault(row.verifier, []).append(row)
    return groups


def _problem_view(problem: Row) -> dict[str, Any]:
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


def _pool_view(pool: Row, aggregator: str) -> dict[str, Any]:
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
                "steps": list(zip(steps, scores, strict=True)) if scores else [(step, None) for step in steps],
                "score": score if math.isfinite(score) else None,
                "count": counts[tuple(steps)],
                "verdict": {True: "right", False: "wrong", None: "unknown"}[pool["correct"][index]],
                "answer": pool["answers"][index],
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


def _tree_view(tree: Row) -> dict[str, Any]:
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
