"""A policy on vLLM in this process: the engine batches the requests of all trees and computes shared prefixes once."""

import itertools
import logging
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mm_prm.annotation.protocols import Generation, Problem, Rollout, RolloutRequest, RolloutStatus
from mm_prm.engine_guard import EngineGuard, open_guarded

from .prompts import PromptBuilder
from .settings import check_sampling
from .steps import STEP_ENDS, StepFormat, first_step, parse_steps

logger = logging.getLogger(__name__)


class VLLMPolicy:
    """
    Writes solutions with a vLLM engine, see [`~mm_prm.annotation.protocols.Policy`].

    Needs vLLM, which is imported when the policy is opened. A rollout depends on its request's seed and its number
    within the request; on a GPU, whose kernels round differently in batches of different size, only with vLLM's batch
    invariance (`VLLM_BATCH_INVARIANT=1`).

    Args:
        path (`str`):
            Folder or Hub repository of the model and its processor.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Most tokens of a rollout. A rollout that reaches it has the status `"length"`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature; 0 takes the most probable token.
        top_k (`int`, *optional*, defaults to `50`):
            Number of most probable tokens to sample from; 0 takes all.
        top_p (`float`, *optional*, defaults to `0.9`):
            Samples from the smallest set of most probable tokens whose probability reaches this; 1 takes all.
        step_format (`str`, *optional*, defaults to `"paragraphs"`):
            How the model writes its steps, see [`~mm_prm.policies.steps.parse_steps`].
        dtype (`str`, *optional*):
            Type of the weights; that of the checkpoint if not given. On a CPU `float32` can be several times faster than
            `bfloat16`.
        engine_settings:
            Further arguments of vLLM's `EngineArgs`, for example `max_model_len`, `gpu_memory_utilization`,
            `tensor_parallel_size`, `enforce_eager`.
    """

    def __init__(
        self,
        path: str,
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 0.9,
        step_format: StepFormat = "paragraphs",
        dtype: str | None = None,
        **engine_settings: Any,
    ):
        check_sampling(max_new_tokens, temperature, top_k, top_p, step_format)
        try:
            from vllm import EngineArgs, LLMEngine, SamplingParams
            from vllm.platforms import current_platform
            from vllm.sampling_params import RequestOutputKind
            from vllm.usage.usage_lib import UsageContext
        except ImportError as error:
            raise ValueError(
                f"vLLM cannot be imported ({error}): install it (`pip install vllm`), or use a server or transformers"
            ) from error
        from transformers import AutoProcessor

        self.path = path
        self.prompts = PromptBuilder(AutoProcessor.from_pretrained(path), step_format)
        self._greedy = temperature == 0
        self._sampling = lambda num_rollouts, seed, stop=(): SamplingParams(
            n=num_rollouts,
            seed=seed,
            stop=list(stop),
            max_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        arguments: Any = {"model": path, "dtype": dtype or "auto", "disable_log_stats": True}
        if current_platform.is_cpu():
            # A prompt that is split between two batches takes the noise of its seed back, which a generator on the CPU
            # cannot: vLLM would end there with "CPU Generator does not use offset".
            arguments["enable_chunked_prefill"] = False
        arguments |= engine_settings
        # As vLLM's own `LLM` class: without it, an engine takes 128 sequences at once, an eighth of what a large GPU does.
        engine, guard = open_guarded(
            lambda: LLMEngine.from_engine_args(EngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)
        )
        self._engine = _Engine(engine, guard)
        self.close = weakref.finalize(self, self._engine.stop)

    def submit(self, problem: Problem, request: RolloutRequest) -> "Future[Generation]":
        """
        Sends a request into the engine's queue and does not wait.

        Args:
            problem (`Mapping`):
                Problem row, its images decoded.
            request ([`~mm_prm.annotation.protocols.RolloutRequest`]):
                What is asked.

        Returns:
            `Future[Generation]`: Cancelling it takes the request out of the engine.
        """
        tokens, images = self.prompts.build_tokens(problem, request.prefix, request.one_step)
        # Greedy samples are all the same, and vLLM refuses to compute several.
        stop = STEP_ENDS[self.prompts.step_format] if request.one_step else ()
        params = self._sampling(1 if self._greedy else request.num_rollouts, request.seed, stop)
        return self._send(tokens, images, params, lambda output: self._read(output, request))

    def generate(self, requests: Sequence[tuple[Problem, RolloutRequest]]) -> list[Generation]:
        """Answers requests; see [`~mm_prm.annotation.protocols.Policy`]."""
        futures = [self.submit(problem, request) for problem, request in requests]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:  # after an error, or Ctrl-C
                future.cancel()

    def _send(
        self, tokens: list[int], images: list[Image.Image], params: Any, read: Callable[[Any], Generation]
    ) -> "Future[Generation]":
        prompt: dict[str, Any] = {"prompt_token_ids": tokens}
        if images:
            prompt["multi_modal_data"] = {"image": images}
        return self._engine.submit(prompt, params, read)

    def _read(self, output: Any, request: RolloutRequest) -> Generation:
        continues = bool(request.prefix) and self.prompts.prefix_in_turn
        rollouts = []
        for completion in sorted(output.outputs, key=lambda completion: completion.index):
            if completion.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"vLLM ended a rollout with {completion.finish_reason!r}")
            ended: RolloutStatus = "finished" if completion.finish_reason == "stop" else "length"
            if request.one_step:
                # `stop_reason` is the text at which it stopped, or, at the end of the solution, no text.
                ended = "stopped" if isinstance(completion.stop_reason, str) else ended
                steps, status = first_step(completion.text, self.prompts.step_format, ended)
            else:
                steps = parse_steps(completion.text, self.prompts.step_format, continues)
                status = ended if steps else "unparsable"
            rollouts.append(Rollout(steps, status, len(completion.token_ids)))
        if self._greedy:
            rollouts *= request.num_rollouts
        return Generation(rollouts, len(output.prompt_token_ids))


@dataclass
class _Order:
    """A request on its way into the engine; without a prompt, one that is to be taken out of it."""

    name: str
    prompt: dict[str, Any] | None = None
    params: Any = None
    read: Any = None
    future: "Future[Generation] | None" = None


class _Engine:
    """The thread to which the engine belongs: it takes in what is asked, steps, and hands out what is finished."""

    def __init__(self, engine: Any, guard: EngineGuard):
        self._guard = guard
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._names = map(str, itertools.count())
        self._dead = threading.Event()
        # The thread holds no reference to this object, so that it ends with its policy.
        self._thread = threading.Thread(
            target=_run, args=(engine, self._orders, self._dead), name="vllm-policy", daemon=True
        )
        self._thread.start()

    def submit(self, prompt: dict[str, Any], params: Any, read: Any) -> "Future[Generation]":
        if self._dead.is_set():
            raise RuntimeError("the engine of vLLM has stopped; its own messages say why")
        future: Future[Generation] = Future()
        name = next(self._names)
        orders = self._orders

        def cancelled(future: "Future[Generation]") -> None:
            if future.cancelled():
                orders.put(_Order(name))

        future.add_done_callback(cancelled)
        orders.put(_Order(name, prompt, params, read, future))
        return future

    def stop(self) -> None:
        self._orders.put(None)
        # Whoever interrupts a run does not wait for an engine that takes its time: what is left of it is killed.
        self._thread.join(timeout=3.0)
        self._guard.stop()
        self._thread.join(timeout=1.0)


def _run(engine: Any, orders: "queue.SimpleQueue[_Order | None]", dead: threading.Event) -> None:
    waiting: dict[str, _Order] = {}
    try:
        while True:
            while not orders.empty() or not waiting:
                order = orders.get()
                if order is None:
                    return
                _take_in(engine, order, waiting)
            for output in engine.step():
                if output.finished and (finished := waiting.pop(output.request_id, None)) is not None:
                    _hand_out(finished, output)
    except Exception as error:  # the engine is gone, and with it whatever it was computing
        logger.exception("vLLM failed")
        for order in waiting.values():
            _fail(order, RuntimeError(f"vLLM failed: {type(error).__name__}: {error}"))
    finally:
        dead.set()
        stopped = RuntimeError("the engine of vLLM has stopped")
        while not orders.empty():
            if (left := orders.get()) is not None:
                _fail(left, stopped)
        engine.engine_core.shutdown()


def _take_in(engine: Any, order: _Order, waiting: dict[str, _Order]) -> None:
    if order.future is None:
        if waiting.pop(order.name, None) is not None:
            engine.abort_request([order.name])
        return
    if order.future.cancelled():
        return
    try:
        engine.add_request(order.name, order.prompt, order.params)
    except Exception as error:  # for example a prompt that is too long: the fault of this request alone
        _fail(order, error)
    else:
        waiting[order.name] = order


def _hand_out(order: _Order, output: Any) -> None:
    assert order.future is not None
    try:
        generation = order.read(output)
    except Exception as error:
        _fail(order, error)
    else:
        if order.future.set_running_or_notify_cancel():
            order.future.set_result(generation)


def _fail(order: _Order, error: Exception) -> None:
    if order.future is not None and order.future.set_running_or_notify_cancel():
        order.future.set_exception(error)
