"""
What annotation needs from a policy and from a judge, and nothing more.

Rooms that write solutions (`mm_prm.policies`) or check answers (`mm_prm.judges`) implement [`Policy`] or [`Judge`];
annotation never imports them. Only plain data crosses: a problem is a mapping with the columns of
`mm_prm.data.features.PROBLEM_FEATURES`, a step is bare text.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

RolloutStatus = Literal["finished", "stopped", "length", "unparsable"]
VerdictValue = Literal["right", "wrong", "unknown"]
Problem = Mapping[str, Any]


@dataclass(frozen=True)
class RolloutRequest:
    """
    "Complete this prefix of steps to the final answer, so many times."

    Args:
        problem_id (`str`):
            Problem that the steps belong to.
        prefix (`tuple[str, ...]`):
            Steps that are already there, bare text; empty at the root of a tree.
        num_rollouts (`int`):
            Number of independent completions wanted.
        seed (`int`):
            63-bit seed of the first completion; completion `i` draws from `seed + i`, which is what vLLM does on its
            own. No two completions of a tree have the same seed.
        one_step (`bool`, *optional*, defaults to `False`):
            Whether a completion ends with its first step, as a search that chooses among steps wants it.
    """

    problem_id: str
    prefix: tuple[str, ...]
    num_rollouts: int
    seed: int
    one_step: bool = False


def sample_seed(*identity: Any) -> int:
    """
    A 63-bit seed for a [`RolloutRequest`], with room for 65,536 samples before the next.

    Args:
        identity (`Any`):
            What makes the request another than all others, as JSON can hold it.
    """
    digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 17 << 16


@dataclass(frozen=True)
class Rollout:
    """
    One completion of a prefix.

    Args:
        steps (`tuple[str, ...]`):
            The steps after the prefix, bare stripped text without empty steps. The last one states the answer if
            `status` is `"finished"`.
        status (`str`):
            `"finished"`; `"stopped"` if one step was asked for and the solution goes on after it; `"length"` if the
            token limit cut it; `"unparsable"` if no steps could be read from it.
        num_tokens (`int`):
            Number of generated tokens, counted for the cost of the tree.
        logprob (`float`, *optional*, defaults to `nan`):
            Sum of the log-probabilities of the generated tokens under the policy, at temperature 1 and before any
            filter; not a number where the policy does not say.
    """

    steps: tuple[str, ...]
    status: RolloutStatus
    num_tokens: int
    logprob: float = float("nan")


@dataclass
class Generation:
    """
    A policy's answer to one request.

    Args:
        rollouts (`list[Rollout]`):
            As many as the request asked for, in the order of their seeds.
        prompt_tokens (`int`):
            Number of tokens of the prompt with its prefix, counted once for the request.
    """

    rollouts: list[Rollout]
    prompt_tokens: int


@runtime_checkable
class Policy(Protocol):
    """Writes solutions. Requests of many trees come in one call, so that an engine can batch them."""

    def generate(self, requests: Sequence[tuple[Problem, RolloutRequest]]) -> list[Generation]:
        """Returns one [`Generation`] for each request, in the order of the requests."""
        ...


@runtime_checkable
class SubmittingPolicy(Policy, Protocol):
    """A policy that takes further requests while it works on others, as engines and servers do."""

    def submit(self, problem: Problem, request: RolloutRequest) -> "Future[Generation]":
        """Takes a request and does not wait. Cancelling the future, where it is not running, cancels the request."""
        ...


@dataclass(frozen=True)
class Verdict:
    """
    A judge's opinion of one final answer.

    Args:
        verdict (`str`):
            `"right"`, `"wrong"`, or `"unknown"` if the judge cannot tell. Unknown never becomes wrong.
        extracted (`str`):
            The final answer as it was read from the solution.
        reason (`str`):
            Why, in a few words.
        from_cache (`bool`, *optional*, defaults to `False`):
            Whether it was known from before. Counted for the cost of the tree; two verdicts that differ in this alone
            are equal.
    """

    verdict: VerdictValue
    extracted: str
    reason: str
    from_cache: bool = field(default=False, compare=False)


@runtime_checkable
class Judge(Protocol):
    """
    Decides whether the final answer of a solution equals the gold answer of its problem.

    Several threads ask it at once. Of equal solutions of a problem it may be asked about one.
    """

    def judge(self, problem: Problem, solution: Sequence[str]) -> Verdict:
        """Judges a whole solution, given as all of its steps; the last one states the answer."""
        ...
