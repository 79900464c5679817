"""Scoring candidates with a process reward model, and choosing among them."""

from typing import TYPE_CHECKING, Any

from .aggregators import AGGREGATORS, PROBABILITY_AGGREGATORS
from .best_of_n import Selection, build_pools, group_answers, select

if TYPE_CHECKING:
    from .scorer import Scorer

__all__ = [
    "AGGREGATORS",
    "PROBABILITY_AGGREGATORS",
    "Scorer",
    "Selection",
    "build_pools",
    "group_answers",
    "select",
]


def __getattr__(name: str) -> Any:
    if name != "Scorer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .scorer import Scorer  # torch, which choosing among scored candidates does not need

    return Scorer
