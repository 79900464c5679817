"""One self-contained HTML page: numbers and plots, problems with scored candidates, and search trees to unfold.

Whatever a model wrote is escaped by the template, which runs with autoescape on; the page holds no script, loads
nothing, and forbids both by its own content policy.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .annotation import annotation_cost
from .formulas import to_html
from .plots import draw_annotation, draw_curve, draw_distributions, draw_reliability, plot_svg, save_plot
from .steps import collect_evidence, prefix_values, reliability_rows, step_labels
from .summary import (
    Results,
    SummaryRow,
    format_difference,
    format_estimate,
    format_share,
    step_error_rows,
    summary_rows,
)
from .views import Row, pool_view, problem_view, solution_view, tree_view

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def render_report(
    results: Results,
    problems: Iterable[Row],
    pools: Sequence[Row] = (),
    trees: Sequence[Row] = (),
    *,
    solutions: Sequence[Row] = (),
    step_results: Mapping[str, Any] | None = None,
    verifier: str = "",
    aggregator: str = "min",
    baselines: Mapping[str, Mapping[str, float]] | None = None,
    facts: Mapping[str, str] | None = None,
    title: str = "Best-of-N with a process reward model",
    max_problems: int = 6,
    max_trees: int = 3,
    plot_folder: str | Path | None = None,
) -> str:
    """
    Render the report of a run. Sections for which there is nothing are left out.

    Args:
        results (`Mapping[str, Mapping]`):
            What the `best_of_n` metric returned, by the name of the process reward model, all on the same candidates.
            May be empty.
        problems (`Iterable[Mapping[str, Any]]`):
            Problem rows of what is shown; others are ignored.
        pools (`Sequence[Mapping[str, Any]]`, *optional*, defaults to `()`):
            Candidate pools with the step scores of `verifier`. Shown are the first whose candidates are not all right
            or all wrong.
        trees (`Sequence[Mapping[str, Any]]`, *optional*, defaults to `()`):
            Annotated trees. All count for the cost and lend their mc_values to candidates; the first complete ones are
            shown.
        solutions (`Sequence[Mapping[str, Any]]`, *optional*, defaults to `()`):
            Solutions with `problem_id, steps, step_scores` and `first_error` or `step_labels`.
        step_results (`Mapping[str, Any]`, *optional*):
            What the `step_errors` metric returned for these solutions.
        verifier (`str`, *optional*, defaults to `""`):
            Name of the model whose scores pools and solutions hold.
        aggregator (`str`, *optional*, defaults to `"min"`):
            Aggregator for the curve and for choosing among candidates.
        baselines (`Mapping[str, Mapping[str, float]]`, *optional*):
            Further estimates for the table, such as `{"greedy": {"value", "low", "high"}}`.
        facts (`Mapping[str, str]`, *optional*):
            What a reader should know about the run, such as the policy's name or the seconds of each stage.
        title (`str`, *optional*, defaults to `"Best-of-N with a process reward model"`):
            Title of the page.
        max_problems (`int`, *optional*, defaults to `6`):
            Largest number of problems to show with candidates, and of labelled solutions.
        max_trees (`int`, *optional*, defaults to `3`):
            Largest number of trees to show.
        plot_folder (`str` or `Path`, *optional*):
            Folder to which the plots go as PNG files, too: curve, reliability, scores, annotation.

    Returns:
        `str`: The page.
    """
    mixed = [pool for pool in pools if pool["step_scores"] and len(set(map(bool, pool["correct"]))) == 2]
    with_errors = [solution for solution in solutions if solution["step_scores"] and -1 in step_labels(solution)]
    shown_pools, shown_solutions = mixed[:max_problems], with_errors[:max_problems]
    of_pools = {pool["problem_id"] for pool in pools}
    values, shown_trees = {}, list[Row]()
    for tree in trees:
        if tree["problem_id"] in of_pools:
            values[tree["problem_id"]] = prefix_values(tree)
        if len(shown_trees) < max_trees and tree["status"] == "complete":
            shown_trees.append(tree)
    by_id = _find(problems, {row["problem_id"] for row in (*shown_pools, *shown_solutions, *shown_trees)})

    evidence = collect_evidence(pools, values, solutions)
    cost = annotation_cost(trees)
    figures: dict[str, Figure] = {}
    if results:
        figures["curve"] = draw_curve(results, aggregator)
    if evidence:
        figures |= {"reliability": draw_reliability(evidence), "scores": draw_distributions(evidence)}
    if cost.mc_values:
        figures["annotation"] = draw_annotation(cost)
    if plot_folder is not None:
        for name, figure in figures.items():
            save_plot(figure, Path(plot_folder) / f"{name}.png")

    def view(row: Row) -> dict[str, Any]:
        return problem_view(by_id[row["problem_id"]])

    rows = summary_rows(results, baselines) if results else []
    return _template().render(
        title=title,
        facts=facts or {},
        first=next(iter(results.values())) if results else None,
        groups=_group_by_verifier(row for row in rows if row.aggregator in ("", aggregator)),
        all_groups=_group_by_verifier(row for row in rows if row.verifier),
        step_results=step_results,
        step_rows=step_error_rows(step_results) if step_results else [],
        plots={name: Markup(plot_svg(figure, name)) for name, figure in figures.items()},
        evidence=evidence,
        reliability=reliability_rows(evidence),
        cost=cost if sum(cost.trees.values()) else None,
        aggregator=aggregator,
        verifier=verifier,
        num_mixed=len(mixed),
        num_with_errors=len(with_errors),
        problems=[
            view(pool) | pool_view(pool, aggregator, values.get(pool["problem_id"], {})) for pool in shown_pools
        ],
        solutions=[view(solution) | solution_view(solution) for solution in shown_solutions],
        trees=[view(tree) | {"tree": tree_view(tree)} for tree in shown_trees],
    )


def _find(problems: Iterable[Row], wanted: set[str]) -> dict[str, Row]:
    if isinstance(problems, datasets.Dataset):  # without decoding the pictures of all others
        problems = problems.select([place for place, name in enumerate(problems["id"]) if name in wanted])
    found = {problem["id"]: problem for problem in problems if problem["id"] in wanted}
    if missing := wanted - set(found):
        raise ValueError(f"problem {min(missing)!r} of a pool or tree is not among the problems; give its row too")
    return found


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("mm_prm.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "estimate": format_estimate,
        "difference": format_difference,
        "share": format_share,
        "formulas": to_html,
    }
    return environment.get_template("report.html.jinja")


def _group_by_verifier(rows: Iterable[SummaryRow]) -> dict[str, list[SummaryRow]]:
    groups: dict[str, list[SummaryRow]] = {}
    for row in rows:
        groups.setdefault(row.verifier, []).append(row)
    return groups
