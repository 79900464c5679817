"""Scores from a vLLM server, many solutions at once: the same text and tokens as here, one score for each step."""

import logging
import os
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import Retry

from mm_prm.data.images import image_data_url

from .solutions import (
    Steps,
    check_token_ids,
    distinct_solutions,
    rgb_images,
    right_probabilities,
    scores_of_candidates,
)

logger = logging.getLogger(__name__)

_HUB_REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_RETRIED_STATUSES = (408, 429, 500, 502, 503, 504)
_CONNECT_SECONDS = 10.0
_LONGEST_WAIT_SECONDS = 60.0
_ADVICE = "start one with `mm-prm serve MODEL`"


class ScoreServerError(ConnectionError):
    """A server that gave no scores; the message names the server and says what it did and what to do."""


class ServedScorer:
    """
    Gives each step of a solution its score, from a server that `mm-prm serve` started; see [`Scorer`].

    Text and tokens are those of the model's own processor, which is loaded here. The first solution with images and the
    first without are compared with the server's tokens, so that another chat template or other image settings are an
    error and no silent shift. Requests that fail in a way that may pass (no connection, a time-out, status 429 or 5xx)
    are sent again after a growing wait.

    Args:
        base_url (`str`):
            Address of the server, for example `http://127.0.0.1:8000`.
        model (`str` or `os.PathLike`, *optional*):
            Folder or Hub repository of the model that is served, from which the processor is loaded; a server that says
            it has another one is an error. Where the server says it has the model from, if not given.
        max_concurrency (`int`, *optional*, defaults to `16`):
            Most requests at once.
        max_retries (`int`, *optional*, defaults to `5`):
            Most attempts of a request after the first.
        timeout_seconds (`float`, *optional*, defaults to `600.0`):
            Time limit of one attempt.
        api_key (`str`, *optional*):
            Sent as bearer token; the environment variable `VLLM_API_KEY`, which vLLM reads as well, if not given.

    Example:

    ```python
    >>> from mm_prm.inference import ServedScorer

    >>> scorer = ServedScorer("http://127.0.0.1:8000")
    >>> problem = {"id": "1", "question": "What is 2 + 3?", "images": []}
    >>> scores = scorer.score([problem], [[["2 + 3 = 5", "The answer is 5."], ["The answer is 6."]]])
    >>> [len(candidate) for candidate in scores[0]]
    [2, 1]
    ```
    """

    def __init__(
        self,
        base_url: str,
        model: str | os.PathLike | None = None,
        max_concurrency: int = 16,
        max_retries: int = 5,
        timeout_seconds: float = 600.0,
        api_key: str | None = None,
    ):
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url = {base_url!r}: has to begin with http:// or https://")
        if max_concurrency < 1 or max_retries < 0 or timeout_seconds <= 0:
            raise ValueError(
                f"max_concurrency = {max_concurrency}, max_retries = {max_retries}, timeout_seconds = {timeout_seconds}: "
                "must be at least 1, at least 0 and above 0"
            )
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.max_concurrency = max_concurrency
        self.timeout_seconds = timeout_seconds
        self._session = _session(max_concurrency, max_retries, api_key or os.environ.get("VLLM_API_KEY"))
        self.close = weakref.finalize(self, self._session.close)
        self._served_name, root = self._find_model()
        self.model = root if model is None else os.fspath(model)
        self.processor = self._load_processor(self.model)
        self._check_model(root)
        self._checked: set[bool] = set()  # with images, without

    def score(
        self,
        problems: Sequence[Mapping[str, Any]],
        candidates: Sequence[Sequence[Sequence[str]]],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[list[float]]]:
        """
        Scores every step of every candidate; see [`Scorer.score`].

        Args:
            problems (`Sequence[Mapping[str, Any]]`):
                Problem rows, with `id`, `question` and `images`.
            candidates (`Sequence[Sequence[Sequence[str]]]`):
                For each problem the steps of each candidate.
            progress (`Callable[[int, int], None]`, *optional*):
                Called with the number of distinct solutions scored so far and in all.

        Raises:
            [`ScoreServerError`]: If the server gives no scores, or none that can be meant for these steps.
        """
        distinct = distinct_solutions(problems, candidates)
        scores: list[dict[Steps, list[float]]] = [{} for _ in problems]
        total = sum(map(len, distinct))
        pending: dict[Future[Any], tuple[int, Steps]] = {}

        def collect() -> None:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                index, steps = pending.pop(future)
                scores[index][steps] = self._read_scores(problems[index], steps, future.result())
                if progress is not None:
                    progress(sum(map(len, scores)), total)

        threads = ThreadPoolExecutor(self.max_concurrency, thread_name_prefix="served-scorer")
        try:
            for index, steps, body in self._bodies(problems, distinct):
                pending[threads.submit(self._post, "/pooling", body | {"task": "token_classify"})] = index, steps
                if len(pending) > self.max_concurrency:  # one waits, and few images are held
                    collect()
            while pending:
                collect()
        finally:
            # After an error, what is still under way is of no use to anybody.
            threads.shutdown(wait=False, cancel_futures=True)
        return scores_of_candidates(scores, candidates)

    def _bodies(
        self, problems: Sequence[Mapping[str, Any]], distinct: Sequence[Sequence[Steps]]
    ) -> Iterator[tuple[int, Steps, dict[str, Any]]]:
        for index, (problem, solutions) in enumerate(zip(problems, distinct, strict=True)):
            urls = [image_data_url(image) for image in rgb_images(problem)] if solutions else []
            for steps in solutions:
                if urls:
                    body = self._body_with_images(problem, steps, urls)
                else:
                    body = {"input": self.processor([problem], [steps])["input_ids"][0].tolist()}
                if bool(urls) not in self._checked:
                    self._check_tokens(problem, steps, body)
                    self._checked.add(bool(urls))
                yield index, steps, {"model": self._served_name, **body}

    def _body_with_images(self, problem: Mapping[str, Any], steps: Steps, urls: Sequence[str]) -> dict[str, Any]:
        """
        A chat that the server renders to the exact text of the row.

        Servers take images in chats only, and chat templates write a finished assistant turn in another way than a
        generation prompt with steps behind it. So everything behind the question (end of the user turn, generation
        prompt, steps) is sent as the end of the user's own last text, with the turn left open. Questions and steps
        spell no special token, which is the processor's work; this text does, on purpose.
        """
        content = [
            {"type": "image"} if part is None else {"type": "text", "text": part}
            for part in self.processor.parts(problem)
        ]
        last = next((part for part in reversed(content) if part["type"] == "text"), None)
        if last is None:
            content.append(last := {"type": "text", "text": ""})
        last["text"] = last["text"].rstrip()
        beginning = self.processor.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, continue_final_message=True
        )
        text = self.processor.text(problem, steps)
        if not text.startswith(beginning):
            raise ValueError(
                f"problem {problem['id']!r}: the model's chat template writes an open user turn in another way than a "
                "finished one, so that no server can be sent its text with images; score with Scorer or VLLMScorer"
            )
        last["text"] += text[len(beginning) :]
        images = iter(urls)
        content = [
            {"type": "image_url", "image_url": {"url": next(images)}} if part["type"] == "image" else part
            for part in content
        ]
        return {
            "messages": [{"role": "user", "content": content}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        }

    def _check_tokens(self, problem: Mapping[str, Any], steps: Steps, body: Mapping[str, Any]) -> None:
        if "input" in body:
            body = {"prompt": self.processor.text(problem, steps), "add_special_tokens": False}
        answer = self._post("/tokenize", {"model": self._served_name, **body})
        expected = self.processor([problem], [steps])["input_ids"][0].tolist()
        try:
            check_token_ids(problem, expected, answer["tokens"], self.base_url)
        except ValueError as error:
            raise ScoreServerError(str(error)) from None
        except (LookupError, TypeError):
            raise self._foreign(f"answered /tokenize with {answer!s:.200}") from None

    def _read_scores(self, problem: Mapping[str, Any], steps: Steps, answer: Any) -> list[float]:
        try:
            (entry,) = answer["data"]
            rows = entry["data"]
        except (LookupError, TypeError, ValueError):
            raise self._foreign(f"answered /pooling with {answer!s:.200}") from None
        try:
            return right_probabilities(problem, steps, rows, self.base_url)
        except ValueError as error:
            raise ScoreServerError(str(error)) from None

    def _find_model(self) -> tuple[str, str]:
        """Name under which the server has the model, and where it has it from."""
        answer = self._request("GET", "/v1/models")
        try:
            entry = answer["data"][0]
            return entry["id"], entry.get("root") or entry["id"]
        except (LookupError, TypeError, AttributeError):
            raise self._foreign(f"answered /v1/models with {answer!s:.200}") from None

    def _check_model(self, root: str) -> None:
        """Models of one family have the same tokens: only the name tells whose scores they are."""
        same = _is_same_model(self.model, self._served_name, root)
        if same is False:
            raise ScoreServerError(
                f"{self.base_url} serves {root!r} (as {self._served_name!r}), not {self.model!r}; set `model` to what it "
                "serves, or start a server for the one that is meant"
            )
        if same is None:
            logger.warning(
                f"{self.base_url} serves {root!r} (as {self._served_name!r}), and whether that is {self.model!r} cannot be "
                "known here; the scores count as those of the latter"
            )

    def _load_processor(self, path: str) -> Any:
        from mm_prm.embedded import model_path
        from mm_prm.models import ProcessRewardProcessor

        try:
            return ProcessRewardProcessor.from_pretrained(model_path(path))
        except (OSError, ValueError) as error:
            raise ScoreServerError(
                f"{self.base_url} serves {path!r}, of which no processor of a process reward model can be loaded here "
                f"({' '.join(str(error).split()):.300}); set `model` to the folder or Hub repository of the same model"
            ) from error

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._request("POST", path, body)

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        timeout = (min(_CONNECT_SECONDS, self.timeout_seconds), self.timeout_seconds)
        try:
            response = self._session.request(method, self.base_url + path, json=body, timeout=timeout)
        except requests.RequestException as error:
            raise ScoreServerError(
                f"{self.base_url}: no answer to {path} ({error}); {_ADVICE}, or set base_url"
            ) from None
        if response.status_code in (401, 403):
            raise ScoreServerError(
                f"{self.base_url} refuses the API key (status {response.status_code}); set VLLM_API_KEY"
            )
        if response.status_code in (404, 405, 501):
            raise self._foreign(f"has no {path} (status {response.status_code}: {_quote(response)})")
        if response.status_code != 200:
            raise ScoreServerError(f"{self.base_url}{path}: status {response.status_code}: {_quote(response)}")
        try:
            return response.json()
        except requests.JSONDecodeError:
            kind = response.headers.get("Content-Type", "no type")
            raise self._foreign(
                f"answered {path} with something that is no JSON ({kind}: {_quote(response)})"
            ) from None

    def _foreign(self, finding: str) -> ScoreServerError:
        return ScoreServerError(f"{self.base_url} {finding}: it is no server of a process reward model; {_ADVICE}")


def _is_same_model(model: str, served_name: str, root: str) -> bool | None:
    """Whether a server has this model; `None` if that cannot be known here, such as of a folder on another machine."""
    from mm_prm.embedded import EMBEDDED_MODELS, model_path

    # Servers have the embedded models from their own installation.
    if model == root or (model == served_name and model in EMBEDDED_MODELS):
        return True
    given, served = Path(model_path(model)), Path(root)
    if given.is_dir() and served.is_dir():
        return given.resolve() == served.resolve()
    if given.is_dir() or served.is_dir() or not (_HUB_REPOSITORY.fullmatch(model) and _HUB_REPOSITORY.fullmatch(root)):
        return True if model == served_name else None
    return model.lower() == root.lower()


def _session(max_concurrency: int, max_retries: int, api_key: str | None) -> requests.Session:
    retries = Retry(
        total=max_retries,
        status_forcelist=_RETRIED_STATUSES,
        allowed_methods=None,  # scoring twice does no harm
        backoff_factor=0.5,
        backoff_max=_LONGEST_WAIT_SECONDS,
        backoff_jitter=0.5,
        raise_on_status=False,
    )
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=max_concurrency, max_retries=retries))
    if api_key is not None:
        session.headers["Authorization"] = f"Bearer {api_key}"
    return session


def _quote(response: requests.Response) -> str:
    text = " ".join(response.text.split())
    return text if len(text) <= 300 else text[:300] + " …"
