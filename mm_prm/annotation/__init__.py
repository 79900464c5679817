"""Annotation: trees of rollouts for problems, by OmegaPRM or flat, with a journal.

Names load their module when they are first used, so that settings and protocols do not wait for `datasets`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .annotator import Progress, annotate
    from .config import AnnotationConfig
    from .flat import FlatRollouts
    from .identity import describe
    from .journal import Journal, JournalError
    from .omegaprm import OmegaPRM
    from .protocols import Generation, Judge, Policy, Rollout, RolloutRequest, Verdict
    from .stage import MCTSAnnotator

_MODULES = {
    "AnnotationConfig": "config",
    "FlatRollouts": "flat",
    "Generation": "protocols",
    "Journal": "journal",
    "JournalError": "journal",
    "Judge": "protocols",
    "MCTSAnnotator": "stage",
    "OmegaPRM": "omegaprm",
    "Policy": "protocols",
    "Progress": "annotator",
    "Rollout": "protocols",
    "RolloutRequest": "protocols",
    "Verdict": "protocols",
    "annotate": "annotator",
    "describe": "identity",
}

__all__ = [
    "AnnotationConfig",
    "FlatRollouts",
    "Generation",
    "Journal",
    "JournalError",
    "Judge",
    "MCTSAnnotator",
    "OmegaPRM",
    "Policy",
    "Progress",
    "Rollout",
    "RolloutRequest",
    "Verdict",
    "annotate",
    "describe",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
