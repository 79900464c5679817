"""Two judges in turn: rules decide what they can, and a language model is asked about the rest."""

from collections.abc import Sequence

from mm_prm.annotation.protocols import Judge, Problem, Verdict


class CascadeJudge:
    """
    Asks the second judge where the first does not know, see [`~mm_prm.annotation.protocols.Judge`].

    A solution in which the first judge found no answer at all stays unknown: there is nothing to compare.

    Args:
        first ([`~mm_prm.annotation.protocols.Judge`]):
            The cheap one.
        second ([`~mm_prm.annotation.protocols.Judge`]):
            The dear one.
    """

    def __init__(self, first: Judge, second: Judge):
        self.first = first
        self.second = second

    def judge(self, problem: Problem, solution: Sequence[str]) -> Verdict:
        """Judges a solution; see [`~mm_prm.annotation.protocols.Judge`]."""
        verdict = self.first.judge(problem, solution)
        if verdict.verdict != "unknown" or not verdict.extracted:
            return verdict
        second = self.second.judge(problem, solution)
        return Verdict(second.verdict, verdict.extracted, f"{verdict.reason}; {second.reason}", second.from_cache)
