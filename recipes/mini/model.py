"""Builds the untrained mini policy: a stock Qwen2.5-VL class and processor, small enough to ship.

    python recipes/mini/model.py outputs/mini/policy_init

The tokenizer is a byte-level BPE trained on the mini world's text: one token a digit, one for the blank line between
two steps, and every other text spelled in bytes. A 112 × 112 picture is 16 image tokens.
"""

import random
import sys

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from mm_prm.data import mini

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCAB_SIZE = 576


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Trains the tokenizer on questions and solutions of the policy split."""
    rng = random.Random(0)
    texts = []
    for index in range(4000):
        problem = mini.problem("policy", index)
        texts += [f"user\n{problem.question}", "assistant\n", *problem.sample_solution(rng)[1]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False, special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS[1:2] + SPECIAL_TOKENS[3:],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> Qwen2_5_VLProcessor:
    """White is 0 after normalisation: ink on paper then stands out from the first training step on."""
    image_settings = {
        "image_mean": [1.0] * 3,
        "image_std": [0.35] * 3,
        "min_pixels": 112 * 112,
        "max_pixels": 112 * 112,
    }
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**image_settings),
        tokenizer=build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**image_settings),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: Qwen2_5_VLProcessor) -> Qwen2_5_VLForConditionalGeneration:
    """A random model: text 256 wide and 4 layers deep, vision 160 wide and 4 deep, tied embeddings."""
    tokenizer = processor.tokenizer
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS), strict=True))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 256,
            "intermediate_size": 672,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 160,
            "intermediate_size": 448,
            "num_heads": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 256,
            "window_size": 112,
            "fullatt_block_indexes": [0, 1, 2, 3],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model


def main(directory: str) -> None:
    processor = build_processor()
    model = build_model(processor)
    processor.save_pretrained(directory)
    model.save_pretrained(directory)
    print(f"{directory}: {model.num_parameters():,} parameters, {len(processor.tokenizer)} tokens")


if __name__ == "__main__":
    main(sys.argv[1])
