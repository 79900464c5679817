"""Adapters of process reward models load as the models do, with equal scores, and merge into stock checkpoints."""

import inspect
import json
import sys

import pytest
import torch
import transformers.integrations.peft
from transformers import AutoModelForImageTextToText, AutoModelForTokenClassification

from mm_prm.models import AutoModelForProcessReward, ProcessRewardMixin, modeling

from .tiny_architectures import REWARD_TOKEN_IDS, build_config, build_inputs

peft = pytest.importorskip("peft")

STEP_TOKEN_ID = 95
# transformers 5.17 cannot
LOADS_TRAINED_ROWS = "adapter_state_dict_load_map" in inspect.getsource(transformers.integrations.peft)

RECIPES = {
    "lora": {},
    "step token": {"trainable_token_indices": [STEP_TOKEN_ID]},
    "all three tokens": {
        "trainable_token_indices": {key: [STEP_TOKEN_ID, *REWARD_TOKEN_IDS] for key in ("embed_tokens", "lm_head")}
    },
    "whole head": {"modules_to_save": ["lm_head"]},
    "token classification": {"task_type": "TOKEN_CLS"},
    "causal language model": {"task_type": "CAUSAL_LM"},
}


@pytest.fixture(autouse=True)
def _code_cache(tmp_path, monkeypatch):
    # Code of repositories is copied there, and not where the user keeps it
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def _save_base(folder, tied=True):
    torch.manual_seed(0)
    model = AutoModelForProcessReward.from_config(build_config("qwen2_vl", tied))
    model.save_pretrained(folder)
    return str(folder)


def _inputs():
    inputs = build_inputs("qwen2_vl")
    inputs["input_ids"][:, 20] = STEP_TOKEN_ID
    return inputs


def _train(model, inputs):
    labels = torch.full(inputs["input_ids"].shape, torch.nan)
    labels[0, 20], labels[1, 20] = 1.0, 0.25
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    for _ in range(2):
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(before[name], parameter) for name, parameter in trained.items())


@torch.no_grad()
def _scores(model, inputs):
    return model.eval()(**inputs).logits[:, 20].softmax(-1)[:, 1]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_adapter_loads_and_merges_with_equal_scores(recipe, tied, tmp_path):
    base, inputs = _save_base(tmp_path / "base", tied), _inputs()
    untrained = AutoModelForProcessReward.from_pretrained(base)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian", **RECIPES[recipe])
    model = peft.get_peft_model(AutoModelForProcessReward.from_pretrained(base), config)
    _train(model, inputs)
    scores = _scores(model, inputs)
    assert (scores - _scores(untrained, inputs)).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")

    by_peft = peft.PeftModel.from_pretrained(AutoModelForProcessReward.from_pretrained(base), tmp_path / "adapter")
    assert torch.equal(_scores(by_peft, inputs), scores)
    if not LOADS_TRAINED_ROWS and RECIPES[recipe].keys() & {"trainable_token_indices", "modules_to_save"}:
        with pytest.raises(ValueError, match=r"weights of the adapter found no place.*PeftModel.from_pretrained"):
            AutoModelForProcessReward.from_pretrained(tmp_path / "adapter")
    else:
        by_path = AutoModelForProcessReward.from_pretrained(tmp_path / "adapter")
        by_code = AutoModelForTokenClassification.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
        assert not isinstance(by_code, ProcessRewardMixin)
        for loaded in (by_path, by_code):
            assert torch.equal(_scores(loaded, inputs), scores)

    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForProcessReward.from_pretrained(tmp_path / "merged")
    for each in (merged, reloaded):
        torch.testing.assert_close(_scores(each, inputs), scores, rtol=0, atol=1e-5)
    assert (tmp_path / "merged" / modeling.CODE_FILE).exists()
    with torch.no_grad():
        plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
        logits = plain(**inputs).logits[:, 20, list(REWARD_TOKEN_IDS)]
    assert [type(plain).__name__] == plain.config.architectures == ["Qwen2VLForConditionalGeneration"]
    torch.testing.assert_close(logits.softmax(-1)[:, 1], scores, rtol=0, atol=1e-5)


def test_a_model_with_a_loaded_adapter_saves_the_adapter_alone(tmp_path):
    base, inputs = _save_base(tmp_path / "base"), _inputs()
    model = AutoModelForProcessReward.from_pretrained(base)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json"}
    assert not (tmp_path / "adapter" / modeling.CODE_FILE).exists()
    assert not (tmp_path / "adapter" / "config.json").exists()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base
    loaded = AutoModelForProcessReward.from_pretrained(tmp_path / "adapter")
    assert torch.equal(_scores(loaded, inputs), _scores(model, inputs))


def test_lora_on_the_head_itself_is_refused(tmp_path):
    model = AutoModelForProcessReward.from_config(build_config("qwen2", False))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match=r"cannot be a target of peft.tuners.lora.*trainable_token_indices"):
        model(**build_inputs("qwen2"))


def test_an_adapter_of_a_model_that_was_never_saved_is_refused(tmp_path, tiny_vlm_path):
    # Rows of new tokens would be missing, and scores silently wrong
    adapter = _adapter_of(tiny_vlm_path, tmp_path)
    with pytest.raises(
        ValueError, match=r"is an adapter of '.*', which is no process reward model.*adapter_config.json"
    ):
        AutoModelForProcessReward.from_pretrained(adapter)


def test_an_adapter_whose_base_is_gone_names_both(tmp_path):
    adapter = _adapter_of(str(tmp_path / "gone"), tmp_path)
    with pytest.raises(OSError, match=r"'.*adapter' is an adapter of '.*gone'.*base_model_name_or_path"):
        AutoModelForProcessReward.from_pretrained(adapter)


def _adapter_of(base, folder):
    model = AutoModelForProcessReward.from_config(build_config("qwen2_vl", True))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"
