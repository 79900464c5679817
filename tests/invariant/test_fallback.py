"""Architectures that cannot read packed rows say so by name and give the numbers of `packing: none`."""

import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config
from transformers.utils import logging as transformers_logging

from mm_prm.inference import Scorer
from mm_prm.models import AutoModelForProcessReward, ProcessRewardProcessor, TreePacker, use_flex_attention
from mm_prm.trainer import PRMConfig, PRMTrainer
from mm_prm.trainer.batches import settle_packing

from ..trainer.packings import build_prm, one_step, tree_rows


def test_sliding_windows_fall_back_in_training_and_scoring(tmp_path, caplog):
    path, rows = build_prm("gemma2", tmp_path), tree_rows("gemma2")
    reason = "'gemma2' models have layers that do not attend to all tokens (sliding_attention)"
    expected = one_step(path, rows, tmp_path, per_device_train_batch_size=12)
    transformers_logging.enable_propagation()
    for packing, max_tokens in [("rows", 400), ("tree", None)]:
        caplog.clear()
        found = one_step(path, rows, tmp_path, per_device_train_batch_size=12, packing=packing, max_tokens=max_tokens)
        assert f"{reason}: packing = {packing!r} falls back to 'none'" in caplog.text
        assert found[0]["loss"] == expected[0]["loss"] and found[0]["tokens_saved_by_packing"] == 0
        assert all((found[1][name] == gradient).all() for name, gradient in expected[1].items())
    transformers_logging.disable_propagation()

    model, processor = AutoModelForProcessReward.from_pretrained(path), ProcessRewardProcessor.from_pretrained(path)
    with pytest.raises(ValueError, match="sliding_attention"):
        TreePacker(model, processor)
    problems = [{"id": "1", "question": rows[0]["prompt"], "images": []}]
    candidates = [[row["completions"] for row in rows[:3]]]
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        scores = Scorer(model, processor).score(problems, candidates)
        assert f"{reason}; " in caplog.text
    for steps, found in zip(candidates[0], scores[0], strict=True):
        inputs = processor(problems, [steps])
        alone = model(**inputs).logits.softmax(-1)[..., 1][inputs["step_mask"]].tolist()
        assert found == pytest.approx(alone, abs=1e-5)


def test_packing_is_settled_before_a_model_init_makes_its_models(tmp_path):
    path = build_prm("gemma2", tmp_path)
    args = PRMConfig(str(tmp_path), packing="tree", max_tokens=300, use_cpu=True, report_to="none")
    trainer = PRMTrainer(
        model_init=lambda: AutoModelForProcessReward.from_pretrained(path),
        args=args,
        train_dataset=tree_rows("gemma2"),
    )
    assert (trainer.args.packing, trainer.args.max_tokens, trainer.data_collator.packer) == ("none", None, None)


@pytest.mark.parametrize(
    ("device", "kwargs", "implementation"),
    [
        ("cuda", None, "flex_for_block_masks"),
        ("cuda", {"dtype": "float32"}, "flex_for_block_masks"),
        ("cuda", {"attn_implementation": "sdpa"}, "sdpa"),
        ("cpu", None, "sdpa"),
    ],
)
def test_a_gpu_gets_flex_attention_unless_another_is_named(tiny_prm_path, device, kwargs, implementation):
    model = AutoModelForProcessReward.from_pretrained(tiny_prm_path)
    vision = model.model.visual.config._attn_implementation
    settle_packing(model, SimpleNamespace(packing="rows", device=torch.device(device), model_init_kwargs=kwargs))
    assert model.config.text_config._attn_implementation == implementation
    assert model.model.visual.config._attn_implementation == vision and model.config._attn_implementation == "sdpa"
    unpacked = AutoModelForProcessReward.from_pretrained(tiny_prm_path)
    settle_packing(unpacked, SimpleNamespace(packing="none", device=torch.device("cuda"), model_init_kwargs=None))
    assert unpacked.config.text_config._attn_implementation == "sdpa"


def test_small_heads_stay_with_sdpa():
    def implementation(**heads):
        config = Qwen2Config(vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=1, **heads)
        config.reward_token_ids = [7, 3]
        return use_flex_attention(AutoModelForProcessReward.from_config(config)).config._attn_implementation

    assert implementation(num_attention_heads=4, num_key_value_heads=2) == "sdpa"
    assert implementation(num_attention_heads=2, num_key_value_heads=2, head_dim=8) == "sdpa"
    assert implementation(num_attention_heads=2, num_key_value_heads=2) == "flex_for_block_masks"
    assert implementation(num_attention_heads=4, num_key_value_heads=2, head_dim=16) == "flex_for_block_masks"


def test_attention_with_dropout_stays_with_sdpa(tiny_prm_path):
    model = AutoModelForProcessReward.from_pretrained(tiny_prm_path)
    model.config.text_config.attention_dropout = 0.1
    assert use_flex_attention(model).config.text_config._attn_implementation == "sdpa"
