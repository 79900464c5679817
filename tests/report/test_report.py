"""The page is self-contained, shows what models wrote as text, and is well formed; the plots are drawn."""

import re
from html.parser import HTMLParser

import evaluate
import numpy as np
import pytest
from PIL import Image

from mm_prm.data.features import validate_rows
from mm_prm.report import curve_lines, format_difference, format_estimate, render_report, summary_rows

from ..testing_utils import tiny_problem

HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(1)> & </details></span> {{ 7 * 7 }}'
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects tags and text, and checks that every tag is closed where it belongs."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.text += data

    def count(self, tag: str, **attributes) -> int:
        return sum(
            name == tag and all(value in (found.get(key) or "").split() for key, value in attributes.items())
            for name, found in self.tags
        )


def pool_rows(count: int = 3) -> list[dict]:
    candidates = [
        ["Bar A shows 7.", "The answer is 4."],
        [HOSTILE, "The answer is 5."],
        ["Bar A shows 7.", "The answer is 4."],
        [],
        ["The answer is 6."],
    ]
    return [
        {
            "problem_id": f"problem-{number}",
            "candidates": candidates,
            "answers": ["4", "5", "4", "", "6"],
            "correct": [True, False, True, False, None],
            "step_scores": [[0.9, 0.75], [0.31, 0.2], [0.9, 0.75], [], [0.75]],
        }
        for number in range(count)
    ]


def tree_row(problem_id: str, depth: int = 2) -> dict:
    nodes = [
        {"node_id": 0, "parent_id": -1, "steps": [], "num_right": 8, "num_judged": 16, "visits": 3, "kind": "root"}
    ]
    nodes += [
        {
            "node_id": number,
            "parent_id": number - 1,
            "steps": [HOSTILE, f"step {number}"],
            "num_right": 4,
            "num_judged": 16,
            "visits": 1,
            "kind": "measured",
        }
        for number in range(1, depth + 1)
    ]
    nodes.append(nodes[1] | {"node_id": depth + 1, "steps": ["another way"], "num_right": 0, "num_judged": 0})
    return {
        "problem_id": problem_id,
        "nodes": nodes,
        "rollouts": [
            {"node_id": 1, "steps": ["so", "The answer is 3."], "verdict": "wrong", "status": "finished"},
            {"node_id": 1, "steps": [], "verdict": "unknown", "status": "unparsable"},
        ],
        "strategy": "omegaprm",
        "settings": "{}",
        "cost": {"rollouts": 48, "prompt_tokens": 1, "generated_tokens": 1, "judge_calls": 1, "seconds": 1.0},
        "status": "complete",
        "reason": "",
    }


@pytest.fixture(scope="module")
def results() -> dict:
    metric = evaluate.load("mm_prm/metrics/best_of_n/best_of_n.py")
    pools = pool_rows(12)
    columns = {name: [pool[name] for pool in pools] for name in ("correct", "answers", "candidates")}
    generator = np.random.default_rng(0)
    results = {}
    for name in ("prm_before", "prm_after <b>"):
        scores = [[[float(generator.random()) for _ in steps] for steps in pool["candidates"]] for pool in pools]
        results[name] = metric.compute(**columns, step_scores=scores, num_resamples=100)
    return results


@pytest.fixture(scope="module")
def problems() -> list[dict]:
    hostile = tiny_problem(2) | {"question": f"<image> {HOSTILE}", "choices": ["4", HOSTILE], "answer": "<i>4</i>"}
    return [tiny_problem(0, num_images=2), tiny_problem(1, num_images=0), hostile, tiny_problem(9)]


@pytest.fixture(scope="module")
def html(results, problems) -> str:
    assert validate_rows("pool", pool_rows()) == 3 and validate_rows("tree", [tree_row("problem-9")]) == 1
    return render_report(
        results,
        problems,
        pool_rows(),
        [tree_row("problem-9")],
        verifier="prm_after <b>",
        baselines={"greedy": {"value": 0.4, "low": 0.3, "high": 0.5}},
        facts={"policy": HOSTILE},
    )


def test_model_text_is_shown_as_text(html):
    page = Page(html)
    assert page.count("script") == 0 and page.count("i") == 0 and page.count("b") == 0
    # question, choice, fact, one candidate in each of 3 problems, two nodes
    assert page.text.count(HOSTILE) == 8
    assert "prm_after <b>" in page.text
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)


def test_nothing_is_loaded_from_elsewhere(html):
    for tag, attributes in Page(html).tags:
        for key in ("src", "href", "xlink:href", "action", "data"):
            assert attributes.get(key, "#").startswith(("#", "data:image/png;base64,")), (tag, attributes)
        assert tag not in ("link", "script", "iframe", "object", "base")
    assert not re.findall(r"https?:|@import|url\((?!#)", html)


def test_pictures_candidates_and_choice(html):
    page = Page(html)
    assert page.count("img") == 2 + 0 + 1 + 1  # of three pools and one tree
    assert page.count("article", **{"class": "candidate"}) == 3 * 4  # a repeated solution is shown once
    assert page.count("article", **{"class": "chosen"}) == 3
    assert page.count("article", **{"class": "right"}) == 3 and page.text.count("sampled 2 times") == 3
    assert page.text.count("★ chosen") == 3 and page.text.count("✓ right") == 3
    for shown in ("0.90", "0.75", "0.31", "no score", "no steps could be read", "1 other had the same score"):
        assert shown in page.text
    assert 'style="--p:0.310"' in html


def test_tree_unfolds_with_values_and_counts(html):
    page = Page(html)
    assert page.count("details", **{"class": "node"}) == 4
    assert page.count("details", **{"class": "branch"}) == 2
    for shown in ("8 of 16 right, 3 visits", "4 of 16 right, 1 visit", "0.25", "not measured", "2 rollouts from here"):
        assert shown in page.text
    assert "✗ wrong" in page.text and "(unparsable)" in page.text


def test_a_deep_tree_is_no_trouble(results, problems):
    page = Page(
        render_report(
            results, problems, [], [tree_row("problem-9", depth=2000)], verifier="prm_before", max_problems=0
        )
    )
    assert page.count("details", **{"class": "node"}) == 2002


def test_table_and_curve_have_every_method(html, results):
    page = Page(html)
    # head, 5 baselines, 2 methods of 2 models, 3 headings; unfolded: head, 13 methods of 2 models, 2 headings;
    # then head and one kind of evidence, head and 5 costs
    assert page.count("tr") == 1 + 5 + 4 + 3 + 1 + 26 + 2 + 2 + 6
    assert page.count("svg") == 4 and "currentColor" in html and "#010203" not in html
    for name in ("oracle", "majority vote", "mean pass@1", "prm_before (min)"):
        assert name in page.text
    assert "40.0 % [30.0, 50.0]" in page.text


def test_summary_order_and_paired_differences(results):
    rows = summary_rows(results, {"greedy": {"value": 0.4, "low": 0.3, "high": 0.5}})
    assert [row.method for row in rows[:4]] == ["mean pass@1", "greedy", "majority vote", "uninformative verifier"]
    assert rows[-1].method == "oracle"
    assert (rows[4].method, rows[4].aggregator, rows[-2].method) == ("Best-of-N", "min", "weighted vote")
    assert [row.verifier for row in rows[4:-1]] == ["prm_before"] * 13 + ["prm_after <b>"] * 13
    assert rows[2].minus_majority is None and rows[4].minus_majority["p_value"] <= 1


def test_curve_lines(results):
    lines = {line.name: line.points for line in curve_lines(results, "mean")}
    assert list(lines) == ["oracle", "prm_before (mean)", "prm_after <b> (mean)", "majority vote", "mean pass@1"]
    assert all([n for n, _ in points] == [1, 2, 4, 5] for points in lines.values())
    assert lines["oracle"][0][1]["value"] == pytest.approx(0.4)
    assert [estimate["value"] for _, estimate in lines["mean pass@1"]] == pytest.approx([0.4] * 4)


def test_ids_of_the_plots_are_unique_and_found(html):
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', html))
    assert referred and referred <= set(ids)


def test_plots_are_pictures_that_depend_on_the_numbers(results, problems, tmp_path):
    pictures = {}
    for aggregator in ("min", "last"):
        folder = tmp_path / aggregator
        folder.mkdir()
        arguments = {"verifier": "prm_before", "aggregator": aggregator, "plot_folder": folder}
        render_report(results, problems, pool_rows(), [tree_row("problem-9")], **arguments)
        assert {path.name for path in folder.iterdir()} == {
            "curve.png",
            "reliability.png",
            "scores.png",
            "annotation.png",
        }
        for path in folder.iterdir():
            with Image.open(path) as picture:
                assert picture.width > 800
                pictures[aggregator, path.stem] = picture.tobytes()
    assert pictures["min", "curve"] != pictures["last", "curve"]
    assert pictures["min", "reliability"] == pictures["last", "reliability"]


def test_candidates_carry_the_values_of_the_tree(results, problems):
    tree = tree_row("problem-0")
    tree["nodes"][1] |= {"steps": ["Bar A shows 7."], "num_right": 12}
    tree["nodes"][2]["steps"] = ["The answer is 4."]
    text = Page(render_report(results, problems, pool_rows(1), [tree], verifier="prm_before")).text
    assert text.count("mc 0.75") == text.count("mc 0.25") == 1 and text.count("of 16") >= 2
    assert "mc_value of the same prefix" in text


def test_labelled_solutions_without_pools(problems):
    scores = [[0.9, 0.8, 0.3], [0.9], []]
    solutions = [
        {"problem_id": "problem-1", "steps": ["a", HOSTILE, "$x^2$"], "step_scores": scores[0], "first_error": 1},
        {"problem_id": "problem-0", "steps": ["right"], "step_scores": scores[1], "first_error": -1},
        {"problem_id": "problem-0", "steps": ["unscored"], "step_scores": scores[2], "first_error": 0},
    ]
    step_results = evaluate.load("mm_prm/metrics/step_errors/step_errors.py").compute(
        step_scores=scores, first_error=[1, -1, 0], num_resamples=10
    )
    html = render_report({}, problems, solutions=solutions, step_results=step_results, verifier="prm")
    page = Page(html)
    assert page.count("article") == 1 and page.count("svg") == 2 and page.count("math") == 1
    for shown in ("Wrong steps found", "✗ wrong", "labels of the steps", "oracle (", "mean of subsets", HOSTILE):
        assert shown in page.text
    assert "Accuracy" not in page.text and "Annotation" not in page.text


def test_unscored_pools_and_missing_problems(results, problems):
    pools = [pool | {"step_scores": []} for pool in pool_rows()]
    assert Page(render_report(results, problems, pools, verifier="prm_before")).count("article") == 0
    with pytest.raises(ValueError, match="problem 'problem-1' of a pool or tree is not among the problems"):
        render_report(results, problems[2:3] + problems[:1], pool_rows(), verifier="prm_before")


def test_numbers_are_percent():
    assert format_estimate({"value": 0.4123, "low": 0.38, "high": 0.445}) == "41.2 % [38.0, 44.5]"
    difference = {"value": 0.031, "low": -0.004, "high": 0.059, "p_value": 0.0214}
    assert format_difference(difference) == "+3.1 [-0.4, +5.9], p = 0.021"
    assert format_difference(None) == ""
