"""A judge by rules: choices, numbers with units, lists, and formulas through math-verify. What it cannot tell is unknown."""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from mm_prm.annotation.protocols import Problem, Verdict

from .comparison import equal_answers
from .extraction import extract_answer
from .math_process import MathProcess
from .quantities import compact, normalize

_CACHED_ANSWERS = 2**17
# An answer of more characters is a solution, or an attack on the rules.
_MOST_CHARACTERS = 2000

_LETTER = re.compile(r"(?:the\s+)?(?:option|choice)?\s*[(\[]?([A-Za-z])[)\]]?\s*[.:)]?", re.IGNORECASE)
_LETTER_AND_TEXT = re.compile(
    r"(?:(?:option|choice)\s+)?(?:[(\[]([A-Z])[)\]][.:]?|([A-Z])\s*[.:)])\s*(\S.*)", re.DOTALL
)


class RulesJudge:
    """
    Decides by rules whether a solution's final answer equals the gold answer, see
    [`~mm_prm.annotation.protocols.Judge`].

    The verdict is `"unknown"` if no answer can be found, if the gold answer or the answer is not understood, or if the
    comparison takes too long. Verdicts are kept, so that the same answer of a problem is compared once.

    An instance pickles as its settings and can be used from several threads; comparisons of formulas then wait for each
    other.

    Args:
        timeout_seconds (`float`, *optional*, defaults to `5.0`):
            Time limit of one comparison of formulas, which runs in a process of its own and is killed after it.
    """

    def __init__(self, timeout_seconds: float = 5.0):
        if timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds: {timeout_seconds!r} has to be above 0")
        self.timeout_seconds = timeout_seconds
        self._mathematics = MathProcess(timeout_seconds)
        self._extract = lru_cache(maxsize=_CACHED_ANSWERS)(_extract_from_last)
        self._compare = lru_cache(maxsize=_CACHED_ANSWERS)(self._compare_uncached)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.timeout_seconds,)

    def judge(self, problem: Problem, solution: Sequence[str]) -> Verdict:
        """
        Judges a solution.

        Args:
            problem (`Mapping`):
                Problem row; its `answer` and `choices` are read.
            solution (`Sequence[str]`):
                All steps; the last one states the answer.

        Returns:
            [`~mm_prm.annotation.protocols.Verdict`].
        """
        choices = tuple(problem["choices"] or ())
        last = next((step for step in reversed(solution) if step and not step.isspace()), "")
        return self.judge_answer(problem["answer"], self._extract(last, choices), choices)

    def judge_answer(self, gold: str, answer: str, choices: Sequence[str] = ()) -> Verdict:
        """
        Judges an answer that was extracted before.

        Args:
            gold (`str`):
                The gold answer: its text, or the letter of a choice.
            answer (`str`):
                The answer.
            choices (`Sequence[str]`, *optional*, defaults to `()`):
                Choices of the problem.

        Returns:
            [`~mm_prm.annotation.protocols.Verdict`].
        """
        return self._compare(gold, answer, tuple(choices))

    def equivalent(self, first: str, second: str, choices: Sequence[str] = ()) -> bool:
        """
        Whether two answers are known to be the same, to count votes.

        Args:
            first (`str`):
                An answer, as extracted.
            second (`str`):
                Another.
            choices (`Sequence[str]`, *optional*, defaults to `()`):
                Choices of the problem.

        Returns:
            `bool`: `False` also if it cannot be told.
        """
        return self._compare(first, second, tuple(choices)).verdict == "right"

    def _compare_uncached(self, gold: str, answer: str, choices: tuple[str, ...]) -> Verdict:
        if not answer.strip():
            return Verdict("unknown", answer, "no answer found")
        if max(len(gold), len(answer)) > _MOST_CHARACTERS:
            return Verdict("unknown", answer, "too long to compare")
        equal, reason = self._equal_choices(gold, answer, choices) if choices else self._equal(gold, answer)
        return Verdict("unknown" if equal is None else "right" if equal else "wrong", answer, reason)

    def _equal(self, gold: str, answer: str) -> tuple[bool | None, str]:
        if re.fullmatch(r"[A-Z]", normalize(gold)):  # a letter whose choices stand in the question
            letter = _letter(answer)
            if letter is not None:
                return letter == normalize(gold), "compared as letters"
        return equal_answers(gold, answer, self._mathematics.compare)

    def _equal_choices(self, gold: str, answer: str, choices: tuple[str, ...]) -> tuple[bool | None, str]:
        gold_index, reason = self._choice(gold, choices)
        if gold_index is None:
            return None, f"gold answer: {reason}"
        index, reason = self._choice(answer, choices)
        if index is not None:
            same = index == gold_index or compact(choices[index]) == compact(choices[gold_index])
            return same, "compared as choices"
        return (False if index is None and reason == "none of the choices" else None), reason

    def _choice(self, text: str, choices: tuple[str, ...]) -> tuple[int | None, str]:
        """Index of the choice that a text names, or `None` and why."""
        by_text = [index for index, choice in enumerate(choices) if compact(choice) == compact(text)]
        letter = _letter(text)
        by_letter = None if letter is None else ord(letter) - ord("A")
        if by_letter is not None and by_letter >= len(choices):
            by_letter = None
        if by_letter is not None:
            if by_text and by_letter not in by_text:
                return None, "a letter that is also the text of another choice"
            return by_letter, ""
        if by_text:
            return by_text[0], ""
        both = _LETTER_AND_TEXT.fullmatch(normalize(text))
        if both is not None:
            index = ord(both[1] or both[2]) - ord("A")
            if index < len(choices):
                named, _ = equal_answers(choices[index], both[3], self._mathematics.compare)
                elsewhere = any(
                    compact(choice) == compact(both[3]) for other, choice in enumerate(choices) if other != index
                )
                return (None, "letter and text name two choices") if elsewhere and not named else (index, "")
        verdicts = [equal_answers(choice, text, self._mathematics.compare)[0] for choice in choices]
        if verdicts.count(True) == 1:
            return verdicts.index(True), ""
        if True in verdicts:
            return None, "several choices are equal to it"
        return None, "not clear which choice" if None in verdicts else "none of the choices"


def _letter(text: str) -> str | None:
    match = _LETTER.fullmatch(normalize(text).strip("*_ "))
    return match[1].upper() if match else None


def _extract_from_last(last: str, choices: tuple[str, ...]) -> str:
    return extract_answer([last], choices)
