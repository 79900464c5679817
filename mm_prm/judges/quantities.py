"""
Answers as text, numbers and quantities: everything about an answer that needs no computer algebra.

[`normalize`] removes differences of typesetting and none of meaning. [`parse_quantity`] reads a plain number with its
unit. Both are pure and cheap: they decide nearly all answers of a data set of plain numbers and choices.
"""

import itertools
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUPERSCRIPT = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
# An index is no digit of the number before it: "101₂".
_SUBSCRIPT = re.compile(r"(?<=[\d)])[₀-₉]+")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_CIRCLED = re.compile(r"[①-⑳]")
_THIN_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\\[,!]|[\u2009\u202f])\d{3})+(?!\d)")
_DEGREE_SIGNS = re.compile(r"[º˚]")
_VULGAR = re.compile(r"(\d?)\s*([¼½¾⅐-⅞])")
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf|cal|bb)?|boldsymbol|bm|mbox|operatorname|number|unit|si)\s*"
    r"\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_QUANTITY_MACRO = re.compile(r"\\(?:quantity|qty|SI)\s*\{([^{}]*)\}\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_REPLACEMENTS = (
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[dt]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:[,;:!\s]|quad(?![a-zA-Z])|qquad(?![a-zA-Z])|displaystyle(?![a-zA-Z]))|~"), " "),
    (re.compile(r"\\math(?:rm|bf|it)(?![a-zA-Z])\s*"), ""),
    (re.compile(r"\\(?:[()\[\]]|boxed)|\$"), " "),
    (re.compile(r"\{\s*,\s*\}"), ","),
    (re.compile(r"\s*(?:\{\s*\})?\s*\^\s*\{?\s*\\circ\s*\}?|\s*(?:\*\s*)?\\degree(?![a-zA-Z])"), "°"),
    (re.compile(r"\s*\bdegrees?\b", re.IGNORECASE), "°"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"[−–—]"), "-"),
    (re.compile(r"[×✕]|\\times(?![a-zA-Z])"), "×"),
    (re.compile(r"[·⋅]|\\cdot(?![a-zA-Z])"), "·"),
    (re.compile(r"÷|\\div(?![a-zA-Z])"), "/"),
    (re.compile(r"π|(?<![\\a-zA-Z])pi(?![a-zA-Z])|\\pi(?![a-zA-Z])"), r"\\pi "),
    (re.compile(r"[≤⩽]|<=|\\le(?:q|qslant)?(?![a-zA-Z])"), r"\\le "),
    (re.compile(r"[≥⩾]|>=|\\ge(?:q|qslant)?(?![a-zA-Z])"), r"\\ge "),
    (re.compile(r"≠|!=|\\neq?(?![a-zA-Z])"), r"\\ne "),
    (re.compile(r"、"), ","),
    (re.compile(r"。"), "."),
    (re.compile(r"[‘’′]"), "'"),
)
# "2**3" is no bold.
_BOLD = re.compile(r"(?<![\w)])\*\*(?=\S)(.+?)(?<=\S)\*\*(?!\w)|(?<=\w)\*\*(?=[:.,)]|\Z)")
_QUOTED = re.compile(r"([`\"'“])([^`\"'“”]+)[`\"'”]")
_CURRENCY_BEFORE = re.compile(r"\A([-+]?)\s*([€£¥])\s*(?=\d)(.+)")
_BRITISH = re.compile(r"(col|neighb|fav)our")
_THOUSANDS = re.compile(r"(?<![\d.,(\[])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")

NUMBER_WORDS = {
    word: number
    for number, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
            "twenty",
        ]
    )
}

# Units by kind and size; a unit that is not here is compared by its name.
_UNITS: dict[str, tuple[str, Fraction]] = {
    name: (kind, Fraction(size))
    for kind, sizes in {
        "length": {
            "1/1000": "mm millimeter millimeters millimetre millimetres",
            "127/5000": "in inch inches",
            "381/1250": "ft foot feet",
            "1143/1250": "yd yard yards",
            "201168/125": "mile miles",
            "1/100": "cm centimeter centimeters centimetre centimetres",
            "1/10": "dm decimeter decimeters decimetre decimetres",
            "1": "m meter meters metre metres",
            "1000": "km kilometer kilometers kilometre kilometres",
        },
        "mass": {
            "1/1000000": "mg milligram milligrams",
            "1/1000": "g gram grams",
            "1": "kg kilogram kilograms",
            "1000": "t ton tons tonne tonnes",
        },
        "volume": {"1/1000": "ml milliliter milliliters millilitre millilitres", "1": "l liter liters litre litres"},
        "time": {
            "1": "s sec second seconds",
            "60": "min mins minute minutes",
            "3600": "h hr hrs hour hours",
            "86400": "day days",
            "604800": "week weeks",
        },
        "angle": {"1/60": "'", "1": "°"},
        "share": {"1/100": "% percent"},
    }.items()
    for size, names in sizes.items()
    for name in names.split()
}

_INTEGER = r"\d+"
_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_SIGN = r"[-+]?\s*"
_FRACTION = re.compile(
    rf"({_SIGN})(?:({_INTEGER})\s*)?\\frac\s*(?:\{{\s*({_SIGN}{_INTEGER})\s*\}}|(\d))\s*(?:\{{\s*({_INTEGER})\s*\}}|(\d))"
)
_SLASH = re.compile(rf"({_SIGN})(?:({_INTEGER})\s+)?({_INTEGER})\s*/\s*({_INTEGER})")
_SCIENTIFIC = re.compile(
    rf"({_SIGN}{_DECIMAL})\s*(?:[×*·x]\s*10\s*\^\s*\{{?\s*({_SIGN}\d{{1,3}})\s*\}}?|e({_SIGN}\d{{1,3}}))"
)
_PLAIN = re.compile(rf"{_SIGN}{_DECIMAL}")
_UNIT = re.compile(
    r"[%€£¥]|°(?:\s*(?:C(?:elsius)?|F(?:ahrenheit)?))?|(?:square|cubic|sq\.?|cu\.?)?\s*[a-zA-Z\u4e00-\u9fff]+(?:\s*/\s*[a-zA-Z]+)?\s*(?:\^\s*\{?\s*[23]\s*\}?)?(?:\s+[a-zA-Z]+){0,2}"
)

_SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Words after a number that make something else of it than a quantity: "5 or more", "5 to 7".
_NO_UNITS = {"or", "to", "than", "not", "but", "out", "and", "plus", "minus"}
_TERM_OF_COMPOUND = re.compile(rf"\s*(?:,|and\b)?\s*({_DECIMAL})\s*([a-zA-Z]+|°|')")

_UNIT_AT_END = re.compile(r"(.*[\d)}\s])((?:[a-zA-Z]+|°)(?:\s*\^\s*\{?\s*[23]\s*\}?)?)", re.DOTALL)


@dataclass(frozen=True)
class Quantity:
    """
    A plain number with its unit.

    Args:
        value (`fractions.Fraction`):
            The number as written.
        unit (`str`):
            The unit as written, without spaces; empty if there is none.
        decimals (`int`, *optional*, defaults to `0`):
            Number of digits after the point, 0 for anything but a decimal number.
        may_be_term (`bool`, *optional*, defaults to `False`):
            Whether the unit may as well be a variable, as in "5m".
        scale (`int`, *optional*, defaults to `1`):
            What the number was multiplied by: 1,000,000 in "2 million", whose value is 2,000,000.
    """

    value: Fraction
    unit: str
    decimals: int = 0
    may_be_term: bool = False
    scale: int = 1


@lru_cache(maxsize=65536)
def normalize(text: str) -> str:
    """
    Writes an answer in one way: without dollars, sizes of brackets and spaces of LaTeX, `\\dfrac`, full-width
    characters, thousands separators and a final full stop. Spaces are collapsed, not removed.
    """
    text = _THIN_THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = " ".join(text.split())
    text = _SUPERSCRIPT.sub(lambda match: "^{" + match[0].translate(_SUPERSCRIPTS) + "}", text)
    text = _SUBSCRIPT.sub(lambda match: "_{" + match[0].translate(_SUBSCRIPTS) + "}", text)
    text = _CIRCLED.sub(lambda match: f"({int(unicodedata.numeric(match[0]))})", text)
    text = _VULGAR.sub(_vulgar_fraction, text)
    text = unicodedata.normalize("NFKC", _DEGREE_SIGNS.sub("°", text))  # NFKC makes a letter of "º"
    text = _QUANTITY_MACRO.sub(r"\1 \2", text)
    for _ in range(4):  # wrappers may be nested
        text, count = _WRAPPER.subn(r" \1 ", text)
        if not count:
            break
    text = _BOLD.sub(lambda match: match[1] or "", text)
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    text = _close_braces(text)
    text = " ".join(text.split())
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    text = _CURRENCY_BEFORE.sub(r"\1\3 \2", text)
    while True:
        text = re.sub(r"(?<=.)[\s.;,]+\Z", "", text)
        # A pair of braces or quotation marks around everything is typesetting too.
        if text.startswith("{") and text.endswith("}") and _closes_at(text) == len(text) - 1:
            text = text[1:-1].strip()
        elif (quoted := _QUOTED.fullmatch(text)) is not None:
            text = quoted[2].strip()
        else:
            return text


def _vulgar_fraction(match: re.Match[str]) -> str:
    numerator, denominator = unicodedata.normalize("NFKC", match[2]).split("⁄")
    return f"{match[1]} {numerator}/{denominator}"


def _closes_at(text: str) -> int:
    depth = 0
    for index, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return index
    return -1


def _close_braces(text: str) -> str:
    """Extraction by others often cuts at the first closing brace: `135^{\\circ`."""
    missing = text.count("{") - text.count("}")
    return text + "}" * missing if 0 < missing <= 2 else text


def compact(text: str) -> str:
    """Normalised text without spaces (except in "1 2", which is not 12), in lower case where case says nothing."""
    text = re.sub(r"(?<!\d) | (?!\d)", "", normalize(text))
    return text if len(text) == 1 else _BRITISH.sub(r"\1or", text.casefold())


def is_cut_off(text: str, whole: str) -> bool:
    """Whether a text ends inside of a brace, and is the beginning of another as far as it goes."""
    if text.count("{") <= text.count("}"):
        return False
    return compact(whole).startswith(compact(text).rstrip("}"))


@lru_cache(maxsize=65536)
def parse_quantity(text: str) -> Quantity | None:
    """
    Reads a plain number with its unit: integer, decimal, fraction, mixed number, scientific notation, percentage, and
    sums like "1 h 30 min".

    Args:
        text (`str`):
            An answer. It has to be the number and its unit and nothing else.

    Returns:
        [`Quantity`], or `None` if it is not that.
    """
    text = normalize(text)
    word = NUMBER_WORDS.get(text.casefold())
    if word is not None:
        return Quantity(Fraction(word), "")
    if len(text) > 100:
        return None
    compound = _compound(text)
    if compound is not None:
        return compound
    for pattern, value_of in ((_FRACTION, _fraction), (_SLASH, _slash), (_SCIENTIFIC, _scientific), (_PLAIN, _plain)):
        match = pattern.match(text)
        if match is None:
            continue
        unit = text[match.end() :].strip()
        if unit.startswith("(") and unit.endswith(")") and text[match.end()].isspace():
            unit = unit[1:-1]  # "20 (cm)"
        letters = re.match(r"[a-zA-Z]+", unit)
        single_letter = letters is not None and len(letters[0]) == 1
        if unit and (_UNIT.fullmatch(unit) is None or (single_letter and unit[0].casefold() not in _UNITS)):
            continue  # "21p" and "5 x" are terms of algebra
        words = unit.casefold().split()
        if not _NO_UNITS.isdisjoint(words):
            continue
        scale = _SCALES.get(words[0], 1) if words else 1
        if scale != 1:
            unit = unit[len(words[0]) :].strip()
        value = value_of(match)
        if value is None:
            return None
        decimals = match[0].partition(".")[2] if pattern is _PLAIN else ""
        stands_apart = " " in text[match.end() - 1 : match.end() + 1]
        return Quantity(value * scale, _unit_name(unit), len(decimals), single_letter and not stands_apart, scale)
    return None


def _compound(text: str) -> Quantity | None:
    """ "1 h 30 min", "5 feet and 3 inches": terms of one kind, from the large unit to the small one."""
    terms, end = [], 0
    while (match := _TERM_OF_COMPOUND.match(text, end)) is not None:
        terms.append((Fraction(match[1].rstrip(".")), _UNITS.get(match[2].casefold())))
        end = match.end()
    kinds = [unit for _, unit in terms if unit is not None]
    if end < len(text) or len(terms) < 2 or len(kinds) < len(terms) or len({kind for kind, _ in kinds}) > 1:
        return None
    sizes = [size for _, size in kinds]
    if any(size <= smaller for size, smaller in itertools.pairwise(sizes)):
        return None
    total = sum((value * size for (value, _), size in zip(terms, sizes, strict=True)), Fraction(0))
    smallest = next(name for name, known in _UNITS.items() if known == kinds[-1])
    return Quantity(total / sizes[-1], smallest)


def _unit_name(unit: str) -> str:
    unit = re.sub(r"\b(?:square|sq\.?)\s*units?\b|\b(?:cubic|cu\.?)\s*units?\b|\bunits?\b", "", unit)
    unit = re.sub(r"(?<=[CF])(?:elsius|ahrenheit)", "", unit)
    squared = re.match(r"(square|sq\.?|cubic|cu\.?)\s*(\w+)\Z", unit)
    if squared:
        unit = f"{squared[2]}^{2 if squared[1].startswith('s') else 3}"
    return re.sub(r"[\s{}]", "", unit)


def _fraction(match: re.Match[str]) -> Fraction | None:
    sign, whole, long_numerator, short_numerator, long_denominator, short_denominator = match.groups()
    numerator = int(re.sub(r"\s", "", long_numerator or short_numerator))
    denominator = int(long_denominator or short_denominator)
    return _mixed(sign, whole, numerator, denominator)


def _slash(match: re.Match[str]) -> Fraction | None:
    sign, whole, numerator, denominator = match.groups()
    return _mixed(sign, whole, int(numerator), int(denominator))


def _mixed(sign: str, whole: str | None, numerator: int, denominator: int) -> Fraction | None:
    if denominator == 0:
        return None
    value = int(whole or 0) + Fraction(numerator, denominator)
    return -value if "-" in sign else value


def _scientific(match: re.Match[str]) -> Fraction:
    mantissa, exponent = match[1], match[2] or match[3]
    return Fraction(re.sub(r"\s", "", mantissa)) * Fraction(10) ** int(re.sub(r"\s", "", exponent))


def _plain(match: re.Match[str]) -> Fraction:
    return Fraction(re.sub(r"\s", "", match[0]).rstrip("."))


def equal_quantities(gold: Quantity, answer: Quantity) -> bool | None:
    """
    Compares two quantities. A unit that only one of them has is taken as understood (the problem names it), except that
    "5%" is not known to be the same as a gold "5", nor "2 million" as a gold "2". `None` if units differ in a way that
    cannot be told.
    """
    if gold.scale != answer.scale and gold.value * answer.scale == answer.value * gold.scale:
        return None
    gold_kind, gold_size = _kind(gold.unit)
    kind, size = _kind(answer.unit)
    if gold_kind == kind:
        return _close(gold.value * gold_size, answer.value * size, gold, answer)
    if "share" in (gold_kind, kind) and not (gold.unit and answer.unit):
        # 75% is 0.75; and a gold "75" whose question asks for a percentage is 75%.
        if _close(gold.value * gold_size, answer.value * size, gold, answer):
            return True
        same = _close(gold.value, answer.value, gold, answer)
        return (True if kind == "share" else None) if same else False
    if not gold.unit or not answer.unit:
        if gold.may_be_term and gold.value == answer.value:
            return None
        return _close(gold.value, answer.value, gold, answer)
    if _close(gold.value, answer.value, gold, answer):
        # The same number with another unit: wrong where both units are known, else perhaps two names of one unit.
        return False if gold_kind != gold.unit.casefold() and kind != answer.unit.casefold() else None
    return False


def split_unit(text: str) -> tuple[str, str]:
    """A formula and the known unit at its end, "6\\sqrt{3} cm^{2}"; the unit is empty if there is none."""
    match = _UNIT_AT_END.fullmatch(text)
    if match is None:
        return text, ""
    unit = _unit_name(match[2])
    if _kind(unit) == (unit.casefold(), 1):
        return text, ""
    # One letter is a variable where it stands close, or beside other variables: "x + 2s", "2 s t".
    has_variables = re.search(r"(?<![\\a-zA-Z])[a-zA-Z]", match[1]) is not None
    if unit[0].isalpha() and unit[1:2] in ("", "^") and (has_variables or not match[1].endswith(" ")):
        return text, ""
    return match[1].strip(), unit


def same_unit(first: str, second: str) -> bool:
    """Whether two units are two names of one."""
    return _kind(first) == _kind(second)


def _kind(unit: str) -> tuple[str, Fraction]:
    """Kind and size of a unit: `cm^2` is ("length^2", 1/10000); a unit that is not known is a kind of its own."""
    name, _, power = unit.partition("^")
    known = _UNITS.get(name if name in _UNITS else name.casefold())
    if known is None or power not in ("", "2", "3"):
        return unit.casefold(), Fraction(1)
    kind, size = known
    return (f"{kind}^{power}", size ** int(power)) if power else (kind, size)


def _close(gold: Fraction, answer: Fraction, gold_quantity: Quantity, quantity: Quantity) -> bool:
    if gold == answer:
        return True
    # A decimal of six places or more may stand for a number that no decimal can write.
    decimals = max(gold_quantity.decimals, quantity.decimals)
    return decimals >= 6 and abs(gold - answer) * 10**decimals < 1
