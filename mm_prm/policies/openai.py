"""A policy on any server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, a gateway in front of many of them."""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, Unpack

from PIL import Image

from mm_prm.annotation.protocols import Generation, Problem, Rollout, RolloutRequest, RolloutStatus
from mm_prm.chat_client import (
    ChatChoice,
    ChatClient,
    ChatCompletion,
    ChatRequestError,
    ChatServerError,
    ConnectionSettings,
    neutralize_chat_markup,
)
from mm_prm.data.images import image_data_url
from mm_prm.data.text import (
    neutralize_special_tokens,
    question_text,
    special_token_texts,
    split_image_markers,
)

from .questions import decoded_images, previous_steps
from .settings import check_sampling
from .steps import SEPARATORS, STEP_ENDS, StepFormat, first_step, format_steps, parse_steps

logger = logging.getLogger(__name__)

_CACHED_IMAGE_BYTES = 256 * 2**20
# Text whose tokens can be counted: twice the text is twice the tokens, give or take one where the halves meet.
_PROBE = " 1 2 3 4 5 6 7 8 9"


class OpenAIPolicy:
    """
    Writes solutions with a model behind an OpenAI-compatible server, see [`~mm_prm.annotation.protocols.Policy`].

    All samples of a request are asked for at once (`n`), with the request's seed; vLLM gives sample `i` the seed
    `seed + i`. Steps that are already there are sent as an unfinished assistant message, which vLLM and SGLang continue
    (`continue_final_message`), so that their prefix cache serves them. Whether a server does that is checked when the
    policy is opened; if one does not, the steps go into the user turn as "Previous Steps", and a warning says so.

    A request for one step stops at the step's end, where servers tell this from the solution's end (vLLM and SGLang do)
    and templates keep the separator in front of the step. Where not, whole completions are paid for and cut, and a
    warning says so.

    Pictures are sent as data URLs. Text that spells a special token is broken up before it is sent.

    Args:
        model (`str`):
            Name under which the servers serve the model.
        base_urls (`str` or `Sequence[str]`):
            Addresses of one or more servers, up to and including `/v1`. Each request goes to the least busy one.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Most tokens of a rollout. A rollout that reaches it has the status `"length"`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature.
        top_k (`int`, *optional*, defaults to `50`):
            Number of most probable tokens to sample from; 0 takes all, and is for servers that do not know `top_k`.
        top_p (`float`, *optional*, defaults to `0.9`):
            Samples from the smallest set of most probable tokens whose probability reaches this; 1 takes all.
        step_format (`str`, *optional*, defaults to `"paragraphs"`):
            How the model writes its steps, see [`~mm_prm.policies.steps.parse_steps`].
        tokenizer (`str`, *optional*):
            Folder or Hub repository of the model's tokenizer, whose special tokens are broken up. Without it, what
            looks like one under the usual templates.
        timeout_seconds (`float`, *optional*, defaults to `600.0`):
            Time limit of one attempt at a request.
        connection (*optional*):
            `max_concurrency`, `max_retries`, `retry_seconds` and `api_key` of the [`~mm_prm.chat_client.ChatClient`].
    """

    def __init__(
        self,
        model: str,
        base_urls: str | Sequence[str],
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 0.9,
        step_format: StepFormat = "paragraphs",
        tokenizer: str | None = None,
        timeout_seconds: float = 600.0,
        **connection: Unpack[ConnectionSettings],
    ):
        check_sampling(max_new_tokens, temperature, top_k, top_p, step_format)
        self.model = model
        self.step_format = step_format
        self.sampling: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        if top_k:
            self.sampling["top_k"] = top_k
        self.client = ChatClient(base_urls, timeout_seconds=timeout_seconds, **connection)
        self._special_tokens: tuple[str, ...] | None = None
        if tokenizer is not None:
            from transformers import AutoTokenizer

            self._special_tokens = special_token_texts(AutoTokenizer.from_pretrained(tokenizer))
        self._image_urls: OrderedDict[bytes, str] = OrderedDict()
        self._image_bytes = 0
        self.prefix_in_turn = self._servers_continue()
        self._stops: bool | None = None  # asked when a first single step is wanted

    def submit(self, problem: Problem, request: RolloutRequest) -> "Future[Generation]":
        """
        Sends a request and does not wait, so that the servers have hundreds of requests to batch.

        Args:
            problem (`Mapping`):
                Problem row, its images decoded.
            request ([`~mm_prm.annotation.protocols.RolloutRequest`]):
                What is asked.

        Returns:
            `Future[Generation]`: Raises [`~mm_prm.chat_client.ChatServerError`] if no server answers. Cancelling it
            cancels the request.
        """
        whole: Future[Generation] = Future()
        self._ask(self.payload(problem, request), request, [], whole)
        return whole

    def generate(self, requests: Sequence[tuple[Problem, RolloutRequest]]) -> list[Generation]:
        """Answers requests; see [`~mm_prm.annotation.protocols.Policy`]."""
        futures = [self.submit(problem, request) for problem, request in requests]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:  # after an error, or Ctrl-C
                future.cancel()

    def payload(self, problem: Problem, request: RolloutRequest) -> dict[str, Any]:
        """The body of the HTTP request for a request, as [`OpenAIPolicy.submit`] sends it."""
        parts: list[str | Image.Image] = []
        images = iter(decoded_images(problem))
        for part in split_image_markers(question_text(problem), len(problem["images"])):
            parts.append(next(images) if part is None else self._neutralize(part))
        steps = format_steps([self._neutralize(step) for step in request.prefix], self.step_format)
        in_turn = bool(steps) and self.prefix_in_turn
        stops = request.one_step and self._servers_stop()
        if steps and not in_turn:
            parts.append(previous_steps(steps))
        payload = {
            "model": self.model,
            "messages": self._messages(parts, steps + SEPARATORS[self.step_format] * stops if in_turn else None),
            **self.sampling,
            **({"stop": list(STEP_ENDS[self.step_format])} if stops else {}),
            # Greedy samples are all the same, and vLLM refuses to compute several.
            "n": request.num_rollouts if self.sampling["temperature"] else 1,
            "seed": request.seed,
        }
        return payload | _CONTINUE if in_turn else payload

    def _ask(
        self,
        payload: Mapping[str, Any],
        request: RolloutRequest,
        answers: list[ChatCompletion],
        whole: "Future[Generation]",
    ) -> None:
        """Collects the samples of a request: a server that limits `n` is asked again for what is left."""
        have = sum(len(answer.choices) for answer in answers)
        future = self.client.submit({**payload, "n": payload["n"] - have, "seed": payload["seed"] + have})

        def received(part: "Future[ChatCompletion]") -> None:
            try:
                answers.append(part.result())
                if sum(len(answer.choices) for answer in answers) < payload["n"]:
                    self._ask(payload, request, answers, whole)
                elif whole.set_running_or_notify_cancel():
                    whole.set_result(self._generation(answers, request))
            except CancelledError:
                whole.cancel()
            except Exception as error:
                if not whole.done():
                    whole.set_exception(error)

        def cancelled(outer: "Future[Generation]") -> None:
            if outer.cancelled():
                future.cancel()

        whole.add_done_callback(cancelled)
        future.add_done_callback(received)

    def _generation(self, answers: Sequence[ChatCompletion], request: RolloutRequest) -> Generation:
        rollouts: list[Rollout] = []
        for answer in answers:
            tokens = _share_out(answer.completion_tokens or 0, [len(choice.text) for choice in answer.choices])
            rollouts += [
                self._rollout(choice, num_tokens, request)
                for choice, num_tokens in zip(answer.choices, tokens, strict=True)
            ]
        if not self.sampling["temperature"]:
            rollouts = rollouts[:1] * request.num_rollouts
        return Generation(rollouts[: request.num_rollouts], answers[0].prompt_tokens or 0)

    def _rollout(self, choice: ChatChoice, num_tokens: int, request: RolloutRequest) -> Rollout:
        ended: RolloutStatus = "unparsable"
        if choice.finish_reason in ("stop", "length"):
            ended = "finished" if choice.finish_reason == "stop" else "length"
        if request.one_step and self._stops and ended != "unparsable":
            return Rollout(
                *first_step(choice.text, self.step_format, "stopped" if choice.stopped_at else ended), num_tokens
            )
        steps = parse_steps(choice.text, self.step_format, bool(request.prefix) and self.prefix_in_turn)
        if request.one_step and len(steps) > 1 and ended != "unparsable":
            return Rollout(steps[:1], "stopped", num_tokens)
        return Rollout(steps, ended if steps else "unparsable", num_tokens)

    def _neutralize(self, text: str) -> str:
        if self._special_tokens is not None:
            return neutralize_special_tokens(text, self._special_tokens)
        return neutralize_chat_markup(text)

    def _messages(self, parts: Sequence[str | Image.Image], prefix: str | None) -> list[dict[str, Any]]:
        content: Any = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": self._image_url(part)}}
            for part in parts
        ]
        if all(isinstance(part, str) for part in parts):  # templates of text-only models take strings
            content = "".join(part["text"] for part in content)
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        return messages if prefix is None else [*messages, {"role": "assistant", "content": prefix}]

    def _image_url(self, image: Image.Image) -> str:
        """A data URL; the requests of a tree share it, and with it the server's cache of pictures."""
        key = hashlib.blake2b(f"{image.size}".encode() + image.tobytes()).digest()
        url = self._image_urls.pop(key, None)
        if url is None:
            url = image_data_url(image)
            self._image_bytes += len(url)
        self._image_urls[key] = url
        while self._image_bytes > _CACHED_IMAGE_BYTES and len(self._image_urls) > 1:
            self._image_bytes -= len(self._image_urls.popitem(last=False)[1])
        return url

    def _servers_continue(self) -> bool:
        """Whether every server that answers goes on with an unfinished assistant message."""
        continues = {}
        for url in self.client.base_urls:
            try:
                continues[url] = self._server_continues(url)
            except ChatRequestError:
                raise
            except ChatServerError as error:
                logger.warning("%s; going on with the other servers", error)
        if not continues:
            raise ChatServerError(f"no server answers at {', '.join(self.client.base_urls)}")
        for url, continued in continues.items():
            if not continued:
                logger.warning(
                    "%s does not continue an unfinished assistant message. Prefixes go into the user turn as 'Previous "
                    "Steps', so nothing computed for one is used again.",
                    url,
                )
        return all(continues.values())

    def _server_continues(self, url: str) -> bool:
        # A server that closes the turn and opens another writes their marks into the prompt: more tokens than the text.
        root, once, twice = (self._count_prompt(url, text) for text in (None, _PROBE, _PROBE * 2))
        if root is None or once is None or twice is None:
            return False
        return abs((once - root) - (twice - once)) <= 1

    def _servers_stop(self) -> bool:
        """Whether every server that answers can be asked for one step, see [`OpenAIPolicy`]."""
        if self._stops is None:
            unfit: dict[str, str] = {}
            for url in self.client.base_urls:
                try:
                    reason = self._server_cannot_stop(url)
                except ChatServerError as error:
                    logger.warning("%s; going on with the other servers", error)
                else:
                    unfit |= {url: reason} if reason else {}
            for url, reason in unfit.items():
                logger.warning(
                    "%s %s. A single step is cut out of a whole completion, all of whose tokens are computed.",
                    url,
                    reason,
                )
            self._stops = not unfit
        return self._stops

    def _server_cannot_stop(self, url: str) -> str:
        payload = {"model": self.model, "messages": self._messages(["Count."], None), "max_tokens": 1}
        if self.client.complete(payload, url).choices[0].stopped_at is None:
            return "does not say at which text an answer stopped"
        separator = SEPARATORS[self.step_format]
        if separator and self.prefix_in_turn:
            without, with_it = (self._count_prompt(url, _PROBE + end) for end in ("", separator))
            if without == with_it:
                return "drops the separator at the end of an unfinished assistant message"
        return ""

    def _count_prompt(self, url: str, prefix: str | None) -> int | None:
        payload = {"model": self.model, "messages": self._messages(["Count."], prefix), "max_tokens": 1}
        if prefix is None:
            return self.client.complete(payload, url).prompt_tokens
        try:
            return self.client.complete(payload | _CONTINUE, url).prompt_tokens
        except ChatRequestError as error:
            logger.info("%s", error)
            return None


_CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}


def _share_out(total: int, weights: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to the weights that add up to the total: servers count the tokens of a request only."""
    whole, shares, given, seen = max(1, sum(weights)), [], 0, 0
    for weight in weights:
        seen += weight
        shares.append(total * seen // whole - given)
        given += shares[-1]
    if shares:
        shares[-1] += total - given
    return shares
