"""The step-errors metric: golden cases, real rows of ProcessBench, brute force, and loading it on its own."""

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
from sklearn.metrics import f1_score

from mm_prm.metrics.step_errors.thresholds import (
    best_threshold,
    count_first_errors,
    count_steps,
    first_error_figures,
    step_figures,
)

from .test_best_of_n import assert_contains

REPOSITORY = Path(__file__).parents[2]
METRIC = REPOSITORY / "mm_prm" / "metrics" / "step_errors"
PROCESSBENCH = REPOSITORY.parent / "shared" / "data" / "processbench"
CASES = json.loads((Path(__file__).parent / "cases" / "step_errors.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(str(METRIC))


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_golden_case(metric, case):
    results = metric.compute(**case["input"], num_resamples=200)
    assert_contains(results, case["expected"])
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def official_f1(predictions, labels):
    """ProcessBench's own computation, from the text of its evaluation script's description: two accuracies, their
    harmonic mean."""
    erroneous = np.mean([p == label for p, label in zip(predictions, labels, strict=True) if label != -1])
    correct = np.mean([p == label for p, label in zip(predictions, labels, strict=True) if label == -1])
    return erroneous, correct, 2 * erroneous * correct / (erroneous + correct)


def test_real_rows_of_processbench(metric):
    if not PROCESSBENCH.exists():
        pytest.skip(f"the sample of ProcessBench is not here: {PROCESSBENCH} is missing")
    generator = np.random.default_rng(0)
    columns = {"step_scores": [], "first_error": [], "subset": []}
    expected = {}
    for file in sorted(PROCESSBENCH.glob("*.json")):
        rows = json.loads(file.read_text(encoding="utf-8"))
        # scores that know something of the first error, so that both accuracies are above 0
        scores = [
            [float(generator.uniform(0.3 * (step != row["label"]), 1)) for step in range(len(row["steps"]))]
            for row in rows
        ]
        name = file.stem.removesuffix("_sample")
        predicted = [next((i for i, score in enumerate(row) if score < 0.35), -1) for row in scores]
        expected[name] = official_f1(predicted, [row["label"] for row in rows])
        columns["step_scores"] += scores
        columns["first_error"] += [row["label"] for row in rows]
        columns["subset"] += [name] * len(rows)
    assert list(expected) == ["gsm8k", "math", "olympiadbench", "omnimath"]
    results = metric.compute(**columns, threshold=0.35, num_resamples=200)
    fixed = results["thresholds"]["fixed"]
    for name, figures in expected.items():
        found = [fixed["subsets"][name][figure]["value"] for figure in ("erroneous", "correct", "f1")]
        assert found == pytest.approx(figures)
    assert fixed["mean_of_subsets"]["f1"]["value"] == pytest.approx(np.mean([f1 for *_, f1 in expected.values()]))
    assert results["num_solutions"] == 160
    oracle = results["thresholds"]["oracle"]["pooled"]["f1"]["value"]
    assert oracle >= max(results["thresholds"][name]["pooled"]["f1"]["value"] for name in ("0.5", "fixed"))
    for figures in [fixed["pooled"], *fixed["subsets"].values()]:
        for figure in figures.values():
            assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1

    perfect = [
        [float(step != label) for step in range(len(scores))]
        for scores, label in zip(columns["step_scores"], columns["first_error"], strict=True)
    ]
    results = metric.compute(**columns | {"step_scores": perfect}, num_resamples=50)
    assert results["thresholds"]["0.5"]["mean_of_subsets"]["f1"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert results["auc"]["pooled"] == 1.0


solutions = st.lists(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=5).flatmap(
        lambda scores: st.tuples(st.just(scores), st.integers(-1, len(scores) - 1))
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None)
@given(solutions=solutions, threshold=st.sampled_from([0.1, 0.25, 0.5, 0.6, 1.0]))
def test_first_errors_equal_brute_force(solutions, threshold):
    scores, labels = zip(*solutions, strict=True)
    predicted = [next((i for i, score in enumerate(row) if score < threshold), -1) for row in scores]
    hits = [p == label for p, label in zip(predicted, labels, strict=True)]
    counts = count_first_errors(scores, labels)
    by_row = counts["found"].by_row(threshold, len(scores)) + counts["passed"].by_row(threshold, len(scores))
    assert by_row.tolist() == hits
    assert counts["found"].totals(np.array([threshold]))[0] == sum(
        hit for hit, label in zip(hits, labels, strict=True) if label >= 0
    )


@settings(deadline=None)
@given(solutions=solutions)
def test_oracle_threshold_beats_every_other(solutions):
    scores, labels = zip(*solutions, strict=True)
    counts = count_first_errors(scores, labels)
    flat = np.concatenate(scores)
    steps = count_steps(np.zeros(len(flat), dtype=int), flat, np.arange(len(flat)) % 3 > 0)
    cuts = np.linspace(0, 1.05, 43)
    for each, figures in ((counts, first_error_figures), (steps, step_figures)):
        best = best_threshold(each, figures, "f1")
        values, [value] = (
            np.nan_to_num(figures({name: count.totals(np.asarray(at)) for name, count in each.items()})["f1"])
            for at in (cuts, [best])
        )
        assert value >= values.max() - 1e-12


def test_step_figures_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    scores, is_right = generator.random(200).round(1), generator.random(200) < 0.6
    counts = count_steps(np.zeros(200, dtype=int), scores, is_right)
    for threshold in (0.0, 0.3, 0.5, 1.0, 1.1):
        figures = step_figures({name: count.totals(np.array([threshold])) for name, count in counts.items()})
        held_right = scores >= threshold
        expected = [f1_score(is_right == kind, held_right == kind, zero_division=0) for kind in (True, False)]
        assert [figures["f1_right"][0], figures["f1_wrong"][0]] == pytest.approx(expected)
        assert figures["f1"][0] == pytest.approx(np.mean(expected))


def random_columns(num_solutions=60):
    generator = np.random.default_rng(1)
    labels = [generator.choice([1, 1, 0, -1], size=4).tolist() for _ in range(num_solutions)]
    return {
        "step_scores": [[round(0.3 * (label == 1) + generator.uniform(0, 0.7), 3) for label in row] for row in labels],
        "step_labels": labels,
        "subset": [f"source {number % 3}" for number in range(num_solutions)],
    }


def test_order_of_solutions_does_not_matter(metric):
    columns = random_columns()
    order = np.random.default_rng(4).permutation(60)
    permuted = {name: [column[i] for i in order] for name, column in columns.items()}
    assert metric.compute(**permuted, num_resamples=100) == metric.compute(**columns, num_resamples=100)


def test_solutions_of_one_problem_are_resampled_together(metric):
    columns = random_columns()
    copies = {name: column * 4 for name, column in columns.items()}
    ids = [str(number) for number in range(60)]

    def width(**columns):
        figure = metric.compute(**columns)["thresholds"]["0.5"]["pooled"]["f1"]
        return figure["high"] - figure["low"]

    alone = width(**columns)
    assert width(**copies, problem_ids=ids * 4) == pytest.approx(alone, rel=0.1)  # copies bring nothing new
    assert width(**copies) == pytest.approx(alone / 2, rel=0.15)


def test_one_solution_at_a_time_equals_all_at_once(metric):
    columns = random_columns(6)
    expected = metric.compute(**columns)
    for row in range(6):
        metric.add(**{name: column[row] for name, column in columns.items()})
    assert metric.compute() == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"step_scores": [[0.5]]}, "give either `first_error` or `step_labels`"),
        ({"step_scores": [[0.5]], "first_error": [0], "step_labels": [[1]]}, "give either"),
        ({"step_scores": [[0.5], [1.5]], "first_error": [0, 0]}, "`step_scores` holds 1.5"),
        ({"step_scores": [[0.5, 0.5]], "first_error": [2]}, "`first_error` is 2, with 2 step scores"),
        ({"step_scores": [[0.5, 0.5]], "step_labels": [[1]]}, "2 step scores for 1 `step_labels`"),
        ({"step_scores": [[0.5]], "step_labels": [[2]]}, r"`step_labels` is \[2\]; give 1, 0 or -1"),
        ({"step_scores": [[0.5]], "first_error": [0], "neutral": "right"}, "neutral = 'right'"),
        (
            {"step_scores": [[0.5]], "first_error": [0], "validation": {"step_scores": [[0.5]], "step_labels": [[1]]}},
            "`validation` needs the kind of labels",
        ),
        (
            {"step_scores": [[0.5]], "first_error": [0], "validation": {"step_scores": [[2]], "first_error": [0]}},
            "validation, solution at index 0",
        ),
    ],
)
def test_bad_input_is_named(columns, message):
    with pytest.raises(ValueError, match=message):
        evaluate.load(str(METRIC)).compute(**columns)


def test_loads_alone(tmp_path):
    """The folder copied away, a fresh interpreter outside the checkout, no network."""
    shutil.copytree(METRIC, tmp_path / "step_errors", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import sys, evaluate\n"
        "results = evaluate.load('step_errors').compute(step_scores=[[0.9, 0.2], [0.8]], first_error=[1, -1])\n"
        "assert not [name for name in sys.modules if name.startswith('mm_prm')]\n"
        "print(results['thresholds']['0.5']['pooled']['f1']['value'])\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-P", "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout.split()[-1:]) == (0, ["1.0"]), run.stderr
