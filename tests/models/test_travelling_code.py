import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForTokenClassification

from mm_prm.hub import model_card
from mm_prm.models import AutoModelForProcessReward, ProcessRewardMixin, ProcessRewardProcessor, modeling

from ..testing_utils import tiny_problem
from .tiny_architectures import TEXT_ONLY, build_config, build_inputs

ARCHITECTURES = ("gemma3", "internvl", "llama", "qwen2_vl")

# Runs where mm_prm cannot be imported: loads each repository, compares its logits with those saved beside it, computes
# step scores from what config.json says, and saves it again.
_PROGRAM = """
import json, sys, torch
from pathlib import Path
sys.modules["mm_prm"] = None
from transformers import AutoModelForTokenClassification

results = {}
for repository in map(Path, sys.argv[1:]):
    model = AutoModelForTokenClassification.from_pretrained(repository, trust_remote_code=True)
    reference = torch.load(repository / "reference.pt")
    with torch.no_grad():
        outputs = model(**reference["inputs"], labels=reference["labels"])
    at_steps = reference["inputs"]["input_ids"] == model.config.step_token_id
    scores = outputs.logits.softmax(-1)[at_steps][:, 1]
    model.save_pretrained(repository / "again")
    AutoModelForTokenClassification.from_pretrained(repository / "again", trust_remote_code=True)
    built = AutoModelForTokenClassification.from_config(model.config, trust_remote_code=True)
    results[repository.name] = {
        "logits_equal": torch.equal(outputs.logits, reference["logits"]),
        "loss_equal": torch.equal(outputs.loss, reference["loss"]),
        "scores": scores.tolist(),
        "dtype": str(model.dtype),
        "class": type(model).__name__,
        "id2label": model.config.id2label,
        "built": type(built).__name__,
    }
print(json.dumps(results))
"""


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory, tiny_prm_path) -> Path:
    """Sharded repositories of several architectures, with logits, all loaded and saved again where mm_prm is missing."""
    root = tmp_path_factory.mktemp("repositories")
    for architecture in ARCHITECTURES:
        torch.manual_seed(0)
        config = build_config(architecture, tied=architecture != "llama")
        config.step_token_id = 95
        config.id2label = {0: "wrong", 1: "right"}
        model = AutoModelForProcessReward.from_config(config).eval()
        if architecture == "internvl":
            model.to(torch.bfloat16)
        model.save_pretrained(root / architecture, max_shard_size="20KB")
        inputs = build_inputs(architecture)
        inputs["input_ids"][:, 20] = inputs["input_ids"][0, 14] = 95
        _save_reference(root / architecture, inputs)
    model = AutoModelForProcessReward.from_pretrained(tiny_prm_path)
    model.save_pretrained(root / "tiny_prm")
    processor = ProcessRewardProcessor.from_pretrained(tiny_prm_path)
    steps = [["7 - 3 = 4.", "The answer is 4."], ["The answer is 5."]]
    _save_reference(root / "tiny_prm", dict(processor([tiny_problem(1, 2), tiny_problem(2)], steps)))

    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "PYTHONPATH": ""}
    folders = [str(root / name) for name in (*ARCHITECTURES, "tiny_prm")]
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *folders], env=environment, cwd=root, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    (root / "results.json").write_text(run.stdout.splitlines()[-1])
    return root


def _save_reference(folder: Path, inputs: dict[str, torch.Tensor]) -> None:
    model = AutoModelForProcessReward.from_pretrained(folder)
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items() if k != "step_mask"}
    labels = torch.full(inputs["input_ids"].shape, torch.nan)
    labels[inputs["input_ids"] == model.config.step_token_id] = 0.75
    with torch.no_grad():
        outputs = model(**inputs, labels=labels)
    reference = {"inputs": inputs, "labels": labels, "logits": outputs.logits, "loss": outputs.loss}
    torch.save(reference, folder / "reference.pt")


@pytest.mark.parametrize("name", [*ARCHITECTURES, "tiny_prm"])
def test_without_mm_prm_the_logits_and_scores_are_the_same(name, repositories):
    result = json.loads((repositories / "results.json").read_text())[name]
    reference = torch.load(repositories / name / "reference.pt")
    config = json.loads((repositories / name / "config.json").read_text())
    at_steps = reference["inputs"]["input_ids"] == config["step_token_id"]
    assert result["logits_equal"]
    assert result["loss_equal"]
    assert result["scores"] == reference["logits"].softmax(-1)[at_steps][:, 1].tolist()
    assert len(result["scores"]) == 3
    assert result["dtype"] == ("torch.bfloat16" if name == "internvl" else "torch.float32")
    assert [result["class"]] == [result["built"]] == config["architectures"]
    assert result["id2label"] == {"0": "wrong", "1": "right"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_code_class_name_and_weights_travel_on(name, repositories):
    folder = repositories / name
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    source = Path(modeling.__file__).read_bytes()
    code = {"AutoModelForTokenClassification": "modeling_process_reward.ProcessRewardModel"}
    kept = ("architectures", "id2label", "model_type", "reward_token_ids", "step_token_id")
    configs = []
    for saved in (folder, folder / "again"):
        assert (saved / modeling.CODE_FILE).read_bytes() == source
        configs.append(json.loads((saved / "config.json").read_text()))
        assert configs[-1]["auto_map"] == code
    assert {key: configs[0][key] for key in kept} == {key: configs[1][key] for key in kept}
    before, after = _weights(folder), _weights(folder / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) and value.dtype == after[key].dtype for key, value in before.items())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_repository_is_the_plain_model_too(name, repositories):
    auto_class = AutoModelForCausalLM if name in TEXT_ONLY else AutoModelForImageTextToText
    model = AutoModelForProcessReward.from_pretrained(repositories / name)
    for folder in (repositories / name, repositories / name / "again"):
        plain = auto_class.from_pretrained(folder)
        assert not isinstance(plain, ProcessRewardMixin)
        assert [type(plain).__name__] == plain.config.architectures
        assert plain.state_dict().keys() == model.state_dict().keys()
        for key, value in plain.state_dict().items():
            assert torch.equal(value, model.state_dict()[key])
            assert value.dtype == model.state_dict()[key].dtype


def test_dtype_is_that_of_the_file_unless_asked_for(repositories):
    assert AutoModelForProcessReward.from_pretrained(repositories / "internvl").dtype == torch.bfloat16
    assert AutoModelForProcessReward.from_pretrained(repositories / "internvl", dtype="float32").dtype == torch.float32
    assert AutoModelForProcessReward.from_pretrained(repositories / "llama").dtype == torch.float32


def test_the_code_imports_nothing_but_torch_transformers_and_the_standard_library():
    tree = ast.parse(Path(modeling.__file__).read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_a_text_model_loaded_without_trust_is_not_the_reward_model_and_the_card_says_so(repositories):
    model = AutoModelForTokenClassification.from_pretrained(repositories / "llama")
    assert type(model).__name__ == "LlamaForTokenClassification"
    warning = "Without `trust_remote_code=True` this line loads a stock token classifier whose head is random."
    assert warning in model_card("prm", reads_images=False).text
    card = model_card("prm").text
    assert warning not in card
    assert 'AutoModelForTokenClassification.from_pretrained("prm", trust_remote_code=True)' in card


@pytest.mark.parametrize("method", ["push_to_hub", "save_pretrained"])
def test_pushing_uploads_all_files(method, repositories, tmp_path, monkeypatch):
    commits = []

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return type("Url", (), {"repo_id": repo_id})

        def create_commit(self, *, repo_id, operations, **kwargs):
            commits.append({operation.path_in_repo for operation in operations})

    for module in ("transformers.modeling_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.hf_api", Hub, raising=False)
        monkeypatch.setattr(f"{module}.create_repo", Hub().create_repo, raising=False)
        monkeypatch.setattr(f"{module}.create_commit", Hub().create_commit, raising=False)
    model = AutoModelForProcessReward.from_pretrained(repositories / "llama")
    if method == "push_to_hub":
        model.push_to_hub("someone/prm", max_shard_size="50KB")
    else:
        model.save_pretrained(tmp_path / "prm", push_to_hub=True, repo_id="someone/prm", max_shard_size="50KB")
    [files] = commits
    assert {"config.json", modeling.CODE_FILE, "model.safetensors.index.json", "README.md"} <= files
    assert any(file.startswith("model-00002-of-") for file in files)
