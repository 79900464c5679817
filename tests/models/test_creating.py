import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mm_prm.models import (
    AutoModelForProcessReward,
    ProcessRewardProcessor,
    create_process_reward_model,
    prepare_model_for_process_reward,
)

from ..testing_utils import build_tiny_vlm, tiny_problem

STEPS = ["Bar A shows 7.", "The answer is 4."]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_new_tokens_get_rows_of_their_own_and_nothing_else_changes(tied, tmp_path):
    path = build_tiny_vlm(tmp_path, tie_word_embeddings=tied)
    policy = AutoModelForImageTextToText.from_pretrained(path)
    model, processor = create_process_reward_model(path)
    token_ids = [processor.step_token_id, *processor.reward_token_ids]
    assert token_ids == [400, 401, 402]
    for before, after in [
        (policy.get_input_embeddings(), model.get_input_embeddings()),
        (policy.get_output_embeddings(), model.get_output_embeddings()),
    ]:
        old, new = before.weight, after.weight
        assert new.shape == (403, 32)
        assert torch.equal(old, new[:400])
        rows = new[token_ids]
        cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
        assert cosines.fill_diagonal_(0).abs().max() < 0.7
        assert 0.5 < rows.std() / old.std() < 2
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    for name, value in policy.state_dict().items():
        if "embed_tokens" not in name and "lm_head" not in name:
            assert torch.equal(value, model.state_dict()[name]), name


def test_the_same_seed_draws_the_same_rows(tiny_vlm_path):
    first, second, third = (create_process_reward_model(tiny_vlm_path, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first.get_input_embeddings().weight, second.get_input_embeddings().weight)
    assert not torch.equal(first.get_input_embeddings().weight, third.get_input_embeddings().weight)


def test_rows_that_have_collapsed_are_drawn_anew(tiny_vlm_path, tmp_path):
    policy = AutoModelForImageTextToText.from_pretrained(tiny_vlm_path)
    plain = AutoProcessor.from_pretrained(tiny_vlm_path)
    # Tokens that the policy knows and has never seen in training end up at the same place
    plain.tokenizer.add_tokens(["<prm>", "No", "Yes"], special_tokens=True)
    policy.resize_token_embeddings(len(plain.tokenizer), mean_resizing=False)
    weight = policy.get_input_embeddings().weight
    with torch.no_grad():
        weight[400:403] = weight[5] * 3 + 1e-4 * torch.randn(3, 32)
    before = weight.detach().clone()
    policy.save_pretrained(tmp_path)
    plain.save_pretrained(tmp_path)

    model, processor = create_process_reward_model(tmp_path)
    assert (processor.step_token_id, *processor.reward_token_ids) == (400, 401, 402)
    after = model.get_input_embeddings().weight
    assert torch.equal(after[:400], before[:400])
    cosines = torch.nn.functional.cosine_similarity(after[400:, None], after[None, 400:], dim=-1)
    assert cosines.fill_diagonal_(0).abs().max() < 0.7


def test_rows_that_are_told_apart_are_kept(tiny_prm_path):
    saved = AutoModelForProcessReward.from_pretrained(tiny_prm_path)
    model, processor = create_process_reward_model(tiny_prm_path)
    assert processor.added_token_ids == ()
    assert torch.equal(model.get_input_embeddings().weight, saved.get_input_embeddings().weight)


def test_spare_rows_of_the_checkpoint_are_used_before_it_is_resized(tiny_vlm_path):
    # Checkpoints often have more rows than their tokenizer has tokens; those rows hold leftovers
    policy = AutoModelForImageTextToText.from_pretrained(tiny_vlm_path)
    policy.resize_token_embeddings(448, mean_resizing=False)
    with torch.no_grad():
        policy.get_input_embeddings().weight[400:] = 0
    processor = ProcessRewardProcessor.from_processor(AutoProcessor.from_pretrained(tiny_vlm_path))
    model = prepare_model_for_process_reward(policy, processor)
    assert model is policy
    weight = model.get_input_embeddings().weight
    assert weight.shape[0] == 448
    assert (weight[400:403].std(dim=-1) > 0).all()
    assert torch.equal(weight[403:], torch.zeros(45, 32))


def test_saved_checkpoint_is_the_plain_model_with_a_few_keys(tiny_vlm_path, tmp_path):
    model, processor = create_process_reward_model(tiny_vlm_path)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert config["step_token_id"] == processor.step_token_id
    assert config["reward_token_ids"] == list(processor.reward_token_ids)
    assert config["classifier_from_token"] == ["No", "Yes"]
    assert config["method"] == "no_post_processing"
    assert config["id2label"] == {"0": "wrong", "1": "right"}

    loaded = AutoModelForProcessReward.from_pretrained(tmp_path)
    assert loaded.config.num_labels == 2
    batch = processor([tiny_problem(1)], [STEPS])
    assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)

    # The same folder is a policy
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path)
    plain = AutoProcessor.from_pretrained(tmp_path)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in stock.state_dict().items())
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How much?"}]}]
    prompt = plain.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = plain(text=[prompt], images=tiny_problem(1)["images"], return_tensors="pt")
    assert stock.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]

    # And it stays one when it is saved again, from either class
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {key: again[key] for key in config if key != "transformers_version"} == {
        key: value for key, value in config.items() if key != "transformers_version"
    }


def test_dtype_is_kept(tiny_vlm_path, tmp_path):
    model, _ = create_process_reward_model(tiny_vlm_path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert AutoModelForProcessReward.from_pretrained(tmp_path).dtype == torch.bfloat16
