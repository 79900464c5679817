"""The answer rule of benchmarks that state how far a number may lie from the gold answer."""

from collections.abc import Mapping, Sequence

from mm_prm.annotation.protocols import Judge, Problem, Verdict
from mm_prm.inference.best_of_n import EquivalenceJudge


class ToleranceJudge:
    """
    A judge that also takes a number within its problem's tolerance for right.

    Args:
        judge ([`~mm_prm.annotation.protocols.Judge`]):
            Judge that is asked first.
        equivalence ([`EquivalenceJudge`]):
            Judge that compares answers with each other, to count votes: by rules, because there are many pairs.
        tolerances (`Mapping[str, float]`):
            Tolerance of a problem, by its id.
    """

    def __init__(self, judge: Judge, equivalence: EquivalenceJudge, tolerances: Mapping[str, float]):
        self._judge, self._equivalence, self._tolerances = judge, equivalence, tolerances

    def judge(self, problem: Problem, solution: Sequence[str]) -> Verdict:
        """Judges a solution, see [`~mm_prm.annotation.protocols.Judge`]."""
        verdict = self._judge.judge(problem, solution)
        tolerance = self._tolerances.get(problem["id"])
        if verdict.verdict == "right" or tolerance is None:
            return verdict
        gold, answer = _number(problem["answer"]), _number(verdict.extracted)
        # A gold answer of 1.2 rounds 1.25 in or out by the last bit of its double; the limit itself is within.
        if gold is None or answer is None or abs(gold - answer) > tolerance * (1 + 1e-9):
            return verdict
        return Verdict("right", verdict.extracted, f"within {tolerance:g} of the gold answer")

    def equivalent(self, a: str, b: str, choices: Sequence[str]) -> bool:
        """Whether two answers mean the same; tolerance has no part in it, as it is no equivalence."""
        return self._equivalence.equivalent(a, b, choices)


def _number(text: str) -> float | None:
    try:
        return float(text.strip("$ ").replace(",", ""))
    except ValueError:
        return None
