"""
Search guided by a process reward model: beam search and DVTS, beside Best-of-N, under a budget of generated tokens.

Beam search (Snell et al. 2024, arXiv 2408.03314) extends its beams by one step at a time and keeps those that the model
scores highest. DVTS (diverse verifier tree search, Beeching et al. 2024) does so in several trees that know nothing of
each other and follow one beam each. All take a policy that can write one step
([`~mm_prm.annotation.protocols.RolloutRequest`]) and a scorer of prefixes, and many problems at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from mm_prm.annotation.protocols import Policy, Rollout, RolloutRequest, sample_seed

from .aggregators import AGGREGATORS

SearchStrategy = Literal["best_of_n", "beam_search", "dvts"]
Steps = tuple[str, ...]


class StepScorer(Protocol):
    """Gives each step of each solution its score: [`Scorer`] and its siblings."""

    def score(
        self, problems: Sequence[Mapping[str, Any]], candidates: Sequence[Sequence[Sequence[str]]]
    ) -> list[list[list[float]]]:
        """One score for each step of each candidate of each problem."""
        ...


@dataclass(frozen=True)
class SearchConfig:
    """
    How a problem is searched.

    Args:
        strategy (`str`, *optional*, defaults to `"beam_search"`):
            `"beam_search"`, `"dvts"`, or `"best_of_n"`, which samples whole solutions.
        token_budget (`int`, *optional*, defaults to `4096`):
            Number of generated tokens for each problem. What a policy writes beyond is not used. A search that ends
            before starts anew, so that all strategies spend the same.
        num_beams (`int`, *optional*, defaults to `16`):
            Number of continuations (`"best_of_n"`: solutions) that are sampled at a time.
        branching (`int`, *optional*, defaults to `4`):
            Number of continuations of each beam: `num_beams / branching` beams are kept, by DVTS one in each of so many
            trees.
        aggregator (`str`, *optional*, defaults to `"min"`):
            What the scores of a beam's steps become to compare it with others: one of [`AGGREGATORS`].
        max_steps (`int`, *optional*, defaults to `40`):
            A beam with so many steps and no end is given up.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the continuations.
    """

    strategy: SearchStrategy = "beam_search"
    token_budget: int = 4096
    num_beams: int = 16
    branching: int = 4
    aggregator: str = "min"
    max_steps: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("token_budget", "num_beams", "branching", "max_steps"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} = {value}: has to be at least 1")
        if self.strategy not in ("best_of_n", "beam_search", "dvts"):
            raise ValueError(f"strategy = {self.strategy!r}: use best_of_n, beam_search or dvts")
        if self.strategy != "best_of_n" and self.num_beams % self.branching:
            raise ValueError(f"num_beams = {self.num_beams}: has to be a multiple of branching = {self.branching}")
        if self.aggregator not in AGGREGATORS:
            raise ValueError(f"aggregator = {self.aggregator!r}: use one of {', '.join(AGGREGATORS)}")


@dataclass
class SearchResult:
    """
    What a search found for a problem.

    Args:
        candidates (`list[list[str]]`):
            Steps of each finished solution, in the order in which they were found; a solution found twice is there
            twice.
        step_scores (`list[list[float]]`):
            Their step scores.
        generated_tokens (`int`):
            Number of generated tokens that were used; never above the budget.
        unused_tokens (`int`):
            Number of tokens beyond the budget that the policy wrote in the last round, and that were thrown away.
        num_unfinished (`int`):
            Number of continuations within the budget that a limit cut, or that held no step.
    """

    candidates: list[list[str]] = field(default_factory=list)
    step_scores: list[list[float]] = field(default_factory=list)
    generated_tokens: int = 0
    unused_tokens: int = 0
    num_unfinished: int = 0


class Search:
    """
    The search of one problem, which computes nothing itself: it hands out requests, and takes back rollouts, then scores.

    Args:
        problem_id (`str`):
            The problem.
        config ([`SearchConfig`]):
            How it is searched.
    """

    def __init__(self, problem_id: str, config: SearchConfig):
        self.problem_id, self.config = problem_id, config
        self.result = SearchResult()
        self.done = False
        self._num_requests = 0
        self._trees: list[list[Steps]] = []  # the beams of each tree, best first
        self._asked: list[tuple[int, RolloutRequest]] = []
        self._found: list[dict[Steps, bool]] = []  # what each tree's continuations are, and whether they are finished
        self._to_score: list[Steps] = []

    def requests(self) -> list[RolloutRequest]:
        """What is to be sampled now."""
        config = self.config
        num_trees = config.num_beams // config.branching if config.strategy == "dvts" else 1
        if not any(self._trees):
            self._trees = [[()] for _ in range(num_trees)]
        samples = config.num_beams // num_trees
        self._asked = [
            # Where there are fewer beams than places, each has more continuations.
            (number, self._request(beam, samples // len(beams) + (place < samples % len(beams))))
            for number, beams in enumerate(self._trees)
            for place, beam in enumerate(beams[:samples])
        ]
        return [request for _, request in self._asked]

    def _request(self, prefix: Steps, num_rollouts: int) -> RolloutRequest:
        seed = sample_seed(self.config.seed, self.problem_id, prefix, self._num_requests)
        self._num_requests += 1
        one_step = self.config.strategy != "best_of_n"
        return RolloutRequest(self.problem_id, prefix, num_rollouts, seed, one_step)

    def receive(self, rollouts: Sequence[Sequence[Rollout]]) -> list[Steps]:
        """
        Takes the rollouts of the requests.

        Args:
            rollouts (`Sequence[Sequence[Rollout]]`):
                Those of each request, in the order of the requests.

        Returns:
            `list[tuple[str, ...]]`: The prefixes and solutions to score.
        """
        result = self.result
        self._found = [{} for _ in self._trees]
        finished: list[Steps] = []
        for (number, request), each in zip(self._asked, rollouts, strict=True):
            for rollout in each:
                cost = max(1, rollout.num_tokens)  # a policy that writes nothing comes to an end, too
                if self.done or result.generated_tokens + cost > self.config.token_budget:
                    self.done = True
                    result.unused_tokens += rollout.num_tokens
                    continue
                result.generated_tokens += cost
                steps = request.prefix + rollout.steps
                if rollout.status == "finished":
                    finished.append(steps)
                    self._found[number][steps] = True
                elif rollout.status == "stopped" and len(steps) < self.config.max_steps:
                    self._found[number].setdefault(steps, False)
                else:
                    result.num_unfinished += 1
        self.done = self.done or result.generated_tokens == self.config.token_budget
        result.candidates += map(list, finished)
        beams = [] if self.done else [steps for found in self._found for steps, ended in found.items() if not ended]
        self._to_score = finished + beams
        return self._to_score

    def receive_scores(self, scores: Sequence[Sequence[float]]) -> None:
        """Takes the step scores of what [`Search.receive`] returned, and keeps the best beams of each tree."""
        num_finished = len(self.result.candidates) - len(self.result.step_scores)
        self.result.step_scores += map(list, scores[:num_finished])
        aggregate = AGGREGATORS[self.config.aggregator]
        values = {steps: aggregate(each) for steps, each in zip(self._to_score, scores, strict=True)}
        width = 1 if self.config.strategy == "dvts" else self.config.num_beams // self.config.branching
        self._trees = [
            # A finished solution among the best takes its place with it: what is worse is not worth tokens.
            [steps for steps in sorted(found, key=values.__getitem__, reverse=True)[:width] if not found[steps]]
            for found in ({} if self.done else found for found in self._found)
        ]


def search(
    problems: Sequence[Mapping[str, Any]],
    policy: Policy,
    scorer: StepScorer,
    config: SearchConfig,
    progress: Callable[[int], None] | None = None,
) -> list[SearchResult]:
    """
    Search the solutions of many problems, whose steps are sampled and scored together.

    Args:
        problems (`Sequence[Mapping[str, Any]]`):
            Problem rows, their images decoded.
        policy ([`~mm_prm.annotation.protocols.Policy`]):
            Writes the steps.
        scorer ([`StepScorer`]):
            Scores them.
        config ([`SearchConfig`]):
            How each problem is searched.
        progress (`Callable[[int], None]`, *optional*):
            Called with the number of problems that are done.

    Returns:
        `list[SearchResult]`: One for each problem.

    Example:

    ```python
    >>> from mm_prm.inference import Scorer, SearchConfig, search, select
    >>> from mm_prm.policies.transformers import TransformersPolicy

    >>> policy = TransformersPolicy.from_pretrained("path/to/vlm")
    >>> scorer = Scorer.from_pretrained("path/to/prm")
    >>> [found] = search(problems[:1], policy, scorer, SearchConfig("dvts", token_budget=8192))
    >>> found.candidates[select(found.candidates, found.step_scores, "min").index]
    ```
    """
    searches = [Search(problem["id"], config) for problem in problems]
    while live := [(problem, one) for problem, one in zip(problems, searches, strict=True) if not one.done]:
        asked = [one.requests() for _, one in live]
        generations = iter(
            policy.generate(
                [(problem, request) for (problem, _), each in zip(live, asked, strict=True) for request in each]
            )
        )
        to_score = [
            one.receive([next(generations).rollouts for _ in each]) for (_, one), each in zip(live, asked, strict=True)
        ]
        scores = scorer.score([problem for problem, _ in live], to_score)
        for (_, one), each in zip(live, scores, strict=True):
            one.receive_scores(each)
        if progress is not None:
            progress(sum(one.done for one in searches))
    return [one.result for one in searches]
