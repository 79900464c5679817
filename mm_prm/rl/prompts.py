"""Between problem rows and TRL's prompts: the prompt of a problem, and the problem that a prompt poses."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import datasets
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from mm_prm.data.text import (
    IMAGE_MARKER,
    neutralize_special_tokens,
    question_text,
    special_token_texts,
    split_image_markers,
)


def add_prompts(problems: datasets.Dataset, processor: ProcessorMixin | PreTrainedTokenizerBase) -> datasets.Dataset:
    """
    Adds what [`~trl.GRPOTrainer`] shows to the policy: a column `prompt`, as the policies of this package write it.

    Args:
        problems (`datasets.Dataset`):
            Problem rows. Their columns stay, for the reward functions.
        processor ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            Processor of the policy, or tokenizer if it reads text only. A question that spells one of its special tokens
            is broken up there.

    Returns:
        `datasets.Dataset`: The rows with a conversational `prompt` of one user turn, whose images are placeholders at
        their places; TRL puts the pictures of the column `images` there.
    """
    if isinstance(processor, PreTrainedTokenizerBase):
        special_tokens = special_token_texts(processor)
    else:
        reads_images = cast(Any, processor)  # what a processor has beyond the shared class differs between models
        special_tokens = special_token_texts(reads_images.tokenizer, extra=[reads_images.image_token])

    def prompt(problem: Mapping[str, Any]) -> dict[str, Any]:
        parts = split_image_markers(question_text(problem), len(problem["images"]))
        if isinstance(processor, PreTrainedTokenizerBase):  # templates of text-only models take strings
            if problem["images"]:
                raise ValueError(
                    f"problem {problem['id']!r}: images: has {len(problem['images'])}, but the policy reads text only: use "
                    "a vision-language model, or problems without images"
                )
            content: Any = neutralize_special_tokens(question_text(problem), special_tokens)
        else:
            content = [
                {"type": "image"}
                if part is None
                else {"type": "text", "text": neutralize_special_tokens(part, special_tokens)}
                for part in parts
            ]
        return {"prompt": [{"role": "user", "content": content}]}

    return problems.map(prompt)


def problems_of(prompts: Sequence[Any], columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """
    Reads the problems that a reward function was called with.

    Args:
        prompts (`Sequence`):
            Prompts, as messages or as plain text.
        columns (`Mapping[str, Sequence]`):
            Other columns of the same rows: `id`, `question`, `images` and `choices` are those of the problem. What is not
            there is read from the prompt, the question from its only user turn.

    Returns:
        `list[dict]`: One problem a row, with `id`, `question`, `images` and `choices`.
    """
    return [
        {
            "id": columns["id"][row] if "id" in columns else f"row {row} of the batch",
            "question": columns["question"][row] if "question" in columns else _question(prompt, row),
            "images": (columns["images"][row] or []) if "images" in columns else _images(prompt, row),
            "choices": (columns["choices"][row] or []) if "choices" in columns else [],
        }
        for row, prompt in enumerate(prompts)
    ]


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _question(prompt: Any, row: int) -> str:
    if isinstance(prompt, str):
        return prompt
    turns = [message for message in prompt if message["role"] != "system"]
    if [message["role"] for message in turns] != ["user"]:
        roles = ", ".join(message["role"] for message in prompt)
        raise ValueError(
            f"row {row} of the batch: its prompt has the turns {roles}, and the question is not one user turn: give the "
            "dataset a column `question`"
        )
    return "".join(
        IMAGE_MARKER if part["type"] == "image" else neutralize_special_tokens(part["text"], [IMAGE_MARKER])
        for part in _parts(turns[0])
    )


def _images(prompt: Any, row: int) -> list[Any]:
    if isinstance(prompt, str):
        return []
    images = [part.get("image") for message in prompt for part in _parts(message) if part["type"] == "image"]
    if None in images:
        raise ValueError(
            f"row {row} of the batch: its prompt has a place for a picture and no picture: give the dataset a column `images`"
        )
    return images
