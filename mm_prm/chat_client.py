"""
Chat completions from servers that speak OpenAI's protocol (vLLM, SGLang, llama.cpp, OpenAI, …): many requests at once,
over several servers, through whatever a busy server does.

Everything happens in one thread with an event loop of its own, so that callers are plain functions, hundreds of
requests cost no hundreds of threads, and a cancelled request closes its connection, at which servers free its slot.
"""

import asyncio
import email.utils
import json
import logging
import math
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypedDict

import aiohttp

from mm_prm.data.text import IMAGE_MARKER, neutralize_special_tokens

logger = logging.getLogger(__name__)

# Answers that another attempt may mend; any other refusal is one of the request itself.
_RETRIED_STATUSES = {408, 409, 425, 429}
_LONGEST_WAIT_SECONDS = 60.0
_CONNECT_SECONDS = 10.0
# A server that has just failed is left alone for as long as others answer; longer from one failure to the next.
_REST_SECONDS = 5.0
_LONGEST_QUOTE = 300

# What chat templates and processors give a meaning to, where a server's tokenizer is not at hand.
_SPECIAL_TEXT = re.compile(
    r"<\|[^<>|\n]{1,40}\|>|<｜[^<>\n]{1,40}｜>|</?(?:s|img|think|prm|tool_call|tool_response|image|video)>"
    r"|<(?:bos|eos|pad|unk|image_soft_token|start_of_image|end_of_image|start_of_turn|end_of_turn|IMG_CONTEXT)>"
    r"|\[/?(?:INST|IMG|IMG_BREAK|IMG_END|SYSTEM_PROMPT|TOOL_CALLS)\]"
)


class ChatServerError(ConnectionError):
    """A request that no server answered, after all attempts; the message says what the last one did."""


class ChatRequestError(ChatServerError):
    """A request that a server refused, and would refuse again."""


class FailuresInARow:
    """
    Tells a request that failed from servers that are gone; may be used from many threads.

    Args:
        most (`int`):
            So many failures in a row are servers that are gone.
    """

    def __init__(self, most: int):
        self._most = most
        self._number = 0
        self._lock = threading.Lock()

    def count(self, error: ChatServerError) -> None:
        """Counts a failure, and raises it if it is one too many."""
        with self._lock:
            self._number += 1
            if self._number >= self._most:
                raise error

    def reset(self) -> None:
        """A request was answered."""
        with self._lock:
            self._number = 0


@dataclass(frozen=True)
class ChatChoice:
    """
    One sampled answer.

    Args:
        text (`str`):
            Its text.
        finish_reason (`str`):
            Why it ended: `"stop"`, `"length"`, …
        stopped_at (`str`, *optional*):
            The text of the request's `stop` at which it ended; `""` if at none, `None` if the server does not say.
        first_tokens (`tuple[tuple[str, float], ...]`, *optional*, defaults to `()`):
            The most probable first tokens with their log-probabilities, where the request asks for `top_logprobs`.
    """

    text: str
    finish_reason: str
    stopped_at: str | None = None
    first_tokens: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class ChatCompletion:
    """
    A server's answer.

    Args:
        choices (`list[ChatChoice]`):
            The sampled answers, at least one.
        prompt_tokens (`int`, *optional*):
            Tokens of the prompt, `None` if the server does not say.
        completion_tokens (`int`, *optional*):
            Tokens of all choices together, `None` if the server does not say.
    """

    choices: list[ChatChoice]
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass
class _Server:
    url: str
    in_flight: int = 0
    last_used: float = 0.0
    failures: int = 0  # in a row
    resting_until: float = 0.0

    def failed(self) -> None:
        self.resting_until = time.monotonic() + min(_REST_SECONDS * 2**self.failures, _LONGEST_WAIT_SECONDS)
        self.failures += 1

    def answered(self) -> None:
        self.failures, self.resting_until = 0, 0.0

    def preference(self) -> tuple[float, int, float]:
        """The server with the lowest is asked: one that works, then the least busy."""
        resting_until = self.resting_until if self.resting_until > time.monotonic() else 0.0
        return resting_until, self.in_flight, self.last_used


class ConnectionSettings(TypedDict, total=False):
    """Settings of a [`ChatClient`] that policies and judges hand on to theirs."""

    api_key: str | None
    max_concurrency: int
    max_retries: int
    retry_seconds: float


class ChatClient:
    """
    Sends chat completions to the least busy of several servers.

    A request that fails in a way that may pass (no connection, a time-out, a connection closed half way, status 429 or
    5xx, an answer that is none) is sent again, to another server if there is one, after a growing wait with jitter, or
    after what the server's `Retry-After` asks for. A refusal (any other status 4xx) is raised at once.

    Args:
        base_urls (`str` or `Sequence[str]`):
            Addresses up to and including `/v1`. All of them serve the same model.
        api_key (`str`, *optional*):
            Sent as bearer token, and shown nowhere; that of the environment variable `OPENAI_API_KEY` if not given.
        max_concurrency (`int`, *optional*, defaults to `64`):
            Most requests under way at once, over all servers.
        timeout_seconds (`float`, *optional*, defaults to `600.0`):
            Time limit of one attempt.
        max_retries (`int`, *optional*, defaults to `5`):
            Most attempts after the first.
        retry_seconds (`float`, *optional*, defaults to `0.5`):
            First wait between two attempts; it doubles from one to the next.
    """

    def __init__(
        self,
        base_urls: str | Sequence[str],
        api_key: str | None = None,
        max_concurrency: int = 64,
        timeout_seconds: float = 600.0,
        max_retries: int = 5,
        retry_seconds: float = 0.5,
    ):
        urls = [base_urls] if isinstance(base_urls, str) else list(base_urls)
        if not urls:
            raise ValueError("base_urls: give at least one, for example http://127.0.0.1:8000/v1")
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"base_urls: {url!r} has to begin with http:// or https://")
        for name, value, holds, wanted in (
            ("max_concurrency", max_concurrency, max_concurrency >= 1, "at least 1"),
            ("timeout_seconds", timeout_seconds, timeout_seconds > 0, "above 0"),
            ("max_retries", max_retries, max_retries >= 0, "0 or more"),
        ):
            if not holds:
                raise ValueError(f"{name}: {value!r} has to be {wanted}")
        api_key = api_key or os.environ.get("OPENAI_API_KEY")
        self.base_urls = [url.rstrip("/") for url in urls]
        self._exchange = _Exchange(
            servers=[_Server(url) for url in self.base_urls],
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            slots=asyncio.Semaphore(max_concurrency),
            timeout=aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=_CONNECT_SECONDS),
            max_retries=max_retries,
            retry_seconds=retry_seconds,
        )
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="chat-client", daemon=True)
        thread.start()
        self.close = weakref.finalize(self, _stop, self._exchange, self._loop, thread)

    def submit(self, payload: Mapping[str, Any], base_url: str | None = None) -> "Future[ChatCompletion]":
        """
        Sends a request.

        Args:
            payload (`Mapping[str, Any]`):
                Body of the request, as the protocol has it.
            base_url (`str`, *optional*):
                The server to ask; the least busy one if not given.

        Returns:
            `Future[ChatCompletion]`: Raises [`ChatServerError`] if there is no answer. Cancelling it cancels the request.
        """
        return asyncio.run_coroutine_threadsafe(self._exchange.complete(payload, base_url), self._loop)

    def complete(self, payload: Mapping[str, Any], base_url: str | None = None) -> ChatCompletion:
        """Sends a request and waits for the answer, see [`ChatClient.submit`]."""
        return self.submit(payload, base_url).result()


class _Retry(Exception):
    """An attempt that failed in a way that may pass; the message says how."""

    def __init__(self, message: str, wait_seconds: float = 0.0):
        super().__init__(message)
        self.wait_seconds = wait_seconds


@dataclass
class _Exchange:
    """What lives in the event loop."""

    servers: list[_Server]
    headers: Mapping[str, str]
    slots: asyncio.Semaphore
    timeout: aiohttp.ClientTimeout
    max_retries: int
    retry_seconds: float
    session: aiohttp.ClientSession | None = None

    async def complete(self, payload: Mapping[str, Any], base_url: str | None) -> ChatCompletion:
        servers = [server for server in self.servers if base_url in (None, server.url)]
        attempt = 0
        while True:
            # The slot is free while a request waits for its next attempt.
            async with self.slots:
                server = min(servers, key=_Server.preference)
                server.in_flight += 1
                server.last_used = time.monotonic()
                try:
                    completion = await self._attempt(server.url, payload)
                    server.answered()
                    return completion
                except _Retry as error:
                    server.failed()
                    failure = error
                finally:
                    server.in_flight -= 1
            message = f"{server.url}: {failure}"
            if attempt == self.max_retries:
                raise ChatServerError(f"no answer after {attempt + 1} attempts; the last: {message}")
            # Jitter, so that requests that failed together do not come back together.
            wait = min(self.retry_seconds * 2**attempt, _LONGEST_WAIT_SECONDS) * random.uniform(0.5, 1.0)
            wait = max(wait, min(failure.wait_seconds, _LONGEST_WAIT_SECONDS))
            attempt += 1
            logger.info("%s; attempt %d in %.1f s", message, attempt + 1, wait)
            await asyncio.sleep(wait)

    async def _attempt(self, url: str, payload: Mapping[str, Any]) -> ChatCompletion:
        if self.session is None:  # a session belongs to the loop in which it is made
            self.session = aiohttp.ClientSession(
                headers=self.headers, timeout=self.timeout, connector=aiohttp.TCPConnector(limit=0)
            )
        try:
            async with self.session.post(f"{url}/chat/completions", json=payload) as response:
                body = await response.text(errors="replace")
        except TimeoutError:
            raise _Retry("time limit") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Retry(f"{type(error).__name__}: {error}") from error
        if response.status in _RETRIED_STATUSES or response.status >= 500:
            wait = _retry_after(response.headers.get("Retry-After"))
            raise _Retry(f"status {response.status}: {_quote(body)}", wait)
        if response.status != 200:
            raise ChatRequestError(f"{url}: status {response.status}: {_quote(body)}")
        try:
            return _read(json.loads(body))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _Retry(f"an answer that is none ({type(error).__name__}: {error}): {_quote(body)}") from error


def neutralize_chat_markup(text: str) -> str:
    """
    Breaks up what looks like a special token, for servers whose tokenizer is not at hand.

    Args:
        text (`str`):
            Text of a question, a step or an answer.

    Returns:
        `str`: The text, in which no markup of the usual chat templates occurs; see
        [`~mm_prm.data.text.neutralize_special_tokens`].
    """
    while found := set(_SPECIAL_TEXT.findall(text)):
        text = neutralize_special_tokens(text, sorted(found))
    return neutralize_special_tokens(text, (IMAGE_MARKER,))


def _retry_after(value: str | None) -> float:
    """Seconds that a `Retry-After` header asks for: a number, or a date."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _quote(body: str) -> str:
    text = " ".join(body.split())
    return text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + " …"


def _read(body: Any) -> ChatCompletion:
    choices = sorted(body["choices"], key=lambda choice: choice.get("index", 0))
    if not choices:
        raise ValueError("no choices")
    usage = body.get("usage") or {}
    return ChatCompletion(
        [_read_choice(choice) for choice in choices],
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
    )


def _read_choice(choice: Any) -> ChatChoice:
    text, reason = choice["message"]["content"], choice["finish_reason"]
    text = "" if text is None else text  # nothing was written, or nothing that may be shown
    if not isinstance(text, str) or not isinstance(reason, str):
        raise TypeError("content and finish_reason have to be text")
    if reason in ("abort", "error"):  # the engine gave up, which says nothing about the model
        raise ValueError(f"finish_reason {reason!r}")
    stopped_at = None
    for name in ("stop_reason", "matched_stop"):  # vLLM's name and SGLang's; a number is that of an end token
        if name in choice:
            stopped_at = choice[name] if isinstance(choice[name], str) else ""
    return ChatChoice(text, reason, stopped_at, _read_first_tokens(choice.get("logprobs")))


def _read_first_tokens(logprobs: Any) -> tuple[tuple[str, float], ...]:
    if not logprobs or not logprobs.get("content"):  # not asked for, or not known to the server
        return ()
    tokens = tuple((entry["token"], entry["logprob"]) for entry in logprobs["content"][0].get("top_logprobs") or ())
    for token, logprob in tokens:
        if not isinstance(token, str) or not isinstance(logprob, int | float) or not logprob <= 1e-3:  # NaN is none
            raise TypeError("top_logprobs have to be texts with log-probabilities")
    return tokens


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _stop(exchange: _Exchange, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    async def close() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if exchange.session is not None:
            await exchange.session.close()
        loop.stop()

    asyncio.run_coroutine_threadsafe(close(), loop)
    if thread is not threading.current_thread():
        thread.join(timeout=5.0)
        if not thread.is_alive():
            loop.close()
