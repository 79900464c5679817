import pickle

import dill
import pytest
from datasets import Dataset, Features, Image, List
from datasets.fingerprint import Hasher

from mm_prm.annotation import AnnotationConfig, MCTSAnnotator, annotate, describe
from mm_prm.annotation.identity import checkpoint_digest, code_digest
from mm_prm.data.features import PROBLEM_FEATURES, TREE_FEATURES, validate_rows
from tests.annotation.scripted import ScriptedJudge, ScriptedPolicy, make_problem, open_policy

CONFIG = AnnotationConfig(num_rollouts=4, rollout_budget=40)


def make_annotator(**changes):
    arguments = {
        "policy": "scripted",
        "config": CONFIG,
        "policy_settings": {"p_wrong": 0.2},
        "open_policy": open_policy,
        "open_judge": ScriptedJudge,
    }
    return MCTSAnnotator(**{**arguments, **changes})


@pytest.fixture
def problems():
    rows = [make_problem(f"p{number}") for number in range(10)]
    rows[4]["answer"] = ""
    return Dataset.from_list(rows, features=PROBLEM_FEATURES)


def without_seconds(rows):
    return [{**row, "cost": {**row["cost"], "seconds": 0.0}} for row in rows]


def test_map_gives_the_rows_of_annotate_in_the_order_of_the_problems(problems, tmp_path):
    annotator = make_annotator(journal=tmp_path / "trees.journal.sqlite")
    trees = problems.map(
        annotator, batched=True, batch_size=4, remove_columns=problems.column_names, features=annotator.features
    )
    assert trees.features == TREE_FEATURES
    assert validate_rows("tree", trees) == 10
    assert trees["problem_id"] == problems["id"]
    assert [row["status"] for row in trees] == ["skipped" if number == 4 else "complete" for number in range(10)]
    identities = {
        "policy_identity": describe(open_policy, "scripted", {"p_wrong": 0.2}),
        "judge_identity": describe(ScriptedJudge, None, {}),
    }
    streamed = list(annotate(problems, ScriptedPolicy(p_wrong=0.2), ScriptedJudge(), CONFIG, **identities))
    streamed.sort(key=lambda row: int(row["problem_id"][1:]))
    assert without_seconds(trees) == without_seconds(Dataset.from_list(streamed, features=TREE_FEATURES))

    def never():
        raise AssertionError("the journal has all trees")

    shared = annotate(problems, never, never, CONFIG, journal=annotator.journal, **identities)
    shared = Dataset.from_list(sorted(shared, key=lambda row: int(row["problem_id"][1:])), features=TREE_FEATURES)
    assert without_seconds(shared) == without_seconds(trees)


def test_map_adds_only_new_columns(problems):
    annotator = make_annotator()
    annotated = problems.map(annotator, batched=True, features=Features({**problems.features, **annotator.features}))
    assert set(annotated.column_names) == set(PROBLEM_FEATURES) | set(TREE_FEATURES)
    assert annotated["question"] == problems["question"]


def test_an_image_that_is_none_gives_a_row_with_its_reason(tmp_path):
    path = tmp_path / "no.png"
    path.write_text("no image")
    features = Features({**PROBLEM_FEATURES, "images": List(Image(decode=False))})
    rows = [make_problem("a"), make_problem("b", images=[{"path": str(path), "bytes": None}])]
    annotator = make_annotator()
    problems = Dataset.from_list(rows, features=features)
    trees = problems.map(annotator, batched=True, remove_columns=problems.column_names, features=annotator.features)
    assert trees["status"] == ["complete", "failed"]
    assert "images[0] cannot be read" in trees["reason"][1]


def test_the_fingerprint_follows_from_the_settings(problems):
    annotator = make_annotator()
    fingerprint = Hasher.hash(annotator)
    assert Hasher.hash(make_annotator()) == fingerprint
    annotator(problems[:3])
    assert annotator._annotation is not None
    assert Hasher.hash(annotator) == fingerprint, "also after use"
    assert Hasher.hash(make_annotator(policy_settings={"p_wrong": 0.3})) != fingerprint
    assert Hasher.hash(make_annotator(config=AnnotationConfig(num_rollouts=4, rollout_budget=41))) != fingerprint
    used = make_annotator()
    first = problems.map(used, batched=True, features=Features({**problems.features, **TREE_FEATURES}))
    again = problems.map(used, batched=True, features=Features({**problems.features, **TREE_FEATURES}))
    assert first._fingerprint == again._fingerprint


@pytest.mark.parametrize("module", [pickle, dill])
def test_it_pickles_as_its_settings(problems, module):
    annotator = make_annotator()
    before = module.dumps(annotator)
    rows = annotator(problems[:3])
    assert module.dumps(annotator) == before
    copy = module.loads(before)
    assert [len(nodes) for nodes in copy(problems[:3])["nodes"]] == [len(nodes) for nodes in rows["nodes"]]


def test_several_processes_are_refused_with_the_reason(problems):
    with pytest.raises(RuntimeError, match=r"MCTSAnnotator runs in one process.*Leave num_proc out of `map`"):
        problems.map(make_annotator(), batched=True, num_proc=2)


def test_a_checkpoint_counts_by_its_content(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = checkpoint_digest(tmp_path)
    (tmp_path / "README.md").write_text("a card")
    assert checkpoint_digest(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert checkpoint_digest(tmp_path) != first
    assert describe(open_policy, tmp_path, {}) != describe(open_policy, tmp_path, {"temperature": 1.0})
    assert "Qwen/Qwen2.5-VL" in describe(open_policy, "Qwen/Qwen2.5-VL", {})


@pytest.mark.parametrize("config", ["config.json", "adapter_config.json"])
def test_a_name_on_the_hub_counts_by_its_revision(tmp_path, monkeypatch, config):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--me--policy"
    identities = []
    for commit in ("1" * 40, "2" * 40):
        for file, text in ((f"snapshots/{commit}/{config}", "{}"), ("refs/main", commit)):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        identities.append(describe(open_policy, "me/policy", {}))
        assert commit in identities[-1]
    assert identities[0] != identities[1]


def test_a_setting_left_out_is_its_default_and_where_it_runs_does_not_count(tmp_path):
    from mm_prm.commands.annotate import AnnotateSettings
    from mm_prm.judges import RulesJudge
    from mm_prm.policies.transformers import TransformersPolicy

    opener = TransformersPolicy.from_pretrained
    plain = describe(opener, tmp_path, {"dtype": "float32"})
    assert plain == describe(opener, tmp_path, {"dtype": "float32", "temperature": 1.0, "batch_size": 7})
    assert plain == describe(opener, tmp_path, {"dtype": "float32", "device": "cuda"})
    assert plain != describe(opener, tmp_path, {"dtype": "float32", "temperature": 0.9})
    assert plain != describe(opener, tmp_path, {"dtype": "bfloat16"})

    # The command line and the map stage, both with nothing but defaults, are the same policy and the same judge.
    of_command = AnnotateSettings(problems="", output="")
    of_stage = MCTSAnnotator("mini-policy")._open()
    assert of_stage._policy_identity == of_command.policy_identity()
    assert of_stage._judge_identity == of_command.judge_identity()
    assert "math-verify" in of_command.judge_identity() and "float32" in of_command.policy_identity()
    assert (
        of_command.policy_identity()
        == AnnotateSettings(problems="", output="", policy_dtype="float32").policy_identity()
    )
    assert describe(RulesJudge, None, {}) == describe(RulesJudge, None, {"timeout_seconds": 5.0})

    def with_vllm(**settings):
        return AnnotateSettings(problems="", output="", policy_engine="vllm", **settings).policy_identity()

    assert with_vllm() == with_vllm(policy_gpu_memory_utilization=0.5) != with_vllm(policy_max_model_len=512)
    assert with_vllm() == with_vllm(policy_num_engines=2)


def test_code_counts(tmp_path, monkeypatch):
    package = tmp_path / "my_judges"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "rules.py").write_text("class Judge:\n    def judge(self, problem, solution): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    from my_judges.rules import Judge

    first = describe(Judge, None, {})
    assert describe(Judge, None, {}) == first
    (package / "helper.py").write_text("1\n")
    code_digest.cache_clear()
    assert describe(Judge, None, {}) != first
