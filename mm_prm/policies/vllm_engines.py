"""Engines of vLLM in this process, each with a thread and a copy of the model of its own."""

import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import patch_environment

from mm_prm.engine_guard import EngineGuard, open_guarded

logger = logging.getLogger(__name__)

# Problems whose engine is remembered, several times as many as trees are in flight
_PROBLEMS_REMEMBERED = 4096
_STOPPED = "the engine of vLLM has stopped; its own messages say why"


class Engines:
    """
    Opens engines and sends each problem's requests to one of them, which then has its images and steps in its cache.

    Args:
        number (`int`):
            Number of engines.
        arguments (`dict[str, Any]`):
            Arguments of vLLM's `EngineArgs` for each of them.

    Raises:
        `ValueError`: If there is no CPU core for each, where vLLM computes on the CPU.
    """

    def __init__(self, number: int, arguments: dict[str, Any]):
        self._engines: list[_Engine] = []
        self._of_problem: dict[str, _Engine] = {}
        self._lock = threading.Lock()
        try:
            for variables, settings in _places(number, arguments):
                with patch_environment(**variables):  # which the engine's processes take over
                    self._engines.append(_open(settings))
        except BaseException:
            self.stop()
            raise

    def submit(
        self, problem_id: str, prompt: dict[str, Any], params: Any, read: Callable[[Any], Any]
    ) -> "Future[Any]":
        """
        Sends a request and does not wait.

        Args:
            problem_id (`str`):
                Problem that it belongs to.
            prompt (`dict[str, Any]`):
                vLLM's prompt.
            params (`vllm.SamplingParams`):
                How it samples.
            read (`Callable`):
                Makes the result of vLLM's `RequestOutput`; called in the engine's thread.

        Raises:
            `RuntimeError`: If no engine runs any more.
        """
        return self._engine(problem_id).submit(prompt, params, read)

    def stop(self) -> None:
        """Stops the engines; what they have not answered fails."""
        for engine in self._engines:
            engine.tell_to_stop()
        # Whoever interrupts a run does not wait for engines that take their time: what is left of them is killed.
        deadline = time.monotonic() + 3.0
        for engine in self._engines:
            engine.wait(deadline)

    def _engine(self, problem_id: str) -> "_Engine":
        with self._lock:
            engine = self._of_problem.get(problem_id)
            if engine is None or engine.has_stopped:
                running = [engine for engine in self._engines if not engine.has_stopped]
                if not running:
                    raise RuntimeError(_STOPPED)
                engine = min(running, key=lambda engine: engine.num_requests)
                self._of_problem[problem_id] = engine
                if len(self._of_problem) > _PROBLEMS_REMEMBERED:
                    del self._of_problem[next(iter(self._of_problem))]
            return engine


def _places(number: int, arguments: dict[str, Any]) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Environment and arguments of each engine: which cores, or which GPUs and how much of their memory."""
    from vllm import EngineArgs
    from vllm.platforms import current_platform

    if number == 1:
        yield {}, arguments
        return
    if current_platform.is_cpu():
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        if number > len(cores):
            raise ValueError(f"num_engines: {number!r} has to be at most {len(cores)}, the number of CPU cores")
        for index in range(number):
            yield {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores[index::number]))}, arguments
        return
    variable = current_platform.device_control_env_var
    visible = os.environ.get(variable)
    devices = visible.split(",") if visible else [str(device) for device in range(current_platform.device_count())]
    size = arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)
    groups = [devices[start : start + size] for start in range(0, len(devices) - size + 1, size)] or [devices]
    share = arguments.get("gpu_memory_utilization", EngineArgs.gpu_memory_utilization)
    for index in range(number):
        group = groups[index % len(groups)]
        num_sharing = len(range(index % len(groups), number, len(groups)))
        yield {variable: ",".join(group)}, arguments | {"gpu_memory_utilization": share / num_sharing}


def _open(settings: dict[str, Any]) -> "_Engine":
    from vllm import EngineArgs, LLMEngine
    from vllm.usage.usage_lib import UsageContext

    # As vLLM's own `LLM` class: without it, an engine takes 128 sequences at once, an eighth of what a large GPU does.
    engine, guard = open_guarded(
        lambda: LLMEngine.from_engine_args(EngineArgs(**settings), usage_context=UsageContext.LLM_CLASS)
    )
    return _Engine(engine, guard)


@dataclass
class _Order:
    """A request on its way into the engine; without a prompt, one that is to be taken out of it."""

    name: str
    prompt: dict[str, Any] | None = None
    params: Any = None
    read: Any = None
    future: "Future[Any]" = field(default_factory=Future)


class _Engine:
    """The thread to which the engine belongs: it takes in what is asked, steps, and hands out what is finished."""

    def __init__(self, engine: Any, guard: EngineGuard):
        self._guard = guard
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._unanswered: dict[str, _Order] = {}  # whoever takes an order out of it answers it
        self._names = map(str, itertools.count())
        self._dead = threading.Event()
        # The threads hold no reference to this object, so that they end with its policy.
        state = (engine, self._orders, self._unanswered, self._dead)
        self._thread = threading.Thread(target=_run, args=state, name="vllm-policy", daemon=True)
        self._thread.start()
        threading.Thread(target=_watch, args=state, name="vllm-watch", daemon=True).start()

    @property
    def has_stopped(self) -> bool:
        return self._dead.is_set()

    @property
    def num_requests(self) -> int:
        return len(self._unanswered)

    def submit(self, prompt: dict[str, Any], params: Any, read: Any) -> "Future[Any]":
        order = _Order(next(self._names), prompt, params, read)
        orders, unanswered = self._orders, self._unanswered

        def ended(future: "Future[Any]") -> None:
            if future.cancelled():
                unanswered.pop(order.name, None)
                orders.put(_Order(order.name))

        unanswered[order.name] = order
        order.future.add_done_callback(ended)
        orders.put(order)
        if self.has_stopped:  # perhaps since its last orders were answered
            _fail_all(unanswered, _STOPPED)
        return order.future

    def tell_to_stop(self) -> None:
        self._orders.put(None)

    def wait(self, deadline: float) -> None:
        self._thread.join(timeout=max(0.0, deadline - time.monotonic()))
        self._guard.stop()
        self._thread.join(timeout=1.0)


def _run(
    engine: Any, orders: "queue.SimpleQueue[_Order | None]", unanswered: dict[str, _Order], dead: threading.Event
) -> None:
    in_engine: set[str] = set()
    reason = _STOPPED
    try:
        while True:
            while not orders.empty() or not in_engine:
                order = orders.get()
                if order is None:
                    return
                _take_in(engine, order, unanswered, in_engine)
            for output in engine.step():
                if output.finished and output.request_id in in_engine:
                    in_engine.remove(output.request_id)
                    _hand_out(unanswered, output)
    except Exception as error:  # the engine is gone, and with it whatever it was computing
        logger.exception("vLLM failed")
        reason = f"vLLM failed: {type(error).__name__}: {error}"
    finally:
        dead.set()
        _fail_all(unanswered, reason)
        engine.engine_core.shutdown()


def _watch(
    engine: Any, orders: "queue.SimpleQueue[_Order | None]", unanswered: dict[str, _Order], dead: threading.Event
) -> None:
    """vLLM waits for ever for an engine whose process was killed, for want of memory for example: nobody else is to."""
    resources = getattr(engine.engine_core, "resources", None)  # an engine in this process has none
    while resources is not None and not dead.wait(1.0):
        if resources.engine_dead:
            dead.set()
            _fail_all(unanswered, "vLLM failed: the process of its engine has ended")
            orders.put(None)
            engine.engine_core.outputs_queue.put(RuntimeError("the process of the engine has ended"))


def _take_in(engine: Any, order: _Order, unanswered: dict[str, _Order], in_engine: set[str]) -> None:
    if order.prompt is None:
        if order.name in in_engine:
            in_engine.remove(order.name)
            engine.abort_request([order.name])
        return
    if order.name not in unanswered:  # cancelled
        return
    try:
        engine.add_request(order.name, order.prompt, order.params)
    except Exception as error:  # for example a prompt that is too long: the fault of this request alone
        _fail(unanswered, order.name, error)
    else:
        in_engine.add(order.name)


def _hand_out(unanswered: dict[str, _Order], output: Any) -> None:
    order = unanswered.get(output.request_id)
    if order is None:
        return
    try:
        generation = order.read(output)
    except Exception as error:
        _fail(unanswered, order.name, error)
    else:
        if unanswered.pop(order.name, None) is not None and order.future.set_running_or_notify_cancel():
            order.future.set_result(generation)


def _fail(unanswered: dict[str, _Order], name: str, error: Exception) -> None:
    order = unanswered.pop(name, None)
    if order is not None and order.future.set_running_or_notify_cancel():
        order.future.set_exception(error)


def _fail_all(unanswered: dict[str, _Order], reason: str) -> None:
    for name in list(unanswered):
        _fail(unanswered, name, RuntimeError(reason))
