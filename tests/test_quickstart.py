"""The quickstart at a size of seconds: every file and number is there, and a second run reuses what is done."""

import json
import re

import pytest

from mm_prm.cli import main
from mm_prm.inference import AGGREGATORS

SIZE = {
    "num_problems": 3,
    "num_rollouts": 2,
    "rollout_budget": 6,
    "train_steps": 1,
    "train_batch_size": 2,
    "num_eval_problems": 4,
    "num_candidates": 4,
}


def quickstart(folder):
    assert main(["quickstart", "--output_dir", str(folder), *(f"--{name}={value}" for name, value in SIZE.items())]) == 0
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, quickstart(folder)


def test_results_have_every_number(first):
    _, results = first
    assert (results["num_problems"], results["num_candidates"]) == (4, 4)
    estimates = [results[name] for name in ("pass@1", "greedy", "majority", "uninformative", "oracle", "weighted_majority")]
    for verifier in ("prm_before", "prm_after", "prm_shipped"):
        assert set(results[verifier]) == set(AGGREGATORS)
        estimates += results[verifier].values()
    for estimate in estimates:
        assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
    assert results["pass@1"]["value"] <= results["oracle"]["value"]
    assert {"annotate", "train", "sample", "score"} <= set(results["seconds"])
    assert results["reused"] == []
    # the three models are three models
    assert len({json.dumps(results[verifier]) for verifier in ("prm_before", "prm_shipped")}) == 2


def test_the_report_stands_alone(first):
    folder, _ = first
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and not re.search(r"(?:src|href)=[\"']?https?:", page)
    assert page.count("data:image/") >= 4
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_reuses_what_is_done(first):
    folder, results = first
    again = quickstart(folder)
    assert {"annotate", "train", "sample"} <= set(again["reused"])
    for name in ("pass@1", "majority", "prm_after", "prm_shipped"):
        assert again[name] == results[name]
