"""Scoring candidates with a process reward model, choosing among them, and searching with it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .aggregators import AGGREGATORS, PROBABILITY_AGGREGATORS
from .best_of_n import Selection, build_pools, group_answers, select, vote
from .guided_search import SearchConfig, SearchResult, search

if TYPE_CHECKING:
    from .scorer import Scorer
    from .served import ServedScorer
    from .vllm import VLLMScorer

__all__ = [
    "AGGREGATORS",
    "PROBABILITY_AGGREGATORS",
    "Scorer",
    "SearchConfig",
    "SearchResult",
    "Selection",
    "ServedScorer",
    "VLLMScorer",
    "build_pools",
    "group_answers",
    "search",
    "select",
    "vote",
]


# torch and a network library load with these, which choosing among scored candidates does not need.
_SCORERS = {"Scorer": "scorer", "ServedScorer": "served", "VLLMScorer": "vllm"}


def __getattr__(name: str) -> Any:
    if name not in _SCORERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_SCORERS[name]}"), name)
