import copy
import json
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from mm_prm.models import AutoModelForProcessReward, batch_vision_attention, create_process_reward_model
from mm_prm.models.vision import _TOWERS
from mm_prm.policies.transformers import TransformersPolicy
from tests.testing_utils import tiny_problem

from .tiny_architectures import build_config, build_inputs

# Those that `AutoModel` does not know, in every version of transformers
TOWER_CLASSES = {
    "qwen2_5_vl_vision": Qwen2_5_VisionTransformerPretrainedModel,
    "qwen2_vl_vision": Qwen2VisionTransformerPretrainedModel,
}

# Height and width in patches; an image of 8 patches and windows of 4 make whole windows, one of 6 × 10 cuts some.
GRIDS = {
    "one size": [[1, 8, 8], [1, 8, 8], [1, 8, 8]],
    "one image": [[1, 8, 8]],
    "mixed sizes": [[1, 6, 10], [1, 8, 8], [1, 4, 4], [1, 10, 6], [1, 2, 2], [1, 8, 8]],
    "frames": [[3, 4, 6], [1, 8, 8]],
}


def _build_tower(name: str):
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 14,
        "image_size": 112,
        "num_position_embeddings": 16,
        "initializer_range": 0.2,  # so large that attention is far from uniform
    }
    if name == "qwen2_vl_vision":
        vision |= {"embed_dim": 32, "mlp_ratio": 2}
    elif name == "qwen2_5_vl_vision":
        vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
    elif name.startswith("qwen3_vl"):
        vision |= {"deepstack_visual_indexes": [0]}
    config = AutoConfig.for_model(name, **vision)
    torch.manual_seed(0)
    if name in TOWER_CLASSES:
        return TOWER_CLASSES[name]._from_config(config)
    return AutoModel.from_config(config)


def _run(tower, grids):
    """Returns the tower's outputs and the gradients of its input and its weights."""
    grid_thw = torch.tensor(grids)
    pixels = torch.rand(
        int(grid_thw.prod(-1).sum()), 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    tower.zero_grad()
    outputs = tower(pixels, grid_thw=grid_thw)
    (outputs.pooler_output.square().sum() + outputs.last_hidden_state.square().sum()).backward()
    gradients = {name: weight.grad.clone() for name, weight in tower.named_parameters() if weight.grad is not None}
    return outputs.pooler_output.detach(), pixels.grad, gradients


def _relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def _count_attention_calls(tower, grids, monkeypatch) -> int:
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda *args, **kwargs: calls.append(1) or attention(*args, **kwargs),
        )
        _run(tower, grids)
    return len(calls)


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("name", sorted(_TOWERS))
def test_outputs_and_gradients_are_those_of_the_loop_over_images(name, grids):
    if grids == "frames" and name.startswith("glm4v"):
        pytest.skip("GLM-4V's model hands its tower one frame at a time")
    grids = GRIDS[grids]
    tower = _build_tower(name)
    stock = copy.deepcopy(tower)
    assert batch_vision_attention(tower) is tower
    assert {module.config._attn_implementation for module in tower.modules() if "config" in vars(module)} == {
        "flash_chunks_on_sdpa"
    }
    output, input_gradient, gradients = _run(tower, grids)
    expected_output, expected_input_gradient, expected_gradients = _run(stock, grids)
    assert expected_output.abs().max() > 0.1
    assert _relative_difference(output, expected_output) < 1e-6
    assert _relative_difference(input_gradient, expected_input_gradient) < 1e-5
    assert gradients.keys() == expected_gradients.keys()
    for parameter, gradient in gradients.items():
        assert _relative_difference(gradient, expected_gradients[parameter]) < 1e-5, parameter


def test_one_call_for_each_length_and_block(monkeypatch):
    tower = _build_tower("qwen2_5_vl_vision")
    stock = copy.deepcopy(tower)
    batch_vision_attention(tower)
    # Two blocks of windows, four of 4 × 4 patches an image, and one of whole images
    assert _count_attention_calls(stock, GRIDS["one size"], monkeypatch) == 2 * 12 + 3
    assert _count_attention_calls(tower, GRIDS["one size"], monkeypatch) == 3
    # Windows of 16, 8 and 4 patches; images of 60, 64, 16 and 4
    assert _count_attention_calls(tower, GRIDS["mixed sizes"], monkeypatch) == 2 * 3 + 4


def test_images_do_not_see_each_other():
    tower = batch_vision_attention(_build_tower("qwen2_5_vl_vision"))
    pixels = torch.rand(2 * 64, 3 * 2 * 14 * 14)
    changed = pixels.clone()
    changed[64:] = 0
    grid_thw = torch.tensor(GRIDS["one size"][:2])
    with torch.no_grad():
        before = tower(pixels, grid_thw=grid_thw).pooler_output
        after = tower(changed, grid_thw=grid_thw).pooler_output
    torch.testing.assert_close(before[:16], after[:16])
    assert (before[16:] - after[16:]).abs().max() > 1e-3


def test_models_are_batched_when_loaded_and_saved_as_stock_models(tiny_vlm_path, tmp_path):
    model, processor = create_process_reward_model(tiny_vlm_path)
    policy = TransformersPolicy.from_pretrained(tiny_vlm_path, device="cpu").model
    for loaded, folder in ((model, tmp_path / "prm"), (policy, tmp_path / "policy")):
        assert loaded.model.visual.blocks[0].attn.config._attn_implementation == "flash_chunks_on_sdpa"
        assert loaded.config.vision_config._attn_implementation == "sdpa"
        assert loaded.model.language_model.config._attn_implementation == "sdpa"
        loaded.save_pretrained(folder)
        assert "flash" not in (folder / "config.json").read_text()
        assert "attn_implementation" not in json.dumps(loaded.model.visual.config.to_dict())
        # What is made anew from a configuration is a stock model, and needs nothing of ours
        for again in (type(loaded)._from_config(loaded.config), AutoModelForImageTextToText.from_pretrained(folder)):
            assert again.model.visual.config._attn_implementation == "sdpa"
    processor.save_pretrained(tmp_path / "prm")
    for loaded in (AutoModelForProcessReward.from_pretrained(tmp_path / "prm"), pickle.loads(pickle.dumps(model))):
        assert loaded.model.visual.blocks[0].attn.config._attn_implementation == "flash_chunks_on_sdpa"

    with torch.no_grad():
        inputs = processor([tiny_problem(1), tiny_problem(2)], [["7 - 3 = 4.", "The answer is 4."], ["It is 5."]])
        logits = model(**inputs).logits
        model.set_attn_implementation("sdpa")
        assert model.model.visual.blocks[0].attn.config._attn_implementation == "sdpa"
        torch.testing.assert_close(model(**inputs).logits, logits, rtol=1e-6, atol=1e-6)


def test_what_was_asked_for_is_kept():
    for architecture, implementation in (("qwen2_vl", "eager"), ("internvl", "sdpa"), ("qwen2", "sdpa")):
        model = AutoModelForProcessReward.from_config(
            build_config(architecture, tied=True), attn_implementation=implementation
        )
        assert {module.config._attn_implementation for module in model.modules() if "config" in vars(module)} == {
            implementation
        }
    model = AutoModelForProcessReward.from_config(build_config("qwen2_vl", tied=True))
    assert batch_vision_attention(model) is model
    assert model.model.visual.config._attn_implementation == "flash_chunks_on_sdpa"
    model.gradient_checkpointing_enable()
    inputs = build_inputs("qwen2_vl")
    labels = torch.full(inputs["input_ids"].shape, torch.nan)
    labels[:, -1] = 1.0
    model.train()(**inputs, labels=labels).loss.backward()
    assert model.model.visual.blocks[0].attn.qkv.weight.grad.abs().max() > 0
