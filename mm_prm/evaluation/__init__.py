"""From a policy and a process reward model to the numbers of a benchmark, each stage kept and resumable."""

from .judging import ToleranceJudge
from .scorer_identity import scorer_identity
from .stages import sample_candidates, score_candidates, search_candidates

__all__ = ["ToleranceJudge", "sample_candidates", "score_candidates", "scorer_identity", "search_candidates"]
