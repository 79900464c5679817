"""The audit of labels: against exact correctness on the embedded trees, and against fresh rollouts."""

import json
from collections import Counter

import numpy as np
import pyarrow.parquet
import pytest

from mm_prm.annotation.audit import Label, exact_correctness, fresh_values, sample_labels, tree_labels
from mm_prm.annotation.label_quality import label_quality
from mm_prm.annotation.protocols import Generation, Rollout, Verdict
from mm_prm.cli import main
from mm_prm.data.mini import problem_from_id
from mm_prm.data.mini_check import check_steps
from mm_prm.embedded import embedded_path
from mm_prm.metrics.steps import within_problem_auc
from tests.chat_server import ChatServer


@pytest.fixture(scope="module")
def trees():
    return pyarrow.parquet.read_table(embedded_path("mini_trees.parquet")).slice(0, 60).to_pylist()


@pytest.fixture
def trees_file(trees, tmp_path):
    path = tmp_path / "trees.jsonl"
    path.write_text("".join(json.dumps(tree) + "\n" for tree in trees))
    return str(path)


def test_measured_labels_are_those_of_the_nodes(trees):
    labels = tree_labels(trees, "measured")
    by_prefix = {(label.problem_id, label.prefix): (label.num_right, label.num_judged) for label in labels}
    assert len(by_prefix) == len(labels)
    num_nodes = 0
    for tree in trees:
        prefixes = {-1: ()}
        whole = {
            (rollout["node_id"], tuple(rollout["steps"]))
            for rollout in tree["rollouts"]
            if rollout["verdict"] != "unknown"
        }
        for node in tree["nodes"]:
            prefixes[node["node_id"]] = prefixes[node["parent_id"]] + tuple(node["steps"])
        solutions = {prefixes[node_id] + steps for node_id, steps in whole}
        for node in tree["nodes"][1:]:
            prefix = prefixes[node["node_id"]]
            if prefix not in solutions:
                num_nodes += 1
                assert by_prefix[tree["problem_id"], prefix] == (node["num_right"], node["num_judged"])
    assert num_nodes == len(labels)
    pooled = {(label.problem_id, label.prefix): label.num_judged for label in tree_labels(trees, "pooled")}
    assert len(pooled) > len(labels)
    assert all(pooled[key] >= num_judged for key, (_, num_judged) in by_prefix.items())


def test_exact_correctness_is_that_of_the_last_step():
    problem = problem_from_id("mini-test-0000003")
    right, wrong = problem.solution("right"), problem.solution(next(name for name in problem.rates if name != "right"))
    prefixes = [tuple(steps[: place + 1]) for steps in (right, wrong) for place in range(len(steps))]
    labels = [Label(problem.id, prefix, 1, 2) for prefix in (*prefixes, ("It is obvious.",))]
    *found, unknown = exact_correctness(labels)
    assert found == [float(value) for steps in (right, wrong) for value in check_steps(problem, steps)]
    assert 0.0 in found
    assert np.isnan(unknown)


def labels_of(values, num_judged=8, problems=None):
    return [
        Label(
            f"p{number if problems is None else problems[number]}",
            ("s",) * (1 + number % 3),
            round(value * num_judged),
            num_judged,
        )
        for number, value in enumerate(values)
    ]


def test_labels_that_are_the_truth_have_no_error():
    truth = np.array([0.0, 1.0, 1.0, 0.0] * 10)
    quality = label_quality(labels_of(truth, problems=np.arange(40) // 4), truth, num_resamples=50)
    perfect = {"value": 1.0, "low": 1.0, "high": 1.0}
    none = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert quality["auc"] == quality["auc_within_problems"] == perfect
    for name in ("disagreement", "mean_absolute_error", "mean_squared_error", "expected_calibration_error"):
        assert quality[name] == none
    assert quality["share_right"]["value"] == 0.5
    assert [row["rollouts"] for row in quality["at_fewer_rollouts"]] == [1, 2, 4, 8]
    assert all(row["disagreement"] == none for row in quality["at_fewer_rollouts"])
    assert quality["judge"] is None


def test_figures_by_hand():
    labels = labels_of([0.0, 0.5, 0.5, 1.0], problems=[0, 0, 1, 1])
    quality = label_quality(labels, np.array([0.0, 1.0, 0.0, 1.0]), num_resamples=200)
    assert quality["auc"]["value"] == (1 + 1 + 0.5 + 1) / 4
    assert quality["auc_within_problems"] is None  # of two problems nothing follows
    assert quality["mean_absolute_error"]["value"] == 0.25
    assert quality["mean_squared_error"]["value"] == 0.125
    assert quality["disagreement"]["value"] == 0.25
    assert quality["expected_calibration_error"]["value"] == 0.0  # of the two at 0.5 one is right
    assert [(row["labels"], row["mean_label"], row["mean_reference"]["value"]) for row in quality["calibration"]] == [
        (1, 0.0, 0.0),
        (2, 0.5, 0.5),
        (1, 1.0, 1.0),
    ]
    assert [(row["depth"], row["labels"], row["disagreement"]["value"]) for row in quality["by_depth"]] == [
        ("1", 2, 0.0),
        ("2", 1, 0.0),
        ("3", 1, 1.0),
    ]
    assert [(row["num_judged"], row["labels"]) for row in quality["by_num_judged"]] == [("8-15", 4)]
    with pytest.raises(ValueError, match="no label has a reference"):
        label_quality(labels, np.full(4, np.nan))


def test_aucs_are_those_of_the_metrics_room(trees):
    labels = tree_labels(trees, "pooled")
    truth = exact_correctness(labels)
    known = [(label, value) for label, value in zip(labels, truth, strict=True) if not np.isnan(value)]
    expected = within_problem_auc(
        [value for _, value in known],
        [label.value for label, _ in known],
        [label.problem_id for label, _ in known],
    )
    quality = label_quality(labels, truth, num_resamples=200)
    assert quality["auc"]["value"] == pytest.approx(expected["auc"], abs=1e-12)
    assert quality["auc_within_problems"]["value"] == pytest.approx(expected["within_problem_auc"], abs=1e-12)
    assert quality["auc"]["low"] < quality["auc"]["value"] < quality["auc"]["high"]
    assert sum(row["labels"] for row in quality["by_num_judged"]) == quality["labels"] == len(known)
    assert sum(row["labels"] for row in quality["calibration"]) == len(known)


def test_intervals_cover_the_truth_as_often_as_they_say():
    covered = 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        rates = generator.random(40).repeat(6)  # labels of a problem go together
        truth = (generator.random(240) < rates).astype(float)
        labels = labels_of(generator.binomial(8, rates) / 8, problems=np.arange(240) // 6)
        interval = label_quality(labels, truth, num_resamples=120, seed=seed)["mean_squared_error"]
        # E (X/8 - Y)² = Var X/8 + Var Y = 9/8 p (1 - p), and p is uniform
        covered += interval["low"] <= 9 / 8 / 6 <= interval["high"]
    assert 34 <= covered <= 40


def test_fewer_rollouts_are_worse_and_the_labels_the_same(trees):
    labels = tree_labels(trees, "measured")
    table = label_quality(labels, exact_correctness(labels), num_resamples=50)["at_fewer_rollouts"]
    assert [row["rollouts"] for row in table] == [1, 2, 4, 8]
    assert len({row["labels"] for row in table}) == 1
    aucs = [row["auc"]["value"] for row in table]
    assert aucs == sorted(aucs)
    errors = [row["mean_squared_error"]["value"] for row in table]
    assert errors == sorted(errors, reverse=True)


def test_what_a_judge_of_steps_is_worth():
    truth = np.array([0.0, 1.0] * 8)
    labels = [
        Label(f"p{number // 4}", ("s",), 4 * (number not in (0, 4)) if value else 8 * (number in (2, 6)), 8, score)
        for number, (value, score) in enumerate(zip(truth, truth * 0.8 + 0.1, strict=True))
    ]
    judge = label_quality([*labels, Label("p0", ("t",), 1, 8)], np.append(truth, 0.0), num_resamples=50)["judge"]
    assert judge["labels"] == 16
    assert judge["auc"]["value"] == 1.0
    assert judge["consensus"]["value"] == 14 / 16
    assert judge["monte_carlo"]["disagreement"]["value"] == 2 / 16
    assert judge["monte_carlo_in_consensus"]["disagreement"]["value"] == 0.0
    assert judge["monte_carlo_in_consensus"]["labels"] == 14


class ScriptedPolicy:
    """Ends right as often as the first step says; remembers its requests."""

    def __init__(self):
        self.requests = []

    def generate(self, requests):
        self.requests += [request for _, request in requests]
        return [
            Generation([self._rollout(request, sample) for sample in range(request.num_rollouts)], 1)
            for _, request in requests
        ]

    def _rollout(self, request, sample):
        if request.prefix[0] == "lost":
            return Rollout(("and",), "length", 1)
        right = np.random.default_rng(request.seed + sample).random() < float(request.prefix[0])
        return Rollout(("right" if right else "wrong",), "finished", 1)


class CountingJudge:
    def __init__(self):
        self.calls = Counter()

    def judge(self, problem, solution):
        self.calls[problem["id"], tuple(solution)] += 1
        return Verdict(solution[-1], "", "")


def test_fresh_rollouts_measure_a_prefix_and_ask_the_judge_once_for_equal_solutions():
    labels = [
        Label("a", ("0.25",), 1, 8),
        Label("b", ("0.25",), 1, 8),
        Label("b", ("1.0", "x"), 1, 8),
        Label("b", ("lost",), 1, 8),
    ]
    policy, judge, progress = ScriptedPolicy(), CountingJudge(), []
    found = fresh_values(
        labels,
        lambda problem_id: {"id": problem_id},
        policy,
        judge,
        num_rollouts=2048,
        judge_concurrency=3,
        on_progress=progress.append,
    )
    assert found[:2] == pytest.approx([0.25, 0.25], abs=0.04)
    assert found[0] != found[1]  # other seeds
    assert found[2] == 1.0
    assert np.isnan(found[3])  # what has no answer is not wrong
    assert set(judge.calls.values()) == {1}
    assert progress == [2, 4]
    assert [request.prefix for request in policy.requests] == [label.prefix for label in labels]
    again = fresh_values(
        labels[:2], {"a": {"id": "a"}, "b": {"id": "b"}}, ScriptedPolicy(), CountingJudge(), num_rollouts=2048
    )
    assert list(again) == list(found[:2])
    other = fresh_values(
        labels[:1], lambda _: {"id": "a"}, ScriptedPolicy(), CountingJudge(), num_rollouts=2048, seed=1
    )
    assert other[0] != found[0]


def test_a_sample_is_the_same_for_a_seed_and_keeps_the_order(trees):
    labels = tree_labels(trees)
    sample = sample_labels(labels, 20, seed=3)
    assert sample == sample_labels(labels, 20, seed=3) != sample_labels(labels, 20, seed=4)
    assert [label for label in labels if label in sample] == sample
    assert sample_labels(labels, 10**6) == labels


def test_the_command_on_embedded_trees(trees, trees_file, tmp_path, capsys):
    output, plot = tmp_path / "audit.json", tmp_path / "deep" / "audit.png"
    assert main(["audit", "--trees", trees_file, "--output_json", str(output), "--plot", str(plot)]) == 0
    report = json.loads(output.read_text())
    labels = tree_labels(trees, "pooled")
    expected = label_quality(labels, exact_correctness(labels))
    assert {name: report[name] for name in expected} == json.loads(json.dumps(expected))
    assert (report["reference"], report["trees"]) == ("exact", len(trees))
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"{report['labels']} pooled labels of" in printed
    assert f"AUC                        {report['auc']['value']:.3f} (" in printed


def test_the_command_against_fresh_rollouts_of_the_embedded_policy(trees_file, tmp_path, capsys):
    output = tmp_path / "audit.json"
    settings = ["--num_labels", "6", "--fresh_rollouts", "4", "--policy_max_new_tokens", "48", "--num_resamples", "20"]
    assert (
        main(["audit", "--trees", trees_file, "--reference", "rollouts", "--output_json", str(output), *settings]) == 0
    )
    report = json.loads(output.read_text())
    assert (report["reference"], report["fresh_rollouts"]) == ("rollouts", 4)
    assert report["labels"] + report["left_out"] == 6
    printed = capsys.readouterr()
    assert "against 4 fresh rollouts" in printed.out
    assert "the policy or its sampling is not that of the trees" in printed.err
    same = ["--policy_max_new_tokens", "128", "--policy_top_k", "0", "--policy_top_p", "1.0", "--fresh_rollouts", "1"]
    few = ["--num_labels", "4", "--num_resamples", "20"]
    assert main(["audit", "--trees", trees_file, "--reference", "rollouts", *few, *same]) == 0
    assert "not that of the trees" not in capsys.readouterr().err


def test_a_server_that_is_gone_is_told_in_one_line(trees_file, capsys):
    with ChatServer(lambda payload: ["The answer is 4."] * payload["n"], failures=("500",) * 100) as server:
        settings = ["--policy", "m", "--policy_engine", "server", "--policy_base_urls", server.url]
        settings += ["--policy_max_retries", "0", "--num_labels", "2", "--fresh_rollouts", "2"]
        assert main(["audit", "--trees", trees_file, "--reference", "rollouts", *settings]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("mm-prm audit: no answer after 1 attempts") and "status 500" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reference", "exact"], "only the mini world knows exactly"),
        ([], "problems: are needed for fresh rollouts"),
        (["--problems", "mini:unknown"], "write mini:SPLIT:NUMBER"),
        (["--fresh_rollouts", "0"], "fresh_rollouts = 0: give a number above 0"),
        (["--plot", "audit.txt"], "plot: audit.txt: give a name that ends in .png"),
    ],
)
def test_what_cannot_be_audited_is_told(arguments, message, trees, tmp_path, capsys):
    path = tmp_path / "trees.jsonl"
    path.write_text(json.dumps({**trees[0], "problem_id": "other"}) + "\n")
    assert main(["audit", "--trees", str(path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_problems_that_are_not_there_are_told_though_exact_correctness_needs_none(trees_file, capsys):
    for problems, message in (("mini:unknown", "write mini:SPLIT:NUMBER"), ("gone.json", "gone.json")):
        assert main(["audit", "--trees", trees_file, "--problems", problems]) == 2
        assert message in capsys.readouterr().err
    assert main(["audit", "--trees", trees_file, "--problems", "mini:test:1"]) == 2
    assert "problems of the trees are not there" in capsys.readouterr().err
