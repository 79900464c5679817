"""The mini study's own code: what it does in batches for speed equals the stock code, and its settings are read."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mm_prm.annotation import AnnotationConfig
from mm_prm.commands.annotate import AnnotateSettings
from mm_prm.commands.train import TrainSettings
from mm_prm.data import mini
from mm_prm.data.text import split_image_markers
from mm_prm.settings import parse_settings
from mm_prm.trainer import PRMConfig

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "mini"


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(RECIPES))
    try:
        import model
        import train_policy
    finally:
        sys.path.remove(str(RECIPES))
    processor = model.build_processor()
    torch.manual_seed(0)
    return train_policy, processor, model.build_model(processor).eval()


@pytest.fixture(scope="module")
def batch(recipe):
    """Problems with one and two pictures, as the stock processor sees them."""
    processor = recipe[1]
    found = {problem.scene.family: problem for problem in (mini.problem("policy", index) for index in range(99))}
    problems = [found["charts"], found["bars"]]
    texts, images = [], []
    for problem in problems:
        pictures = problem.images()
        parts = [
            {"type": "image"} if part is None else {"type": "text", "text": part}
            for part in split_image_markers(problem.question, len(pictures))
        ]
        message = [{"role": "user", "content": parts}]
        texts.append(processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
        images += pictures
    inputs = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
    return problems, torch.from_numpy(np.stack([np.asarray(image) for image in images])), inputs


def test_prompts_and_positions_equal_the_stock_ones(recipe, batch):
    train_policy, processor, model = recipe
    problems, _, inputs = batch
    stream = train_policy.SolutionStream(4, 0, processor.tokenizer)
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    image_id = model.config.image_token_id
    for row, problem in enumerate(problems):
        length = int(inputs["attention_mask"][row].sum())
        ids = inputs["input_ids"][row][:length]
        assert stream.prompt(problem, len(problem.images())) == ids.tolist()
        assert (train_policy.rotary_positions(ids.numpy(), image_id) == positions[:, row, :length].numpy()).all()


def test_pictures_and_their_features_equal_the_stock_ones(recipe, batch):
    train_policy, _, model = recipe
    _, images, inputs = batch
    torch.testing.assert_close(train_policy.patches(images), inputs["pixel_values"], rtol=0, atol=1e-6)
    visual = model.model.visual
    with torch.no_grad():
        stock = visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        ours = train_policy.encode(visual, images)
    torch.testing.assert_close(ours, stock, rtol=0, atol=2e-6)


def test_the_tokenizer_of_the_recipe_is_the_shipped_one(recipe):
    from transformers import AutoTokenizer

    from mm_prm.embedded import embedded_path

    shipped = AutoTokenizer.from_pretrained(embedded_path("mini_policy"))
    assert shipped.get_vocab() == recipe[1].tokenizer.get_vocab()
    text = "half of 13 is 6.5.\n\nThe answer is 3/8."
    assert shipped(text)["input_ids"] == recipe[1].tokenizer(text)["input_ids"]


def test_settings_files_are_read():
    settings, config = parse_settings(
        (AnnotateSettings, AnnotationConfig), ["--config", str(RECIPES / "annotate.yaml")], prog="mm-prm annotate"
    )
    assert (settings.policy_top_p, config.num_rollouts, config.rollout_budget) == (1.0, 8, 80)
    settings, config = parse_settings(
        (TrainSettings, PRMConfig), ["--config", str(RECIPES / "train.yaml")], prog="mm-prm train"
    )
    assert settings.model == "mini-policy" and config.label_mode == "soft"
