"""Rows padded, rows one behind another and rows as trees give one loss and one gradient, in every family that can."""

import pytest

from mm_prm.models import ProcessRewardProcessor

from ..trainer.packings import assert_same_step, build_prm, one_step, tree_rows

ARCHITECTURES = ["qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "qwen2", "idefics3", "llava_onevision"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packings_agree(architecture, tmp_path):
    if architecture == "smolvlm":
        pytest.importorskip("num2words", reason="SmolVLM's processor needs num2words")
    model, rows = build_prm(architecture, tmp_path), tree_rows(architecture)
    expected = one_step(model, rows, tmp_path, per_device_train_batch_size=12)
    assert expected[0]["tokens_saved_by_packing"] == 0
    processor = ProcessRewardProcessor.from_pretrained(model)
    problems = [{"question": row["prompt"], "images": row["images"]} for row in rows]
    longest = max(
        processor.num_tokens(*pair) for pair in zip(problems, [row["completions"] for row in rows], strict=True)
    )
    saved = {}
    # The last budget splits trees
    for packing, batch_size, max_tokens in [("rows", 12, 400), ("tree", 12, None), ("tree", 6, longest + 1)]:
        found = one_step(
            model,
            rows,
            tmp_path,
            packing=packing,
            max_tokens=max_tokens,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=12 // batch_size,
        )
        assert_same_step(found, expected, approx=pytest.approx)
        saved[packing, max_tokens] = found[0]["tokens_saved_by_packing"]
    assert saved["tree", None] > 0.2 and saved["rows", 400] == 0
    assert 0 <= saved["tree", longest + 1] < saved["tree", None]


@pytest.mark.parametrize("settings", [{"label_weighting": "num_judged"}, {"label_mode": "smoothed"}])
def test_weighted_and_smoothed_labels_of_packings_agree(settings, tmp_path):
    model, rows = build_prm("qwen2", tmp_path), tree_rows("qwen2")
    plain = one_step(model, rows, tmp_path, per_device_train_batch_size=12)
    expected = one_step(model, rows, tmp_path, per_device_train_batch_size=12, **settings)
    assert expected[0]["loss"] != pytest.approx(plain[0]["loss"], rel=1e-3)
    for packing in ("rows", "tree"):
        found = one_step(model, rows, tmp_path, per_device_train_batch_size=12, packing=packing, **settings)
        assert_same_step(found, expected, approx=pytest.approx)
