"""The stages of an evaluation. What is finished is in a journal, so that a killed run goes on after it."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

import datasets

from mm_prm.annotation.journal import Journal
from mm_prm.annotation.protocols import Policy, Rollout, RolloutRequest, sample_seed
from mm_prm.inference.guided_search import SearchConfig, SearchResult, StepScorer, search

# Problems whose images are in memory at a time, and whose solutions share batches.
_PROBLEMS_AT_ONCE = 32

_PROBLEM_FIELDS = ("id", "question", "choices")

ShowProgress = Callable[[int, int], None]


def sample_candidates(
    problems: datasets.Dataset,
    open_policy: Callable[[], Policy],
    policy_identity: str,
    num_candidates: int,
    seed: int,
    journal: Journal,
    progress: ShowProgress,
) -> list[list[list[str]]]:
    """
    Sample solutions. One that was cut or could not be read is a candidate without steps.

    Args:
        problems (`datasets.Dataset`):
            Problem rows.
        open_policy (`Callable[[], Policy]`):
            Opens the policy; called when the first solution is needed.
        policy_identity (`str`):
            What the policy is, see [`~mm_prm.annotation.identity.describe`].
        num_candidates (`int`):
            Number of solutions of each problem.
        seed (`int`):
            Seed of the run.
        journal ([`Journal`]):
            Keeps what is finished.
        progress (`Callable[[int, int], None]`):
            Called with the number of problems that are done, and how many of them were in the journal.

    Returns:
        `list[list[list[str]]]`: For each problem the steps of each candidate.
    """
    policy = cache(open_policy)

    def compute(rows: list[Mapping[str, Any]], _: range) -> list[Any]:
        requests = [RolloutRequest(row["id"], (), num_candidates, sample_seed(seed, row["id"])) for row in rows]
        generations = policy().generate(list(zip(rows, requests, strict=True)))
        return [[_steps(rollout) for rollout in generation.rollouts] for generation in generations]

    settings = ["candidates", policy_identity, num_candidates, seed]
    return _kept(problems, [settings] * len(problems), compute, journal, progress)


def score_candidates(
    problems: datasets.Dataset,
    candidates: Sequence[Sequence[Sequence[str]]],
    open_scorer: Callable[[], StepScorer],
    scorer_identity: str,
    journal: Journal,
    progress: ShowProgress,
) -> list[list[list[float]]]:
    """
    Score every step of every candidate.

    Args:
        problems (`datasets.Dataset`):
            Problem rows.
        candidates (`Sequence[Sequence[Sequence[str]]]`):
            For each problem the steps of each candidate.
        open_scorer (`Callable[[], StepScorer]`):
            Opens the scorer; called when the first score is needed.
        scorer_identity (`str`):
            What the process reward model is, see [`scorer_identity`].
        journal ([`Journal`]):
            Keeps what is finished.
        progress (`Callable[[int, int], None]`):
            Called with the number of problems that are done, and how many of them were in the journal.

    Returns:
        `list[list[list[float]]]`: For each problem and candidate one score for each step.
    """
    scorer = cache(open_scorer)

    def compute(rows: list[Mapping[str, Any]], chunk: range) -> list[Any]:
        return scorer().score(rows, [candidates[index] for index in chunk])

    settings = [["scores", scorer_identity, solutions] for solutions in candidates]
    return _kept(problems, settings, compute, journal, progress)


def search_candidates(
    problems: datasets.Dataset,
    open_policy: Callable[[], Policy],
    open_scorer: Callable[[], StepScorer],
    identity: str,
    config: SearchConfig,
    journal: Journal,
    progress: ShowProgress,
) -> list[SearchResult]:
    """
    Search solutions with a process reward model.

    Args:
        problems (`datasets.Dataset`):
            Problem rows.
        open_policy (`Callable[[], Policy]`):
            Opens the policy; called when the first step is needed.
        open_scorer (`Callable[[], StepScorer]`):
            Opens the scorer; called when the first step is needed.
        identity (`str`):
            What policy and model are, see [`~mm_prm.annotation.identity.describe`].
        config ([`~mm_prm.inference.SearchConfig`]):
            How each problem is searched.
        journal ([`Journal`]):
            Keeps what is finished.
        progress (`Callable[[int, int], None]`):
            Called with the number of problems that are done, and how many of them were in the journal.

    Returns:
        `list[SearchResult]`: One for each problem.
    """
    policy, scorer = cache(open_policy), cache(open_scorer)

    def compute(rows: list[Mapping[str, Any]], _: range) -> list[Any]:
        guide = scorer()  # before the policy, whose engine may take a minute to start
        return [asdict(result) for result in search(rows, policy(), guide, config)]

    settings = ["search", identity, asdict(config)]
    return [SearchResult(**value) for value in _kept(problems, [settings] * len(problems), compute, journal, progress)]


def _kept(
    problems: datasets.Dataset,
    settings: Sequence[Any],
    compute: Callable[[list[Mapping[str, Any]], range], list[Any]],
    journal: Journal,
    progress: ShowProgress,
) -> list[Any]:
    """Take from the journal what is there, and compute and commit the rest."""
    results: list[Any] = []
    num_found = 0
    for start in range(0, len(problems), _PROBLEMS_AT_ONCE):
        chunk = range(start, min(start + _PROBLEMS_AT_ONCE, len(problems)))
        rows = [problems[index] for index in chunk]
        keys = [_key(row, settings[index]) for row, index in zip(rows, chunk, strict=True)]
        found = [journal.get(key) for key in keys]
        if any(row is None for row in found):
            # All of the chunk again: what shares a batch decides the last digits, and a run that was killed within a
            # chunk shall end like one that was not.
            found = [{"value": value} for value in compute(rows, chunk)]
            for key, row in zip(keys, found, strict=True):
                assert row is not None
                journal.commit(key, row)
        else:
            num_found += len(chunk)
        results += [row["value"] for row in found if row is not None]
        progress(len(results), num_found)
    return results


def _key(problem: Mapping[str, Any], settings: Any) -> str:
    digest = hashlib.sha256(json.dumps([[problem[name] for name in _PROBLEM_FIELDS], settings]).encode())
    for image in problem["images"]:
        digest.update(f"{image.size}".encode())
        digest.update(image.convert("RGBA").tobytes())  # pixels, not the file
    return digest.hexdigest()


def _steps(rollout: Rollout) -> list[str]:
    return list(rollout.steps) if rollout.status == "finished" else []


def count_empty(candidates: Iterable[Sequence[Sequence[str]]]) -> int:
    """Number of candidates without steps."""
    return sum(not steps for solutions in candidates for steps in solutions)
