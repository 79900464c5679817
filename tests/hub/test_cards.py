"""Cards: metadata that hold whatever the values are, text that shows them, and code on the card that runs."""

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard
from markdown_it import MarkdownIt

from mm_prm.data.features import TREE_FEATURES
from mm_prm.hub import best_of_n_results, dataset_card, eval_result, model_card
from mm_prm.hub.models import model_upload
from mm_prm.metrics.best_of_n.best_of_n import BestOfN
from mm_prm.trainer import PRMConfig, PRMTrainer
from tests.testing_utils import tiny_image

MINI = {"dataset_type": "mini", "dataset_name": "mini world", "dataset_split": "test"}
HOSTILE = 'x"\n---\n# Owned\n- `a|b` <script>alert(1)</script> {{ 7 * 7 }} [link](https://evil.example): no #'


def code_of(card) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", card.text, flags=re.DOTALL | re.MULTILINE))


@pytest.fixture
def tree() -> dict:
    def node(node_id, parent_id, steps, num_right, num_judged):
        kind = "measured" if steps else "root"
        return {
            "node_id": node_id,
            "parent_id": parent_id,
            "steps": steps,
            "num_right": num_right,
            "num_judged": num_judged,
            "visits": 1,
            "kind": kind,
        }

    rollout = {"node_id": 0, "steps": ["The answer is 4."], "verdict": "right", "status": "finished"}
    policy = {"checkpoint": "abc", "settings": {"temperature": 1.0}}
    return {
        "problem_id": "p1",
        "nodes": [node(0, -1, [], 1, 2), node(1, 0, ["7 - 3 = 5."], 0, 0)],
        "rollouts": [rollout, {**rollout, "steps": ["The answer is 5."], "verdict": "wrong"}],
        "strategy": "omegaprm",
        "settings": json.dumps({"num_rollouts": 2, "policy": json.dumps(policy)}),
        "cost": {"rollouts": 2, "prompt_tokens": 30, "generated_tokens": 1500, "judge_calls": 2, "seconds": 1.6},
        "status": "complete",
        "reason": "",
    }


def test_metadata_say_what_was_given():
    card = model_card(
        "my-prm",
        base_model="Qwen/Qwen2.5-VL-3B-Instruct",
        datasets=["owner/trees", "local trees"],
        license="apache-2.0",
        tags=["mini", "mm-prm"],
        eval_results=[eval_result("mean pass@1", {"value": 0.41237, "low": 0.4, "high": 0.43}, **MINI)],
    )
    data = yaml.safe_load(str(card).split("---\n")[1])
    results = data.pop("model-index")
    assert data == {
        "base_model": "Qwen/Qwen2.5-VL-3B-Instruct",
        "datasets": ["owner/trees"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mm-prm", "process-reward-model", "mini"],
    }
    assert results[0]["name"] == "my-prm"
    (result,) = results[0]["results"]
    assert result["dataset"] == {"name": "mini world", "type": "mini", "split": "test"}
    (metric,) = result["metrics"]
    assert metric == {
        "type": "accuracy",
        "name": "mean pass@1",
        "value": 0.4124,
        "args": {"low": 0.4, "high": 0.43, "confidence": 0.95},
    }
    assert "[owner/trees](https://huggingface.co/datasets/owner/trees), local trees." in card.text
    assert "| mean pass@1 | 0.412 (0.400–0.430) |" in card.text


def test_sections_without_content_are_left_out():
    card = model_card("my-prm")
    assert "## Training" not in card.text
    assert "## Evaluation" not in card.text
    assert "model-index" not in str(card) and "model_name" not in str(card)
    assert "Not stated." in card.text
    assert "\n\n\n" not in card.text
    assert str(card).endswith("```\n")


def test_hostile_values_break_neither_metadata_nor_text(tmp_path, tree):
    result = eval_result(HOSTILE, 0.5, dataset_type=HOSTILE, dataset_name=HOSTILE, dataset_split=HOSTILE)
    model_card(
        HOSTILE,
        base_model=HOSTILE,
        datasets=[HOSTILE],
        license=HOSTILE,
        tags=[HOSTILE],
        settings={HOSTILE: HOSTILE, "fence": "\n````\n# Owned"},
        eval_results=[result],
    ).save(tmp_path / "model.md")
    model = ModelCard.load(tmp_path / "model.md")
    assert model.data.license == HOSTILE
    assert model.data.tags[-1] == HOSTILE
    assert model.data.eval_results == [result]

    tree["settings"] = json.dumps({"note": HOSTILE})
    dataset_card(
        HOSTILE, [tree], data_files={HOSTILE: HOSTILE}, license=HOSTILE, usage=f"'''\n```\n{HOSTILE}\n'''"
    ).save(tmp_path / "data.md")
    data = DatasetCard.load(tmp_path / "data.md")
    assert data.data.pretty_name == HOSTILE

    for card, table_rows in ((model, 2), (data, 15)):
        tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
        titles = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
        assert "Owned" not in "".join(titles[1:])
        parts = [part for token in tokens for part in token.children or []]
        links = {part.attrs["href"] for part in parts if part.type == "link_open"}
        assert links == {"https://arxiv.org/abs/2505.13427"}
        assert not [part for part in (*tokens, *parts) if part.type.startswith("html")]
        assert sum(token.type == "tr_open" for token in tokens) == table_rows
        # The text is there as it was, but for its line breaks
        shown = "".join(part.content for part in parts if part.type == "text")
        assert " ".join(HOSTILE.split()) in shown


def test_code_of_a_process_reward_model_runs(tiny_prm_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_image(1).save("bars.png")
    values: dict = {}
    exec(code_of(model_card("tiny", model_id=tiny_prm_path)), values)
    assert [len(scores) for scores in values["scores"]] == [2, 2]
    assert values["best"] in (0, 1)
    expected = [score for scores in values["scores"] for score in scores]
    assert values["step_scores"].tolist() == pytest.approx(expected, abs=1e-5)


def test_code_of_a_policy_runs(tiny_vlm_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_image(1).save("bars.png")
    values: dict = {}
    code = code_of(model_card("tiny", "policy", model_id=tiny_vlm_path))
    exec(code.replace("from_pretrained(", "from_pretrained(max_new_tokens=4, path="), values)
    assert len(values["solutions"]) == 4


def test_code_without_images():
    for kind in ("process-reward-model", "policy"):
        code = code_of(model_card("text", kind, reads_images=False))
        compile(code, kind, "exec")
        assert "PIL" not in code and '"images": []' in code


def test_the_card_says_what_kind_of_model_it_is():
    assert "of a stock vision-language model," in model_card("vlm").text
    assert "of a stock language model," in model_card("text", reads_images=False).text


def test_card_of_trees_lets_datasets_find_them(tmp_path, tree, monkeypatch):
    from datasets import Dataset

    trees = [tree, {**tree, "problem_id": "p2", "status": "failed", "reason": "broken"}]
    Dataset.from_list(trees, features=TREE_FEATURES).to_parquet(str(tmp_path / "all.parquet"))
    card = dataset_card("trees", trees, data_files={"trees": "all.parquet"}, dataset_id=str(tmp_path))
    card.save(tmp_path / "README.md")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    values: dict = {}
    exec(code_of(card), values)
    assert values["trees"]["problem_id"][:] == ["p1", "p2"]
    assert values["counts"]["trees"] == 2
    assert "| 2, 1 of them complete |" in card.text
    assert "| measured prefixes | 2 |" in card.text
    assert "| 2 right, 2 wrong, 0 unknown |" in card.text
    assert "| 60 of prompts, 3,000 generated |" in card.text
    settings = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", card.text, flags=re.DOTALL)]
    assert settings == [{"num_rollouts": 2, "policy": {"checkpoint": "abc", "settings": {"temperature": 1.0}}}]
    assert card.data.size_categories == ["n<1K"]


def test_figures_of_the_metric():
    results = BestOfN().compute(
        correct=[[True, False], [False, False]],
        step_scores=[[[0.9, 0.8], [0.9, 0.1]], [[0.5], [0.2]]],
        answers=[["4", "5"], ["1", "2"]],
    )
    figures = {figure.metric_name: figure for figure in best_of_n_results(results, "min", **MINI)}
    assert {name: figure.metric_value for name, figure in figures.items()} == {
        "mean pass@1": 0.25,
        "uninformative verifier": 0.25,
        "majority vote of 2": 0.5,
        "Best-of-2 (min)": 0.5,
        "weighted vote of 2 (min)": 0.5,
        "oracle of 2": 0.5,
    }
    assert figures["Best-of-2 (min)"].metric_args == {"low": 0.0, "high": 1.0, "confidence": 0.95}
    # A sum of logits is no weight of a vote
    assert "weighted vote of 2 (sum_logit)" not in [
        figure.metric_name for figure in best_of_n_results(results, "sum_logit", **MINI)
    ]


def test_a_figure_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="AUC on mini world, test: value = nan"):
        eval_result("AUC", float("nan"), **MINI, metric_type="roc_auc")


def test_card_of_a_training(tiny_prm_path, tmp_path):
    args = PRMConfig(
        str(tmp_path / "my-prm"), use_cpu=True, bf16=False, report_to="none", hub_token="hf_secret", learning_rate=3e-4
    )
    trainer = PRMTrainer(tiny_prm_path, args)
    trainer.create_model_card(dataset_name="owner/trees", tags="mini", license="mit")
    content = (tmp_path / "my-prm" / "README.md").read_text(encoding="utf-8")
    card = ModelCard(content)
    assert (card.data.license, card.data.datasets, card.data.base_model) == ("mit", ["owner/trees"], None)
    assert {"mm-prm", "process-reward-model", "mini"} <= set(card.data.tags)
    assert "# my-prm\n" in content and 'Scorer.from_pretrained("my-prm")' in content
    (settings,) = re.findall(r"```yaml\n(.*?)```", content, flags=re.DOTALL)
    assert yaml.safe_load(settings)["learning_rate"] == 3e-4
    # A local model is told by its folder's name; no place on this machine, and no secret
    assert f"Started from {Path(tiny_prm_path).name}." in content.replace("\\", "")
    assert str(Path(tiny_prm_path).parent) not in content and str(tmp_path) not in content
    assert "hf_secret" not in content


def test_settings_on_a_card_hold_neither_secrets_nor_local_paths_at_any_depth(tmp_path):
    kwargs = {"token": "hf_secret", "cache_dir": "models", "dtype": "bfloat16", "inner": {"api_key": "hf_secret"}}
    kwargs |= {"files": ["/home/me/a", "owner/b"], "config": str(tmp_path)}
    settings = {"learning_rate": 4e-6, "model_init_kwargs": kwargs, "push_to_hub_token": "hf_secret"}
    settings["lr_scheduler_kwargs"] = {"token": "hf_secret"}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"")
    card = model_upload(tmp_path, "me/prm").files["README.md"].decode()
    (shown,) = re.findall(r"```yaml\n(.*?)```", card, flags=re.DOTALL)
    assert yaml.safe_load(shown) == {
        "learning_rate": 4e-6,
        "model_init_kwargs": {"dtype": "bfloat16", "inner": {}, "files": ["owner/b"]},
    }
    assert not [word for word in ("hf_secret", "/home/me", "cache_dir", str(tmp_path)) if word in card]


def test_a_checkout_on_the_path_finds_its_templates(tmp_path):
    program = "from mm_prm.hub import model_card; print(model_card('away').text.split()[1])"
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {[str(root), *sys.path]!r}; {program}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (0, "away\n"), run.stderr
