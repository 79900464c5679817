"""The mini world: rendered problems whose every step can be checked exactly.

No pretrained vision-language model is needed to see the whole of mm-prm at work: this module makes problems with
pictures, the solutions that a policy learns from (right ones and ones that follow a typical wrong *method*), and an
exact checker of steps. Everything is a pure function of a problem's id, so a data set of annotated trees can leave the
pictures out and draw them again.

A question is an arithmetic expression over quantities that are printed in the picture, put into words with a small
shared vocabulary (plus, minus, half of, twice, the larger of, without the last, …). A wrong method is either a change
of that expression (drops a term, wrong operation, wrong order, halves twice, …) or a misreading of the picture (the
neighbouring bar, row for column, the other picture). The same kinds of error recur in all families, so that what a
verifier learns on some compositions can carry over to others; the misreadings are wrong *by the picture only*.

Documented as what it is: the rates of the wrong methods are made up (`QuestionType.rates`). In three types of five the
right method is the most frequent one, in the others a wrong method is, so that a majority vote helps and still fails
on whole types.

Splits are disjoint by seed. `policy` is for the policy's fine-tuning and holds everything. `annotation`, `validation`
and `test` hold the in-domain types and wordings. `test_ood` holds what annotation and PRM never see: question types
that only the policy knows, and in-domain types in a third wording, under which the policy was shown one further wrong
method for each type.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from .mini_expressions import Expression, Scene, solve
from .mini_types import COLOURS, FAMILIES, ITEMS, QuestionType, question_types, seeded

SPLITS = ("policy", "annotation", "validation", "test", "test_ood")


@dataclass(frozen=True)
class MiniProblem:
    """A problem of the mini world, all of it a function of `split` and `index`.

    Attributes:
        is_ood_wording (`bool`):
            Whether it is put in the wording under which the policy was shown the held-out wrong method.
        answers (`dict[str, str]`):
            The final answer that each method of the type arrives at.
    """

    split: str
    index: int
    type: QuestionType
    scene: Scene
    question: str
    choices: tuple[str, ...]
    is_ood_wording: bool
    answers: dict[str, str]

    @property
    def id(self) -> str:
        return f"mini-{self.split}-{self.index:07d}"

    @property
    def answer(self) -> str:
        return self.answers["right"]

    @property
    def rates(self) -> dict[str, float]:
        return self.type.rates_ood if self.is_ood_wording else self.type.rates

    def images(self) -> list[Any]:
        """The pictures, 112 × 112 `PIL.Image.Image`s in RGB."""
        from .mini_pictures import draw

        return draw(self.scene, seeded("picture", self.split, self.index))

    def solution(self, method: str, reads_first: bool = False) -> list[str]:
        """The steps of `method` (`"right"` or one of `rates`), the last of which states the answer."""
        derivation = solve(self.type.expression, self.scene, method, reads_first)
        value = derivation.stated
        if not self.choices:
            return [*derivation.steps, f"The answer is {value}."]
        letter = "ABCDE"[self.choices.index(value)]
        return [*derivation.steps, f"{value} is option {letter}.", f"The answer is {letter}."]

    def sample_solution(self, rng: random.Random) -> tuple[str, list[str]]:
        """A solution as the policy's fine-tuning data shows it: `(method, steps)`, methods at the type's rates."""
        (method,) = rng.choices(list(self.rates), weights=list(self.rates.values()))
        return method, self.solution(method, reads_first=rng.random() < 0.25)

    def row(self) -> dict[str, Any]:
        """The problem as a row of `PROBLEM_FEATURES`."""
        answer = self.answer
        kinds = ("choice", bool(self.choices)), ("fraction", "/" in answer), ("decimal", "." in answer)
        return {
            "id": self.id,
            "images": self.images(),
            "question": self.question,
            "answer": answer,
            "choices": list(self.choices),
            "answer_type": next((kind for kind, holds in kinds if holds), "integer"),
            "source": f"mini/{self.split}",
            "subject": self.type.name,
        }


def _scene(question_type: QuestionType, rng: random.Random) -> Scene:
    family = FAMILIES[question_type.family]

    def number() -> int:
        return rng.randint(family.low, family.high)

    slots: dict[str, str] = {}
    if family.name == "bars":
        names = [f"bar {letter}" for letter in "ABCD"]
        confusions = {name: names[(place + 1) % 4] for place, name in enumerate(names)}
    elif family.name == "table":
        cells = [(row, column) for row in (1, 2, 3) for column in (1, 2, 3)]
        names = [f"row {row} column {column}" for row, column in cells]
        confusions = {f"row {row} column {column}": f"row {column} column {row}" for row, column in cells}
    elif family.name == "triangle":
        names = ["angle A", "angle B"]
        confusions = {"angle A": "angle B", "angle B": "angle A"}
    elif family.name == "rectangle":
        names = ["the width", "the height", "the cut"]
        confusions = {"the width": "the height", "the height": "the cut", "the cut": "the width"}
    elif family.name == "prices":
        names = rng.sample(ITEMS, 3)
        confusions = dict(pairwise([*names, names[0]]))
    elif family.name == "line":
        names = list("PQRS")
        confusions = dict(zip(names, "QRSR", strict=True))
    elif family.name == "bags":
        names = list(COLOURS)
        confusions = dict(pairwise([*names, names[0]]))
    else:
        names = [f"{letter} in the {place} picture" for place in ("first", "second") for letter in "ABC"]
        confusions = {name: names[(place + 3) % 6] for place, name in enumerate(names)}
    if family.name == "line":
        values = dict(zip(names, sorted(rng.sample(range(family.low, family.high + 1), 4)), strict=True))
    else:
        values = {name: number() for name in names}

    if family.name in ("triangle", "rectangle"):
        slots = dict(zip("xyz", names, strict=False))
    elif family.name == "table":
        off_diagonal = [name for name in names if confusions[name] != name]
        slots = dict(zip("xyz", rng.sample(off_diagonal, 3), strict=True))
    else:
        slots = dict(zip("xyz", rng.sample(names, 3), strict=True))
    if family.name == "line" and values[slots["x"]] < values[slots["y"]]:
        slots["x"], slots["y"] = slots["y"], slots["x"]
    slots |= {"n": str(rng.randint(2, 5)), "m": str(rng.choice((50, 60, 80, 100)))}
    return Scene(family.name, values, slots, confusions)


def _phrase(e: Expression, scene: Scene) -> str:
    """The expression in words."""
    plural = FAMILIES[scene.family].plural

    def inner(part: Expression) -> str:  # inside half of, twice: the sum of … and …
        if part[0] in ("sum", "minus"):
            noun = {"sum": "sum", "minus": "difference"}[part[0]]
            return f"the {noun} of {_phrase(part[1], scene)} and {_phrase(part[2], scene)}"
        return _phrase(part, scene)

    match e:
        case ("read", slot):
            return scene.slots[slot]
        case ("all",):
            return f"the sum of all {plural}"
        case ("all_but_last",):
            return f"the sum of all {plural} without the last"
        case ("half", a):
            return f"half of {inner(a)}"
        case ("twice", a):
            return f"twice {inner(a)}"
        case (("larger" | "smaller") as which, a, b):
            return f"the {which} of {_phrase(a, scene)} and {_phrase(b, scene)}"
        case ("fraction", a, b):
            return f"{_phrase(a, scene)} as a fraction of {inner(b)}"
        case (("sum" | "minus") as kind, a, b):
            comma = "" if a[0] == "read" else ","
            word = {"sum": "plus", "minus": "minus"}[kind]
            return f"{_phrase(a, scene)}{comma} {word} {_phrase(b, scene)}"
    raise ValueError(f"no words for {e}")


def _usable(question_type: QuestionType, scene: Scene, methods: Sequence[str]) -> dict[str, str] | None:
    """The answer of each method, or None where a method fails on this scene or agrees with the right one by chance."""
    answers = {}
    for method in methods:
        derivation = solve(question_type.expression, scene, method)
        answers[method] = derivation.stated
        # quarters are as fine as numbers get, but for fractions
        if any(
            value < 0 or ("/" not in derivation.stated and (value * 4).denominator != 1) for value in derivation.values
        ):
            return None
    values = [Fraction(answer) for answer in answers.values()]
    return answers if len(set(values)) == len(values) and values[0] > 0 else None


def problem(split: str, index: int) -> MiniProblem:
    """Problem number `index` of `split`.

    Args:
        split (`str`):
            One of `SPLITS`.
        index (`int`):
            Its number, from 0.

    Raises:
        `ValueError`: if there is no such split or the index is negative.
    """
    if split not in SPLITS or index < 0:
        raise ValueError(f"no problem {index} in split {split!r} of the mini world; splits are {', '.join(SPLITS)}")
    rng = seeded("problem", split, index)
    types = list(question_types().values())
    in_domain = [question_type for question_type in types if question_type.in_domain]
    novel = [question_type for question_type in types if not question_type.in_domain]
    if split == "policy":
        question_type, is_ood_wording = rng.choice(types), rng.random() < 1 / 3
    elif split == "test_ood":
        question_type, is_ood_wording = (rng.choice(novel), False) if index % 2 else (rng.choice(in_domain), True)
    else:
        question_type, is_ood_wording = rng.choice(in_domain), False
    methods = list(dict.fromkeys([*question_type.rates, *question_type.rates_ood]))
    while True:
        scene = _scene(question_type, rng)
        if question_type.family == "triangle" and sum(scene.values.values()) > 150:
            continue
        if (answers := _usable(question_type, scene, methods)) is not None:
            break
    wording = (
        question_type.wording.format(**scene.slots)
        if question_type.wording
        else _phrase(question_type.expression, scene)
    )
    question = f"Find {wording}." if is_ood_wording else rng.choice(("What is {}?", "Work out {}.")).format(wording)
    if question_type.family == "charts":
        question = f"First picture: <image> Second picture: <image> {question}"
    choices: tuple[str, ...] = ()
    if question_type.is_choice:
        shuffled = list(answers.values())
        rng.shuffle(shuffled)
        choices = tuple(shuffled)
        question += "".join(f" {letter}) {value}" for letter, value in zip("ABCDE", choices, strict=False))
        answers = {method: "ABCDE"[choices.index(value)] for method, value in answers.items()}
    return MiniProblem(split, index, question_type, scene, question, choices, is_ood_wording, answers)


def problem_from_id(problem_id: str) -> MiniProblem:
    """The problem with this id, e.g. `"mini-test-0000012"`."""
    match = re.fullmatch(r"mini-(\w+)-(\d{7})", problem_id)
    if not match:
        raise ValueError(f"{problem_id!r} is no id of the mini world; they look like 'mini-test-0000012'")
    return problem(match[1], int(match[2]))


def generate_problems(split: str, num_problems: int, start: int = 0) -> Iterator[dict[str, Any]]:
    """Yields `num_problems` problem rows of `split`, pictures included, from number `start`."""
    for index in range(start, start + num_problems):
        yield problem(split, index).row()
