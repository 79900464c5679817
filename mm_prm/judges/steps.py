"""A judge of steps: a multimodal language model behind any OpenAI-compatible server says how likely a step is valid."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Unpack

from mm_prm.annotation.protocols import Problem
from mm_prm.chat_client import (
    ChatClient,
    ChatCompletion,
    ChatRequestError,
    ChatServerError,
    ConnectionSettings,
    FailuresInARow,
    neutralize_chat_markup,
)
from mm_prm.data.images import image_data_url
from mm_prm.data.text import question_text, split_image_markers

logger = logging.getLogger(__name__)

# The probabilities of yes and no, in all spellings, among so many tokens. Servers limit them; five are always allowed.
_TOP_LOGPROBS = 5
# Below this share of the first token the model does not answer the question with yes or no, and its ratio says nothing.
_LEAST_PROBABILITY = 0.5
# One failure is a step that is not known; so many in a row are a server that is not there.
_MOST_FAILURES_IN_A_ROW = 8

# What the nodes of a tree share comes first, the pictures too, so that the server's prefix cache serves it.
_BEFORE_QUESTION = """\
You check the steps of a student's solution. You are given a problem, its correct answer, the steps that the student has \
written so far, and the steps that follow them. Decide whether the following steps are valid: true of the problem and of \
its pictures, and logically and mathematically right. Judge the following steps, not those before them. Reply with "Yes" \
or "No" only.

[Problem]

"""
_AFTER_QUESTION = """

[Correct Answer]

{gold}

[Steps So Far]

{prefix}

[Following Steps]

{steps}

Are the following steps valid? Reply with "Yes" or "No" only."""


@dataclass(frozen=True)
class StepOpinion:
    """
    What the judge says of a node's steps.

    Args:
        score (`float`, *optional*):
            P(valid); `None` if it is not known, which is never a number.
        reason (`str`, *optional*, defaults to `""`):
            Why it is not known.
        answered (`bool`, *optional*, defaults to `True`):
            Whether a server answered at all.
    """

    score: float | None
    reason: str = ""
    answered: bool = True


class StepJudge:
    """
    Asks a multimodal language model whether steps of a solution are valid.

    The model sees the problem with its pictures, the gold answer, the steps so far and the steps that follow. Its score
    is P(yes) / (P(yes) + P(no)) of the first token of its reply. Where yes and no together are less probable than one
    half, and where no server answers, the score is not known. If 8 requests in a row are not answered, the judge raises
    [`~mm_prm.chat_client.ChatServerError`].

    Args:
        model (`str`):
            Name under which the servers serve the model.
        base_urls (`str` or `Sequence[str]`):
            Addresses of one or more servers, up to and including `/v1`. They have to give `logprobs`, as vLLM, SGLang,
            llama.cpp and OpenAI do.
        timeout_seconds (`float`, *optional*, defaults to `60.0`):
            Time limit of one attempt at a request.
        connection (*optional*):
            `max_concurrency`, `max_retries`, `retry_seconds` and `api_key` of the [`~mm_prm.chat_client.ChatClient`].

    Raises:
        `ValueError`: If the servers give no log-probabilities, or the model replies with something else than yes or no.
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
        self._open()

    @property
    def identity(self) -> str:
        """What a score depends on beside problem and steps: the model's name, and what it is asked."""
        prompt = hashlib.sha256((_BEFORE_QUESTION + _AFTER_QUESTION).encode()).hexdigest()
        return json.dumps({"model": self.model, "prompt": prompt})

    def submit(
        self, question: Sequence[Mapping[str, Any]], gold: str, prefix: Sequence[str], steps: Sequence[str]
    ) -> "Future[ChatCompletion]":
        """
        Asks about steps and does not wait; [`StepJudge.opinion`] reads the answer.

        Args:
            question (`Sequence[Mapping]`):
                The problem as [`question_parts`] gives it, once for all steps of a problem.
            gold (`str`):
                The gold answer.
            prefix (`Sequence[str]`):
                The steps so far.
            steps (`Sequence[str]`):
                The steps to judge.

        Returns:
            `Future[ChatCompletion]`: Cancelling it cancels the request.
        """
        return self.client.submit(self._payload(question, gold, prefix, steps))

    def opinion(self, answer: "Future[ChatCompletion]") -> StepOpinion:
        """Waits for an answer, and reads it."""
        try:
            first_tokens = answer.result().choices[0].first_tokens
        except ChatRequestError as error:  # of this request; the server is there
            return StepOpinion(None, str(error), answered=False)
        except ChatServerError as error:
            self._failures.count(error)
            return StepOpinion(None, str(error), answered=False)
        self._failures.reset()
        score = probability_valid(first_tokens)
        return StepOpinion(score, "" if score is not None else _neither(first_tokens))

    def _payload(
        self, question: Sequence[Mapping[str, Any]], gold: str, prefix: Sequence[str], steps: Sequence[str]
    ) -> dict[str, Any]:
        gold, *rest = map(neutralize_chat_markup, (gold, *prefix, *steps))
        before, following = rest[: len(prefix)], rest[len(prefix) :]
        text = _AFTER_QUESTION.format(gold=gold, prefix="\n\n".join(before) or "(none)", steps="\n\n".join(following))
        parts = [{"type": "text", "text": _BEFORE_QUESTION}, *question, {"type": "text", "text": text}]
        content: Any = parts
        if all(part["type"] == "text" for part in parts):  # templates of text-only models take strings
            content = "".join(part["text"] for part in parts)
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0.0,
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": _TOP_LOGPROBS,
        }

    def _open(self) -> None:
        """Asks once, so that a wrong address or model ends the run before it begins."""
        question = [{"type": "text", "text": "What is 1 + 2?"}]
        payload = self._payload(question, "3", [], ["1 + 2 = 3.", "The answer is 3."])
        first_tokens = self.client.complete(payload).choices[0].first_tokens
        if not first_tokens:
            raise ValueError(
                f"model {self.model!r}: its server gives no log-probabilities (`logprobs`, `top_logprobs`), out of which "
                "the scores are made; use one that does, for example vLLM"
            )
        if probability_valid(first_tokens) is None:
            raise ValueError(
                f"model {self.model!r}: {_neither(first_tokens)}; use a model that answers at once, without thinking aloud"
            )


def question_parts(problem: Problem) -> list[dict[str, Any]]:
    """
    A problem as the parts of a chat message: text, and pictures at their places.

    Args:
        problem (`Mapping`):
            Problem row, its images decoded.
    """
    images = iter(problem["images"])
    parts = split_image_markers(question_text(problem), len(problem["images"]))
    return [
        {"type": "text", "text": neutralize_chat_markup(part)}
        if part is not None
        else {"type": "image_url", "image_url": {"url": image_data_url(next(images).convert("RGB"))}}
        for part in parts
    ]


def probability_valid(first_tokens: Sequence[tuple[str, float]]) -> float | None:
    """
    P(yes) / (P(yes) + P(no)) of a reply's first token, in all their spellings.

    Args:
        first_tokens (`Sequence[tuple[str, float]]`):
            The most probable tokens with their log-probabilities.

    Returns:
        `float`, or `None` where yes and no together have less than half of the probability.
    """
    probabilities = {"yes": 0.0, "no": 0.0}
    for token, logprob in first_tokens:
        word = re.sub("[^a-z]", "", token.casefold())  # " Yes", "▁yes", "YES"
        if word in probabilities:
            probabilities[word] += math.exp(logprob)
    total = sum(probabilities.values())
    return probabilities["yes"] / total if total >= _LEAST_PROBABILITY else None


def _neither(first_tokens: Sequence[tuple[str, float]]) -> str:
    if not first_tokens:
        return "the answer has no log-probabilities"
    token, _ = max(first_tokens, key=lambda entry: entry[1])
    return f"the reply begins with {token!r} and not with yes or no"
