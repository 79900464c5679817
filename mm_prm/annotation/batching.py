"""
A policy that answers batches, as one that takes single requests at any time: a thread of its own keeps it busy.

While it computes one batch, the verdicts on another come in and requests gather for the next, so that it never waits
for the judge while any tree has work for it.
"""

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from mm_prm.annotation.protocols import Generation, Policy, Problem, RolloutRequest

logger = logging.getLogger(__name__)

# A call takes half of the rollouts that are on their way, at least so many: while it runs, the other half is judged.
_SMALLEST_HALF = 256
# For requests that verdicts will bring in a moment a call is put off, by at most this share of what the last one took.
_SHARE_PUT_OFF = 0.05


@dataclass
class _Order:
    """A request that waits for its answer."""

    problem: Problem
    request: RolloutRequest
    answer: "Future[Generation]" = field(default_factory=Future)


class PolicyThread:
    """
    Gives a policy `submit`.

    Where the policy raises for a batch, its halves are tried apart, and so on down to the request at fault, which is
    tried once more alone.

    Args:
        policy ([`Policy`]):
            The policy; one thread calls it.
    """

    def __init__(self, policy: Policy):
        self._line = _Line()
        # The thread holds no reference to this object, so that it ends with it.
        threading.Thread(target=_work, args=(policy, self._line), name="policy", daemon=True).start()
        weakref.finalize(self, self._line.stop)

    def submit(self, problem: Problem, request: RolloutRequest) -> "Future[Generation]":
        """Queue a request. Cancelling the future takes it out of the queue."""
        order = _Order(problem, request)
        with self._line.changed:
            self._line.orders.append(order)
            self._line.num_rollouts += request.num_rollouts
            self._line.changed.notify()
        return order.answer

    def expect(self, num_rollouts: int) -> None:
        """Say for how many rollouts verdicts are on their way: further requests will follow from them."""
        with self._line.changed:
            self._line.expected = num_rollouts
            self._line.changed.notify()


class _Line:
    """The requests in line."""

    def __init__(self) -> None:
        self.orders: deque[_Order] = deque()
        self.changed = threading.Condition()
        self.num_rollouts = 0  # of all orders
        self.expected = 0
        self.stopped = False

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify()

    def next_batch(self, longest_wait: float) -> list[_Order]:
        """Wait for requests and take those of the next call; none at the end."""
        with self.changed:
            self.changed.wait_for(lambda: self.orders or self.stopped)
            self.changed.wait_for(self._is_enough, longest_wait)
            if self.stopped:
                return []
            left = self.num_rollouts - self._wanted()
            batch: list[_Order] = []
            while self.orders and self.num_rollouts > left:
                order = self.orders.popleft()
                self.num_rollouts -= order.request.num_rollouts
                if order.answer.set_running_or_notify_cancel():
                    batch.append(order)
            return batch or self.next_batch(longest_wait)

    def _wanted(self) -> int:
        return max(_SMALLEST_HALF, (self.num_rollouts + self.expected) // 2)

    def _is_enough(self) -> bool:
        return self.stopped or not self.expected or self.num_rollouts >= self._wanted()


def _work(policy: Policy, line: _Line) -> None:
    seconds = 0.0
    while batch := line.next_batch(_SHARE_PUT_OFF * seconds):
        began = time.perf_counter()
        for order, answer in _generate(policy, batch):
            if isinstance(answer, Generation):
                order.answer.set_result(answer)
            else:
                order.answer.set_exception(answer)
        seconds = time.perf_counter() - began
        del batch, order, answer  # what waits for the next call keeps nothing of this one


def _generate(policy: Policy, orders: Sequence[_Order]) -> Iterator[tuple[_Order, Generation | BaseException]]:
    """The answer to each request, or why there is none."""
    try:
        answers = _call(policy, orders)
    except Exception as error:
        logger.warning("The policy failed on %d requests: %s", len(orders), error)
        if len(orders) > 1:
            half = len(orders) // 2
            yield from _generate(policy, orders[:half])
            yield from _generate(policy, orders[half:])
            return
        try:
            answers = _call(policy, orders)
        except BaseException as second_error:
            yield orders[0], second_error
            return
    except BaseException as error:  # ends the run, in the thread that waits for the answers
        yield from ((order, error) for order in orders)
        return
    yield from zip(orders, answers, strict=True)


def _call(policy: Policy, orders: Sequence[_Order]) -> list[Generation]:
    answers = policy.generate([(order.problem, order.request) for order in orders])
    if len(answers) != len(orders):
        raise RuntimeError(f"the policy answered {len(orders)} requests with {len(answers)} generations")
    for order, answer in zip(orders, answers, strict=True):
        check_generation(order.request, answer)
    return answers


def check_generation(request: RolloutRequest, generation: Generation) -> None:
    """Raises `RuntimeError` where a policy has not written as many rollouts as it was asked for."""
    if len(generation.rollouts) != request.num_rollouts:
        raise RuntimeError(
            f"problem {request.problem_id!r}: the policy wrote {len(generation.rollouts)} rollouts; "
            f"{request.num_rollouts} were asked for"
        )
