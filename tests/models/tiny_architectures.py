"""Tiny random models of several architectures, with the inputs that each of them takes."""

import torch
from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3VLConfig,
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
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


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
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": [28, 28],
        "patch_size": [7, 7],
    }
    return InternVLConfig(
        text_config={**_TEXT, "model_type": "qwen2", "tie_word_embeddings": tied},
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
        tie_word_embeddings=tied,
    )


def _idefics3(tied: bool) -> PreTrainedConfig:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
    }
    return Idefics3Config(
        text_config={**_TEXT, "model_type": "llama", "tie_word_embeddings": tied},
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )


def _gemma3(tied: bool) -> PreTrainedConfig:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
    }
    return Gemma3Config(
        text_config={**_TEXT, "head_dim": 16, "tie_word_embeddings": tied},
        vision_config=vision,
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
    "idefics3": _idefics3,
    "internvl": _internvl,
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
}


TEXT_ONLY = ("cohere", "gemma2", "llama", "qwen2")


def build_config(architecture: str, tied: bool) -> PreTrainedConfig:
    """Returns a tiny configuration with reward tokens."""
    config = CONFIGS[architecture](tied)
    config.reward_token_ids = list(REWARD_TOKEN_IDS)
    return config


def build_inputs(architecture: str, num_image_tokens: int = 4) -> dict[str, torch.Tensor]:
    """Returns two sequences of tokens, of which each shows one picture where the architecture can see."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(10, 90, (2, 24), generator=generator)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if architecture in TEXT_ONLY:
        return inputs
    input_ids[:, 3 : 3 + num_image_tokens] = IMAGE_TOKEN
    if architecture in ("qwen2_vl", "qwen3_vl"):
        inputs["pixel_values"] = torch.rand(2 * 16, 3 * 2 * 14 * 14, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4], [1, 4, 4]])
        inputs["mm_token_type_ids"] = (input_ids == IMAGE_TOKEN).int()
    elif architecture == "idefics3":
        inputs["pixel_values"] = torch.rand(2, 1, 3, 28, 28, generator=generator)
    else:
        inputs["pixel_values"] = torch.rand(2, 3, 28, 28, generator=generator)
    if architecture == "gemma3":
        inputs["token_type_ids"] = (input_ids == IMAGE_TOKEN).long()
    return inputs
