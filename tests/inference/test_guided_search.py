"""Beam search, DVTS and Best-of-N: which beams go on, what the budget allows, and that problems do not meet."""

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_prm.annotation.protocols import Generation, Rollout
from mm_prm.data import mini
from mm_prm.embedded import model_path
from mm_prm.inference import Scorer, SearchConfig, search, select
from mm_prm.inference.guided_search import Search
from mm_prm.policies.transformers import TransformersPolicy

DIGITS = "012345"


def is_end(step):
    return step.endswith("0")


class DigitPolicy:
    """Writes one of six digits a step, a digit a token, drawn by the seed alone; 0 ends a solution."""

    def __init__(self, broken=0.0):
        self.broken, self.calls = broken, []

    def generate(self, requests):
        self.calls.append(requests)
        return [self._generation(request) for _, request in requests]

    def _generation(self, request):
        rollouts = []
        for number in range(request.num_rollouts):
            draw = random.Random(request.seed + number)
            steps = [draw.choice(DIGITS)]
            while not request.one_step and steps[-1] != "0" and len(steps) < 30:
                steps.append(draw.choice(DIGITS))
            status = "finished" if steps[-1] == "0" else "stopped" if request.one_step else "length"
            if draw.random() < self.broken:
                steps, status = [], "unparsable"
            rollouts.append(Rollout(tuple(steps), status, len(steps)))
        return Generation(rollouts, 1)


class DigitScorer:
    """The digit over ten, and not a number for those that are named."""

    def __init__(self, unscored=()):
        self.unscored, self.calls = unscored, []

    def score(self, problems, candidates):
        self.calls.append(candidates)
        return [
            [[math.nan if step in self.unscored else int(step) / 10 for step in steps] for steps in solutions]
            for solutions in candidates
        ]


PROBLEMS = [{"id": f"p{number}"} for number in range(4)]
configs = st.builds(
    lambda strategy, trees, branching, budget, aggregator, max_steps, seed: SearchConfig(
        strategy, budget, trees * branching, branching, aggregator, max_steps, seed
    ),
    st.sampled_from(["best_of_n", "beam_search", "dvts"]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 150),
    st.sampled_from(["min", "last", "sum_logit"]),
    st.integers(1, 8),
    st.integers(0, 5),
)


@settings(max_examples=150, deadline=None)
@given(config=configs, broken=st.sampled_from([0.0, 0.3, 1.0]))
def test_every_search_ends_within_its_budget(config, broken):
    policy = DigitPolicy(broken)
    results = search(PROBLEMS, policy, DigitScorer("3"), config)
    for result in results:
        # A budget is spent but for the one continuation that did not fit.
        assert config.token_budget - 30 < result.generated_tokens <= config.token_budget
        assert len(result.candidates) == len(result.step_scores)
        for steps, scores in zip(result.candidates, result.step_scores, strict=True):
            assert is_end(steps[-1]) and not any(map(is_end, steps[:-1]))
            assert len(steps) == len(scores)
            if config.strategy != "best_of_n":
                assert len(steps) <= config.max_steps
            assert all(math.isnan(score) == (step == "3") for step, score in zip(steps, scores, strict=True))
        if broken == 1.0:
            assert not result.candidates and result.num_unfinished == result.generated_tokens
    asked = Counter(request.num_rollouts for call in policy.calls for _, request in call)
    assert 0 not in asked and max(asked) <= config.num_beams
    seeds = [request.seed + i for call in policy.calls for _, request in call for i in range(request.num_rollouts)]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**63


@pytest.mark.parametrize("strategy", ["best_of_n", "beam_search", "dvts"])
def test_problems_do_not_meet(strategy):
    config = SearchConfig(strategy, token_budget=120, num_beams=8, branching=4)
    policy = DigitPolicy()
    together = search(PROBLEMS, policy, DigitScorer(), config)
    assert [search([problem], DigitPolicy(), DigitScorer(), config)[0] for problem in PROBLEMS] == together
    assert search(PROBLEMS, DigitPolicy(), DigitScorer(), config) == together
    assert len({str(result.candidates) for result in together}) == len(PROBLEMS)
    # All problems share a call, round by round.
    assert {request.problem_id for _, request in policy.calls[0]} == {problem["id"] for problem in PROBLEMS}


def rollouts(*steps):
    return [Rollout((step,), "finished" if is_end(step) else "stopped", 1) for step in steps]


def scores_of(prefixes):
    return DigitScorer().score([None], [prefixes])[0]


def test_beam_search_keeps_the_best_of_all():
    one = Search("p", SearchConfig("beam_search", 100, num_beams=6, branching=3, aggregator="last"))
    [root] = one.requests()
    assert (root.prefix, root.num_rollouts, root.one_step) == ((), 6, True)
    to_score = one.receive([rollouts("1", "4", "5", "5", "2", "0")])
    assert to_score == [("0",), ("1",), ("4",), ("5",), ("2",)]  # a copy is one beam
    one.receive_scores(scores_of(to_score))
    asked = one.requests()
    assert [(request.prefix, request.num_rollouts) for request in asked] == [(("5",), 3), (("4",), 3)]
    to_score = one.receive([rollouts("1", "1", "1"), rollouts("5", "3", "2")])
    one.receive_scores(scores_of(to_score))
    assert [request.prefix for request in one.requests()] == [("4", "5"), ("4", "3")]
    assert one.result.candidates == [["0"]] and one.result.generated_tokens == 12


def test_dvts_keeps_the_best_of_each_tree():
    one = Search("p", SearchConfig("dvts", 100, num_beams=6, branching=3, aggregator="last"))
    asked = one.requests()
    assert [(request.prefix, request.num_rollouts) for request in asked] == [((), 3), ((), 3)]
    assert asked[0].seed != asked[1].seed
    to_score = one.receive([rollouts("5", "4", "3"), rollouts("1", "0", "2")])
    one.receive_scores(scores_of(to_score))
    # The second tree's best goes on, although the first one's others are better.
    asked = one.requests()
    assert [(request.prefix, request.num_rollouts) for request in asked] == [(("5",), 3), (("2",), 3)]


@pytest.mark.parametrize("strategy", ["beam_search", "dvts"])
def test_a_finished_solution_takes_its_place_and_what_ended_starts_anew(strategy):
    config = SearchConfig(strategy, 100, num_beams=2, branching=2)
    one = Search("p", config)
    one.requests()
    to_score = one.receive([[Rollout(("x",), "finished", 1), Rollout(("y",), "stopped", 1)]])
    assert to_score == [("x",), ("y",)]
    one.receive_scores([[0.9], [0.1]])
    assert [request.prefix for request in one.requests()] == [()]
    to_score = one.receive([[Rollout(("x",), "finished", 1), Rollout(("y",), "stopped", 1)]])
    one.receive_scores([[0.1], [0.9]])
    assert [request.prefix for request in one.requests()] == [("y",)]
    assert one.result.candidates == [["x"], ["x"]]


def test_an_unscored_beam_never_goes_on_before_a_scored_one():
    one = Search("p", SearchConfig("beam_search", 100, num_beams=2, branching=2))
    one.requests()
    to_score = one.receive([rollouts("5", "1")])
    one.receive_scores([[math.nan], [0.0]])
    assert to_score == [("5",), ("1",)]
    assert [request.prefix for request in one.requests()] == [("1",)]


def test_what_is_beyond_the_budget_is_not_used():
    one = Search("p", SearchConfig("best_of_n", 5, num_beams=3))
    one.requests()
    to_score = one.receive([[Rollout(("a", "0"), "finished", 3), Rollout(("b",), "length", 2), *rollouts("0")]])
    assert to_score == [("a", "0")] and one.done
    one.receive_scores([[0.5, 0.5]])
    result = one.result
    assert (result.generated_tokens, result.unused_tokens, result.num_unfinished) == (5, 1, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 6}, "num_beams = 6: has to be a multiple of branching = 4"),
        ({"token_budget": 0}, "token_budget = 0: has to be at least 1"),
        ({"strategy": "mcts"}, "strategy = 'mcts': use best_of_n, beam_search or dvts"),
        ({"aggregator": "median"}, "aggregator = 'median': use one of min, last"),
    ],
)
def test_settings_that_cannot_be_used(settings, message):
    with pytest.raises(ValueError, match=message):
        SearchConfig(**settings)


def test_the_embedded_models_search_the_mini_world():
    problems = [mini.problem("test", number).row() for number in range(2)]
    policy = TransformersPolicy.from_pretrained(model_path("mini-policy"), device="cpu")
    scorer = Scorer.from_pretrained(model_path("mini-prm"), device="cpu")
    for strategy in ("best_of_n", "beam_search", "dvts"):
        results = search(problems, policy, scorer, SearchConfig(strategy, token_budget=400, num_beams=8, branching=4))
        again = scorer.score(problems, [result.candidates for result in results])
        for result, scores in zip(results, again, strict=True):
            assert 300 < result.generated_tokens <= 400
            assert len(result.candidates) > 1
            assert all(steps[-1].startswith("The answer is") for steps in result.candidates)
            for one, other in zip(result.step_scores, scores, strict=True):
                assert one == pytest.approx(other, abs=1e-5)
            assert select(result.candidates, result.step_scores, "min").score >= 0
