"""`mm-prm rows`: trees in, stepwise rows to train on out.

mm-prm rows --trees trees --problems problems.json --output rows.parquet
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mm_prm.commands import reading_input
from mm_prm.data.rows import RowConfig
from mm_prm.settings import parse_settings


@dataclass
class RowsSettings:
    """
    Which trees become rows, and where these go.

    Args:
        trees (`str`):
            Trees: a folder, a .parquet or .jsonl file as `mm-prm annotate` writes them, or its journal (.sqlite).
        output (`str`):
            Where the rows go: a folder, or a .parquet or .jsonl file.
        problems (`str`, *optional*):
            Problems of the trees, for the rows' `prompt`. Left empty without them; training fills it in.
        image_root (`str`, *optional*):
            Folder within which image paths of the problems lie. The file's own folder if not given.
        on_bad_row (`str`, *optional*, defaults to `"raise"`):
            At a problem that cannot be used: stop, or leave it out.
        output_json (`str`, *optional*):
            Write the counts there, too.
    """

    trees: str
    output: str
    problems: str | None = None
    image_root: str | None = None
    on_bad_row: Literal["raise", "skip"] = "raise"
    output_json: str | None = None


def main(args: Sequence[str], prog: str) -> int:
    """Run the command; returns its exit status."""
    settings, config = parse_settings(
        (RowsSettings, RowConfig), args, prog=prog, description="Turn trees into stepwise rows to train on."
    )
    return run(settings, config)


def run(settings: RowsSettings, config: RowConfig) -> int:
    """Make the rows, write them and print the counts."""
    from mm_prm.commands.files import check_output, read_trees, write_json, write_rows, write_settings_beside
    from mm_prm.data import load_problems, trees_to_rows
    from mm_prm.data.features import validate_row

    output = check_output(settings.output, settings.trees, settings.problems)
    problems = None
    bad_ids: set[str] = set()
    if settings.problems is not None:
        with reading_input(settings.problems):
            problems, skipped = load_problems(
                settings.problems, image_root=settings.image_root, on_bad_row=settings.on_bad_row
            )
            bad_ids = {entry["id"] for entry in skipped} - set(problems["id"])  # a duplicate's id is also a good one's
    with reading_input(settings.trees):
        trees = list(read_trees(settings.trees))
        if not trees:
            raise ValueError("holds no trees")
        if bad_ids:
            for number, tree in enumerate(trees):
                validate_row("tree", tree, number)
            trees = [tree for tree in trees if tree["problem_id"] not in bad_ids]
        rows, counts = trees_to_rows(trees, config, problems)
    counts["bad_problems"] = len(bad_ids)
    write_settings_beside(output, (settings, config))
    write_rows("stepwise", rows, output)
    write_json(settings.output_json, counts)
    print_counts(counts, settings.output)
    return 0


def print_counts(counts: Mapping[str, Any], output: str) -> None:
    """Print what became of the trees."""
    print(f"{counts['trees']} trees, {counts['trees_kept']} kept")
    if counts["bad_problems"]:
        print(f"  trees of {counts['bad_problems']} bad problems are left out")
    for reason, number in counts["trees_dropped"].items():
        print(f"  dropped: {number} {reason}")
    print(
        f"{counts['solutions']} solutions: {counts['rows']} rows ({counts['rows_right']} end right, "
        f"{counts['rows_wrong']} wrong), {counts['duplicates']} contained in them, {counts['left_out']} left out"
    )
    if "labels_dropped" in counts:
        dropped = counts["labels_dropped"]
        print(f"labels dropped: judge of steps disagrees {dropped['disagree']}, unknown {dropped['unknown']}")
    if "rows_before_selection" in counts:
        print(f"the most informative {counts['rows']} of {counts['rows_before_selection']} rows are kept")
    print(f"{counts['labels']} labels, {counts['distinct_labels']} distinct")
    print(f"rows: {output}")
