"""The cards of the embedded models and trees: figures of `results.json`, settings of the recipe, code that runs."""

import json
import random
import re
import shutil
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard

from mm_prm.data import RowConfig, mini, trees_to_rows
from mm_prm.embedded import embedded_path
from mm_prm.models import modeling
from tests.hub.test_cards import code_of

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "mini"


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(RECIPES))
    try:
        import cards
        import measure
    finally:
        sys.path.remove(str(RECIPES))
    return cards, measure


@pytest.fixture(scope="module")
def study(recipe, tmp_path_factory):
    """Results as the study writes them, of a few problems, trees, and models that score at random."""
    folder = tmp_path_factory.mktemp("study")
    for name in ("candidates", "scores", "rows", "trees"):
        (folder / name).mkdir()
    rng = random.Random(0)
    scores: dict[str, dict] = {"soft": {}, "hard": {}}
    for split in ("validation", "test", "test_ood", "test_swapped"):
        pools = []
        for index in range(4):
            problem = mini.problem(split.removesuffix("_swapped"), index)
            drawn = [problem.solution("right"), *(problem.sample_solution(rng)[1] for _ in range(3))]
            correct = [steps[-1] == drawn[0][-1] for steps in drawn]
            pool = {
                "problem_id": problem.id,
                "candidates": drawn,
                "answers": [s[-1] for s in drawn],
                "correct": correct,
            }
            pools.append(pool | {"logprobs": [-1.0] * 4, "num_tokens": [9] * 4, "greedy_correct": index == 0})
        if split != "test_swapped":
            (folder / "candidates" / f"{split}.json").write_text(json.dumps(pools))
        for name in scores:
            scores[name][split] = [[[rng.random() for _ in s] for s in pool["candidates"]] for pool in pools]
    # On validation `hard` picks a right candidate every time, so that it ships
    scores["hard"]["validation"] = [
        [[float(number == 0)] * len(steps) for number, steps in enumerate(pool)]
        for pool in scores["hard"]["validation"]
    ]
    for name, by_split in scores.items():
        (folder / "scores" / f"{name}.json").write_text(json.dumps(by_split))
    table = pyarrow.parquet.read_table(embedded_path("mini_trees.parquet")).slice(0, 6)
    report = trees_to_rows(table.to_pylist(), RowConfig())[1] | {"rollouts": 321}
    for strategy in ("omegaprm", "flat"):
        pyarrow.parquet.write_table(table, folder / "trees" / f"{strategy}.0.parquet")
    (folder / "rows" / "report.json").write_text(json.dumps({"omegaprm": report, "flat": report}))
    recipe[1].table(folder, folder)
    return json.loads((folder / "results.json").read_text()), folder


@pytest.fixture(scope="module")
def embedded(recipe, study, tiny_prm_path, tmp_path_factory):
    """A folder like `mm_prm/embedded` with its cards."""
    folder = tmp_path_factory.mktemp("embedded")
    shutil.copytree(embedded_path("mini_policy"), folder / "mini_policy", ignore=shutil.ignore_patterns("*.md"))
    shutil.copytree(tiny_prm_path, folder / "mini_prm")
    shutil.copy(study[1] / "trees" / "omegaprm.0.parquet", folder / "mini_trees.parquet")
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["cards.py", "--results", str(study[1] / "results.json"), "--embedded", str(folder)]
        patch.setattr(sys, "argv", arguments)
        recipe[0].main()
    return folder


def settings_of(card: ModelCard) -> dict:
    return yaml.safe_load(re.findall(r"```yaml\n(.*?)```", card.text, flags=re.DOTALL)[0])


def test_figures_are_those_of_the_study(study, embedded):
    results = study[0]
    model = results["models"]["hard"]
    for folder, name, entry in (
        ("mini_policy", "mean pass@1", model["test_ood"]["pass@1"]),
        ("mini_policy", "oracle of 16", model["test_ood"]["oracle"]),
        ("mini_prm", "Best-of-4 (min)", model["test_ood"]["best_of_n"]["min"]),
        ("mini_prm", "majority vote of 4", model["test_ood"]["majority"]),
    ):
        card = ModelCard.load(embedded / folder / "README.md")
        (figure,) = [
            each for each in card.data.eval_results if (each.metric_name, each.dataset_split) == (name, "test_ood")
        ]
        assert figure.metric_value == round(entry["value"], 4)
        interval = {"low": round(entry["low"], 4), "high": round(entry["high"], 4), "confidence": 0.95}
        assert figure.metric_args == interval
        assert f"{entry['value']:.3f} ({entry['low']:.3f}–{entry['high']:.3f})" in card.text
    gap = model["test"]["best_of_n"]["min"]["minus_pass@1"]
    text = ModelCard.load(embedded / "mini_prm" / "README.md").text
    assert f"minus mean pass@1 is {gap['value']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})" in text
    assert f"{model['steps']['within_problem_auc']:.3f} |" in text
    assert "321 in all" in text


def test_settings_are_those_of_the_run_that_ships(embedded):
    prm = ModelCard.load(embedded / "mini_prm" / "README.md")
    recipe = yaml.safe_load((RECIPES / "train.yaml").read_text())
    settings = settings_of(prm)
    assert settings["training"]["label_mode"] == "hard"  # as run.sh says, over train.yaml
    assert settings["training"]["learning_rate"] == recipe["learning_rate"]
    assert settings["annotation"]["rollout_budget"] == 80
    assert "outputs" not in prm.text
    assert "hard labels" in prm.text


def test_settings_of_the_policy_are_those_of_its_program(embedded):
    program = (RECIPES / "train_policy.py").read_text()
    defaults = dict(re.findall(r'"--(\w+)", type=\w+, default=([\d.e-]+)', program))
    policy = ModelCard.load(embedded / "mini_policy" / "README.md")
    settings = settings_of(policy)
    assert settings == {name: float(defaults[name]) for name in settings}
    assert "5,015,456 parameters" in policy.text


def test_an_unknown_run_is_refused(recipe):
    with pytest.raises(ValueError, match=r"shipped = 'nowhere': run\.sh has no such training run"):
        recipe[0].run_settings("nowhere")


def test_code_on_the_cards_runs(embedded, monkeypatch, tmp_path):
    monkeypatch.setattr("mm_prm.embedded.embedded_path", embedded.joinpath)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    values: dict = {}
    for card in (
        ModelCard.load(embedded / "mini_policy" / "README.md"),
        ModelCard.load(embedded / "mini_prm" / "README.md"),
        DatasetCard.load(embedded / "README.md"),
    ):
        exec(code_of(card), values)
    assert len(values["generation"].rollouts) == 16
    assert list(map(len, values["scores"])) == list(map(len, values["solutions"]))
    assert len(values["training_rows"]) == values["counts"]["rows"] > 0
    assert values["training_rows"][0]["images"]


@pytest.mark.skipif(not (RECIPES / "results.json").exists(), reason="the study's results are not in this checkout")
def test_the_shipped_cards_are_up_to_date(recipe):
    cards = recipe[0]
    results = json.loads((RECIPES / "results.json").read_text())
    folder = embedded_path("mini_policy").parent
    for written, path in (
        (cards.policy_card(results, folder / "mini_policy"), folder / "mini_policy"),
        (cards.prm_card(results, folder / "mini_prm"), folder / "mini_prm"),
        (cards.trees_card(results, folder / "mini_trees.parquet"), folder),
    ):
        shipped = type(written).load(path / "README.md")
        advice = "run `python recipes/mini/cards.py`"
        assert shipped.text.strip() == written.text.strip(), advice
        assert shipped.data.to_dict() == written.data.to_dict(), advice


def test_the_shipped_model_carries_the_code_of_this_version():
    carried = embedded_path("mini_prm") / "modeling_process_reward.py"
    assert carried.read_bytes() == Path(modeling.__file__).read_bytes(), "save mini_prm again (recipes/mini/ship.py)"
