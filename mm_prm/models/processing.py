"""The processor of a process reward model: problems and steps in, tensors with step positions and labels out.

One template serves training, scoring and search. Its style, saved with the processor, says where question, images and
steps stand; each step is followed by the step token.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AddedToken, AutoProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import cached_file

from ..data.text import (
    beginning_of_text,
    neutralize_special_tokens,
    question_text,
    special_token_texts,
    split_image_markers,
)
from .auto import _HUB_ARGUMENTS, REWARD_TOKENS, STEP_TOKEN
from .prompts import Prompt, PromptRenderer, PromptTensors
from .templates import PromptTemplate, TemplateStyle

_FILE_NAME = "process_reward_processor.json"


class ProcessRewardProcessor:
    """
    Wraps the processor of a vision-language model (or the tokenizer of a language model) for process rewards.

    Get one from [`ProcessRewardProcessor.from_pretrained`] for a process reward model, and from
    [`create_process_reward_model`] for a new one. It is saved beside the model, and the folder still loads with
    `AutoProcessor` as the plain processor.

    Args:
        processor ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            Processor with a chat template, whose tokenizer has the step token and the reward tokens.
        step_token (`str`, *optional*, defaults to `"<prm>"`):
            Token that follows each step.
        reward_tokens (`tuple[str, str]`, *optional*, defaults to `("No", "Yes")`):
            Tokens for wrong and right.
        template_style (`str`, *optional*, defaults to `"chat"`):
            `"chat"` (the question in the user turn, the steps in the answer) or `"mm_prm"` (the text with which MM-PRM was
            evaluated, for models converted from it); see [`PromptTemplate`].
    """

    def __init__(
        self,
        processor: ProcessorMixin | PreTrainedTokenizerBase,
        step_token: str = STEP_TOKEN,
        reward_tokens: tuple[str, str] = REWARD_TOKENS,
        template_style: TemplateStyle = "chat",
    ):
        self.processor = processor
        self.tokenizer: PreTrainedTokenizerBase = (
            processor if isinstance(processor, PreTrainedTokenizerBase) else processor.tokenizer
        )
        self.step_token = step_token
        self.reward_tokens = tuple(reward_tokens)
        self.template_style = template_style
        vocabulary = self.tokenizer.get_vocab()
        for token in (step_token, *reward_tokens):
            if token not in vocabulary:
                raise ValueError(
                    f"the tokenizer has no token {token!r}; ProcessRewardProcessor.from_processor adds it, and "
                    "create_process_reward_model gives the model a row for it"
                )
        if processor.chat_template is None:
            raise ValueError(
                f"this {type(processor).__name__} has no chat template; set its `chat_template` to the one that the "
                "policy was trained with"
            )
        self.step_token_id: int = vocabulary[step_token]
        self.reward_token_ids: tuple[int, ...] = tuple(vocabulary[token] for token in reward_tokens)
        # Tokens that no training has seen yet: `prepare_model_for_process_reward` draws rows for them.
        self.added_token_ids: tuple[int, ...] = ()
        # A reward token may be a word of the text (`No, 3 apples`); it is read, not broken up.
        self._special_tokens = tuple(
            token for token in special_token_texts(self.tokenizer, extra=(step_token,)) if token not in reward_tokens
        )
        self._template = PromptTemplate(processor, template_style, beginning_of_text(self.tokenizer))
        self._renderer = PromptRenderer(processor, self.tokenizer, self._template)

    @classmethod
    def from_processor(
        cls,
        processor: ProcessorMixin | PreTrainedTokenizerBase,
        *,
        step_token: str = STEP_TOKEN,
        reward_tokens: tuple[str, str] = REWARD_TOKENS,
        template_style: TemplateStyle = "chat",
    ) -> "ProcessRewardProcessor":
        """
        Makes a processor out of a policy's, and adds the tokens that its tokenizer does not have (in place).

        The model needs rows for them: pass both to [`prepare_model_for_process_reward`].

        Args:
            processor ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
                The policy's processor.
            step_token (`str`, *optional*, defaults to `"<prm>"`):
                Token that follows each step.
            reward_tokens (`tuple[str, str]`, *optional*, defaults to `("No", "Yes")`):
                Tokens for wrong and right.
            template_style (`str`, *optional*, defaults to `"chat"`):
                `"chat"` or `"mm_prm"`.
        """
        tokenizer = processor if isinstance(processor, PreTrainedTokenizerBase) else processor.tokenizer
        known = tokenizer.get_vocab()
        # An ordinary token becomes an added one, so that it is never merged with the text before it.
        if step_token not in tokenizer.get_added_vocab():
            tokenizer.add_tokens([AddedToken(step_token, special=True, normalized=False)], special_tokens=True)
        # `single_word`: "Yesterday" is not cut.
        tokenizer.add_tokens(
            [AddedToken(token, single_word=True, normalized=False) for token in reward_tokens if token not in known]
        )
        wrapped = cls(processor, step_token, reward_tokens, template_style)
        vocabulary = tokenizer.get_vocab()
        wrapped.added_token_ids = tuple(
            vocabulary[token] for token in (step_token, *reward_tokens) if token not in known
        )
        return wrapped

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "ProcessRewardProcessor":
        """
        Loads the processor that was saved with a process reward model.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                Folder or Hub repository.
            kwargs:
                Arguments of `AutoProcessor.from_pretrained`.
        """
        path = os.fspath(pretrained_model_name_or_path)
        hub_arguments = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs and key != "trust_remote_code"}
        processor = AutoProcessor.from_pretrained(path, **kwargs)  # says what is wrong with a name
        file = cached_file(path, _FILE_NAME, _raise_exceptions_for_missing_entries=False, **hub_arguments)
        if file is None:
            raise OSError(
                f"'{path}' has no {_FILE_NAME}, so it is not the processor of a process reward model; "
                f"mm_prm.models.create_process_reward_model('{path}') makes one out of a policy"
            )
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
        return cls(
            processor,
            settings["step_token"],
            tuple(settings["reward_tokens"]),
            settings.get("template_style", "chat"),  # not in files written before there were two
        )

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> list[str]:
        """
        Saves the wrapped processor as it is, and beside it one small file with tokens and template style.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder of the model.
            kwargs:
                Arguments of the wrapped processor's `save_pretrained`.
        """
        files = self.processor.save_pretrained(save_directory, **kwargs)
        settings = {
            "step_token": self.step_token,
            "reward_tokens": list(self.reward_tokens),
            "template_style": self.template_style,
        }
        file = Path(save_directory) / _FILE_NAME
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return [*files, str(file)]

    def __call__(
        self,
        problems: Sequence[Mapping[str, Any]],
        completions: Sequence[Sequence[str]],
        labels: Sequence[Sequence[float | None]] | None = None,
        *,
        max_length: int | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """
        Turns rows into the model's inputs, padded on the right.

        A picture that occurs in several rows is processed once. Text of questions and steps that spells a special token
        is broken up, so that exactly one step token stands behind each step.

        Args:
            problems (`Sequence[Mapping[str, Any]]`):
                One problem a row, with `question` and `images`.
            completions (`Sequence[Sequence[str]]`):
                The steps of each row.
            labels (`Sequence[Sequence[float | None]]`, *optional*):
                One label in [0, 1] for each step, `None` for a step without.
            max_length (`int`, *optional*):
                Longest sequence in tokens. Whole trailing steps are dropped with their labels; the prompt and its images
                are never cut. A row of which not even the first step fits is refused.
            return_tensors (`str`, *optional*, defaults to `"pt"`):
                Only `"pt"`.

        Returns:
            [`~transformers.BatchFeature`]: The wrapped processor's outputs (`input_ids`, `attention_mask`,
            `pixel_values`, …), `step_mask` (`torch.BoolTensor` of shape `(batch_size, sequence_length)`), true at the step
            tokens, and with labels `labels` (`torch.FloatTensor` of the same shape), NaN wherever there is no label.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors = {return_tensors!r}: only 'pt' is supported")
        rows = self.encode(problems, completions, labels, max_length=max_length)
        types = {
            key: [prompt_types[number] for number in rows.prompts.numbers]
            for key, prompt_types in rows.prompts.token_types.items()
        }
        arrays = {
            "input_ids": pad(rows.input_ids, self.padding_id),
            "attention_mask": pad([np.ones_like(ids) for ids in rows.input_ids], 0),
            # Types of tokens (text, image): the answer is text
            **{key: pad(values, 0, like=rows.input_ids) for key, values in types.items()},
            "step_mask": pad([ids == self.step_token_id for ids in rows.input_ids], False),
        }
        if labels is not None:
            arrays["labels"] = pad(rows.labels, np.float32(np.nan))
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        return BatchFeature({**tensors, **rows.prompts.images(rows.prompts.numbers)})

    def encode(
        self,
        problems: Sequence[Mapping[str, Any]],
        completions: Sequence[Sequence[str]],
        labels: Sequence[Sequence[float | None]] | None = None,
        *,
        max_length: int | None = None,
    ) -> "EncodedRows":
        """
        Turns rows into token ids, before they are padded or packed; the arguments are those of a call.

        Args:
            problems (`Sequence[Mapping[str, Any]]`):
                One problem a row, with `question` and `images`.
            completions (`Sequence[Sequence[str]]`):
                The steps of each row.
            labels (`Sequence[Sequence[float | None]]`, *optional*):
                One label in [0, 1] for each step, `None` for a step without.
            max_length (`int`, *optional*):
                Longest sequence in tokens.

        Returns:
            [`EncodedRows`]
        """
        _check_rows(problems, completions, labels)
        prompts = [self._renderer.render(self.parts(problem), problem["images"]) for problem in problems]
        encoded = self._renderer.encode(prompts)
        completion_ids = self._encode_completions(prompts, completions)

        input_ids, row_labels = [], []
        for index, (number, ids) in enumerate(zip(encoded.numbers, completion_ids, strict=True)):
            prompt_ids = encoded.input_ids[number]
            row = np.concatenate([prompt_ids, ids])
            steps = np.flatnonzero(row == self.step_token_id)
            if len(steps) != len(completions[index]):
                raise ValueError(
                    f"{_row_name(index, problems)}: {len(completions[index])} steps became {len(steps)} step tokens "
                    f"{self.step_token!r}; the chat template or the tokenizer must not write or swallow this token"
                )
            if max_length is not None and len(row) > max_length:
                steps = steps[steps < max_length]
                if len(steps) == 0:
                    raise ValueError(
                        f"{_row_name(index, problems)}: its prompt ({len(prompt_ids)} tokens) and first step do not fit "
                        f"into max_length = {max_length}; raise max_length or leave the row out"
                    )
                row = row[: steps[-1] + 1]
            values = np.full(len(row), np.nan, dtype=np.float32)
            if labels is not None:
                values[steps] = [math.nan if label is None else label for label in labels[index][: len(steps)]]
            input_ids.append(row)
            row_labels.append(values)
        return EncodedRows(encoded, input_ids, row_labels)

    @property
    def padding_id(self) -> int:
        """Token id that fills rows up."""
        padding = self.tokenizer.pad_token_id
        return 0 if padding is None else int(padding)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the inputs that the wrapped processor makes."""
        return self.processor.model_input_names

    def num_tokens(self, problem: Mapping[str, Any], steps: Sequence[str]) -> int:
        """
        Returns the length in tokens of a row up to its last step token, its image tokens included.

        Args:
            problem (`Mapping[str, Any]`):
                Problem with `question` and `images`.
            steps (`Sequence[str]`):
                The steps.
        """
        return int(self([problem], [steps])["step_mask"][0].nonzero()[-1]) + 1

    def parts(self, problem: Mapping[str, Any]) -> list[str | None]:
        """
        Returns what the user turn holds: pieces of text, free of special tokens, and `None` for each image.

        Args:
            problem (`Mapping[str, Any]`):
                Problem with `question` and `images`.
        """
        parts = split_image_markers(question_text(problem), len(problem["images"]))
        return [None if part is None else neutralize_special_tokens(part, self._special_tokens) for part in parts]

    def text(self, problem: Mapping[str, Any], steps: Sequence[str]) -> str:
        """
        Returns the text of a row, with one placeholder for each image: what the tokens stand for.

        Args:
            problem (`Mapping[str, Any]`):
                Problem with `question` and `images`.
            steps (`Sequence[str]`):
                The steps.
        """
        return self._renderer.render(self.parts(problem), problem["images"]).text + self._answer(steps)

    def _answer(self, steps: Sequence[str]) -> str:
        clean = [neutralize_special_tokens(step.strip(), self._special_tokens) for step in steps]
        separator, ending = self._template.step_separator, self._template.ending
        return separator.join(step + self.step_token for step in clean) + ending

    def _encode_completions(self, prompts: list[Prompt], completions: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Token ids of everything behind the prompts' last special token; see [`Prompt`]."""
        texts = [
            prompt.anchor + prompt.tail + self._answer(steps)
            for prompt, steps in zip(prompts, completions, strict=True)
        ]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [np.asarray(ids[1:] if prompt.anchor else ids) for prompt, ids in zip(prompts, encoded, strict=True)]


@dataclass
class EncodedRows:
    """
    Rows in tokens, neither padded nor packed.

    Args:
        prompts ([`PromptTensors`]):
            The distinct prompts, with their images and the number of each row's prompt.
        input_ids (`list[np.ndarray]`):
            Ids of each row, its prompt included.
        labels (`list[np.ndarray]`):
            Label at each row's step tokens that have one, NaN elsewhere (float32).
    """

    prompts: PromptTensors
    input_ids: list[np.ndarray]
    labels: list[np.ndarray]


def pad(rows: Sequence[np.ndarray], value: Any, *, like: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """
    Stacks rows of different lengths, padded on the right.

    Args:
        rows (`Sequence[np.ndarray]`):
            One-dimensional arrays of one dtype.
        value (`Any`):
            What rows are filled up with.
        like (`Sequence[np.ndarray]`, *optional*):
            Rows whose longest gives the length. Defaults to `rows`.
    """
    padded = np.full((len(rows), max(map(len, rows if like is None else like))), value, dtype=rows[0].dtype)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


def _row_name(index: int, problems: Sequence[Mapping[str, Any]]) -> str:
    problem_id = problems[index].get("id")
    return f"row {index}" if problem_id is None else f"row {index} (problem {problem_id!r})"


def _check_rows(
    problems: Sequence[Mapping[str, Any]],
    completions: Sequence[Sequence[str]],
    labels: Sequence[Sequence[float | None]] | None,
) -> None:
    if not problems:
        raise ValueError("there are no rows to process")
    if len(problems) != len(completions) or (labels is not None and len(labels) != len(problems)):
        counts = f"{len(problems)} problems, {len(completions)} completions"
        counts += "" if labels is None else f", {len(labels)} lists of labels"
        raise ValueError(f"{counts}: each row needs one of each")
    for index, problem in enumerate(problems):
        images = problem.get("images")
        if not isinstance(images, Sequence) or isinstance(images, str):
            raise ValueError(
                f"{_row_name(index, problems)}: images = {images!r:.80}: must be a list, [] without images"
            )
        for number, image in enumerate(images):
            if not isinstance(image, Image.Image | Mapping):
                raise ValueError(
                    f"{_row_name(index, problems)}: images[{number}] = {image!r:.80}: give a PIL image, or a mapping of "
                    "`bytes` and `path` as `datasets` stores it"
                )
    for index, steps in enumerate(completions):
        if isinstance(steps, str) or not steps:
            raise ValueError(
                f"{_row_name(index, problems)}: completions = {steps!r}: must be a list of at least one step"
            )
        for number, text in enumerate(steps):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(
                    f"{_row_name(index, problems)}: completions[{number}] = {text!r}: a step must be a text that is not "
                    "empty; mm_prm.data.text.clean_steps leaves empty ones out"
                )
        if labels is None:
            continue
        if len(labels[index]) != len(steps):
            raise ValueError(
                f"{_row_name(index, problems)}: {len(steps)} steps but {len(labels[index])} labels; give each step one "
                "label, None where there is none"
            )
        for step, label in enumerate(labels[index]):
            if label is not None and not 0 <= label <= 1:
                raise ValueError(
                    f"{_row_name(index, problems)}: labels[{step}] = {label}: must be in [0, 1], or None for no label"
                )
