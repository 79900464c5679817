"""LaTeX becomes MathML; what is broken or hostile stays the text that it was, escaped."""

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_prm.report.formulas import to_html

TAGS = re.compile(r"<(/?)([a-z]+)((?: [a-z]+=\"[^\"<>]*\")*)>")
BOX = '<span class="formula">'  # of a formula that may be wide
HARMLESS = {"display", "mathvariant", "stretchy", "fence", "accent", "width", "linethickness", "notation", "form"}


def plain(text: str) -> str:
    """What a reader sees, without the structure of formulas."""
    return html.unescape(TAGS.sub("", str(to_html(text))))


@pytest.mark.parametrize(
    ("text", "tag", "seen"),
    [
        (r"so $\frac{1}{2}$ of it", "mfrac", "so 12 of it"),
        (r"\(x^2 \le 3\)", "msup", "x2≤3"),
        (r"$$\sqrt{2}$$", "msqrt", "2"),
        ("\\[\nx_1 + \\alpha\n\\]", "msub", "x1+α"),
        (r"$45^{\circ}$, $\angle ABC$", "msup", "45∘, ∠ABC"),
        (r"$\text{area in cm}$", "mtext", "area in cm"),
        ("$3$-digit", "mn", "3-digit"),
    ],
)
def test_formulas(text, tag, seen):
    assert f"<{tag}>" in to_html(text) and "<math" in to_html(text)
    assert re.sub(r"\s+", " ", plain(text)) == seen
    assert ('display="block"' in to_html(text)) == (BOX in to_html(text)) == text.startswith(("$$", r"\["))


@pytest.mark.parametrize(
    "text",
    [
        "costs $5 and $3 more",
        "$5-$3",
        r"it is \$5 or \$6",
        "a $ b $ c",
        "$$",
        r"broken $\frac{1}{$ here",
        r"$\left(\frac{a}{b}\right$",
        r"$\unheardof{x}$",
        "$}{$",
        "${" + "{" * 500 + "x" + "}" * 500 + "}$",
        "$" + "x" * 5000 + "$",
        r"\(never closed",
        "<script>alert(1)</script> & $<",
        "a &lt; b",
    ],
)
def test_what_is_no_formula_is_shown_as_it_is(text):
    assert to_html(text) == html.escape(text).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")


@pytest.mark.parametrize(
    "text",
    [
        "$<script>alert(1)</script>$",
        r"$\text{<script>alert(1)</script>}$",
        r"$\href{javascript:alert(1)}{x}$",
        r"$\href{\" onclick=\"alert(1)}{x}$",
        r"$\style{background:url(https://example.com)}{x}$",
        r"$\text{&#x0003C;script&#x0003E;alert(1)&#x0003C;/script&#x0003E;}$",
        r"$\text{&#x0D800;}$",
        r"$\class{x}{y}$ $\id{x}{y}$ $\color{red}{x}$",
    ],
)
def test_hostile_formulas(text):
    made = str(to_html(text)).replace(BOX, "")
    assert "<script" not in made and "href" not in made and "style=" not in made and "class" not in made
    assert "<math" in made or made == html.escape(text).replace("&quot;", "&#34;")
    made.encode("utf-8")


PIECES = [*"$\\{}()[]<>&\"'x1^_ \n", r"\frac", r"\text{", r"\href{", r"\begin{matrix}", r"\left(", "&#x0003C;"]


@given(st.lists(st.sampled_from(PIECES)))
def test_no_text_makes_anything_but_mathml(pieces):
    made = str(to_html(f"${''.join(pieces)}$ {''.join(pieces)}"))
    rest = TAGS.sub("", made)
    assert "<" not in rest and ">" not in rest
    stack = []
    for closing, tag, attributes in TAGS.findall(made):
        assert tag[0] == "m" or tag == "none" or (tag, attributes) in (("span", ' class="formula"'), ("span", ""))
        assert tag == "span" or set(re.findall(r" ([a-z]+)=", attributes)) <= HARMLESS, attributes
        if closing:
            assert stack.pop() == tag
        else:
            stack.append(tag)
    assert stack == []
