"""Architectures that cannot read packed rows say so by name and give the numbers of `packing: none`."""

import logging

import pytest
from transformers.utils import logging as transformers_logging

from mm_prm.inference import Scorer
from mm_prm.models import AutoModelForProcessReward, ProcessRewardProcessor, TreePacker

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
