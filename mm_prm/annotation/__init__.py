"""Annotation: trees of rollouts for problems, by OmegaPRM or flat, with a journal."""

from mm_prm.annotation.annotator import Progress, annotate
from mm_prm.annotation.config import AnnotationConfig
from mm_prm.annotation.flat import FlatRollouts
from mm_prm.annotation.identity import describe
from mm_prm.annotation.journal import Journal, JournalError
from mm_prm.annotation.omegaprm import OmegaPRM
from mm_prm.annotation.protocols import Generation, Judge, Policy, Rollout, RolloutRequest, Verdict
from mm_prm.annotation.stage import MCTSAnnotator

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
