"""Scoring candidates with a process reward model, and choosing among them."""

from .aggregators import AGGREGATORS, PROBABILITY_AGGREGATORS
from .best_of_n import Selection, build_pools, group_answers, select
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
