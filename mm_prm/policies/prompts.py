"""
From a problem and the steps so far to what a model reads.

The prefix of steps goes into the assistant turn (`prompt + prefix` is a string prefix of the finished turn), so that
whatever was computed for the prompt serves every prefix, and what was computed for a prefix serves its continuations.
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from mm_prm.data.text import (
    beginning_of_text,
    neutralize_special_tokens,
    question_text,
    special_token_texts,
    split_image_markers,
)

from .questions import decoded_images, previous_steps
from .steps import SEPARATORS, StepFormat, format_solution, format_steps

logger = logging.getLogger(__name__)

# Enough for the problems of the trees in flight; a picture of 112 x 112 pixels takes 0.3 MB.
_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True, eq=False)
class Prompt:
    """
    One prompt, ready for the model.

    Args:
        text (`str`):
            The prompt as rendered by the chat template.
        text_tokens (`list[int]`):
            Its tokens where an image is still one placeholder.
        sequences (`dict[str, torch.Tensor]`):
            What has one entry per token (`input_ids`, `mm_token_type_ids`, …), of shape `(length,)`.
        pictures (`dict[str, torch.Tensor]`):
            What belongs to the images; prompts are batched by concatenating it along the first dimension.
    """

    text: str
    text_tokens: list[int]
    sequences: dict[str, torch.Tensor]
    pictures: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.sequences["input_ids"])

    @property
    def shape(self) -> tuple:
        """Prompts of equal shape can share a batch."""
        return tuple(sorted((name, tuple(value.shape[1:])) for name, value in self.pictures.items()))

    @property
    def num_bytes(self) -> int:
        return sum(value.nbytes for value in (*self.sequences.values(), *self.pictures.values()))


class PromptBuilder:
    """
    Renders problems and prefixes with a processor's chat template.

    Args:
        processor ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            Processor of a vision-language model, or the tokenizer of a text-only one, with a chat template.
        step_format (`str`, *optional*, defaults to `"paragraphs"`):
            How the policy writes its steps, see [`parse_steps`].
    """

    processor: Any  # what a processor has beyond the shared class differs between models

    def __init__(self, processor: ProcessorMixin | PreTrainedTokenizerBase, step_format: StepFormat = "paragraphs"):
        self.processor = cast(Any, processor)
        self.step_format = step_format
        self._reads_images = isinstance(processor, ProcessorMixin)
        self.tokenizer: PreTrainedTokenizerBase = self.processor.tokenizer if self._reads_images else self.processor
        if not processor.chat_template:
            raise ValueError(
                f"the processor of '{self.tokenizer.name_or_path}' has no chat template: set `processor.chat_template`"
            )
        # The placeholder of an image need not be a token of the tokenizer.
        placeholders = [self.processor.image_token] if self._reads_images else []
        self._special_tokens = special_token_texts(self.tokenizer, extra=placeholders)
        self._beginning = beginning_of_text(self.tokenizer)
        self._cache: OrderedDict[Any, Prompt] = OrderedDict()
        self._cache_bytes = 0
        self.prefix_in_turn = self._keeps_prefixes()
        if not self.prefix_in_turn:
            logger.warning(
                "The chat template of '%s' does not render an unfinished assistant turn as the beginning of the finished "
                "one. Prefixes go into the user turn as 'Previous Steps', so nothing computed for one is used again.",
                self.tokenizer.name_or_path,
            )

    def build(
        self, problem: Mapping[str, Any], prefix: Sequence[str], one_step: bool = False
    ) -> tuple[Prompt, list[int]]:
        """
        Builds what the model reads before it writes on.

        Args:
            problem (`Mapping`):
                Problem row, its images decoded.
            prefix (`Sequence[str]`):
                Steps that are already there.
            one_step (`bool`, *optional*, defaults to `False`):
                Whether the prefix ends with what opens the next step.

        Returns:
            `tuple` of the prompt, shared by all prefixes of a problem, and the tokens of the prefix that follow it.
        """
        question, steps, images = self._parts(problem, prefix, one_step)
        prompt = self._prompt(question, images)
        if not steps:
            return prompt, []
        # Tokenised in one go: tokens of the parts, put together, can differ from the tokens of the whole.
        tokens = self._tokenize(prompt.text + steps)
        if tokens[: len(prompt.text_tokens)] == prompt.text_tokens:
            return prompt, tokens[len(prompt.text_tokens) :]
        return self._process(prompt.text + steps, images), []

    def build_tokens(
        self, problem: Mapping[str, Any], prefix: Sequence[str], one_step: bool = False
    ) -> tuple[list[int], list[Image.Image]]:
        """
        Builds what the model reads for an engine that processes pictures itself.

        Args:
            problem (`Mapping`):
                Problem row, its images decoded.
            prefix (`Sequence[str]`):
                Steps that are already there.
            one_step (`bool`, *optional*, defaults to `False`):
                Whether the prefix ends with what opens the next step.

        Returns:
            `tuple` of the tokens of prompt and prefix, each image still one placeholder, and the images.
        """
        question, steps, images = self._parts(problem, prefix, one_step)
        return self._tokenize(self._render(self._user_turn(question), True) + steps), images

    def build_example(self, problem: Mapping[str, Any], steps: Sequence[str]) -> tuple[str, str]:
        """
        Builds the two texts from which a model learns to write a solution.

        Args:
            problem (`Mapping`):
                Problem row; its images are counted, not read.
            steps (`Sequence[str]`):
                All steps of the solution.

        Returns:
            `tuple[str, str]`: The prompt, as a rollout from no steps has it, and what is to be written after it, up to
            and including the token that ends the turn.

        Raises:
            `ValueError`: If the steps would be read back as others.
        """
        question = split_image_markers(question_text(problem), len(problem["images"]))
        solution = format_solution([self._neutralize(step) for step in steps], self.step_format)
        return self._render(self._user_turn(question), True), solution + self.end_of_turn

    def collate(self, prompts: Sequence[Prompt], pad_token: int) -> dict[str, torch.Tensor]:
        """
        Batches prompts of equal shape, padded on the left.

        Args:
            prompts (`Sequence[Prompt]`):
                Prompts of one `shape`.
            pad_token (`int`):
                Id of the padding token.

        Returns:
            `dict[str, torch.Tensor]`: Arguments of the model's forward method.
        """
        length = max(map(len, prompts))
        batch = {}
        for name in prompts[0].sequences:
            values = torch.full((len(prompts), length), pad_token if name == "input_ids" else 0)
            for row, prompt in enumerate(prompts):
                values[row, length - len(prompt) :] = prompt.sequences[name]
            batch[name] = values
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        batch["attention_mask"] = (torch.arange(length) >= length - lengths[:, None]).long()
        for name in prompts[0].pictures:
            batch[name] = torch.cat([prompt.pictures[name] for prompt in prompts])
        return batch

    def _parts(
        self, problem: Mapping[str, Any], prefix: Sequence[str], one_step: bool
    ) -> tuple[list[str | None], str, list[Image.Image]]:
        """The user turn in pieces, the steps that open the assistant turn, and the images."""
        images = self._images(problem)
        question = split_image_markers(question_text(problem), len(images))
        steps = format_steps([self._neutralize(step) for step in prefix], self.step_format)
        if steps and not self.prefix_in_turn:
            return [*question, previous_steps(steps)], "", images
        # With one step, its end is looked for, and the separator before it must not be taken for that.
        return question, steps + (SEPARATORS[self.step_format] if steps and one_step else ""), images

    def _images(self, problem: Mapping[str, Any]) -> list[Image.Image]:
        images = problem["images"]
        if images and not self._reads_images:
            raise ValueError(
                f"problem '{problem['id']}': images: has {len(images)}, but '{self.tokenizer.name_or_path}' reads text "
                "only: use a vision-language model, or problems without images"
            )
        return decoded_images(problem)

    def _prompt(self, parts: Sequence[str | None], images: Sequence[Image.Image]) -> Prompt:
        # The pictures' content is the key: an object's identity would not notice that its pixels were changed.
        key = (tuple(parts), tuple((image.size, hashlib.blake2b(image.tobytes()).digest()) for image in images))
        prompt = self._cache.get(key)
        if prompt is not None:
            self._cache.move_to_end(key)
            return prompt
        prompt = self._cache[key] = self._process(self._render(self._user_turn(parts), True), images)
        self._cache_bytes += prompt.num_bytes
        while self._cache_bytes > _CACHE_BYTES and len(self._cache) > 1:
            self._cache_bytes -= self._cache.popitem(last=False)[1].num_bytes
        return prompt

    def _process(self, text: str, images: Sequence[Image.Image]) -> Prompt:
        text_tokens = self._tokenize(text)
        if not self._reads_images:
            return Prompt(text, text_tokens, {"input_ids": torch.tensor(text_tokens)}, {})
        outputs = self.processor(
            text=[text],
            images=[list(images)] if images else None,
            add_special_tokens=False,
            return_tensors="pt",
        )
        length = outputs["input_ids"].shape[-1]
        sequences = {name: value[0] for name, value in outputs.items() if value.shape == (1, length)}
        pictures = {name: value for name, value in outputs.items() if name not in sequences}
        del sequences["attention_mask"]
        return Prompt(text, text_tokens, sequences, pictures)

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _neutralize(self, text: str) -> str:
        return neutralize_special_tokens(text, self._special_tokens)

    def _user_turn(self, parts: Sequence[str | None]) -> list[dict[str, Any]]:
        content = [
            {"type": "image"} if part is None else {"type": "text", "text": self._neutralize(part)} for part in parts
        ]
        return [{"role": "user", "content": content}]

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        if not self._reads_images:  # templates of text-only models take strings
            messages = [
                {"role": turn["role"], "content": "".join(part["text"] for part in turn["content"])}
                for turn in messages
            ]
        text = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text if text.startswith(self._beginning) else self._beginning + text

    @cached_property
    def end_of_turn(self) -> str:
        """
        What ends a finished assistant turn: the template's text after it, up to and including a special token, or the
        tokenizer's end token where the template does not say.
        """
        turns, text = self._user_turn(["A question?"]), "The answer is 4."
        answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        written, finished = self._render(turns, True) + text, self._render([*turns, answer], False)
        end = finished.removeprefix(written) if finished.startswith(written) else ""
        places = [end.index(token) + len(token) for token in self._special_tokens if token in end]
        if places:
            return end[: min(places)]
        if self.tokenizer.eos_token is None:
            raise ValueError(
                f"neither the chat template nor the tokenizer of '{self.tokenizer.name_or_path}' ends a turn with a token: "
                "set `tokenizer.eos_token`"
            )
        return self.tokenizer.eos_token

    def _keeps_prefixes(self) -> bool:
        """Whether the generation prompt and a first step are the beginning of the finished turn."""
        turns = self._user_turn(["A question?"])
        steps = ["A first step.", "A second step."]
        answer = {"role": "assistant", "content": [{"type": "text", "text": format_steps(steps, self.step_format)}]}
        finished = self._render([*turns, answer], False)
        return finished.startswith(self._render(turns, True) + format_steps(steps[:1], self.step_format))
