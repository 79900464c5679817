"""The quickstart at a size of seconds: every file and number is there, and a second run reuses what is done."""

import json
import re
import shutil

import pytest

from mm_prm.cli import main
from mm_prm.inference import AGGREGATORS, Scorer
from mm_prm.policies.transformers import TransformersPolicy
from mm_prm.quickstart import QuickstartConfig
from mm_prm.trainer import PRMTrainer

from .hub.conftest import hub, session  # noqa: F401

SIZE = {
    "num_problems": 3,
    "num_rollouts": 2,
    "rollout_budget": 6,
    "train_steps": 1,
    "train_batch_size": 2,
    "num_eval_problems": 4,
    "num_candidates": 4,
}


def quickstart(folder, *flags):
    size = (f"--{name}={value}" for name, value in SIZE.items())
    assert main(["quickstart", "--output_dir", str(folder), *size, *flags]) == 0
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def _refuse(*args, **kwargs):
    raise AssertionError("a policy, scorer or trainer was made again")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, quickstart(folder)


def test_results_have_every_number(first):
    _, results = first
    assert (results["num_problems"], results["num_candidates"]) == (4, 4)
    estimates = [
        results[name] for name in ("pass@1", "greedy", "majority", "uninformative", "oracle", "weighted_majority")
    ]
    for verifier in ("prm_before", "prm_after", "prm_shipped"):
        assert set(results[verifier]) == set(AGGREGATORS)
        estimates += results[verifier].values()
    for estimate in estimates:
        assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
    assert results["pass@1"]["value"] <= results["oracle"]["value"]
    assert {"annotate", "train", "sample", "score"} <= set(results["seconds"])
    assert results["reused"] == []


def test_the_report_stands_alone(first):
    folder, _ = first
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and not re.search(r"(?:src|href)=[\"']?https?:", page)
    assert page.count("data:image/") >= 4
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_three_models_give_three_scores(first):
    folder, _ = first
    names = ("prm_before", "prm_after", "prm_shipped")
    scores = [(folder / "stages" / f"scores_{name}.json").read_text(encoding="utf-8") for name in names]
    assert len(set(scores)) == 3


def test_what_it_made_goes_to_the_hub_and_comes_back(first, hub, session):  # noqa: F811
    folder, results = first
    model = folder / "stages" / "prm_after"
    figures = ("--results", folder / "prm_after.json", "--results_dataset", "me/trees")
    for args in (
        ("dataset", folder / "data", "me/trees", "--license", "mit"),
        ("model", model, "me/prm", "--license", "mit", "--trained_on", "me/trees", *figures),
        ("metric", "best_of_n", "me/best_of_n"),
        ("space", folder, "me/report"),
    ):
        answer = session.push(*args)
        assert answer["status"] == 0, answer["err"]
    pushed = hub.repositories["model", "me/prm"].branches["main"]
    card = pushed["README.md"].decode()
    assert "Best-of-4 (min)" in card and "label_mode: hard" in card and "mini-policy" in card
    assert str(folder) not in card and ".quickstart.json" not in pushed
    page = hub.repositories["space", "me/report"].branches["main"]
    assert page["index.html"] == (folder / "report.html").read_bytes() and b"sdk: static" in page["README.md"]
    answer = session.push("model", "mini-prm", "me/other", *figures)
    assert answer["status"] == 2 and "whose checkpoint is not that of" in answer["err"]

    found = session.run(
        "import evaluate\n"
        "from datasets import load_dataset\n"
        "from mm_prm.data import MMK12\n"
        "from mm_prm.inference import Scorer\n"
        "problems = MMK12.from_hub('me/trees')\n"
        "places = {problem_id: place for place, problem_id in enumerate(problems['id'])}\n"
        "pools = load_dataset('me/trees', 'pools', split='train')\n"
        "scores = Scorer.from_pretrained('me/prm', dtype='float32', device='cpu').score(\n"
        "    [problems[places[name]] for name in pools['problem_id']], pools['candidates'])\n"
        "columns = {name: pools[name][:] for name in ('correct', 'answers', 'candidates')}\n"
        "figures = evaluate.load('me/best_of_n').compute(**columns, step_scores=scores)\n"
        "result = [figures['best_of_n'], load_dataset('me/trees', 'trees', split='train')['problem_id'][:]]"
    )
    own = {name: entry["value"] for name, entry in results["prm_after"].items()}
    assert {name: entry["value"] for name, entry in found[0].items()} == pytest.approx(own)
    assert len(found[1]) == SIZE["num_problems"]


def test_a_second_run_reuses_what_is_done(first, monkeypatch):
    folder, results = first
    # (The identity of a policy counts the defaults of `__init__`, which therefore stays.)
    for opened, name in (
        (TransformersPolicy, "from_pretrained"),
        (Scorer, "from_pretrained"),
        (PRMTrainer, "__init__"),
    ):
        monkeypatch.setattr(opened, name, _refuse)
    again = quickstart(folder)
    stages = {"annotate", "train", "sample", "score prm_before", "score prm_after", "score prm_shipped"}
    assert set(again["reused"]) == stages
    for name in ("pass@1", "majority", "prm_after", "prm_shipped"):
        assert again[name] == results[name]


def test_another_seed_reuses_nothing_that_depends_on_it(first, tmp_path):
    folder, _ = first
    shutil.copytree(folder, tmp_path / "copy")
    other = quickstart(tmp_path / "copy", "--seed=1")
    assert other["reused"] == []


def test_settings_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match="num_candidates = 0: give a number above 0"):
        QuickstartConfig(num_candidates=0)
    with pytest.raises(ValueError, match="rollout_budget = 4: does not cover the 8 rollouts"):
        QuickstartConfig(rollout_budget=4)


def test_an_output_that_is_a_file_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["quickstart", "--output_dir", str(tmp_path / "file")]) == 2
    assert "mm-prm quickstart: output_dir: " in (message := capsys.readouterr().err) and "file'" in message
