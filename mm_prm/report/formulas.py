"""Text of models as HTML: LaTeX between its delimiters becomes MathML, all else is escaped.

A formula that the library cannot convert is shown as the text that it was. What the library makes is not trusted: it puts
`\\href{javascript:…}` into attributes, so only known elements and harmless attributes are written, with escaped text.
"""

import html
import re
from xml.etree.ElementTree import Element

from markupsafe import Markup, escape

# As in pandoc: `$` opens before, and closes behind, what is no white space, and does not close before a digit. So
# "costs $5 and $3" holds no formula.
_FORMULA = re.compile(
    r"\$\$(?P<dollars>.+?)\$\$|\\\[(?P<brackets>.+?)\\\]|\\\((?P<parentheses>.+?)\\\)"
    r"|(?<![\\$])\$(?![\s$])(?P<dollar>[^$\n]*?[^\s$\\])\$(?![\d$])",
    re.DOTALL,
)
_DISPLAY = ("dollars", "brackets")
# Above this, a page spends longer on the formula than a reader does.
_MAX_LENGTH = 2000
_MAX_DEPTH = 100
# A longer formula may be wider than a phone, and browsers break none into lines: it gets a box that scrolls.
_SHORT = 24

_ELEMENTS = frozenset(
    [
        "math",
        "mrow",
        "mi",
        "mn",
        "mo",
        "mtext",
        "mspace",
        "msup",
        "msub",
        "msubsup",
        "mfrac",
        "msqrt",
        "mroot",
        "mover",
        "munder",
        "munderover",
        "mmultiscripts",
        "mprescripts",
        "none",
        "mtable",
        "mtr",
        "mtd",
        "mstyle",
        "mpadded",
        "mphantom",
        "menclose",
    ]
)
_ATTRIBUTES = frozenset(
    [
        "display",
        "mathvariant",
        "stretchy",
        "fence",
        "separator",
        "form",
        "accent",
        "accentunder",
        "movablelimits",
        "largeop",
        "symmetric",
        "lspace",
        "rspace",
        "width",
        "height",
        "depth",
        "voffset",
        "minsize",
        "maxsize",
        "linethickness",
        "displaystyle",
        "scriptlevel",
        "columnalign",
        "rowspacing",
        "columnspacing",
        "notation",
    ]
)
# The library leaves characters as references in the text of its elements, always with five digits.
_REFERENCE = re.compile(r"&#x[0-9A-Fa-f]{5};")


class _CannotConvert(Exception):
    pass


def to_html(text: str) -> Markup:
    """
    Escape a text, with its formulas as MathML.

    Args:
        text (`str`):
            Anything, as a model wrote it.

    Returns:
        `Markup`: Safe HTML.
    """
    parts, end = [], 0
    for match in _FORMULA.finditer(text):
        name = match.lastgroup or ""
        parts += [escape(text[end : match.start()]), _formula(match[0], match[name], name in _DISPLAY)]
        end = match.end()
    return Markup("").join([*parts, escape(text[end:])])


def _formula(source: str, latex: str, display: bool) -> Markup:
    from latex2mathml.converter import convert_to_element

    if len(latex) > _MAX_LENGTH:
        return escape(source)
    try:
        formula = _mathml(convert_to_element(latex, display="block" if display else "inline"))
    except Exception:
        # On broken formulas the library raises whatever its walk over the tokens runs into: its own errors,
        # StopIteration, IndexError, RecursionError. All of them mean the same.
        return escape(source)
    return Markup('<span class="formula">{}</span>').format(formula) if display or len(latex) > _SHORT else formula


def _mathml(element: Element, depth: int = 0) -> Markup:
    text = _REFERENCE.sub(lambda match: html.unescape(match[0]), element.text or "")
    if element.tag not in _ELEMENTS or depth > _MAX_DEPTH or "\\" in text:  # an unknown command is left as it is
        raise _CannotConvert
    attributes = Markup("").join(
        Markup(' {}="{}"').format(name, value) for name, value in element.attrib.items() if name in _ATTRIBUTES
    )
    children = Markup("").join(_mathml(child, depth + 1) for child in element)
    return Markup("<{0}{1}>{2}{3}</{0}>").format(Markup(element.tag), attributes, text, children)
