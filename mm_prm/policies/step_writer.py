"""
Plain solutions to solutions in steps: a language model behind any OpenAI-compatible server rewrites them, and what it
wrote is checked before anybody learns from it.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Unpack

from mm_prm.annotation.protocols import Judge, Problem, sample_seed
from mm_prm.chat_client import (
    ChatChoice,
    ChatClient,
    ChatCompletion,
    ChatRequestError,
    ChatServerError,
    ConnectionSettings,
    FailuresInARow,
    neutralize_chat_markup,
)
from mm_prm.data.text import IMAGE_MARKER, neutralize_special_tokens, question_text
from mm_prm.judges.steps import question_parts

from .steps import STEP_TAGS, parse_steps, without_number

# One failure is a solution that is not rewritten; so many in a row are a server that is not there.
_MOST_FAILURES_IN_A_ROW = 8
# The first attempt is the most probable text; the others have to be other texts.
_RETRY_TEMPERATURE = 0.7

# The gold answer is not shown: the answer that is compared with it has to come from the solution.
_BEFORE_QUESTION = """\
Rewrite the solution of a problem as steps. Keep what the solution says: its reasoning, its numbers and its final answer. \
Do not solve the problem anew, do not correct the solution, and add no fact, number or result that neither the problem nor \
the solution has. Put each step of the reasoning between <step> and </step>, in their order, without numbering them. Put the \
final answer into one sentence between <answer> and </answer> at the end. There must be at least one step, and at most \
{most}. Write nothing before, between and after them. For example:

<step>The angles of a triangle add up to 180 degrees.</step>
<step>So the third angle is 180 - 40 - 60 = 80 degrees.</step>
<answer>The answer is 80 degrees.</answer>

[Problem]

"""
_AFTER_QUESTION = """

[Solution]

{solution}

[Solution in Steps]
"""

_TEXT = r"(?:(?!</?(?:step|answer)>).)*"
_WRITTEN = re.compile(rf"\s*(?:<step>{_TEXT}</step>\s*)+<answer>{_TEXT}</answer>\s*", re.DOTALL)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|\\,)(?=\d{3}(?!\d))")


@dataclass(frozen=True)
class Written:
    """
    What became of a solution.

    Args:
        steps (`tuple[str, ...]`):
            The steps; none if they were not accepted.
        reason (`str`, *optional*, defaults to `""`):
            Why they were not.
        answered (`bool`, *optional*, defaults to `True`):
            Whether a server answered at all.
    """

    steps: tuple[str, ...]
    reason: str = ""
    answered: bool = True


class StepWriter:
    """
    Asks a language model to rewrite solutions in steps, and accepts what passes all checks: the text holds steps and an
    answer and nothing else, there are neither too few nor too many, no number stands in them that neither the problem nor
    the solution has, and the judge finds the final answer right. What cannot be told is not accepted.

    If 8 requests in a row are not answered, [`StepWriter.read`] raises [`~mm_prm.chat_client.ChatServerError`].

    Args:
        model (`str`):
            Name under which the servers serve the model.
        base_urls (`str` or `Sequence[str]`):
            Addresses of one or more servers, up to and including `/v1`.
        judge ([`~mm_prm.annotation.protocols.Judge`]):
            Who compares the final answer with the gold answer.
        max_steps (`int`, *optional*, defaults to `24`):
            Most steps of a solution, the answer included.
        max_tokens (`int`, *optional*, defaults to `4096`):
            Most tokens that the model may write.
        show_images (`bool`, *optional*, defaults to `False`):
            Whether the model sees the pictures of the problem.
        timeout_seconds (`float`, *optional*, defaults to `120.0`):
            Time limit of one attempt at a request.
        connection (*optional*):
            `max_concurrency`, `max_retries`, `retry_seconds` and `api_key` of the [`~mm_prm.chat_client.ChatClient`].
    """

    def __init__(
        self,
        model: str,
        base_urls: str | Sequence[str],
        judge: Judge,
        *,
        max_steps: int = 24,
        max_tokens: int = 4096,
        show_images: bool = False,
        timeout_seconds: float = 120.0,
        **connection: Unpack[ConnectionSettings],
    ):
        if max_steps < 2:
            raise ValueError(f"max_steps: {max_steps} has to be at least 2, a step and the answer")
        self.model, self.judge = model, judge
        self.max_steps, self.max_tokens, self.show_images = max_steps, max_tokens, show_images
        self.client = ChatClient(base_urls, timeout_seconds=timeout_seconds, **connection)
        self._failures = FailuresInARow(_MOST_FAILURES_IN_A_ROW)
        # Asks once, so that a wrong address or model ends the run before it begins
        self.client.complete({"model": model, "messages": [{"role": "user", "content": "1 + 2?"}], "max_tokens": 1})

    def key(self, problem: Problem, solution: str) -> str:
        """
        What the steps of a solution depend on, beside the number of attempts and the judge.

        Args:
            problem (`Mapping`):
                Problem row.
            solution (`str`):
                The plain solution.
        """
        # The gold answer and the choices decide what is accepted
        content = [self._payload(problem, solution, 0), problem["answer"], list(problem["choices"] or ())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def submit(self, problem: Problem, solution: str, attempt: int) -> "Future[ChatCompletion]":
        """
        Asks for a solution in steps and does not wait; [`StepWriter.read`] reads the answer.

        Args:
            problem (`Mapping`):
                Problem row, its images decoded if they are shown.
            solution (`str`):
                The plain solution.
            attempt (`int`):
                Number of the attempt, from 0 on.

        Returns:
            `Future[ChatCompletion]`: Cancelling it cancels the request.
        """
        return self.client.submit(self._payload(problem, solution, attempt))

    def read(self, problem: Problem, solution: str, answer: "Future[ChatCompletion]") -> Written:
        """
        Waits for an answer and checks it.

        Args:
            problem (`Mapping`):
                Problem row.
            solution (`str`):
                The plain solution.
            answer (`Future[ChatCompletion]`):
                What [`StepWriter.submit`] returned.
        """
        try:
            [choice, *_] = answer.result().choices
        except ChatRequestError as error:  # of this request; the server is there
            return Written((), str(error), answered=False)
        except ChatServerError as error:
            self._failures.count(error)
            return Written((), str(error), answered=False)
        self._failures.reset()
        try:
            return Written(self._checked(problem, solution, choice))
        except _NotAccepted as error:
            return Written((), str(error))

    def _checked(self, problem: Problem, solution: str, choice: ChatChoice) -> tuple[str, ...]:
        if choice.finish_reason == "length":
            raise _NotAccepted(f"the text is cut: max_tokens = {self.max_tokens}")
        steps = read_written(choice.text, self.max_steps)
        invented = invented_numbers(steps, [question_text(problem), solution])
        if invented:
            raise _NotAccepted(f"numbers that neither the problem nor the solution has: {', '.join(invented[:5])}")
        verdict = self.judge.judge(problem, steps)
        if verdict.verdict != "right":
            reason = f" ({verdict.reason})" if verdict.reason else ""
            raise _NotAccepted(
                f"the final answer is not known to be right: {verdict.extracted!r:.60} against "
                f"{problem['answer']!r:.60} is {verdict.verdict}{reason}"
            )
        return steps

    def _payload(self, problem: Problem, solution: str, attempt: int) -> dict[str, Any]:
        before = _BEFORE_QUESTION.format(most=self.max_steps - 1)
        clean = neutralize_special_tokens(neutralize_chat_markup(solution.strip()), STEP_TAGS)
        after = _AFTER_QUESTION.format(solution=clean)
        if self.show_images and problem["images"]:
            parts = question_parts(problem)
            content: Any = [{"type": "text", "text": before}, *parts, {"type": "text", "text": after}]
        else:  # templates of text-only models take strings
            question = question_text(problem).replace(IMAGE_MARKER, "[picture]")
            content = before + neutralize_chat_markup(question) + after
        sampling: dict[str, Any] = {"temperature": 0.0}
        if attempt:
            seed = sample_seed("write steps", problem["id"], solution, attempt)
            sampling = {"temperature": _RETRY_TEMPERATURE, "seed": seed}
        messages = [{"role": "user", "content": content}]
        return {"model": self.model, "messages": messages, "max_tokens": self.max_tokens, **sampling}


class _NotAccepted(Exception):
    """What a model wrote does not pass; the message says why, and after a colon where."""


def read_written(text: str, max_steps: int) -> tuple[str, ...]:
    """
    Reads what a model wrote, and nothing that only looks like it.

    Args:
        text (`str`):
            The text.
        max_steps (`int`):
            Most steps, the answer included.

    Returns:
        `tuple[str, ...]`: The steps, without the numbers that models like to put before them.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _NotAccepted("half of a surrogate pair: no file can store it") from None
    if not _WRITTEN.fullmatch(text):
        raise _NotAccepted(f"not steps and an answer between tags and nothing else: {' '.join(text.split())!r:.80}")
    number = text.count("<step>") + 1
    if number > max_steps:
        raise _NotAccepted(f"too many steps: {number}, more than max_steps = {max_steps}")
    steps = tuple(step for step in map(without_number, parse_steps(text, "tags")) if step)
    if len(steps) < number:
        raise _NotAccepted("an empty step")
    return steps


def invented_numbers(steps: Sequence[str], sources: Sequence[str]) -> list[str]:
    """
    The numbers in steps that none of the sources has, commas in thousands aside. Digits of a longer number count as there:
    LaTeX writes 1/2 as `\\frac12`.

    Args:
        steps (`Sequence[str]`):
            The steps.
        sources (`Sequence[str]`):
            Where their numbers may come from.
    """
    known = {number for source in sources for number in _NUMBER.findall(_THOUSANDS.sub("", source))}
    found = dict.fromkeys(number for step in steps for number in _NUMBER.findall(_THOUSANDS.sub("", step)))
    return [number for number in found if number not in known and not any(number in longer for longer in known)]
