"""
Whether two final answers are the same: true, false, or not known.

From cheap to dear: the same text, the same quantity, lists part by part, and last a formula through math-verify. What
none of them understands is not known; it never becomes false.
"""

import re
from collections.abc import Callable

from .math_process import MathOutcome
from .quantities import (
    NUMBER_WORDS,
    Quantity,
    compact,
    equal_quantities,
    normalize,
    parse_quantity,
    same_unit,
    split_unit,
)

# Compares two LaTeX formulas.
CompareFormulas = Callable[[str, str], MathOutcome]

# Computer algebra is not asked about more than this: an answer is short.
_MOST_CHARACTERS = 400
_MOST_NESTING = 12

_FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "log", "exp", "sqrt", "frac", "lim", "max",
    "min", "mod", "and",
}  # fmt: skip
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_SHORT_WORD = re.compile(r"(?<![\\a-zA-Z])(?:is|it|of|we|if)(?![a-zA-Z])", re.IGNORECASE)
# "The area is 5 cm": no number stands before the one that is stated.
_STATEMENT = re.compile(r"([^\d=]*)(?:\b(?:is|are|equals|has|have)\b|[=≈])\s*([^=]+)", re.IGNORECASE)
_NEGATION = re.compile(r"\b(?:not|no|never|cannot|neither|nor|unless|if|except)\b|n't\b", re.IGNORECASE)
# "(x, y) = (3, 4)" for "(3, 4)"; "(y, x) = (4, 3)" says another order.
_COORDINATES = re.compile(r"\A[\s$]*(\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])+\s*\)|[A-Z])\s*=\s*(?=\()")
_REFUSAL = re.compile(
    r"\b(?:no answer|none of|none\Z|not among|no (?:correct|valid) |cannot be determined|there is an error|(?:is|are) incorrect|"
    r"do(?:es)? not match|not enough information)",
    re.IGNORECASE,
)
_OPPOSITES = (
    {"yes", "no"},
    {"true", "false"},
    {"<", ">", "="},
    {"increasing", "decreasing"},
    {"increase", "decrease"},
)
_RELATIONS = {"<", ">", "=", "\\le", "\\ge", "\\ne"}
_BRACKETS = {"(": ")", "[": "]", "\\{": "\\}"}
_BRACKET_PARTS = {*_BRACKETS, *_BRACKETS.values()}
_LABEL = re.compile(r"\((\d)\)\s*")
_RATIO = re.compile(r"\s*:\s*|\s+to\s+")
# Computer algebra would multiply them: "(3)(4)" is not 12.
_JUXTAPOSED = re.compile(r"(?<!_)\d\s+-?\d|\(\d+\)\s*\(?\d")
_APPROXIMATELY = re.compile(r"≈|\\approx(?![a-zA-Z])")
_PLUS_MINUS = re.compile(r"(?:±|\\pm(?![a-zA-Z]))\s*(.+)", re.DOTALL)
_CLOSE_UNIT = re.compile(r"(?<=[\d)}])[mgshlL]\Z")
_VARIABLE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]")
_CHAIN = re.compile(r"\s*([<>])\s*")
_QUALIFIER = re.compile(
    r"\A\s*(?:(?:the|only|just|exactly|approximately|about|roughly)\s+|(?:≈|\\approx(?![a-zA-Z]))\s*)(?=\S)",
    re.IGNORECASE,
)
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?:\s*([ap])\.?m)?", re.IGNORECASE)
_INDEXED_NUMBER = re.compile(r"\d\s*_")
# A number may stand in an answer in words as "\\frac{1}{2} of them" or "two red ones".
_FRACTION_SIGN = re.compile(r"\\frac|/|\bhalf\b", re.IGNORECASE)
_NUMBER_WORD = re.compile(rf"\b(?:{'|'.join(NUMBER_WORDS)})\b", re.IGNORECASE)
_OUT_OF = re.compile(r"\d\s+out\s+of\s+(?:the\s+)?\d")
_ASSIGNED = re.compile(r"\s*([a-zA-Z](?:_\{?\w\}?)?)\s*=")
_FUNCTION_OF = re.compile(r"\A\s*([a-zA-Z])\s*\(\s*[a-zA-Z]\s*\)\s*=")
# Points in an order: computer algebra would multiply them, and "BACD" is not "ABCD".
_POINTS = re.compile(r"(?:\\(?:angle|triangle|overline|bar)|[∠△])?[\s{]*([A-Z]{2,})\}*")
_ONE_NUMBER = re.compile(r"(-?\d+),\s?(\d+)|(-?\d{1,3}(?: \d{3})+)")
_SLASHED_FACTOR = re.compile(r"(\d+)\s*/\s*(\d+)(?=\s*(?:\\pi|\\sqrt|√|[a-zA-Z(]))")
_DEGREES_OF = re.compile(r"\\?(sin|cos|tan|cot)\s*[({]?\s*(\d+(?:\.\d+)?)\s*°\s*[)}]?")
_ALTERNATIVES = re.compile(r"\s*,?\s+or\s+|\s*,\s*or\s+")
_LATEX = (
    (re.compile(r"(?<![\\a-zA-Z])(sin|cos|tan|cot|sec|csc|log|ln|exp)(?![a-zA-Z])"), r"\\\1 "),
    (re.compile(r"(?<![\\a-zA-Z])sqrt\s*(\d+)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\a-zA-Z])C\s*_\s*\{?(\d+)\}?\s*\^\s*\{?(\d+)\}?"), r"\\binom{\1}{\2}"),
    (re.compile(r"(?<![\\a-zA-Z])C\s*\^\s*\{?(\d+)\}?\s*_\s*\{?(\d+)\}?"), r"\\binom{\2}{\1}"),
    (re.compile(r"√\s*\{"), r"\\sqrt{"),
    (re.compile(r"√\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*(\d+|[a-zA-Z])"), r"\\sqrt{\1}"),
    (re.compile(r"×"), r"\\times "),
    (re.compile(r"·|(?<=[\w)])\s*\*\s*(?=[\w(\\])"), r"\\cdot "),
    (re.compile(r"∞"), r"\\infty "),
    (re.compile(r"∠"), r"\\angle "),
    (re.compile(r"°"), r""),
    (re.compile(r"%"), r"\\%"),
)
_GREEK = {
    letter: f"\\{name} "
    for letter, name in zip(
        "αβγδθλμρσφω",
        ["alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "rho", "sigma", "phi", "omega"],
        strict=True,
    )
}


def equal_answers(gold: str, answer: str, compare_formulas: CompareFormulas) -> tuple[bool | None, str]:
    """
    Compares two answers.

    Args:
        gold (`str`):
            The gold answer.
        answer (`str`):
            The other answer.
        compare_formulas (`Callable`):
            What compares two formulas, see [`MathProcess`].

    Returns:
        `tuple` of whether they are equal, `None` if that is not known, and the reason in a few words.
    """
    if not compact(gold) or not compact(answer):
        return None, "nothing to compare"
    bare_gold, bare = _QUALIFIER.sub("", gold), _QUALIFIER.sub("", answer)
    if compact(gold) == compact(answer) or compact(bare_gold) == compact(bare):
        return True, "same text"
    gold, answer = bare_gold, bare
    gold, answer = _without_coordinates(gold, answer)
    gold_text, answer_text = normalize(gold), normalize(answer)
    gold_quantity, quantity = parse_quantity(gold), parse_quantity(answer)
    if gold_quantity is not None and quantity is not None:
        equal = equal_quantities(gold_quantity, quantity)
        return equal, "different units" if equal is None else "compared as numbers"
    if {gold_text.casefold(), answer_text.casefold()} <= next(
        (group for group in _OPPOSITES if gold_text.casefold() in group), set()
    ):
        return False, "opposite"
    if gold_text in _RELATIONS and (quantity is not None or answer_text.isalnum()):
        return False, "a comparison sign is wanted"
    if gold_quantity is not None and re.fullmatch(r"[a-zA-Z]", answer_text):
        return False, "a letter where a number is wanted"
    verdict = _compare_prose(gold_text, answer_text, gold_quantity)
    if verdict is not None:
        return verdict
    verdict = _compare_structure(gold, answer, gold_text, answer_text, compare_formulas)
    if verdict is not None:
        return verdict
    return _compare_as_formulas(gold_text, answer_text, compare_formulas)


def is_prose(text: str) -> bool:
    """Whether a text has words in it that no formula has."""
    if _SHORT_WORD.search(text):
        return True
    return any(word.casefold() not in _FUNCTIONS and not word.isupper() for word in _WORD.findall(text))


def _without_coordinates(gold: str, answer: str) -> tuple[str, str]:
    """Without the names of the coordinates where only one of the two has them, in the order of the alphabet."""
    texts = (gold, answer)
    names = [_COORDINATES.match(normalize(text)) for text in texts]
    if (names[0] is None) == (names[1] is None):
        return gold, answer
    gold, answer = (
        normalize(text)[match.end() :]
        if match and (letters := re.findall("[a-zA-Z]", match[1])) == sorted(letters)
        else text
        for text, match in zip(texts, names, strict=True)
    )
    return gold, answer


def _compare_prose(gold: str, answer: str, gold_quantity: Quantity | None) -> tuple[bool | None, str] | None:
    if not is_prose(answer) and not is_prose(gold):
        return None
    if not is_prose(answer):
        words = {word.casefold() for word in _WORD.findall(gold)}
        if parse_quantity(answer) is not None and not re.search(r"\d", gold) and not words & NUMBER_WORDS.keys():
            return False, "no number is wanted"
    elif not is_prose(gold):
        if _REFUSAL.search(answer):
            return False, "no answer is given"
        if _OUT_OF.search(answer):
            return None, "so many out of so many"
        statement = _STATEMENT.fullmatch(answer)
        stated = parse_quantity(statement[2]) if statement and not _NEGATION.search(statement[1]) else None
        if gold_quantity is not None and stated is not None:
            equal = equal_quantities(gold_quantity, stated)
            return equal, "different units" if equal is None else "compared with the number that is stated"
        numbers = re.findall(r"\d+(?:\.\d+)?", answer)
        if not numbers and re.search(r"\d", gold):
            return None, "text where a number is wanted"
        if gold_quantity is not None and (
            _NUMBER_WORD if gold_quantity.value.denominator == 1 else _FRACTION_SIGN
        ).search(answer):
            return None, "text that rules cannot compare"
        if gold_quantity is not None and not any(parse_quantity(number) == gold_quantity for number in numbers):
            plain = abs(gold_quantity.value)
            if all((read := parse_quantity(number)) is None or read.value != plain for number in numbers):
                return False, "the number is not in the answer"
    return None, "text that rules cannot compare"


def _compare_structure(
    gold: str, answer: str, gold_text: str, answer_text: str, compare_formulas: CompareFormulas
) -> tuple[bool | None, str] | None:
    """Ratios, chains of comparisons, and answers of several parts; `None` if the gold answer is none of these."""
    clocks = [_CLOCK.fullmatch(gold_text), _CLOCK.fullmatch(answer_text)]
    if clocks[0] and clocks[1] and (clocks[0][3] or clocks[1][3]):
        times = [(int(clock[1]) % 12, clock[2]) for clock in clocks if clock]
        halves = {clock[3].casefold() for clock in clocks if clock and clock[3]}
        if times[0] != times[1] or len(halves) > 1:
            return False, "compared as times of day"
        return (True if clocks[0][3] and clocks[1][3] else None), "compared as times of day"
    ratios = [_ratio(gold_text), _ratio(answer_text)]
    if ratios[0] is not None and ratios[1] is not None:
        return ratios[0] == ratios[1], "compared as ratios"
    chains = [_chain(gold_text), _chain(answer_text)]
    if chains[0] is not None and chains[1] is not None and max(map(len, filter(None, chains))) > 2:
        return chains[0] == chains[1], "compared as chains"
    gold_text, answer_text = (
        text if sign is None else f"{sign[1]} or -{sign[1]}"
        for text in (gold_text, answer_text)
        for sign in [_PLUS_MINUS.fullmatch(text)]
    )
    if answer_text != normalize(answer):
        answer = answer_text
    gold_alternatives = _ALTERNATIVES.split(gold_text)
    if len(gold_alternatives) > 1:
        alternatives = _split_parts(answer, orderless=True)
        alternatives = alternatives[1:-1] if alternatives[0] == "\\{" else alternatives
        return _compare_alternatives(gold_alternatives, alternatives, compare_formulas)
    serials = [_serial_numbers(gold_text), _serial_numbers(answer_text)]
    if serials[0] is not None and serials[1] is not None:
        if sorted(serials[0]) != sorted(serials[1]):
            return False, "compared as serial numbers"
        return (True if serials[0] == serials[1] else None), "serial numbers, perhaps in another order"
    if serials[0] is not None:
        # What numbers no statement is none of them: "17.3.5", a number, a letter.
        is_other = parse_quantity(answer) is not None or re.fullmatch(
            r"[a-zA-Z]|-?\d+(?:\.-?\d+)+|(?:\(-?\d+\)\s*)+", answer_text
        )
        return False if is_other else None, "serial numbers are wanted"
    gold_parts, parts = _split_parts(gold), _split_parts(answer)
    if gold_parts[0] == parts[0] == "\\{":  # a set has no order
        return _compare_alternatives(gold_parts[1:-1], parts[1:-1], compare_formulas)
    if len(gold_parts) == 1 and len(parts) == 1:
        return None
    if abs(len(gold_parts) - len(parts)) == 2 and (gold_parts[0] in _BRACKETS) != (parts[0] in _BRACKETS):
        bare_gold, bare = (side[1:-1] if side[0] in _BRACKETS else side for side in (gold_parts, parts))
        if _compare_parts(bare_gold, bare, compare_formulas)[0]:
            is_set = "\\{" in (gold_parts[0], parts[0])
            return (True, "equal part by part") if is_set else (None, "brackets on one side only")
        if _compare_alternatives(bare_gold, bare, compare_formulas)[0]:
            return None, "brackets on one side only, and another order"
    if len(gold_parts) != len(parts):
        one_number = _as_one_number(gold_text)
        if one_number is not None and one_number == _as_one_number(answer_text):
            return None, "perhaps one number, perhaps two"
        # What is not plain may be said in another way: "x = 2, y = 3" for "(2, 3)".
        is_single = re.fullmatch(r"[a-zA-Z]", answer_text) is not None or parse_quantity(answer) is not None
        plain = is_single or all(map(_is_plain, [*gold_parts, *parts]))
        return (False if plain else None), "another number of parts"
    return _compare_parts(gold_parts, parts, compare_formulas)


def _as_one_number(text: str) -> Quantity | None:
    """ "0,5" read as a decimal number, "1 200" as a number with a space."""
    match = _ONE_NUMBER.fullmatch(text)
    if match is None:
        return parse_quantity(text)
    return parse_quantity(match[3].replace(" ", "") if match[3] else f"{match[1]}.{match[2]}")


def _is_plain(part: str) -> bool:
    """Whether a part is made of numbers only: a number, or a point, a list of numbers."""
    if part in _BRACKET_PARTS or parse_quantity(part) is not None:
        return True
    parts = _split_parts(part)
    return len(parts) > 1 and all(map(_is_plain, parts))


def _serial_numbers(text: str) -> list[str] | None:
    """Numbers of statements: "(1)(3)(4)", "1.3.4"."""
    if re.fullmatch(r"(?:\(\d{1,2}\)[\s,.;]*){2,}", text) or re.fullmatch(r"\d(?:\.\d){2,}", text):
        return re.findall(r"\d+", text)
    return None


def _compare_parts(gold: list[str], answer: list[str], compare_formulas: CompareFormulas) -> tuple[bool | None, str]:
    names, gold_names = ([_ASSIGNED.match(part) for part in side] for side in (answer, gold))
    if all(names) and all(gold_names):  # "y = 2, x = 1" says its own order
        by_name, gold_by_name = (
            {name[1]: part for name, part in zip(found, side, strict=True) if name}
            for found, side in ((names, answer), (gold_names, gold))
        )
        if len(by_name) == len(answer) and by_name.keys() == gold_by_name.keys():
            answer = [by_name[name] for name in gold_by_name]
    unknown = ""
    for number, (gold_part, part) in enumerate(zip(gold, answer, strict=True), start=1):
        if {gold_part, part} & _BRACKET_PARTS and gold_part != part:
            return False, "other brackets"
        equal, reason = equal_answers(gold_part, part, compare_formulas)
        if equal is False:
            return False, f"part {number}: {reason}"
        if equal is None:
            unknown = unknown or f"part {number}: {reason}"
    return (None, unknown) if unknown else (True, "equal part by part")


def _compare_alternatives(
    gold: list[str], answer: list[str], compare_formulas: CompareFormulas
) -> tuple[bool | None, str]:
    """Alternatives have no order: each has to have its equal on the other side."""
    gold = [part for alternative in gold for part in _split_parts(alternative)]
    if len(gold) != len(answer):
        return False, "another number of alternatives"
    left = list(answer)
    for part in gold:
        verdicts = [equal_answers(part, other, compare_formulas)[0] for other in left]
        if True in verdicts:
            left.pop(verdicts.index(True))
        else:
            return (None if None in verdicts else False), "compared as alternatives"
    return True, "compared as alternatives"


def _split_parts(text: str, orderless: bool = False) -> list[str]:
    """Parts of an answer: lines, and what commas, semicolons and "and" separate outside of brackets."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip(" $")]
    labelled = _LABEL.split(" ".join(lines))
    if labelled[1::2] == [str(number) for number in range(1, len(labelled) // 2 + 1)] and not labelled[0].strip():
        contents = [content.strip() for content in labelled[2::2]]
        if len(contents) > 1 and all(contents):
            return contents
    if len(lines) > 1:
        return lines
    text = normalize(text)
    if orderless:
        text = _ALTERNATIVES.sub(", ", text)
    opening = next((bracket for bracket in _BRACKETS if text.startswith(bracket)), None)
    closing = next((bracket for bracket in _BRACKETS.values() if text.endswith(bracket)), None)
    parts = _split_outside_brackets(text)
    if opening and closing and len(parts) == 1 and (opening == "\\{") == (closing == "\\}"):
        inner = _split_outside_brackets(text[len(opening) : -len(closing)])
        # The brackets are kept as parts: (1, 2) is no [1, 2], and no [1, 2).
        return [opening, *inner, closing] if len(inner) > 1 else [text]
    if len(parts) == 1 and re.fullmatch(r"-?\d+(?:\.\d+)?(?:\s+-?\d+(?:\.\d+)?)+", text):
        return text.split()
    return parts


def _split_outside_brackets(text: str) -> list[str]:
    parts, depth, start, index = [], 0, 0, 0
    while index < len(text):
        if text[index] in "([{":
            depth += 1
        elif text[index] in ")]}":
            depth -= 1
        elif depth == 0:
            separator = re.compile(r"[,;]|\band\b").match(text, index)
            if separator:
                parts.append(text[start:index])
                start = separator.end()
                index = start - 1
        index += 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def _ratio(text: str) -> tuple | None:
    terms = _RATIO.split(text)
    if not 2 <= len(terms) <= 4:
        return None
    quantities = [parse_quantity(term) for term in terms]
    values = [quantity.value for quantity in quantities if quantity is not None]
    units = {quantity.unit for quantity in quantities if quantity is not None}
    if len(values) != len(terms) or values[-1] == 0 or len(units) > 1:  # "3:45 PM" is no ratio
        return None
    return tuple(value / values[-1] for value in values)


def _chain(text: str) -> list[str] | None:
    """Terms of "a < b < c" in rising order."""
    pieces = _CHAIN.split(text)
    signs = set(pieces[1::2])
    if len(signs) != 1:
        return None
    terms = [compact(term) for term in pieces[::2]]
    return terms if signs == {"<"} else terms[::-1]


def _compare_as_formulas(gold: str, answer: str, compare_formulas: CompareFormulas) -> tuple[bool | None, str]:
    points = [_POINTS.fullmatch(text) for text in (gold, answer)]
    if points[0] and points[1] and sorted(points[0][1]) == sorted(points[1][1]) and points[0][1] != points[1][1]:
        return None, "points in another order"
    gold, answer = (_FUNCTION_OF.sub(_as_assignment, text) for text in (gold, answer))
    gold, answer = (_DEGREES_OF.sub(r"\\\1(\\frac{\2\\pi }{180})", text) for text in (gold, answer))
    forms = _APPROXIMATELY.split(answer)
    if len(forms) > 1 and all(form.strip() for form in forms) and not _APPROXIMATELY.search(gold):
        # "2√2 ≈ 2.83" states the same number twice.
        verdicts = [equal_answers(gold, form, compare_formulas) for form in forms]
        return next((verdict for verdict in verdicts if verdict[0]), verdicts[0])
    # What an answer is assigned to is not part of it: "AM = 5" for "5". An equation is one where the gold answer is.
    if "=" in answer and "=" not in gold:
        value = re.split(r"=|≈|\\approx", answer)[-1].strip()
        if value:
            return equal_answers(gold, value, compare_formulas)
    if "=" in gold and "=" not in answer and re.match(r"\s*(?:[a-zA-Z]{1,2}|\\?angle\s*\w+|∠\w+)\s*=[^=]*\Z", gold):
        return equal_answers(gold.split("=")[1], answer, compare_formulas)
    (gold_formula, gold_unit), (formula, unit) = split_unit(gold), split_unit(answer)
    if gold_unit and unit:
        if not same_unit(gold_unit, unit):
            return (False if gold_formula == formula else None), "different units"
        gold, answer = gold_formula, formula
    elif "°" in (gold_unit, unit) and "\\pi" in (gold_formula if unit else formula):  # degrees and radians
        gold = f"({gold_formula})\\cdot\\frac{{\\pi}}{{180}}" if gold_unit else gold
        answer = f"({formula})\\cdot\\frac{{\\pi}}{{180}}" if unit else answer
    # A unit that only one of them has is understood, unless it may be a variable of the other.
    elif gold_unit and gold_unit not in answer:
        gold = gold_formula
    elif unit and unit not in gold:
        answer = formula
    for text in (gold, answer):
        if len(text) > _MOST_CHARACTERS or _nesting(text) > _MOST_NESTING or is_prose(text):
            return None, "no formula that rules can read"
        if _INDEXED_NUMBER.search(text):
            return None, "a number with an index"
        if _JUXTAPOSED.search(text):
            return None, "several numbers side by side"
    outcome = compare_formulas(_as_latex(gold), _as_latex(answer))
    if outcome == "equal":
        return True, "equal formulas"
    if outcome == "different":
        bare = [text if _VARIABLE.search(text[:-1]) else _CLOSE_UNIT.sub("", text) for text in (gold, answer)]
        if bare != [gold, answer] and compare_formulas(*map(_as_latex, bare)) == "equal":
            return None, "a letter that may be a unit or a variable"
        factors = [_SLASHED_FACTOR.sub(r"\\frac{\1}{\2}", text) for text in (gold, answer)]
        if factors != [gold, answer] and compare_formulas(*map(_as_latex, factors)) == "equal":
            return None, "what follows a slash may be a factor or a divisor"
        return False, "different formulas"
    return None, {"timeout": "time limit", "gold": "the gold answer is no formula", "answer": "no formula"}.get(
        outcome, "math-verify failed"
    )


def _as_assignment(match: re.Match[str]) -> str:
    """ "f(x) =" is "y =", "S(x) =" is "S ="."""
    return ("y" if match[1] in "fgh" else match[1]) + " ="


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += {"{": 1, "(": 1, "[": 1, "}": -1, ")": -1, "]": -1}.get(character, 0)
        deepest = max(deepest, depth)
    return deepest


def _as_latex(text: str) -> str:
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return "".join(_GREEK.get(character, character) for character in text)
