"""The question types of the mini world, and the rates at which its policy was shown wrong methods for each."""

import hashlib
import random
from dataclasses import dataclass
from functools import cache

from .mini_expressions import ALL, ALL_BUT_LAST, WRONG_METHODS, Expression, X, Y, Z, apply_method, slots_of


@dataclass(frozen=True)
class Family:
    """One kind of picture: the quantities it shows and how a careless reader confuses them."""

    name: str
    plural: str
    low: int
    high: int


FAMILIES = {
    family.name: family
    for family in (
        Family("bars", "bars", 2, 20),
        Family("table", "cells", 1, 20),
        Family("triangle", "angles", 25, 75),
        Family("rectangle", "sides", 3, 12),
        Family("prices", "prices", 2, 20),
        Family("line", "points", 1, 40),
        Family("bags", "colours", 1, 12),
        Family("charts", "bars", 2, 20),
    )
}
ITEMS = ("cup", "pen", "hat", "key", "fan", "jar", "map", "toy")
COLOURS = ("red", "blue", "green")

# --- question types -------------------------------------------------------------------------------------------------

_THIRD_ANGLE = ("minus", ("minus", ("number", 180), X), Y)
_AREA = ("times", X, Y)
_PERIMETER = ("twice", ("sum", X, Y))

# key, expression, wording where it is not the generic one, multiple choice?; the last of each family is out of domain.
_TEMPLATES: dict[str, list[tuple[str, Expression, str, bool]]] = {
    "bars": [
        ("plus_minus", ("minus", ("sum", X, Y), Z), "", False),
        ("half_sum", ("half", ("sum", X, Y)), "", False),
        ("all_but_last", ALL_BUT_LAST, "", False),
        ("fraction_of_all", ("fraction", X, ALL), "", False),
        ("larger_minus_choice", ("minus", ("larger", X, Y), Z), "", True),
        ("twice_larger", ("twice", ("larger", X, Y)), "", False),
    ],
    "table": [
        ("plus", ("sum", X, Y), "", False),
        ("twice_minus", ("minus", ("twice", X), Y), "", False),
        ("larger_plus", ("sum", ("larger", X, Y), Z), "", False),
        ("half_plus", ("sum", ("half", X), Y), "", False),
        ("half_difference", ("half", ("minus", X, Y)), "", False),
    ],
    "triangle": [
        ("third", _THIRD_ANGLE, "angle C", False),
        ("half_third", ("half", _THIRD_ANGLE), "half of angle C", False),
        ("third_minus", ("minus", _THIRD_ANGLE, X), "angle C minus {x}", False),
        ("twice_third_choice", ("twice", _THIRD_ANGLE), "twice angle C", True),
        ("third_larger", ("larger", _THIRD_ANGLE, X), "the larger of angle C and {x}", False),
    ],
    "rectangle": [
        ("area", _AREA, "the area", False),
        ("perimeter", _PERIMETER, "the perimeter", False),
        ("half_area", ("half", _AREA), "half of the area", False),
        ("area_minus", ("minus", _AREA, Z), "the area, minus {z}", False),
        ("perimeter_plus", ("sum", _PERIMETER, Z), "the perimeter, plus {z}", False),
    ],
    "prices": [
        ("several", ("sum", ("times", ("number", "n"), X), Y), "{n} times {x} plus {y}", False),
        ("change", ("minus", ("number", "m"), ("sum", X, Y)), "{m} minus the sum of {x} and {y}", False),
        ("twice_sum", ("twice", ("sum", X, Y)), "", False),
        ("several_minus", ("minus", ("times", ("number", "n"), X), Y), "{n} times {x}, minus {y}", True),
        ("half_several", ("half", ("times", ("number", "n"), X)), "half of {n} times {x}", False),
    ],
    "line": [
        ("distance", ("minus", X, Y), "the distance from {y} to {x}", False),
        ("midpoint", ("half", ("sum", X, Y)), "the midpoint of {y} and {x}", False),
        ("twice_distance", ("twice", ("minus", X, Y)), "twice the distance from {y} to {x}", False),
        ("distance_plus", ("sum", ("minus", X, Y), Z), "the distance from {y} to {x}, plus {z}", False),
        (
            "half_distance_plus",
            ("sum", ("half", ("minus", X, Y)), Z),
            "half of the distance from {y} to {x}, plus {z}",
            False,
        ),
    ],
    "bags": [
        ("fraction_of_all", ("fraction", X, ALL), "", False),
        ("twice_minus", ("minus", ("twice", X), Y), "", False),
        ("fraction_of_sum", ("fraction", X, ("sum", X, Y)), "", False),
        ("half_plus", ("sum", ("half", X), Y), "", False),
        ("twice_all", ("twice", ALL), "", False),
    ],
    "charts": [
        ("minus", ("minus", X, Y), "", False),
        ("smaller_plus", ("sum", ("smaller", X, Y), Z), "", False),
        ("twice_sum", ("twice", ("sum", X, Y)), "", False),
        ("half_sum_choice", ("half", ("sum", X, Y)), "", True),
        ("half_plus_minus", ("minus", ("sum", ("half", X), Y), Z), "", False),
    ],
}


@dataclass(frozen=True)
class QuestionType:
    """A family and an expression, with the methods that the policy's fine-tuning data shows for it.

    Attributes:
        rates (`dict[str, float]`):
            Share of each method in solutions to the ordinary wordings; `"right"` and three wrong methods.
        rates_ood (`dict[str, float]`):
            The same under the out-of-domain wording, where one further wrong method takes the place of the most
            frequent one.
    """

    name: str
    family: str
    expression: Expression
    wording: str
    is_choice: bool
    in_domain: bool
    rates: dict[str, float]
    rates_ood: dict[str, float]


def seeded(*parts: object) -> random.Random:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


@cache
def question_types() -> dict[str, QuestionType]:
    """All question types by name, e.g. `"bars/half_sum"`; the same on every machine."""
    types = {}
    number = 0
    for family, templates in _TEMPLATES.items():
        for key, expression, wording, is_choice in templates:
            name = f"{family}/{key}"
            in_domain = key != templates[-1][0]
            rng = seeded("mini world, third edition", name)
            changes = [method for method in WRONG_METHODS if apply_method(method, expression) is not None]
            readings = [f"misreads {slot}" for slot in sorted(slots_of(expression))]
            rng.shuffle(changes)
            rng.shuffle(readings)
            # One or two of the three methods are misreadings; the fourth, of either sort, is kept for test_ood.
            wrong = readings[: 2 if number % 3 == 0 else 1]
            rest = changes + readings[len(wrong) :]
            wrong, held_out = wrong + rest[: 3 - len(wrong)], rest[3 - len(wrong)]
            rng.shuffle(wrong)
            if number % 5 in (1, 3):  # a wrong method is the most frequent one: the majority fails on this type
                right = rng.uniform(0.26, 0.34)
                most = right + rng.uniform(0.12, 0.18)
                shares = [most, *(share * (1 - right - most) for share in (0.6, 0.4))]
            else:
                right = rng.uniform(0.50, 0.62)
                shares = [share * (1 - right) for share in (0.42, 0.33, 0.25)]
            rates = {"right": right, **dict(zip(wrong, shares, strict=True))}
            rates_ood = {held_out if method == wrong[0] else method: rate for method, rate in rates.items()}
            types[name] = QuestionType(name, family, expression, wording, is_choice, in_domain, rates, rates_ood)
            number += 1
    return types
