"""A judge by language model, behind any OpenAI-compatible server: shown question, gold answer and answer, it says yes or no."""

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from typing import Any, Unpack

from mm_prm.annotation.protocols import Problem, Verdict, VerdictValue
from mm_prm.chat_client import (
    ChatClient,
    ChatRequestError,
    ChatServerError,
    ConnectionSettings,
    FailuresInARow,
    neutralize_chat_markup,
)
from mm_prm.data.text import IMAGE_MARKER, question_text

from .extraction import extract_answer, final_step

logger = logging.getLogger(__name__)

# The answer stands at the end of the last step.
_MOST_CHARACTERS = 4000
# One failure is an answer that is not known; so many in a row are a judge that is not there.
_MOST_FAILURES_IN_A_ROW = 8

_PROMPT = """\
You are given a problem, its reference answer, and the final step of a student's solution. Decide whether the student's \
final answer is equal to the reference answer. Only the final result counts, not the way to it. Another notation, another \
form of the same number, a unit left out, or the text of a choice instead of its letter do not matter. Where the reference \
answer has several parts, all of them have to be there.

[Problem]

{question}

[Reference Answer]

{gold}

[Student's Final Step]

{answer}

Is the student's final answer equal to the reference answer? Reply with "Yes" or "No" only."""


class LLMJudge:
    """
    Asks a language model whether a solution's final answer equals the gold answer, see
    [`~mm_prm.annotation.protocols.Judge`].

    The model decodes greedily and, where the server can constrain it (`structured_outputs` of vLLM), can say nothing but
    yes or no. Whatever else it says, and a request that no server answers, is the verdict `"unknown"`, never `"wrong"`.
    If 8 requests in a row are not answered, the judge raises [`~mm_prm.chat_client.ChatServerError`]: trees without
    labels would look finished.

    Can be used from many threads at once; pictures are not shown to the model.

    Args:
        model (`str`):
            Name under which the servers serve the model.
        base_urls (`str` or `Sequence[str]`):
            Addresses of one or more servers, up to and including `/v1`.
        timeout_seconds (`float`, *optional*, defaults to `60.0`):
            Time limit of one attempt at a request.
        connection (*optional*):
            `max_concurrency`, `max_retries`, `retry_seconds` and `api_key` of the [`~mm_prm.chat_client.ChatClient`].
    """

    def __init__(
        self,
        model: str,
        base_urls: str | Sequence[str],
        *,
        timeout_seconds: float = 60.0,
        **connection: Unpack[ConnectionSettings],
    ):
        self.model = model
        self.client = ChatClient(base_urls, timeout_seconds=timeout_seconds, **connection)
        self._failures = FailuresInARow(_MOST_FAILURES_IN_A_ROW)
        self._constraint: dict[str, Any] = {"structured_outputs": {"choice": ["Yes", "No"]}}
        self._open()

    @property
    def identity(self) -> str:
        """What a verdict depends on beside question and answers, see [`language_model_identity`]."""
        return language_model_identity(self.model)

    def judge(self, problem: Problem, solution: Sequence[str]) -> Verdict:
        """
        Judges a solution.

        Args:
            problem (`Mapping`):
                Problem row; its `question`, `choices` and `answer` are read.
            solution (`Sequence[str]`):
                All steps; the last one states the answer.

        Returns:
            [`~mm_prm.annotation.protocols.Verdict`].
        """
        answer = final_step(solution)[-_MOST_CHARACTERS:]
        if not answer:
            return Verdict("unknown", "", "no answer found")
        extracted = extract_answer(solution, tuple(problem["choices"] or ()))
        question = question_text(problem).replace(IMAGE_MARKER, "[picture]")
        payload = self._payload(question, problem["answer"], answer)
        try:
            text = self.client.complete(payload).choices[0].text
        except ChatServerError as error:
            logger.warning("The judge has no verdict: %s", error)
            self._failures.count(error)
            return Verdict("unknown", extracted, f"language model: {error}")
        self._failures.reset()
        verdict = read_reply(text)
        said = " ".join(text.split())[:60]
        reason = "language model" if verdict != "unknown" else f"language model said {said!r}"
        return Verdict(verdict, extracted, reason)

    def _payload(self, question: str, gold: str, answer: str) -> dict[str, Any]:
        question, gold, answer = map(neutralize_chat_markup, (question, gold, answer))
        content = _PROMPT.format(question=question, gold=gold, answer=answer)
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0.0,
            "max_tokens": 8,
            **self._constraint,
        }

    def _open(self) -> None:
        """Asks once, so that a wrong address or model ends the run before it begins."""
        payload = self._payload("What is 1 + 1?", "2", "The answer is 2.")
        try:
            self.client.complete(payload)
        except ChatRequestError as error:
            logger.info("%s; asking without a constraint", error)
            self._constraint = {}
            self.client.complete({name: payload[name] for name in payload if name != "structured_outputs"})


def language_model_identity(model: str) -> str:
    """What the verdicts of a language model depend on beside question and answers: its name, and what it is asked."""
    return json.dumps({"model": model, "prompt": hashlib.sha256(_PROMPT.encode()).hexdigest()})


def read_reply(text: str) -> VerdictValue:
    """The verdict that a reply states: its first word is yes or no, and the other word is not in it."""
    words = re.findall(r"[a-z]+", text.casefold())
    if words[:1] == ["yes"] and "no" not in words:
        return "right"
    if words[:1] == ["no"] and "yes" not in words:
        return "wrong"
    return "unknown"
