"""The Best-of-N metric: golden cases, the ancestor's recorded numbers, brute force, and loading it on its own."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_prm.metrics.best_of_n.best_of_n import AGGREGATORS
from mm_prm.metrics.best_of_n.estimates import (
    best_of_n_curve,
    bootstrap_interval,
    bootstrap_means,
    difference,
    majority_curve,
    oracle_curve,
    subset_sizes,
    uninformative_accuracy,
)

REPOSITORY = Path(__file__).parents[2]
METRIC = REPOSITORY / "mm_prm" / "metrics" / "best_of_n"
ANCESTOR = REPOSITORY.parent / "shared" / "data" / "ancestor_reference" / "best_of_n.json"
CASES = json.loads((Path(__file__).parent / "cases" / "best_of_n.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(str(METRIC))


def assert_contains(actual, expected, path="results"):
    if isinstance(expected, dict):
        assert set(expected) <= set(actual), f"{path} lacks {set(expected) - set(actual)}"
        for key, value in expected.items():
            assert_contains(actual[key], value, f"{path}[{key!r}]")
        assert bool(actual) == bool(expected), path
    else:
        assert actual == pytest.approx(expected, abs=1e-12), path


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_golden_case(metric, case):
    results = metric.compute(**case["input"], num_resamples=200)
    assert_contains(results, case["expected"])
    assert not set(case.get("absent", [])) & set(results)


def test_ancestor_reference(metric):
    """Where every candidate has scores, our numbers are the ancestor's.

    They differ where a candidate has none: the ancestor gives it 0, which beats every sum of log-probabilities and
    every negative sum of logits; here it never wins. The recorded pools hold no such candidate, no score of 0 or 1 and
    no tie.
    """
    if not ANCESTOR.exists():
        pytest.skip(f"the recorded numbers are not here: {ANCESTOR} is missing")
    reference = json.loads(ANCESTOR.read_text(encoding="utf-8"))
    pools, recorded = reference["pools"], reference["results"]
    results = metric.compute(
        correct=[pool["labels"] for pool in pools], step_scores=[pool["prm_scores"] for pool in pools]
    )
    names = {"mean": "average", "mean_odds": "mean_odd"}
    assert {name: results["best_of_n"][name]["value"] for name in AGGREGATORS} == {
        name: recorded[names.get(name, name)]["accuracy"] for name in AGGREGATORS
    }
    assert results["oracle"]["value"] == recorded["pass@16"]["accuracy"]
    assert results["pass@1"]["value"] == pytest.approx(recorded["random"]["accuracy"], abs=0.01)  # sampled there
    assert results["num_problems"] == recorded["min"]["total"]


def test_loads_alone(tmp_path):
    """The folder copied away, a fresh interpreter outside the checkout, no network."""
    shutil.copytree(METRIC, tmp_path / "best_of_n", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import sys, json, evaluate\n"
        "results = evaluate.load('best_of_n').compute(correct=[[True, False]], step_scores=[[[0.9], [0.1]]])\n"
        "assert not [name for name in sys.modules if name.startswith('mm_prm')]\n"
        "print(json.dumps(results['best_of_n']['last']['value']))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == 1.0


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"correct": []}, "no problems"),
        ({"correct": [[True], []]}, "index 1: `correct` is empty"),
        ({"correct": [[True]], "step_scores": [[[0.5], [0.5]]]}, "index 0: `step_scores` has 2 entries for 1"),
        ({"correct": [[True], [True]], "answers": [["1"], ["1", "2"]]}, "index 1: `answers` has 2 entries for 1"),
        ({"correct": [[True, False]], "step_scores": [[[0.5], [0.5, 1.5]]]}, "`step_scores` of candidate 1 holds 1.5"),
    ],
)
def test_bad_input_is_named(columns, message):
    with pytest.raises(ValueError, match=message):
        evaluate.load(str(METRIC)).compute(**columns)


def test_one_problem_at_a_time_equals_all_at_once(metric):
    columns = CASES[8]["input"]
    expected = metric.compute(**columns)
    for row in range(2):
        metric.add(**{key: value[row] for key, value in columns.items()})
    assert metric.compute() == expected


# Pools where scores and answers often repeat, so that ties are common
pools = st.integers(1, 7).flatmap(
    lambda n: st.tuples(
        st.lists(st.booleans(), min_size=n, max_size=n),
        st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, float("-inf")]), min_size=n, max_size=n),
        st.lists(st.sampled_from(["a", "b", "c", "", None]), min_size=n, max_size=n),
    )
)


@settings(deadline=None)
@given(pool=pools)
def test_formulas_equal_brute_force_over_subsets(pool):
    correct, scores, _ = pool
    sizes = range(1, len(correct) + 1)
    best, oracle = [], []
    for size in sizes:
        subsets = list(itertools.combinations(range(len(correct)), size))
        best.append(np.mean([correct[max(subset, key=lambda i: (scores[i], -i))] for subset in subsets]))
        oracle.append(np.mean([any(correct[i] for i in subset) for subset in subsets]))
    assert best_of_n_curve(correct, scores, sizes) == pytest.approx(best)
    assert oracle_curve(correct, sizes) == pytest.approx(oracle)
    # with all candidates the expectation is the plain argmax, which takes the first of equals
    assert best_of_n_curve(correct, scores, [len(correct)])[0] == correct[int(np.argmax(scores))]


@settings(deadline=None)
@given(pool=pools)
def test_majority_equals_a_plain_count(pool):
    correct, scores, answers = pool
    for weights in (None, scores):
        votes: dict[str, float] = {}
        for i, answer in enumerate(answers):
            if answer:
                weight = 1.0 if weights is None else max(weights[i], 0.0) + 1e-200 * (weights[i] >= 0)
                votes[answer] = votes.get(answer, 0.0) + weight
        winner = max(votes, key=votes.__getitem__) if votes else None  # the first of equals: dicts keep their order
        expected = correct[answers.index(winner)] if votes else False
        assert majority_curve(correct, answers, [len(correct)], weights)[0] == expected


def test_majority_of_subsets_is_close_to_brute_force():
    correct = [True, False, True, False, False, True, False, True]
    answers = ["4", "5", "4", "6", "5", "4", "7", "4"]
    votes = []
    for subset in itertools.combinations(range(8), 4):
        chosen = [answers[i] for i in subset]
        votes.append(correct[answers.index(max(dict.fromkeys(chosen), key=chosen.count))])
    curve = majority_curve(correct, answers, [1, 4, 8], num_subsets=20_000)
    assert curve == pytest.approx([0.5, np.mean(votes), 1.0], abs=0.01)


def test_uninformative_equals_random_scores_per_distinct_text():
    correct, texts = [True, True, True, False, False, False], ["a", "a", "a", "b", "c", None]
    generator = np.random.default_rng(0)
    hits = []
    for _ in range(20_000):
        score = dict(zip("abc", generator.random(3), strict=True))
        hits.append(correct[int(np.argmax([score.get(text, -1.0) for text in texts]))])
    assert uninformative_accuracy(correct, texts) == pytest.approx(np.mean(hits), abs=0.01)
    assert uninformative_accuracy([False, True], [None, None]) == 0.0


def random_columns(num_problems=40, num_candidates=6):
    generator = np.random.default_rng(3)
    correct = (generator.random((num_problems, num_candidates)) < 0.4).tolist()
    return {
        "correct": correct,
        "step_scores": [[generator.random(3).round(1).tolist() for _ in row] for row in correct],
        "answers": [["right" if right else f"wrong {generator.integers(3)}" for right in row] for row in correct],
    }


def test_order_of_problems_does_not_matter(metric):
    columns = random_columns()
    order = np.random.default_rng(4).permutation(len(columns["correct"]))
    permuted = {name: [column[i] for i in order] for name, column in columns.items()}
    assert_contains(metric.compute(**permuted), metric.compute(**columns))


def test_baselines_have_one_interval_beside_every_verifier(metric):
    columns = random_columns()
    reverse = [[[1 - score for score in steps] for steps in problem] for problem in columns["step_scores"]]
    results, other = metric.compute(**columns), metric.compute(**(columns | {"step_scores": reverse}))
    assert results["best_of_n"]["min"] != other["best_of_n"]["min"]
    for baseline in ("pass@1", "uninformative", "majority", "oracle"):
        assert results[baseline] == other[baseline]


def test_results_depend_on_the_seed_only(metric):
    columns = random_columns()
    assert metric.compute(**columns) == metric.compute(**columns)
    other = metric.compute(**columns, seed=1)
    assert other["majority"]["by_n"]["4"] != metric.compute(**columns)["majority"]["by_n"]["4"]
    assert other["best_of_n"]["min"]["value"] == metric.compute(**columns)["best_of_n"]["min"]["value"]


def test_every_estimate_lies_in_its_interval(metric):
    results = metric.compute(**random_columns())
    for estimate in [results["majority"], *results["best_of_n"].values(), *results["weighted_majority"].values()]:
        assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
        assert list(estimate["by_n"]) == ["1", "2", "4", "6"]
        assert estimate["by_n"]["6"] == {key: estimate[key] for key in ("value", "low", "high")}
        assert 0 < estimate["minus_pass@1"]["p_value"] <= 1
    assert json.loads(json.dumps(results)) == results


def test_rounding_keeps_a_constant_in_its_interval():
    interval = bootstrap_interval([0.4] * 12)
    assert interval["low"] <= interval["value"] <= interval["high"]
    assert interval["high"] - interval["low"] < 1e-12


def test_subset_sizes():
    assert [subset_sizes(n) for n in (1, 2, 3, 8, 12)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12]]


def test_bootstrap_interval_covers_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = [
        interval["low"] <= 0.3 <= interval["high"]
        for interval in (bootstrap_interval(generator.random(200) < 0.3, num_resamples=500) for _ in range(300))
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.04)


def test_bootstrap_agrees_with_the_standard_error_in_blocks_too():
    values = np.random.default_rng(0).random((3000, 2))
    means = bootstrap_means(values, num_resamples=2000)  # 3,000 problems need more than one block
    assert means.shape == (2000, 2)
    assert means.std(axis=0) == pytest.approx(values.std(axis=0) / np.sqrt(3000), rel=0.1)


def test_paired_difference_is_sharper_than_its_parts():
    generator = np.random.default_rng(0)
    difficulty = generator.random(300)
    better, worse = difficulty < 0.55, difficulty < 0.5
    values = np.stack([better, worse], axis=1).astype(float)
    means = bootstrap_means(values)
    gap = difference(values[:, 0] - values[:, 1], means[:, 0] - means[:, 1])
    assert gap["low"] > 0 and gap["p_value"] < 0.01
    assert gap["high"] - gap["low"] < 0.6 * np.subtract(*np.quantile(means[:, 0], [0.975, 0.025]))
    assert difference(np.zeros(10), np.zeros(100))["p_value"] == 1.0
