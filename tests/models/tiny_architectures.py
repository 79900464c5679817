"""Configurations of tiny random models of several architectures."""

import torch
from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    Glm4vConfig,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaOnevisionConfig,
    Mistral3Config,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)

VOCABULARY = 120
IMAGE_TOKEN = 100
REWARD_TOKEN_IDS = (7, 3)

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}


def _qwen2_vl(tied: bool) -> PreTrainedConfig:
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    return Qwen2VLConfig(
        text_config={**_TEXT, "rope_parameters": _MROPE, "tie_word_embeddings": tied},
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=101,
        vision_start_token_id=102,
        vision_end_token_id=103,
        tie_word_embeddings=tied,
    )


def _qwen2_5_vl(tied: bool) -> PreTrainedConfig:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_parameters": _MROPE, "tie_word_embeddings": tied},
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=101,
        vision_start_token_id=102,
        vision_end_token_id=103,
        tie_word_embeddings=tied,
    )


def _qwen3_vl(tied: bool) -> PreTrainedConfig:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 14,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return Qwen3VLConfig(
        text_config={**_TEXT, "head_dim": 16, "rope_parameters": _MROPE, "tie_word_embeddings": tied},
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=101,
        vision_start_token_id=102,
        vision_end_token_id=103,
        tie_word_embeddings=tied,
    )


def _internvl(tied: bool) -> PreTrainedConfig:
    return InternVLConfig(
        text_config={**_TEXT, "model_type": "qwen2", "tie_word_embeddings": tied},
        vision_config={**_VISION, "image_size": [28, 28], "patch_size": [7, 7]},
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
        tie_word_embeddings=tied,
    )


def _idefics3(tied: bool) -> PreTrainedConfig:
    return Idefics3Config(
        text_config={**_TEXT, "model_type": "llama", "tie_word_embeddings": tied},
        vision_config=_VISION,
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )


def _smolvlm(tied: bool) -> PreTrainedConfig:
    return SmolVLMConfig(
        text_config={**_TEXT, "model_type": "llama", "tie_word_embeddings": tied},
        vision_config=_VISION,
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )


def _llava_onevision(tied: bool) -> PreTrainedConfig:
    return LlavaOnevisionConfig(
        text_config={**_TEXT, "model_type": "qwen2", "tie_word_embeddings": tied},
        vision_config={**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=IMAGE_TOKEN,
        video_token_index=101,
        image_grid_pinpoints=[[28, 28], [28, 56], [56, 28], [56, 56]],
        tie_word_embeddings=tied,
    )


def _mistral3(tied: bool) -> PreTrainedConfig:
    return Mistral3Config(
        text_config={**_TEXT, "model_type": "mistral", "head_dim": 16, "tie_word_embeddings": tied},
        vision_config={**_VISION, "model_type": "pixtral", "image_size": 56},
        image_token_index=IMAGE_TOKEN,
        tie_word_embeddings=tied,
    )


def _glm4v(tied: bool) -> PreTrainedConfig:
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "image_size": 56,
        "patch_size": 14,
    }
    rope = {**_MROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    return Glm4vConfig(
        text_config={**_TEXT, "rope_parameters": rope, "tie_word_embeddings": tied},
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=101,
        image_start_token_id=102,
        image_end_token_id=103,
        video_start_token_id=104,
        video_end_token_id=105,
        tie_word_embeddings=tied,
    )


def _gemma3(tied: bool) -> PreTrainedConfig:
    return Gemma3Config(
        text_config={**_TEXT, "head_dim": 16, "tie_word_embeddings": tied},
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_id=IMAGE_TOKEN,
        boi_token_index=102,
        eoi_token_index=103,
        tie_word_embeddings=tied,
    )


def _gemma2(tied: bool) -> PreTrainedConfig:
    return Gemma2Config(**_TEXT, head_dim=16, final_logit_softcapping=2.0, tie_word_embeddings=tied)


def _cohere(tied: bool) -> PreTrainedConfig:
    return CohereConfig(**_TEXT, logit_scale=0.5, tie_word_embeddings=tied)


def _qwen2(tied: bool) -> PreTrainedConfig:
    return Qwen2Config(**_TEXT, tie_word_embeddings=tied)


def _llama(tied: bool) -> PreTrainedConfig:
    return LlamaConfig(**_TEXT, tie_word_embeddings=tied)


CONFIGS = {
    "cohere": _cohere,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "glm4v": _glm4v,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "llama": _llama,
    "llava_onevision": _llava_onevision,
    "mistral3": _mistral3,
    "qwen2": _qwen2,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
    "smolvlm": _smolvlm,
}


TEXT_ONLY = ("cohere", "gemma2", "llama", "qwen2")


def build_config(architecture: str, tied: bool) -> PreTrainedConfig:
    """Returns a tiny configuration with reward tokens."""
    config = CONFIGS[architecture](tied)
    config.reward_token_ids = list(REWARD_TOKEN_IDS)
    return config


def build_inputs(architecture: str) -> dict[str, torch.Tensor]:
    """Returns two sequences of tokens; for Qwen2-VL, each shows one picture."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(10, 90, (2, 24), generator=generator)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if architecture == "qwen2_vl":
        input_ids[:, 3:7] = IMAGE_TOKEN
        inputs["pixel_values"] = torch.rand(2 * 16, 3 * 2 * 14 * 14, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4], [1, 4, 4]])
        inputs["mm_token_type_ids"] = (input_ids == IMAGE_TOKEN).int()
    return inputs
