"""
How a policy writes its steps down: reading them out of generated text, and writing given steps for it to continue.

- `paragraphs`: steps stand apart by blank lines, and the last one states the answer.
- `tags`: `<step>…</step>` for every step, `<answer>…</answer>` for the last one.
- `numbered`: lines that open with `Step k:`, and `†Answer:` for the last one.

Either way a step comes out as bare text: stripped, without tags or numbers.
"""

import re
from collections.abc import Sequence
from typing import Literal, get_args

from mm_prm.annotation.protocols import RolloutStatus
from mm_prm.data.text import neutralize_special_tokens

StepFormat = Literal["paragraphs", "tags", "numbered"]
STEP_FORMATS: tuple[StepFormat, ...] = get_args(StepFormat)

STEP_TAGS = ("<step>", "</step>", "<answer>", "</answer>")

# What opens the next step after a given one, and what ends a step that was so opened.
SEPARATORS: dict[StepFormat, str] = {"paragraphs": "\n\n", "tags": "", "numbered": "\n"}
STEP_ENDS: dict[StepFormat, tuple[str, ...]] = {
    "paragraphs": ("\n\n",),
    "tags": ("</step>",),
    "numbered": ("\nStep ", "\n†Answer"),
}

_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
_TAGGED = re.compile(r"<(step|answer)>(.*?)(?:</\1>|(?=<(?:step|answer)>)|\Z)", re.DOTALL)
_NUMBER = r"[*#\s]*Step\s+\d+\s*[:.][*\s]*"
_ANSWER = r"†\s*Answer\s*:"
_NUMBERED = re.compile(rf"^(?:{_NUMBER}|(?={_ANSWER}))", re.MULTILINE)


def parse_steps(text: str, step_format: StepFormat = "paragraphs", continues: bool = False) -> tuple[str, ...]:
    """
    Reads the steps out of generated text.

    Args:
        text (`str`):
            What the policy wrote, without special tokens.
        step_format (`str`, *optional*, defaults to `"paragraphs"`):
            `"paragraphs"`, `"tags"` or `"numbered"`.
        continues (`bool`, *optional*, defaults to `False`):
            Whether the text continues steps that were given. It then has to open with what separates two steps: text
            that goes on with the last given step would change a prefix whose value is being measured.

    Returns:
        `tuple[str, ...]`: The steps, none of them empty; `()` if the text does not keep to the format.
    """
    text = text.replace("\r\n", "\n")
    if step_format == "paragraphs":
        opens_well = not continues or text.startswith("\n")
        pieces = _BLANK_LINE.split(text)
    elif step_format == "tags":
        matches = list(_TAGGED.finditer(text))
        opens_well = bool(matches) and not text[: matches[0].start()].strip()
        pieces = [match[2] for match in matches]
    else:
        before, *pieces = _NUMBERED.split(text)
        opens_well = not before.strip() and (not continues or text.startswith("\n"))
    steps = tuple(piece.strip() for piece in pieces)
    return tuple(step for step in steps if step) if opens_well else ()


def format_steps(steps: Sequence[str], step_format: StepFormat = "paragraphs") -> str:
    """
    Writes steps down as the policy would have, without white space at the end: the separator opens the next step.

    Args:
        steps (`Sequence[str]`):
            Steps, bare text.
        step_format (`str`, *optional*, defaults to `"paragraphs"`):
            `"paragraphs"`, `"tags"` or `"numbered"`.

    Returns:
        `str`: The text, empty if there are no steps.
    """
    if step_format == "paragraphs":
        return "\n\n".join(steps).rstrip()
    if step_format == "tags":
        return "\n".join(f"<step>{step}</step>" for step in steps)
    return "\n".join(
        step if re.match(_ANSWER, step) else f"Step {number}: {step}" for number, step in enumerate(steps, start=1)
    ).rstrip()


def format_solution(steps: Sequence[str], step_format: StepFormat) -> str:
    """
    Writes a whole solution down, for a policy to learn from: what [`parse_steps`] reads back are the same steps.

    It begins with what [`format_steps`] makes of any prefix. Tags that a step spells are broken up.

    Args:
        steps (`Sequence[str]`):
            All steps, bare text; the last one states the answer.
        step_format (`str`):
            `"paragraphs"`, `"tags"` or `"numbered"`.

    Returns:
        `str`: The text.

    Raises:
        `ValueError`: If the steps would be read back as others.
    """
    if step_format == "tags":
        steps = [neutralize_special_tokens(step, STEP_TAGS) for step in steps]
        *before, last = steps
        text = "\n".join([*(f"<step>{step}</step>" for step in before), f"<answer>{last}</answer>"])
    else:
        text = format_steps(steps, step_format)
    read = parse_steps(text, step_format)
    if read != tuple(steps):
        advice = "" if step_format == "tags" else "; write steps with tags, which hold any text"
        raise ValueError(
            f"are {len(steps)} steps, and {step_format} of them would be read as {len(read)} others; give bare text, "
            f"stripped, with \\n line ends{advice}"
        )
    return text


def without_number(step: str) -> str:
    """
    Takes the number off a step that begins with one, as in `Step 2: …`.

    Args:
        step (`str`):
            Step as a model wrote it.
    """
    return re.sub(rf"\A{_NUMBER}", "", step).strip()


def first_step(text: str, step_format: StepFormat, ended: RolloutStatus) -> tuple[tuple[str, ...], RolloutStatus]:
    """
    Reads the one step of a rollout that was asked for one, see [`~mm_prm.annotation.protocols.RolloutRequest`].

    Args:
        text (`str`):
            What the policy wrote after the separator, without special tokens. It may hold more than the step.
        step_format (`str`):
            `"paragraphs"`, `"tags"` or `"numbered"`.
        ended (`str`):
            How the text ended: `"finished"`, `"length"`, or `"stopped"` where the end of the step is cut off already.

    Returns:
        The step, none if there is none, and the status of the rollout.
    """
    text = text.replace("\r\n", "\n")
    for end in STEP_ENDS[step_format]:
        text, found, _ = text.partition(end)
        ended = "stopped" if found else ended
    steps = parse_steps(text, step_format)
    if not steps:
        return (), "unparsable"
    return steps[:1], "stopped" if len(steps) > 1 else ended
