"""The arithmetic of the mini world: expressions over what a picture shows, wrong methods, and how they are written out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

# An expression is a nested tuple: ("read", slot), ("number", value), ("sum", *terms), ("minus", a, b), ("times", a, b),
# ("half", a), ("twice", a), ("larger", a, b), ("smaller", a, b) or ("fraction", part, whole).
Expression = tuple


def read(slot: str) -> Expression:
    return ("read", slot)


X, Y, Z = read("x"), read("y"), read("z")
ALL: Expression = ("all",)
ALL_BUT_LAST: Expression = ("all_but_last",)


@dataclass(frozen=True)
class Scene:
    """What a picture shows: quantities in reading order, the slots a question uses, and what each is mistaken for."""

    family: str
    values: dict[str, int]
    slots: dict[str, str]
    confusions: dict[str, str]


# --- wrong methods: changes of the expression ------------------------------------------------------------------------


def _drop_term(e: Expression) -> Expression | None:
    match e:
        case ("sum", *terms):
            return terms[0] if len(terms) == 2 else e[:-1]
        case ("minus", kept, _) if kept[0] != "number":
            return kept
        case ("times", _, kept):
            return kept
        case ("all_but_last",):
            return ("all_but_two",)
    return None


def _wrong_operation(e: Expression) -> Expression | None:
    swap = {"sum": "minus", "minus": "sum", "times": "sum"}
    return (swap[e[0]], *e[1:]) if e[0] in swap and len(e) == 3 else None


def _wrong_order(e: Expression) -> Expression | None:
    """Applies the outer operation before the inner one: twice a + b for twice the sum, and the other way round."""
    match e:
        case (("half" | "twice") as outer, (("sum" | "minus") as inner, a, b)):
            return (inner, a, (outer, b))
        case (("sum" | "minus") as outer, (("half" | "twice") as inner, a), b):
            return (inner, (outer, a, b))
        case (("sum" | "minus") as outer, ("times", a, b), c):
            return ("times", a, (outer, b, c))
        case (("sum" | "minus") as outer, (("larger" | "smaller") as inner, a, b), c):
            return (inner, (outer, a, c), b)
        case ("minus", a, ("sum", b, c)):
            return ("sum", ("minus", a, b), c)
        case (("twice") as outer, (("larger" | "smaller") as inner, a, b)):
            return (inner, (outer, a), b)
    return None


def _repeats(e: Expression) -> Expression | None:
    return (e[0], e) if e[0] in ("half", "twice") else None


def _skips(e: Expression) -> Expression | None:
    return e[1] if e[0] in ("half", "twice") else None


def _other_extreme(e: Expression) -> Expression | None:
    swap = {"larger": "smaller", "smaller": "larger"}
    return (swap[e[0]], *e[1:]) if e[0] in swap else None


def _halves_for_doubles(e: Expression) -> Expression | None:
    swap = {"half": "twice", "twice": "half"}
    return (swap[e[0]], *e[1:]) if e[0] in swap else None


def _wrong_whole(e: Expression) -> Expression | None:
    if e[0] != "fraction":
        return None
    return ("fraction", e[1], ("all_but_x",) if e[2] == ALL else e[2][-1])


def _wrong_part(e: Expression) -> Expression | None:
    return ("fraction", read("y"), e[2]) if e[0] == "fraction" else None


def _extra_term(e: Expression) -> Expression | None:
    return ALL if e == ALL_BUT_LAST else None


def _wrong_constant(e: Expression) -> Expression | None:
    return ("number", 360) if e == ("number", 180) else None


def _without_last(e: Expression) -> Expression | None:
    return ALL_BUT_LAST if e == ALL else None


# The shared kinds of error. Each rewrites the first place of the expression, from the outside in, where it applies.
WRONG_METHODS = {
    "drops a term": _drop_term,
    "wrong operation": _wrong_operation,
    "wrong order": _wrong_order,
    "halves or doubles twice": _repeats,
    "forgets to halve or double": _skips,
    "halves for doubles": _halves_for_doubles,
    "the other extreme": _other_extreme,
    "wrong whole": _wrong_whole,
    "wrong part": _wrong_part,
    "takes the last too": _extra_term,
    "leaves out the last": _without_last,
    "wrong constant": _wrong_constant,
}
MISREADINGS = tuple(f"misreads {slot}" for slot in "xyz")


def apply_method(method: str, expression: Expression) -> Expression | None:
    changed = WRONG_METHODS[method](expression)
    if changed is not None:
        return changed
    for place, part in enumerate(expression[1:], start=1):
        if isinstance(part, tuple) and (changed := apply_method(method, part)) is not None:
            return (*expression[:place], changed, *expression[place + 1 :])
    return None


def slots_of(expression: Expression) -> set[str]:
    if expression[0] == "read":
        return {expression[1]}
    if expression[0] == "number":
        return set()
    # "all …" reads every quantity, those in the slots x and y too
    own = {"x", "y"} if expression[0].startswith("all") else set()
    return own.union(*(slots_of(part) for part in expression[1:]))


# --- evaluating and explaining an expression -------------------------------------------------------------------------


def format_value(value: Fraction) -> str:
    """`13`, `13.5` or, where the decimal does not end, `3/8`."""
    if value.denominator == 1:
        return str(value.numerator)
    scaled = value * 10000
    return f"{float(value):.4f}".rstrip("0") if scaled.denominator == 1 else f"{value.numerator}/{value.denominator}"


def expand(expression: Expression, scene: Scene) -> Expression:
    """Replaces `all …` by the sum of what the picture shows, and slots by the names of quantities."""
    kind = expression[0]
    if kind == "read":
        return ("read", scene.slots[expression[1]])
    if kind == "number":
        value = expression[1]
        return ("number", int(scene.slots[value]) if isinstance(value, str) else value)
    if kind.startswith("all"):
        names = list(scene.values)
        names = {"all": names, "all_but_last": names[:-1], "all_but_two": names[:-2]}.get(
            kind, [name for name in names if name != scene.slots["x"]]
        )
        return ("sum", *(("read", name) for name in names))
    return (kind, *(expand(part, scene) for part in expression[1:]))


COMPUTE: dict[str, Callable[..., Fraction]] = {
    "minus": lambda a, b: a - b,
    "times": lambda a, b: a * b,
    "half": lambda a: a / 2,
    "twice": lambda a: a * 2,
    "larger": max,
    "smaller": min,
    "fraction": lambda a, b: a / b,
}
_SAY = {
    "sum": "{} + {} = {}.",
    "minus": "{} - {} = {}.",
    "times": "{} * {} = {}.",
    "half": "half of {} is {}.",
    "twice": "twice {} is {}.",
    "larger": "the larger of {} and {} is {}.",
    "smaller": "the smaller of {} and {} is {}.",
}


@dataclass(frozen=True)
class Derivation:
    steps: tuple[str, ...]
    value: Fraction
    values: tuple[Fraction, ...]  # every value on the way: a method that passes through a negative one is not used

    @property
    def stated(self) -> str:
        """The value as the last step has it: a fraction is quoted as it was written, not in lowest terms."""
        last = self.steps[-1]
        return last[:-1].rsplit(" ", 1)[1] if "/" in last else format_value(self.value)


def derive(expression: Expression, scene: Scene, misread: str | None, reads_first: bool) -> Derivation:
    """Writes the steps that compute `expression`; quantities are read just before they are used, or all at the start."""
    seen: dict[str, Fraction] = {}
    steps: list[str] = []
    values: list[Fraction] = []

    def read(parts: Sequence[Expression]) -> None:
        names = [part[1] for part in parts if part[0] == "read" and part[1] not in seen]
        for name in dict.fromkeys(names):
            shown = scene.confusions[name] if name == misread else name
            seen[name] = Fraction(scene.values[shown])
        if names:
            steps.append(", ".join(f"{name} is {seen[name]}" for name in dict.fromkeys(names)) + ".")

    def leaves(e: Expression) -> list[Expression]:
        if e[0] in ("read", "number"):
            return [e]
        return [leaf for part in e[1:] for leaf in leaves(part)]

    def value_of(e: Expression) -> Fraction:
        if e[0] == "read":
            return seen[e[1]]
        if e[0] == "number":
            return Fraction(e[1])
        inner = {place: value_of(part) for place, part in enumerate(e[1:]) if part[0] not in ("read", "number")}
        read(e[1:])
        operands = [inner[place] if place in inner else value_of(part) for place, part in enumerate(e[1:])]
        if e[0] == "sum":
            total = operands[0]
            for term in operands[1:]:
                steps.append(_SAY["sum"].format(format_value(total), format_value(term), format_value(total + term)))
                total += term
                values.append(total)
            return total
        result = Fraction(COMPUTE[e[0]](*operands))
        if e[0] == "fraction":
            part, whole = map(format_value, operands)
            steps.append(f"{part} of {whole} is {part}/{whole}.")
        else:
            steps.append(_SAY[e[0]].format(*map(format_value, operands), format_value(result)))
        values.append(result)
        return result

    expression = expand(expression, scene)
    if reads_first:
        read(leaves(expression))
    if expression[0] == "read":
        read([expression])
    value = value_of(expression)
    return Derivation(tuple(steps), value, (*values, value))


def solve(expression: Expression, scene: Scene, method: str, reads_first: bool = False) -> Derivation:
    """Follows a method: the expression itself, a change of it, or a misreading of the picture."""
    if method in MISREADINGS:
        return derive(expression, scene, scene.slots[method.removeprefix("misreads ")], reads_first)
    if method != "right":
        changed = apply_method(method, expression)
        assert changed is not None, f"{method} does not apply to {expression}"
        expression = changed
    return derive(expression, scene, None, reads_first)
