"""Prompts of process rewards: rendered once a question, with each picture processed once a call."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .templates import PromptTemplate

# Outputs of a processor with one row for each text; all others belong to the images.
_TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
_MAX_RENDERED = 4096


@dataclass(frozen=True)
class Prompt:
    """
    The text before the first step.

    Tokenizers cut texts at special tokens, so everything up to the last special token (the `anchor`, such as
    `<|im_start|>`) is tokenised once a prompt, and only what follows once a row, together with the steps: the token ids
    are those of the whole text in one piece.

    Args:
        text (`str`):
            Generation prompt as the chat template writes it, with one placeholder for each image.
        images (`tuple[Any, ...]`):
            The images.
        anchor (`str`):
            The last special token in `text`, empty if there is none.
        tail (`str`):
            What follows the anchor.
        tail_ids (`tuple[int, ...]`):
            The tail in tokens.
    """

    text: str
    images: tuple[Any, ...]
    anchor: str
    tail: str
    tail_ids: tuple[int, ...]


@dataclass
class PromptTensors:
    """
    Distinct prompts in tokens and their images in pixels.

    Args:
        numbers (`list[int]`):
            Which of the distinct prompts each row has, in the order of first rows.
        input_ids (`list[np.ndarray]`):
            Ids of each distinct prompt without its tail.
        token_types (`dict[str, list[np.ndarray]]`):
            Types of these tokens, under the names that the model's processor uses.
        images (`Callable[[list[int]], dict[str, torch.Tensor]]`):
            Gives what the processor made of the images of prompts with these numbers, one after another.
    """

    numbers: list[int]
    input_ids: list[np.ndarray]
    token_types: dict[str, list[np.ndarray]]
    images: Callable[[list[int]], dict[str, torch.Tensor]]


class PromptRenderer:
    """
    Renders and encodes prompts with a model's own chat template and processor.

    Args:
        processor ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            Processor, or tokenizer of a text-only model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The processor's tokenizer.
        template ([`PromptTemplate`]):
            Writes the prompts.
    """

    def __init__(
        self,
        processor: ProcessorMixin | PreTrainedTokenizerBase,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate,
    ):
        self.processor = processor
        self.template = template
        self.tokenizer = tokenizer
        self._rendered: dict[tuple[str | None, ...], tuple[str, str, str, tuple[int, ...]]] = {}
        specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        specials.sort(key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, specials))) if specials else None

    def render(self, parts: Sequence[str | None], images: Sequence[Any]) -> Prompt:
        """
        Renders the generation prompt of a question.

        Args:
            parts (`Sequence[str | None]`):
                Pieces of text, and `None` for each image.
            images (`Sequence[Any]`):
                The images, as PIL images or as `datasets` stores them.
        """
        key = tuple(parts)
        if key not in self._rendered:
            if len(self._rendered) >= _MAX_RENDERED:
                self._rendered.clear()
            text = self.template.prompt(parts)
            anchor, tail = self._cut(text)
            ids = self.tokenizer(anchor + tail, add_special_tokens=False)["input_ids"]
            self._rendered[key] = (text, anchor, tail, tuple(ids[1:] if anchor else ids))
        text, anchor, tail, tail_ids = self._rendered[key]
        return Prompt(text, tuple(images), anchor, tail, tail_ids)

    def _cut(self, text: str) -> tuple[str, str]:
        """The last special token of a text, and what follows it."""
        matches = list(self._special_pattern.finditer(text)) if self._special_pattern is not None else []
        return (matches[-1][0], text[matches[-1].end() :]) if matches else ("", text)

    def encode(self, prompts: Sequence[Prompt]) -> PromptTensors:
        """
        Encodes prompts, equal ones once.

        Args:
            prompts (`Sequence[Prompt]`):
                The prompt of each row.
        """
        distinct, numbers = _distinct(prompts)
        encoded, features = self._process(distinct)
        images_per_prompt = [len(prompt.images) for prompt in distinct]

        def images(chosen: list[int]) -> dict[str, torch.Tensor]:
            if not any(images_per_prompt[number] for number in chosen):
                return {}
            repeated = _repeat_images(features, images_per_prompt, chosen)
            # A layout that we cannot take apart: let the processor do every row
            return self._process([distinct[number] for number in chosen])[1] if repeated is None else repeated

        return PromptTensors(
            numbers=numbers,
            input_ids=encoded["input_ids"],
            token_types={key: encoded[key] for key in _TOKEN_TYPES if key in encoded},
            images=images,
        )

    def _process(self, prompts: list[Prompt]) -> tuple[dict[str, list[np.ndarray]], dict[str, torch.Tensor]]:
        """Ids and types of each prompt without its tail, and the image tensors of all prompts."""
        encoded: dict[str, list[np.ndarray]] = {}
        features: dict[str, torch.Tensor] = {}
        # Apart, because processors disagree about prompts without images between prompts with some
        for with_images in (True, False):
            indices = [index for index, prompt in enumerate(prompts) if bool(prompt.images) == with_images]
            if not indices:
                continue
            arguments: dict[str, Any] = {"text": [prompts[index].text for index in indices]}
            if with_images:
                arguments["images"] = [[_as_pil(image) for image in prompts[index].images] for index in indices]
            outputs = dict(
                self.processor(
                    **arguments, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
                )
            )
            lengths = outputs.pop("attention_mask").sum(dim=1).tolist()
            ids = outputs.pop("input_ids").numpy()
            texts = {"input_ids": ids}
            texts |= {key: outputs.pop(key).numpy() for key in _TOKEN_TYPES if key in outputs}
            if with_images:
                features = outputs
            for row, index in enumerate(indices):
                # The processor may have put tokens of its own behind the anchor, so the tail is cut off from the end
                tail = prompts[index].tail_ids
                end = lengths[row] - len(tail)
                if tuple(ids[row, end : lengths[row]].tolist()) != tail:
                    raise ValueError(
                        f"the tokenizer reads {prompts[index].tail!r} at the end of the prompt in another way than "
                        f"behind {prompts[index].anchor!r}; this tokenizer is not supported"
                    )
                for key, array in texts.items():
                    encoded.setdefault(key, [np.empty(0, dtype=np.int64)] * len(prompts))[index] = array[row, :end]
        return encoded, features


def _distinct(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[int]]:
    """Distinct prompts in the order of their first row, and for each row the number of its prompt."""
    # Comparing pixels finds equal pictures that were decoded twice, as in rows of one tree. The same object is
    # fingerprinted once.
    fingerprints: dict[int, Any] = {}
    numbers: dict[Any, int] = {}
    distinct: list[Prompt] = []
    rows: list[int] = []
    for prompt in prompts:
        for image in prompt.images:
            if id(image) not in fingerprints:
                fingerprints[id(image)] = _fingerprint(image)
        key = (prompt.text, tuple(fingerprints[id(image)] for image in prompt.images))
        if key not in numbers:
            numbers[key] = len(distinct)
            distinct.append(prompt)
        rows.append(numbers[key])
    return distinct, rows


def _fingerprint(image: Any) -> Any:
    if isinstance(image, Image.Image):
        palette = image.palette.tobytes() if image.palette is not None else b""
        return image.mode, image.size, palette, image.tobytes()
    return image["path"], image["bytes"]


def _as_pil(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    return datasets.Image().decode_example(image)


def _repeat_images(
    features: dict[str, torch.Tensor], images_per_prompt: list[int], rows: list[int]
) -> dict[str, torch.Tensor] | None:
    """Image tensors of all rows out of those of the distinct prompts, or `None` if their layout is not known."""
    if rows == list(range(len(images_per_prompt))):
        return features
    num_images = sum(images_per_prompt)
    with_images = [int(count > 0) for count in images_per_prompt]
    repeated = {}
    for key, tensor in features.items():
        if not isinstance(tensor, torch.Tensor):
            return None
        if key == "pixel_values" and "image_grid_thw" in features:
            # The Qwen-VL and GLM-V families lay the patches of all images one after another
            patches = iter(features["image_grid_thw"].prod(dim=-1).tolist())
            sizes = [sum(itertools.islice(patches, count)) for count in images_per_prompt]
        elif len(tensor) == num_images:
            sizes = images_per_prompt
        elif len(tensor) == sum(with_images):
            sizes = with_images
        else:
            return None
        if sum(sizes) != len(tensor):
            return None
        pieces = tensor.split(sizes)
        repeated[key] = torch.cat([pieces[row] for row in rows])
    return repeated
