"""A judge by rules: choices, numbers with units, lists, and formulas through math-verify. What it cannot tell is unknown."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from mm_prm.annotation.protocols import Problem, Verdict

from .comparison import CompareFormulas, equal_answers, is_prose
from .extraction import announces_answer, extract_answer, final_step, gold_answer
from .math_process import MathOutcome, MathProcess
from .quantities import compact, is_cut_off, normalize, parse_quantity

_CACHED_ANSWERS = 2**17
# A comparison that took too long is tried again when the answer comes again, but a bomb must not hold up a whole run.
_MOST_TIME_OUTS = 1
# An answer of more characters is a solution, or an attack on the rules.
_MOST_CHARACTERS = 2000

_LETTER = re.compile(
    r"(?:the\s+)?(?:option|choice|choose|figure|选项|选择|选)?\s*[(\[]?([A-Za-z])[)\]]?\s*[.:)]?", re.IGNORECASE
)
_LETTERS = re.compile(r"(?:[(\[]?[A-Z][)\]]?(?:\s*[,;&/]\s*(?:and|or)?\s*|\s+(?:and|or)\s+|\Z))+")
_LETTER_AND_TEXT = re.compile(
    r"(?:(?:option|choice)\s+)?(?:[(\[]([A-Z])[)\]][.:]?|([A-Z])\s*[.:)])\s*(\S.*)", re.DOTALL
)
# What is a letter and its text only if the text says so, too: "B, 20 m", "B - 20 m", "B 20 m".
_LETTER_BESIDE_TEXT = re.compile(
    r"(?:(?:option|choice)\s+)?([A-Z])(?:,?\s+which is\s+|\s*[,=]\s*|\s+-\s+|\s+)(\S.*)", re.DOTALL
)
# A letter that stands after its text: "20 m (B)", "20 m, which is option B".
_LETTER_AFTER_TEXT = re.compile(
    r"(.*?),?\s*(?:which (?:is|corresponds to|matches)\s+)?"
    r"(?:[(\[](?:(?:option|choice)\s+)?([A-Z])[)\]]|(?:the\s+)?\b(?:option|choice)\s+[(\[]?([A-Z])[)\]]?)",
    re.DOTALL | re.IGNORECASE,
)
# What may follow an answer and says nothing about it that could be compared.
_COMMENT = re.compile(
    r"(?:,?\s+(?:because|since|as (?:shown|it|the))\b|\s+is\s+(?:the\s+)?(?:correct|right|answer)\b).*",
    re.DOTALL | re.IGNORECASE,
)


class _Interrupted(Exception):
    """Carries a verdict past the memory of verdicts: that a comparison took too long may be the machine's fault."""

    def __init__(self, verdict: Verdict):
        super().__init__(verdict.reason)
        self.verdict = verdict


class RulesJudge:
    """
    Decides by rules whether a solution's final answer equals the gold answer, see
    [`~mm_prm.annotation.protocols.Judge`].

    The verdict is `"unknown"` if no answer can be found, if the gold answer or the answer is not understood, or if the
    comparison takes too long. Verdicts are kept, so that the same answer of a problem is compared once; only a comparison
    that took too long is tried once more. Raises [`~mm_prm.judges.math_process.MathProcessError`] if math-verify cannot
    be started.

    An instance pickles as its settings and can be used from several threads; comparisons of formulas then wait for each
    other.

    Args:
        timeout_seconds (`float`, *optional*, defaults to `5.0`):
            Time limit of one comparison of formulas, which runs in a process of its own and is killed after it.
    """

    packages = ("math-verify",)  # whose version is part of what this judge is

    def __init__(self, timeout_seconds: float = 5.0):
        if timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds: {timeout_seconds!r} has to be above 0")
        self.timeout_seconds = timeout_seconds
        self._mathematics = MathProcess(timeout_seconds)
        self._time_outs: Counter[tuple[str, str]] = Counter()
        self._extract = lru_cache(maxsize=_CACHED_ANSWERS)(_extract_from_last)
        self._compare_kept = lru_cache(maxsize=_CACHED_ANSWERS)(self._compare_uncached)

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
        return self.judge_answer(problem["answer"], self._extract(final_step(solution), choices), choices)

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

    def judge_prediction(self, gold: str, prediction: str, choices: Sequence[str] = ()) -> Verdict:
        """
        Judges an answer that others have extracted, perhaps with its announcement ("Answer: B"), perhaps not at all.

        Args:
            gold (`str`):
                The gold answer: its text, or the letter of a choice.
            prediction (`str`):
                The answer; or, where nothing could be extracted, the solution.
            choices (`Sequence[str]`, *optional*, defaults to `()`):
                Choices of the problem.

        Returns:
            [`~mm_prm.annotation.protocols.Verdict`].
        """
        if not announces_answer(prediction):
            whole = self.judge_answer(gold, prediction.strip(), choices)
            if whole.verdict != "unknown":
                return whole
        return self.judge_answer(gold, self._extract(prediction.strip(), tuple(choices)), choices)

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

    def _compare(self, gold: str, answer: str, choices: tuple[str, ...]) -> Verdict:
        try:
            return self._compare_kept(gold, answer, choices)
        except _Interrupted as error:
            return error.verdict

    def _compare_uncached(self, gold: str, answer: str, choices: tuple[str, ...]) -> Verdict:
        if not answer.strip():
            return Verdict("unknown", answer, "no answer found")
        if max(len(gold), len(answer)) > _MOST_CHARACTERS:
            return Verdict("unknown", answer[:_MOST_CHARACTERS], "too long to compare")
        interrupted = False

        def compare_formulas(gold_latex: str, answer_latex: str) -> MathOutcome:
            nonlocal interrupted
            outcome = self._mathematics.compare(gold_latex, answer_latex)
            interrupted = interrupted or outcome in ("timeout", "error")
            return outcome

        if compact(gold) != compact(answer):
            gold = gold_answer(gold)
        if choices:
            equal, reason = self._equal_choices(gold, answer, choices, compare_formulas)
        else:
            equal, reason = self._equal(gold, answer, compare_formulas)
        stated = _COMMENT.sub("", answer)
        if equal is None and stated != answer and stated.strip():
            return self._compare_uncached(gold, stated, choices)
        verdict = Verdict("unknown" if equal is None else "right" if equal else "wrong", answer, reason)
        if equal is None and interrupted and self._time_outs[gold, answer] < _MOST_TIME_OUTS:
            self._time_outs[gold, answer] += 1
            raise _Interrupted(verdict)
        return verdict

    def _equal(self, gold: str, answer: str, compare_formulas: CompareFormulas) -> tuple[bool | None, str]:
        if re.fullmatch(r"[A-Z]", normalize(gold)):  # a letter whose choices stand in the question
            letter = _letter(answer)
            if letter is not None:
                return letter == normalize(gold), "compared as letters"
            if parse_quantity(answer) is not None:
                return None, "perhaps the text of a choice that is not given"
        return equal_answers(gold, answer, compare_formulas)

    def _equal_choices(
        self, gold: str, answer: str, choices: tuple[str, ...], compare_formulas: CompareFormulas
    ) -> tuple[bool | None, str]:
        gold_index, reason = self._choice(gold, choices, compare_formulas)
        if gold_index is None:
            return None, f"gold answer: {reason}"
        if len(set(_letters(answer))) > 1 and answer not in choices:
            return False, "several choices are named"
        index, reason = self._choice(answer, choices, compare_formulas)
        if index is not None:
            same = index == gold_index or compact(choices[index]) == compact(choices[gold_index])
            return same, "compared as choices"
        begun = [number for number, choice in enumerate(choices) if is_cut_off(answer, choice)]
        if begun:
            return (None if gold_index in begun else False), "cut off where another choice had begun"
        return (False if index is None and reason == "none of the choices" else None), reason

    def _choice(
        self, text: str, choices: tuple[str, ...], compare_formulas: CompareFormulas
    ) -> tuple[int | None, str]:
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
                named, _ = equal_answers(choices[index], both[3], compare_formulas)
                elsewhere = any(
                    compact(choice) == compact(both[3]) for other, choice in enumerate(choices) if other != index
                )
                return (None, "letter and text name two choices") if elsewhere and not named else (index, "")
        beside = _LETTER_BESIDE_TEXT.fullmatch(normalize(text))
        index = ord(beside[1]) - ord("A") if beside is not None else len(choices)
        if beside is not None and index < len(choices):
            texts = (beside[2], re.sub(r"\A\((.+)\)\Z", r"\1", beside[2]))  # "B (20 m)"
            if any(equal_answers(choices[index], part, compare_formulas)[0] for part in texts):
                return index, ""
        after = _LETTER_AFTER_TEXT.fullmatch(normalize(text))
        index = ord((after[2] or after[3]).upper()) - ord("A") if after is not None else len(choices)
        if after is not None and index < len(choices):
            verdicts = [equal_answers(choice, after[1], compare_formulas)[0] for choice in choices]
            if True in verdicts:
                return (index, "") if verdicts[index] else (None, "letter and text name two choices")
        by_number = _named_by_number(text, choices)
        if by_number is not None:
            return by_number, ""
        verdicts = [equal_answers(choice, text, compare_formulas)[0] for choice in choices]
        if verdicts.count(True) == 1:
            return verdicts.index(True), ""
        if True in verdicts:
            return None, "several choices are equal to it"
        return None, "not clear which choice" if None in verdicts else "none of the choices"


def _letter(text: str) -> str | None:
    match = _LETTER.fullmatch(normalize(text).strip("*_ "))
    return match[1].upper() if match else None


def _letters(text: str) -> list[str]:
    """Letters of an answer that is nothing but a list of them: "(A), (B), and (C)"."""
    text = normalize(text)
    return re.findall(r"[A-Z]", text) if _LETTERS.fullmatch(text) else []


def _named_by_number(text: str, choices: tuple[str, ...]) -> int | None:
    """The choice of the only number in it: "7" for "7-pyramid", where each choice has words and one number of its own."""
    numbers = [re.findall(r"\d+(?:\.\d+)?", normalize(choice)) for choice in choices]
    if not all(len(found) == 1 and is_prose(choice) for found, choice in zip(numbers, choices, strict=True)):
        return None
    named = [index for index, found in enumerate(numbers) if found == [normalize(text)]]
    return named[0] if len(named) == 1 else None


def _extract_from_last(last: str, choices: tuple[str, ...]) -> str:
    return extract_answer([last], choices)
