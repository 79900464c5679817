"""Every family through its own processor and chat template: rows of all shapes, scored as the stock model does."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from mm_prm.models import (
    AutoModelForProcessReward,
    ProcessRewardMixin,
    ProcessRewardProcessor,
    create_process_reward_model,
)

from ..testing_utils import tiny_image
from .tiny_architectures import CONFIGS, TEXT_ONLY
from .tiny_processors import PROCESSORS

STEPS = ["Bar A shows 7.", "7 - 3 = 4.", "The answer is 4."]
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
ARCHITECTURES = pytest.mark.parametrize("architecture", CONFIGS)


def _rows(architecture):
    """Several pictures in one problem, pictures of different sizes, one of them twice, and no picture at all."""
    wide, square, tall = tiny_image(1, (112, 56)), tiny_image(2, (90, 90)), tiny_image(3, (60, 150))
    images = [[wide, square], [], [tall], [square], [wide, square]]
    if architecture in TEXT_ONLY:
        images = [[] for _ in images]
    problems = [
        {"id": str(number), "question": f"How many in {number // 4}?", "images": row_images}
        for number, row_images in enumerate(images)
    ]
    return problems, [STEPS, STEPS[:1], STEPS[:2], STEPS[1:], STEPS[:2]]


def _auto_class(architecture):
    return AutoModelForCausalLM if architecture in TEXT_ONLY else AutoModelForImageTextToText


def _build_policy(architecture, tied, path):
    """Saves a random stock checkpoint with its processor."""
    if architecture == "smolvlm":
        pytest.importorskip("num2words", reason="SmolVLM's processor needs num2words")
    processor = PROCESSORS[architecture]()
    tokenizer = processor if architecture in TEXT_ONLY else processor.tokenizer
    config = CONFIGS[architecture](tied)
    config.get_text_config().vocab_size = len(tokenizer)
    if architecture not in TEXT_ONLY:
        image_token = tokenizer.image_token if architecture == "gemma3" else processor.image_token
        config.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
    torch.manual_seed(0)
    model = _auto_class(architecture).from_config(config)
    with torch.no_grad():
        # Random heads give logits near 0, where neither soft-capping nor a wrong order would show
        model.get_output_embeddings().weight.mul_(30)
        if architecture == "gemma3":  # initialised with zeros, which would make it blind
            model.model.multi_modal_projector.mm_input_projection_weight.normal_()
    model.save_pretrained(path)
    processor.save_pretrained(path)


def _pad_on_the_left(batch):
    """The same rows with their padding on the other side."""
    batch = dict(batch)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    for key, tensor in batch.items():
        if tensor.shape == batch["input_ids"].shape:
            rows = [row.roll(len(row) - length) for row, length in zip(tensor, lengths, strict=True)]
            batch[key] = torch.stack(rows)
    assert batch["attention_mask"][:, -1].all()
    return batch


@TIED
@ARCHITECTURES
def test_scores_are_those_of_the_stock_model(architecture, tied, tmp_path):
    _build_policy(architecture, tied, tmp_path / "policy")
    created, processor = create_process_reward_model(tmp_path / "policy")
    created.save_pretrained(tmp_path / "prm")
    processor.save_pretrained(tmp_path / "prm")

    stock = _auto_class(architecture).from_pretrained(tmp_path / "prm").eval()
    assert not isinstance(stock, ProcessRewardMixin)
    assert json.loads((tmp_path / "prm" / "config.json").read_text())["architectures"] == [type(stock).__name__]
    model = AutoModelForProcessReward.from_pretrained(tmp_path / "prm").eval()
    processor = ProcessRewardProcessor.from_pretrained(tmp_path / "prm")
    assert stock.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in stock.state_dict().items())
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied

    problems, completions = _rows(architecture)
    right = processor(problems, completions)
    left = _pad_on_the_left(right)
    scores = {}
    for side, batch in (("right", right), ("left", left)):
        inputs = {key: tensor for key, tensor in batch.items() if key != "step_mask"}
        with torch.no_grad():
            expected = stock(**inputs).logits[..., list(processor.reward_token_ids)]
            logits = model(**batch).logits
        assert logits.shape == (5, right["input_ids"].shape[1], 2)
        steps = batch["step_mask"]
        assert steps.sum(dim=1).tolist() == [3, 1, 2, 2, 2]
        assert expected[steps].diff(dim=-1).abs().max() > 0.1
        scores[side] = logits[steps].softmax(-1)
        torch.testing.assert_close(scores[side], expected[steps].softmax(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores["left"], scores["right"], rtol=0, atol=1e-5)

    with torch.no_grad():
        for number, (problem, steps) in enumerate(zip(problems, completions, strict=True)):
            row = processor([problem], [steps])
            alone = model(**row).logits[row["step_mask"]].softmax(-1)
            torch.testing.assert_close(alone, scores["right"].split([3, 1, 2, 2, 2])[number], rtol=0, atol=1e-5)
        if architecture not in TEXT_ONLY:
            other = processor([{**problems[3], "images": [tiny_image(8, (90, 90))]}], [completions[3]])
            seen = model(**other).logits[other["step_mask"]].softmax(-1)
            assert (seen - scores["right"].split([3, 1, 2, 2, 2])[3]).abs().max() > 1e-4


@ARCHITECTURES
def test_rows_are_what_the_familys_own_processor_makes_of_the_whole_text(architecture, tmp_path):
    if architecture == "smolvlm":
        pytest.importorskip("num2words", reason="SmolVLM's processor needs num2words")
    processor = ProcessRewardProcessor.from_processor(PROCESSORS[architecture]())
    processor.save_pretrained(tmp_path)
    plain = AutoProcessor.from_pretrained(tmp_path)
    problems, completions = _rows(architecture)
    for problem, steps in zip(problems, completions, strict=True):
        content = [{"type": "image"}] * len(problem["images"]) + [{"type": "text", "text": problem["question"]}]
        if architecture in TEXT_ONLY:
            content = problem["question"]
        prompt = plain.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        text = prompt + "\n\n".join(f"{step}<prm>" for step in steps)
        arguments = {} if architecture in TEXT_ONLY else {"images": [problem["images"]] if problem["images"] else None}
        expected = plain(text=[text], **arguments, add_special_tokens=False, return_tensors="pt")
        row = processor([problem], [steps])
        for key in expected:
            assert torch.equal(row[key], expected[key]), key
        assert row.keys() - expected.keys() == {"step_mask"}
        bos = processor.tokenizer.bos_token_id
        assert row["input_ids"][0].tolist().count(bos) == int(bos is not None)
