"""`mm-prm best-of-n`: scored candidate pools in, accuracies with intervals and baselines out.

mm-prm best-of-n --pools pools.parquet --output_json best_of_n.json
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_prm.commands import InputError, reading_input
from mm_prm.settings import parse_settings

if TYPE_CHECKING:
    from rich.table import Table

# The ancestor's names of columns, and ours.
_ANCESTOR = {"labels": "correct", "prm_scores": "step_scores", "solutions_splits": "candidates"}


@dataclass
class BestOfNSettings:
    """
    Which pools are measured, and how.

    Args:
        pools (`str`):
            Candidate pools, as `mm-prm score` writes them: a folder, or a .parquet, .jsonl or .json file. Files with
            MM-PRM's names (`labels`, `prm_scores`, `solutions_splits`) are read, too.
        model (`str`, *optional*):
            Process reward model whose scores the pools have: a folder, a Hub repository, or mini-prm. Noted with the
            figures, which `mm-prm push model --results` then takes.
        output_json (`str`, *optional*):
            Write everything the metric says there, with the curves over N.
        num_resamples (`int`, *optional*, defaults to `2000`):
            Number of bootstrap resamples of the problems.
        num_subsets (`int`, *optional*, defaults to `256`):
            Number of random subsets from which votes among n < N candidates are estimated.
        confidence (`float`, *optional*, defaults to `0.95`):
            Coverage of the intervals.
        seed (`int`, *optional*, defaults to `0`):
            Seed of both kinds of resampling.
    """

    pools: str
    model: str | None = None
    output_json: str | None = None
    num_resamples: int = 2000
    num_subsets: int = 256
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_resamples", "num_subsets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: give a number above 0")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence = {self.confidence}: give a number between 0 and 1")


def main(args: Sequence[str], prog: str) -> int:
    """Run the command; returns its exit status."""
    description = "Measure how often the best-scored candidate is right."
    return run(parse_settings(BestOfNSettings, args, prog=prog, description=description))


def run(settings: BestOfNSettings) -> int:
    """Measure, and print the table."""
    columns = read_columns(settings.pools)
    said = {} if settings.model is None else _said_of(settings.model)

    from mm_prm.commands.files import write_json
    from mm_prm.metrics.best_of_n.best_of_n import BestOfN

    with reading_input(settings.pools):
        results = BestOfN().compute(
            **columns,
            num_resamples=settings.num_resamples,
            num_subsets=settings.num_subsets,
            confidence=settings.confidence,
            seed=settings.seed,
        )
    write_json(settings.output_json, said | results)
    print_tables(results, Path(settings.model or settings.pools).stem)
    verdicts = [verdict for of_problem in columns["correct"] for verdict in of_problem]
    if unknown := verdicts.count(None):
        print(f"{unknown} of {len(verdicts)} candidates have no verdict and count as not right")
    return 0


def _said_of(model: str) -> dict[str, Any]:
    from mm_prm.annotation.identity import checkpoint_identity
    from mm_prm.embedded import model_path

    with reading_input("model", model):
        return {"model": model, "model_checkpoint": checkpoint_identity(model_path(model))}


def read_columns(path: str) -> dict[str, list[Any]]:
    """
    Read the columns of candidate pools that the metric takes.

    Args:
        path (`str`):
            Pools of this package, or a list of result rows as MM-PRM writes them.
    """
    from mm_prm.commands.files import read_table

    seen: dict[Any, int] = {}
    columns: dict[str, list[Any]] = {"correct": [], "step_scores": [], "answers": [], "candidates": []}
    for number, row in enumerate(read_table(path, key="pools")):
        if not isinstance(row, Mapping):
            raise InputError(f"{path}: row {number} must be a mapping of column names to values")
        named = {_ANCESTOR.get(name, name): value for name, value in row.items()}
        if not isinstance(named.get("correct"), list):
            raise InputError(
                f"{path}: row {number}: correct: must be a list that says of each candidate if it is right"
            )
        if not named["correct"]:
            raise InputError(f"{path}: row {number}: correct: there are no candidates; leave the problem out")
        problem_id = named.get("problem_id")
        if problem_id is not None and seen.setdefault(problem_id, number) != number:
            raise InputError(
                f"{path}: row {number}: problem_id: {problem_id!r} is already that of row {seen[problem_id]}; give all "
                "candidates of a problem in one row"
            )
        for name in columns:
            columns[name].append(named.get(name))
    if not columns["correct"]:
        raise InputError(f"{path}: there are no rows")
    if not any(verdict is not None for of_problem in columns["correct"] for verdict in of_problem):
        raise InputError(f"{path}: correct: no candidate has a verdict; judge the answers first")
    return {name: values for name, values in columns.items() if any(values)}


def print_tables(results: Mapping[str, Any], verifier: str) -> None:
    """Print accuracies with their intervals and their differences to the baselines, and how they go with N."""
    from rich.console import Console

    print(f"{results['num_problems']} problems, {results['num_candidates']} candidates each at most")
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(_methods_table(results, verifier))
    console.print(_curves_table(results))


def _methods_table(results: Mapping[str, Any], verifier: str) -> "Table":
    from mm_prm.report.summary import format_difference, format_estimate, summary_rows

    headings = ["accuracy", "minus mean pass@1", *(["minus majority vote"] if "majority" in results else [])]
    table = _table("method", *headings)
    for row in summary_rows({verifier: results}):
        cells = (
            f"{row.method}, {row.aggregator}" if row.aggregator else row.method,
            format_estimate(row.accuracy),
            format_difference(row.minus_pass_at_1),
            format_difference(row.minus_majority),
        )
        table.add_row(*cells[: len(headings) + 1])
    return table


def _curves_table(results: Mapping[str, Any]) -> "Table":
    curves = {"majority vote": results["majority"]} if "majority" in results else {}
    curves |= {f"Best-of-N, {name}": entry for name, entry in results["best_of_n"].items()}
    curves["oracle"] = results["oracle"]
    table = _table("accuracy in %", *(f"N = {size}" for size in results["oracle"]["by_n"]))
    for name, entry in curves.items():
        table.add_row(name, *(f"{100 * estimate['value']:.1f}" for estimate in entry["by_n"].values()))
    return table


def _table(first: str, *headings: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, no_wrap=True, justify="right")
    return table
