"""Finding the final answer in a solution: a pure function, and the forms it knows."""

import re
from collections.abc import Sequence

# The answer stands at the end: what lies before these many characters of the last step is not looked at, so that a
# step of a megabyte costs no more than a short one.
_MOST_CHARACTERS = 4000

_TAG = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_MARKER = re.compile(
    r"†\s*answer\s*[:：]"
    r"|\b(?:final|correct)?\s*\**answer\**\s*[:：]"
    r"|\b(?:answer|(?:correct|right) (?:option|choice))\s+(?:is|would be|should be|must be)\b\s*[:：]?"
    r"|\b(?:therefore|thus|hence|so),?\s+fill\s+in\b\s*[:：]?"
    r"|故选\s*[:：]?"
    r"|答案\s*(?:[是为選选]\s*[:：]?|[:：])",
    re.IGNORECASE,
)
_FILL_IN = re.compile(r"\bfill\s+in\b\s*[:：]?(?=\s*\S)", re.IGNORECASE)
_HALF_WIDTH = {0xFF01 + offset: 0x21 + offset for offset in range(94)}
# An announcement without content ("the answer is as follows:") is none.
_SENTENCE_END = re.compile(r"(?<!\bapprox)(?<!\bca)[.。!?;](?=\s|\**\Z|\Z)")
_LEAD = re.compile(
    r"^(?:[\s:*_#]|\b(?:it is|therefore|thus|so|hence|approximately|about|option|choice|simply|equal to|given by)\b[\s,:]*)+",
    re.IGNORECASE,
)
# Several lines are one answer of several parts unless there are words in them. Names of LaTeX commands are no words.
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_RELATION = re.compile(r"(?:=|≈|\\approx|\bis\b|\bare\b|\bequals\b)")


def final_step(solution: Sequence[str]) -> str:
    """The last step that says something, stripped; empty if none does."""
    return next((step for step in reversed(solution) if step and not step.isspace()), "").strip()


def extract_answer(solution: Sequence[str], choices: Sequence[str] = ()) -> str:
    r"""
    Reads the final answer from the last step of a solution.

    The last of these forms wins: `<answer>X</answer>`, `†Answer: X`, `Answer: X`, "the (final) answer is X",
    `\boxed{X}`. Without any of them it is the tail of the last step: what follows its last "=" or "is", or the whole
    step if it is short.

    Args:
        solution (`Sequence[str]`):
            Steps; the last one states the answer.
        choices (`Sequence[str]`, *optional*, defaults to `()`):
            Choices of the problem. A last step that is one of them is the answer as it stands.

    Returns:
        `str`: The answer as it was written, empty if there is none.
    """
    last = final_step(solution)[-_MOST_CHARACTERS:]
    if last in choices:
        return last
    tags = [match[1].strip() for match in _TAG.finditer(last)]
    if tags:
        return _boxed(tags[-1]) or tags[-1]
    markers = list(_MARKER.finditer(last))
    if markers:
        statement = last[markers[-1].end() :].strip()
        return _boxed(statement) or _first_statement(statement)
    return _boxed(last) or _tail(last)


def announces_answer(text: str) -> bool:
    """Whether a text says where its answer stands."""
    return any(form.search(text[-_MOST_CHARACTERS:]) for form in (_TAG, _MARKER, _BOXED))


def gold_answer(text: str) -> str:
    """The answer in a gold answer that is a whole explanation, "… Therefore, fill in 60."; else the text itself."""
    markers = list(_FILL_IN.finditer(text.translate(_HALF_WIDTH)))
    return text[markers[-1].end() :].strip() if markers else text


def _boxed(text: str) -> str:
    """Content of the last box whose braces close; of the last one that does not, what is there."""
    content = ""
    for match in _BOXED.finditer(text):
        depth = 1
        for index in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                content = text[match.end() : index]
                break
        else:
            content = content or text[match.end() :]
    return content.strip()


def _first_statement(text: str) -> str:
    """The sentence or line that follows an announcement of the answer."""
    display = re.match(r"\$\$.*?\$\$|\\\[.*?\\\]", text, re.DOTALL)
    line, *others = text.lstrip("*_ \n").splitlines() or [""]
    if others and not any(map(_WORD.search, (line, *others))):
        return "\n".join(part.strip() for part in (line, *others) if part.strip())
    if display:
        line = display[0]
    lead = _LEAD.match(line)
    stripped = line[lead.end() :] if lead else line
    # "B. 20 cm" is a letter with its text, not two sentences.
    choice = re.match(r"[(\[]?[A-Z][)\].:,](?=\s*\S)", stripped)
    end = _SENTENCE_END.search(stripped, choice.end() if choice else 0)
    return (stripped[: end.start()] if end else stripped).strip(" *_\t\n")


def _tail(text: str) -> str:
    if not _WORD.search(text):  # formulas only: all of it is the answer, as an equation or as several parts
        return text.strip(" *_\t\n")
    line = text.rstrip().rsplit("\n", 1)[-1].strip(" *_\t")
    line = line.rstrip(".。;!")
    mathematics = re.findall(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", line)
    if mathematics and line.endswith(("$", "\\)", "\\]")):
        line_or_formula = next(part for part in mathematics[-1] if part)
    else:
        line_or_formula = line
    parts = _RELATION.split(line_or_formula)
    return parts[-1].strip(" $*_\t") if len(parts) > 1 else line_or_formula
