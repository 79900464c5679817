"""The text of questions and steps: image markers, clean steps, and the one function that breaks up special tokens.

A question or a step can spell a special token: `<prm>` would shift the scores, `<image>` the pictures, `<|im_start|>`
the turns. [`neutralize_special_tokens`] is the only place where such text is broken up; everything that is tokenised
or sent to a server passes through it once.
"""

import re
import string
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

IMAGE_MARKER = "<image>"

# No problem has ten thousand images, and `int` refuses numbers of thousands of digits.
_NUMBERED_MARKER = re.compile(r"<image(?:_?([0-9]{1,4}))?>")
# Tags in which some policies were taught to wrap their steps; the rows hold the bare text.
_STEP_TAGS = ("<step>", "</step>", "<answer>", "</answer>")


def neutralize_special_tokens(text: str, special_tokens: Iterable[str]) -> str:
    """
    Break up every special token that `text` spells, so that a tokenizer reads it as ordinary text.

    A space goes in after the token's first character: `<prm>` becomes `< prm>`. A space is chosen over an invisible
    character because it stays visible to whoever reads the data, and because no tokenizer's normaliser drops it.
    A special token of one character is replaced by a space. White space that happens to be an added token (runs of
    spaces, line breaks) is left alone: it spells nothing.

    Text without special tokens comes back unchanged, and so does text that was neutralised before.

    Args:
        text (`str`):
            A question, or a piece of it between two images, or a step.
        special_tokens (`Iterable[str]`):
            Tokens to break up, as [`special_token_texts`] lists them.

    Returns:
        `str`: The text, in which no special token occurs.
    """
    pattern = _special_token_pattern(tuple(special_tokens))
    if pattern is None:
        return text
    # More than one pass, because tokens can overlap (`<a<a>` and `<a>`) or hold a space themselves. Each pass breaks
    # at least one occurrence inside its core, so that the passes come to an end.
    while True:
        broken = pattern.sub(_break_up, text)
        if broken == text:
            return text
        text = broken


def _break_up(match: re.Match[str]) -> str:
    token = match[0]
    core = token.strip()
    start = token.index(core)
    opening = core[0] if len(core) > 1 else ""
    return f"{token[:start]}{opening} {token[start + 1 :]}"


@lru_cache(maxsize=64)
def _special_token_pattern(special_tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    tokens = sorted({token for token in special_tokens if token.strip()}, key=lambda token: (-len(token), token))
    return re.compile("|".join(re.escape(token) for token in tokens)) if tokens else None


class _HasSpecialTokens(Protocol):
    @property
    def all_special_tokens(self) -> list[str]: ...

    def get_added_vocab(self) -> dict[str, int]: ...


def special_token_texts(tokenizer: _HasSpecialTokens, extra: Collection[str] = ()) -> tuple[str, ...]:
    """
    List what must not be spelled by a question or a step under this tokenizer.

    Added tokens count whether or not they are marked as special: the tokenizer cuts both out of any text, and chat
    markup such as `<tool_call>` is often not marked.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that will read the text.
        extra (`Collection[str]`, *optional*, defaults to `()`):
            Further texts with a meaning, such as the placeholder that a processor replaces by image tokens.

    Returns:
        `tuple[str, ...]`: The texts, sorted, each once. White space is left out.
    """
    texts = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab(), *extra, IMAGE_MARKER}
    return tuple(sorted(text for text in texts if text.strip()))


class _AddsTokens(Protocol):
    @property
    def bos_token(self) -> str | None: ...

    @property
    def bos_token_id(self) -> int | None: ...

    def __call__(self, text: str) -> Mapping[str, Any]: ...


def beginning_of_text(tokenizer: _AddsTokens) -> str:
    """
    Tell what a tokenizer puts before every text by itself, so that it can be written exactly once.

    Some chat templates write this token and some leave it to the tokenizer. Rendered text that does not begin with it
    gets it in front, and is tokenised without special tokens.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that will read the text.

    Returns:
        `str`: Its `bos_token`, or `""` for a tokenizer that adds none.
    """
    first = list(tokenizer("")["input_ids"])[:1]
    return tokenizer.bos_token or "" if first and first[0] == tokenizer.bos_token_id else ""


def split_image_markers(question: str, num_images: int) -> list[str | None]:
    """
    Split a question of a problem row into text and image slots.

    The slots take the problem's images in their order. The first `num_images` markers `<image>` are slots, further ones
    are text. Without any marker the images come first. With fewer markers than images, the markers take the first
    images, and the images that no marker names follow the text: so the k-th marker is always the k-th image.

    Args:
        question (`str`):
            Question as the problem row holds it.
        num_images (`int`):
            Number of images of the problem.

    Returns:
        `list[str | None]`: Pieces of text, and `None` for each image: exactly `num_images` of them. No piece is empty.
    """
    pieces = question.split(IMAGE_MARKER, num_images)
    num_markers = len(pieces) - 1
    parts: list[str | None] = [pieces[0]]
    for piece in pieces[1:]:
        parts += [None, piece]
    without_marker: list[str | None] = [None] * (num_images - num_markers)
    parts = parts + without_marker if num_markers else without_marker + parts
    return [part for part in parts if part != ""]


def question_text(problem: Mapping[str, Any]) -> str:
    """
    The question as a model reads it: with its choices, where it does not state them itself.

    Choices follow the question line by line, `(A) first`. They are left out where each stands in the question already,
    and where they are nothing but letters, which refer to the picture.

    Args:
        problem (`Mapping[str, Any]`):
            Problem with `question` and perhaps `choices`.

    Returns:
        `str`: The question, with its image markers.
    """
    question, choices = problem["question"], problem.get("choices") or []
    letters = string.ascii_uppercase[: len(choices)]
    if all(choice in question for choice in choices) or list(letters) == list(choices):
        return question
    lines = (f"({letter}) {choice}" for letter, choice in zip(letters, choices, strict=True))
    return "\n".join([question, *lines])


def normalize_image_markers(question: str, num_images: int) -> tuple[str, list[int]]:
    """
    Turn the markers of a foreign question (`<image1>`, `<image_1>`, `<image>`) into `<image>` at their place.

    A numbered marker stands for the image of that number, a bare one for the first image that no other marker stands
    for. A marker for which there is no image, or whose image was placed before, stays as it is: text that refers to the
    image. As slots are filled in order, the images have to be put into the order in which the markers name them.

    Args:
        question (`str`):
            Question as it was found.
        num_images (`int`):
            Number of images that come with it.

    Returns:
        `tuple[str, list[int]]`: The question, and the 0-based numbers of the images in their new order. Images that no
        marker names come last.
    """
    numbered = {int(number) - 1 for number in _NUMBERED_MARKER.findall(question) if number}
    unclaimed = [index for index in range(num_images) if index not in numbered]
    order: list[int] = []

    def place(match: re.Match[str]) -> str:
        if match[1]:
            index = int(match[1]) - 1
        elif unclaimed:
            index = unclaimed.pop(0)
        else:
            index = -1
        if not 0 <= index < num_images or index in order:
            return match[0]
        order.append(index)
        return IMAGE_MARKER

    question = _NUMBERED_MARKER.sub(place, question)
    return question, order + [index for index in range(num_images) if index not in order]


def clean_step(step: str) -> str:
    """
    Make a step bare text: strip white space and the tags `<step>` and `<answer>` around it.

    Args:
        step (`str`):
            Step as a policy wrote it.

    Returns:
        `str`: The step, empty if there was nothing in it.
    """
    step = step.replace("\r\n", "\n").strip()
    before = None
    while step != before:
        before = step
        for tag in _STEP_TAGS:
            step = step.removeprefix(tag).removesuffix(tag).strip()
    return step


def clean_steps(steps: Sequence[str]) -> list[str]:
    """
    Clean every step (see [`clean_step`]) and leave out those that are empty.

    Args:
        steps (`Sequence[str]`):
            Steps as a policy wrote them.

    Returns:
        `list[str]`: The steps that say something.
    """
    return [step for step in map(clean_step, steps) if step]
