"""Tiny models and problems that the tests of all rooms share: stock classes, built on the spot, no network."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

# Qwen's chat format without the default system turn: content is a string or a list of text and image parts.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SENTENCES = [
    "How much higher is bar A than bar B in the picture?",
    "Bar A shows 7 and bar B shows 3, so the difference is 7 - 3 = 4.",
    "The triangle has the angles 40 and 60 degrees, so the third angle is 180 - 40 - 60 = 80 degrees.",
    "What is the sum of the numbers in the first row of the table? Choose A, B, C or D.",
    "The perimeter of the L-shaped area is twice the width plus twice the height: 2 * 12 + 2 * 9 = 42.",
    "Each circle costs 5 and each square costs 2, therefore all shapes together cost 3 * 5 + 4 * 2 = 23.",
    "The answer is 12.",
    "The answer is 3/8.",
    "The answer is B.",
]


def build_tiny_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """
    Trains a byte-level BPE tokenizer with Qwen's special tokens on a few sentences.

    Args:
        vocab_size (`int`, *optional*, defaults to `400`):
            Number of entries, special tokens and the 256 bytes included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS[1:2] + SPECIAL_TOKENS[3:],
        padding_side="left",
    )


def build_tiny_processor() -> Qwen2_5_VLProcessor:
    """Builds a stock Qwen2.5-VL processor; 112 × 112 images become 16 image tokens, and so does any other square."""
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=112 * 112, max_pixels=112 * 112),
        tokenizer=build_tiny_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def build_tiny_vlm(directory: str | Path, *, tie_word_embeddings: bool = True, seed: int = 0) -> str:
    """
    Saves a random stock Qwen2.5-VL (32 wide, 2 layers) with its processor, and returns the directory as a string.

    Args:
        directory (`str` or `Path`):
            Folder to write. `AutoProcessor` and `AutoModelForImageTextToText` load it.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether the output head is the input embedding.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights.
    """
    processor = build_tiny_processor()
    tokenizer = processor.tokenizer
    token_ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS), strict=True))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": token_ids["<|im_end|>"],
            "pad_token_id": token_ids["<|endoftext|>"],
            "tie_word_embeddings": tie_word_embeddings,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 32,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|video_pad|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        tie_word_embeddings=tie_word_embeddings,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = token_ids["<|im_end|>"]
    model.generation_config.pad_token_id = token_ids["<|endoftext|>"]
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return str(directory)


def tiny_image(number: int, size: tuple[int, int] = (112, 112)) -> Image.Image:
    """Draws a picture that differs for each `number`."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle([10, 10, 20 + 8 * (number % 10), 60], fill=(40 * (number % 7), 90, 200))
    draw.text((20, 70), str(number), fill="black")
    return image


def tiny_problem(number: int = 0, num_images: int = 1) -> dict:
    """Returns a problem row with pictures; the gold answer is `number`."""
    return {
        "id": f"problem-{number}",
        "images": [tiny_image(number + i) for i in range(num_images)],
        "question": "<image>" * num_images + f"How much higher is bar A than {number}?",
        "answer": str(number),
        "choices": [],
        "answer_type": "integer",
        "source": "test",
        "subject": "bars",
    }


def build_tiny_prm(vlm_path: str, directory: str | Path) -> str:
    """Saves an untrained process reward model made from the checkpoint at `vlm_path`, and returns the directory."""
    from mm_prm.models import create_process_reward_model

    model, processor = create_process_reward_model(vlm_path)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return str(directory)
