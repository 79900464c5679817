"""
Trees in flight: each has its next requests at the policy, or the answers to them at the judge, at every moment.

Everything that happens to a tree happens in the thread that waits for the schedule; policy and judge work in threads of
their own and send what they have into one queue of events. So a tree needs no lock, and which thread was faster changes
no tree.
"""

import logging
import queue
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from mm_prm.annotation.batching import PolicyThread, check_generation
from mm_prm.annotation.flat import FlatRollouts
from mm_prm.annotation.judging import JudgeThreads
from mm_prm.annotation.omegaprm import OmegaPRM
from mm_prm.annotation.protocols import Generation, Problem, RolloutRequest, SubmittingPolicy, Verdict
from mm_prm.annotation.tree import Cost, Steps

logger = logging.getLogger(__name__)

# Trees that wait for the judge leave the policy to others, up to so many times as many as it works on.
_TREES_PER_TREE_AT_POLICY = 4


@dataclass(eq=False)
class GrowingTree:
    """
    A tree in flight.

    Args:
        index (`int`):
            Position of its problem.
        problem (`Mapping`):
            The problem, its images decoded.
        key (`str`):
            Its key in the journal.
        search ([`OmegaPRM`] or [`FlatRollouts`]):
            What asks for its rollouts.
        cost ([`Cost`]):
            What it has cost so far.
        failure (`str`):
            Why it grows no further; empty as long as nothing has failed.
    """

    index: int
    problem: Problem
    key: str
    search: OmegaPRM | FlatRollouts
    cost: Cost = field(default_factory=Cost)
    failure: str = ""
    _began: float = 0.0
    _asked: "set[Future[Generation]]" = field(default_factory=set)


@dataclass(frozen=True)
class _Answered:
    """The policy has answered a request, or cannot."""

    tree: GrowingTree
    request: RolloutRequest
    answer: "Future[Generation]"
    is_second: bool


@dataclass(eq=False)
class _Judging:
    """An answer whose solutions are judged; equal ones once."""

    tree: GrowingTree
    request: RolloutRequest
    generation: Generation
    verdicts: dict[Steps, Verdict | None]
    num_missing: int


@dataclass(frozen=True)
class _Judged:
    """The judge has a verdict on a solution, or cannot tell why not."""

    judging: _Judging
    steps: Steps
    verdict: Verdict | BaseException
    num_calls: int


class Schedule:
    """
    Keeps policy and judge busy with the requests of many trees.

    Args:
        policy ([`SubmittingPolicy`] or [`PolicyThread`]):
            Takes requests at any time.
        judge ([`JudgeThreads`]):
            Takes solutions at any time.
        trees_in_flight (`int`):
            Trees that the policy works on at the same time.
        total ([`Cost`]):
            Counts what all trees cost, except seconds.
    """

    def __init__(
        self, policy: SubmittingPolicy | PolicyThread, judge: JudgeThreads, trees_in_flight: int, total: Cost
    ):
        self.total = total
        self.rollouts_at_policy = 0
        self.solutions_at_judge = 0
        self._policy, self._judge, self._trees_in_flight = policy, judge, trees_in_flight
        self._events: queue.SimpleQueue[_Answered | _Judged] = queue.SimpleQueue()
        self._growing: set[GrowingTree] = set()
        self._trees_at_policy = 0
        self._rollouts_at_judge = 0
        # A clock that runs the slower the more trees share it, so that the trees' times add up to the time.
        self._shared_time, self._looked = 0.0, time.perf_counter()

    @property
    def num_growing(self) -> int:
        """Trees in flight."""
        return len(self._growing)

    @property
    def has_room(self) -> bool:
        """Whether another tree can begin."""
        return (
            self._trees_at_policy < self._trees_in_flight
            and len(self._growing) < _TREES_PER_TREE_AT_POLICY * self._trees_in_flight
        )

    @property
    def has_news(self) -> bool:
        """Whether [`Schedule.wait`] returns at once."""
        return not self._events.empty()

    def add(self, tree: GrowingTree) -> None:
        """Begin a tree."""
        self._look_at_clock()
        tree._began = self._shared_time
        self._growing.add(tree)
        self._ask(tree)

    def wait(self) -> GrowingTree | None:
        """Wait for the next answer or verdict; returns the tree that ends with it, if one does."""
        event = self._events.get()
        tree = event.tree if isinstance(event, _Answered) else event.judging.tree
        if isinstance(event, _Answered):
            self._answered(event)
        else:
            self._judged(event)
        if tree not in self._growing or not (tree.failure or tree.search.done):
            return None
        self._look_at_clock()
        self._growing.remove(tree)
        self._trees_at_policy -= bool(tree._asked)
        for answer in tree._asked:  # those of a tree that has failed
            answer.cancel()
        tree.cost.seconds = self._shared_time - tree._began
        return tree

    def close(self) -> None:
        """Take back what has not been answered."""
        for tree in self._growing:
            for answer in tree._asked:
                answer.cancel()
        self._judge.drop()

    def _look_at_clock(self) -> None:
        now = time.perf_counter()
        if self._growing:
            self._shared_time += (now - self._looked) / len(self._growing)
        self._looked = now

    def _ask(self, tree: GrowingTree) -> None:
        for request in tree.search.requests():
            self._submit(tree, request)

    def _submit(self, tree: GrowingTree, request: RolloutRequest, is_second: bool = False) -> None:
        answer: Future[Generation]
        try:
            answer = self._policy.submit(tree.problem, request)
        except Exception as error:  # a prompt that cannot be built, or an engine that has stopped
            answer = Future()
            answer.set_exception(error)
        self._trees_at_policy += not tree._asked
        tree._asked.add(answer)
        self.rollouts_at_policy += request.num_rollouts
        answer.add_done_callback(lambda answer: self._events.put(_Answered(tree, request, answer, is_second)))

    def _answered(self, event: _Answered) -> None:
        tree, request, answer = event.tree, event.request, event.answer
        self.rollouts_at_policy -= request.num_rollouts
        if tree not in self._growing:
            return
        tree._asked.remove(answer)
        self._trees_at_policy -= not tree._asked
        try:
            generation = answer.result()
            check_generation(request, generation)
        except Exception as error:
            if event.is_second or isinstance(self._policy, PolicyThread):  # which has tried again by itself
                logger.warning("Problem %r failed: %s", request.problem_id, error)
                tree.failure = f"policy: {type(error).__name__}: {error}"
            else:
                logger.warning("The policy failed on problem %r and is asked again: %s", request.problem_id, error)
                self._submit(tree, request, is_second=True)
        else:
            self._have_judged(tree, request, generation)

    def _have_judged(self, tree: GrowingTree, request: RolloutRequest, generation: Generation) -> None:
        rollouts = generation.rollouts
        for cost in (tree.cost, self.total):
            cost.rollouts += len(rollouts)
            cost.prompt_tokens += generation.prompt_tokens
            cost.generated_tokens += sum(rollout.num_tokens for rollout in rollouts)
        verdicts: dict[Steps, Verdict | None] = {
            rollout.steps: None for rollout in rollouts if rollout.status == "finished"
        }
        judging = _Judging(tree, request, generation, verdicts, len(verdicts))
        self.solutions_at_judge += len(verdicts)
        self._expect(len(rollouts))
        for steps in verdicts:
            self._judge.submit(tree.problem, [*request.prefix, *steps], partial(self._note, judging, steps))
        if not verdicts:
            self._receive(judging)

    def _note(self, judging: _Judging, steps: Steps, verdict: Verdict | BaseException, num_calls: int) -> None:
        """Called in a thread of the judge."""
        self._events.put(_Judged(judging, steps, verdict, num_calls))

    def _judged(self, event: _Judged) -> None:
        judging, verdict = event.judging, event.verdict
        tree = judging.tree
        self.solutions_at_judge -= 1
        judging.num_missing -= 1
        for cost in (tree.cost, self.total):
            cost.judge_calls += event.num_calls
            cost.judge_cache_hits += isinstance(verdict, Verdict) and verdict.from_cache
        if isinstance(verdict, Verdict):
            judging.verdicts[event.steps] = verdict
        elif isinstance(verdict, Exception):
            tree.failure = tree.failure or f"judge: {type(verdict).__name__}: {verdict}"
        else:
            raise verdict
        if not judging.num_missing:
            self._receive(judging)

    def _receive(self, judging: _Judging) -> None:
        """Give a tree an answer with its verdicts, and ask what it wants next."""
        tree, rollouts = judging.tree, judging.generation.rollouts
        if tree in self._growing and not tree.failure:
            verdicts = [
                verdict.verdict
                if rollout.status == "finished" and (verdict := judging.verdicts[rollout.steps]) is not None
                else "unknown"
                for rollout in rollouts
            ]
            try:
                tree.search.receive(judging.request, rollouts, verdicts)
            except Exception as error:
                tree.failure = f"{type(error).__name__}: {error}"
            else:
                self._ask(tree)
        self._expect(-len(rollouts))

    def _expect(self, num_rollouts: int) -> None:
        self._rollouts_at_judge += num_rollouts
        if isinstance(self._policy, PolicyThread):
            self._policy.expect(self._rollouts_at_judge)


def num_labels(nodes: Sequence[dict]) -> int:
    """Step labels of a tree: the root says how hard the problem is, every other measured node labels a step."""
    return sum(node["num_judged"] > 0 for node in nodes[1:])
