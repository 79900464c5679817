"""What annotated trees cost, and what came of it. Plain data only."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_COSTS = ("rollouts", "prompt_tokens", "generated_tokens", "judge_calls", "seconds")


@dataclass
class AnnotationCost:
    """
    Sums over trees. A label is a measured prefix other than the empty one.

    Args:
        trees (`Counter`):
            Number of trees by status.
        verdicts (`Counter`):
            Number of rollouts by verdict.
        total (`Counter`):
            rollouts, prompt_tokens, generated_tokens, judge_calls and seconds.
        rollouts_per_label (`list[float]`):
            Of each tree with labels.
        mc_values (`list[float]`):
            Of each label.
    """

    trees: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    total: Counter[str] = field(default_factory=Counter)
    rollouts_per_label: list[float] = field(default_factory=list)
    mc_values: list[float] = field(default_factory=list)

    def rows(self) -> list[tuple[str, float, float | None]]:
        """Name of each cost, how much in all, and how much for a label."""
        labels = len(self.mc_values)
        named = ((name.replace("_", " "), float(self.total[name])) for name in _COSTS)
        return [(name, amount, amount / labels if labels else None) for name, amount in named]


def annotation_cost(trees: Iterable[Mapping[str, Any]]) -> AnnotationCost:
    """
    Add up what trees cost.

    Args:
        trees (`Iterable[Mapping[str, Any]]`):
            Tree rows.
    """
    cost = AnnotationCost()
    for tree in trees:
        cost.trees[tree["status"]] += 1
        cost.verdicts.update(rollout["verdict"] for rollout in tree["rollouts"])
        cost.total.update({name: tree["cost"][name] for name in _COSTS})
        measured = [node for node in tree["nodes"][1:] if node["num_judged"]]
        cost.mc_values += [node["num_right"] / node["num_judged"] for node in measured]
        if measured:
            cost.rollouts_per_label.append(tree["cost"]["rollouts"] / len(measured))
    return cost
