"""What the quickstart shows in a terminal: one search tree, and the tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from mm_prm.report import format_difference, format_estimate

Row = Mapping[str, Any]


def choose_tree(trees: Sequence[Row]) -> Row | None:
    """The tree that shows most: prefixes that come right beside prefixes that never do, and many of both."""

    def interest(tree: Row) -> tuple[int, int]:
        measured = [node for node in tree["nodes"] if node["num_judged"]]
        lost = sum(node["num_right"] == 0 for node in measured)
        return min(lost, len(measured) - lost), len(measured)

    complete = [tree for tree in trees if tree["status"] == "complete"]
    return max(complete, key=interest, default=None)


def tree_view(tree: Row, problem: Row) -> Group:
    """
    A search tree: each measured prefix with the share of its rollouts that ended right.

    Args:
        tree (`Mapping[str, Any]`):
            Tree row.
        problem (`Mapping[str, Any]`):
            Its problem row.
    """
    views: dict[int, Tree] = {}
    root = Tree(Text("the problem"))
    for node in tree["nodes"]:
        label = Text.assemble(_value(node), "  ", Text(" ⏎ ".join(node["steps"]) or "(nothing written yet)"))
        parent = views.get(node["parent_id"])
        if parent is None:
            root.label = label
            views[node["node_id"]] = root
        else:
            views[node["node_id"]] = parent.add(label)
    heading = Text.assemble(
        (f"{problem['id']}: ", "bold"), problem["question"], ("  Gold answer: ", "bold"), problem["answer"]
    )
    note = Text("mc_value (right / judged rollouts), and the steps that follow", style="dim")
    return Group(heading, note, root)


def _value(node: Row) -> Text:
    if not node["num_judged"]:
        return Text("  – ", style="dim")
    value = node["num_right"] / node["num_judged"]
    style = "red" if value == 0 else "green" if value > 0.5 else "yellow"
    return Text(f"{value:.2f} ({node['num_right']}/{node['num_judged']})", style=style)


def main_table(results: Row, verifiers: Sequence[str], aggregator: str) -> Table:
    """
    Methods with their accuracies, and paired differences to the baselines.

    Args:
        results (`Mapping[str, Any]`):
            Content of `results.json`.
        verifiers (`Sequence[str]`):
            Names of the process reward models.
        aggregator (`str`):
            Aggregator of the step scores, fixed in advance.
    """
    table = _table("method", "accuracy [95 %]", "minus mean pass@1", "minus majority vote")
    entries = {
        "mean pass@1": results["pass@1"],
        "greedy": results["greedy"],
        "majority vote": results["majority"],
        "uninformative verifier": results["uninformative"],
        **{f"{name}, {aggregator}": results[name][aggregator] for name in verifiers},
        f"weighted majority ({results['weighted_majority']['verifier']}, {aggregator})": results["weighted_majority"],
        "oracle": results["oracle"],
    }
    for name, entry in entries.items():
        differences = (format_difference(entry.get(f"minus_{baseline}")) for baseline in ("pass@1", "majority"))
        table.add_row(name, format_estimate(entry), *differences)
    return table


def aggregator_table(entries: Mapping[str, Mapping[str, Row]], first: str) -> Table:
    """
    Accuracies by aggregator and process reward model.

    Args:
        entries (`Mapping[str, Mapping[str, Mapping]]`):
            Estimates by process reward model and aggregator.
        first (`str`):
            Heading of the first column.
    """
    table = _table(first, *entries)
    for aggregator in next(iter(entries.values())):
        table.add_row(aggregator, *(format_estimate(entry[aggregator]) for entry in entries.values()))
    return table


def _table(first: str, *headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, no_wrap=True, justify="right")
    return table


def console() -> Console:
    """The terminal, or a file as wide as the tables."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=140)
