"""A policy on transformers: any `AutoModelForImageTextToText` or `AutoModelForCausalLM` checkpoint writes solutions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from mm_prm.annotation.protocols import Generation, Problem, Rollout, RolloutRequest, RolloutStatus
from mm_prm.models import batch_vision_attention
from mm_prm.models.auto import adapter_base

from .decoding import Completion, Sampling, Stop, decode
from .prompts import Prompt, PromptBuilder
from .settings import check_sampling
from .steps import STEP_ENDS, StepFormat, first_step, parse_steps


@dataclass(frozen=True)
class _Piece:
    """Some rollouts of one request: those that share a batch."""

    request: int
    start: int
    stop: int


class TransformersPolicy:
    """
    Writes solutions with a model of transformers, see [`~mm_prm.annotation.protocols.Policy`].

    A rollout depends on its request's seed and its number within the request, not on the batch it is computed in (up to
    the rounding of the logits, which differs between batch sizes).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Vision-language or text-only model that generates. Its own generation settings are not used, only its end
            tokens.
        processor ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            Its processor, or tokenizer, with a chat template.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Most tokens of a rollout. A rollout that reaches it has the status `"length"`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature; 0 takes the most probable token.
        top_k (`int`, *optional*, defaults to `50`):
            Number of most probable tokens to sample from; 0 takes all.
        top_p (`float`, *optional*, defaults to `0.9`):
            Samples from the smallest set of most probable tokens whose probability reaches this; 1 takes all.
        batch_size (`int`, *optional*, defaults to `256`):
            Most rollouts computed at once. A GPU wants thousands for a small model.
        step_format (`str`, *optional*, defaults to `"paragraphs"`):
            How the model writes its steps: `"paragraphs"`, `"tags"` or `"numbered"`, see
            [`~mm_prm.policies.steps.parse_steps`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin | PreTrainedTokenizerBase,
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 0.9,
        batch_size: int = 256,
        step_format: StepFormat = "paragraphs",
    ):
        check_sampling(max_new_tokens, temperature, top_k, top_p, step_format)
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size!r} has to be at least 1")
        self.model = model.eval()
        self.prompts = PromptBuilder(processor, step_format)
        self.batch_size = batch_size
        tokenizer = self.prompts.tokenizer
        ends = end_tokens(model, tokenizer)
        self.sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            end_tokens=ends,
            pad_token=ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        **settings: Any,
    ) -> "TransformersPolicy":
        """
        Loads a checkpoint.

        Args:
            path (`str`):
                Folder or Hub repository, of a model or of a PEFT adapter, which is put on the model that it names.
            dtype (`str` or `torch.dtype`, *optional*):
                Type of the weights. By default that of the checkpoint on a GPU, and float32 on a CPU, where many
                processors have no bfloat16 arithmetic and compute it several times slower.
            device (`str` or `torch.device`, *optional*):
                Where to compute; the GPU by default if there is one.
            settings:
                Further arguments of [`TransformersPolicy`].
        """
        base = adapter_base(path, {}) or path
        reads_images = type(AutoConfig.from_pretrained(base)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        model_class = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model: Any = model_class.from_pretrained(
            path, dtype=dtype or (torch.float32 if device.type == "cpu" else "auto"), use_safetensors=True
        )
        model.to(device)
        batch_vision_attention(model)
        return cls(model, AutoProcessor.from_pretrained(path), **settings)

    def generate(self, requests: Sequence[tuple[Problem, RolloutRequest]]) -> list[Generation]:
        """
        Samples the rollouts of many requests.

        Args:
            requests (`Sequence[tuple[Mapping, RolloutRequest]]`):
                Problems, their images decoded, and what is wanted of them.

        Returns:
            `list[Generation]`: One for each request, in their order.
        """
        built = [self.prompts.build(problem, request.prefix, request.one_step) for problem, request in requests]
        completions: list[list[Completion | None]] = [[None] * request.num_rollouts for _, request in requests]
        for pieces in self._batches(built, [request for _, request in requests]):
            batch = iter(self._decode(pieces, built, requests))
            for piece in pieces:
                for number in range(piece.start, piece.stop):
                    completions[piece.request][number] = next(batch)
        return [
            Generation(
                rollouts=self._read([row for row in rows if row is not None], request),
                prompt_tokens=len(prompt) + len(prefix),
            )
            for rows, (_, request), (prompt, prefix) in zip(completions, requests, built, strict=True)
        ]

    def _batches(
        self, built: Sequence[tuple[Prompt, list[int]]], requests: Sequence[RolloutRequest]
    ) -> Iterator[list[_Piece]]:
        """Cuts the requests into batches of like prompts: of one shape, sorted by length, those of a problem together."""
        shapes = [(request.one_step, *prompt.shape) for (prompt, _), request in zip(built, requests, strict=True)]
        numbers: dict[Prompt, int] = {}
        for prompt, _ in built:
            numbers.setdefault(prompt, len(numbers))
        order = sorted(
            range(len(built)),
            key=lambda index: (shapes[index], len(built[index][0]), numbers[built[index][0]]),
        )
        pieces: list[_Piece] = []
        size, shape = 0, None
        for index in order:
            start = 0
            while start < requests[index].num_rollouts:
                if pieces and (size == self.batch_size or shape != shapes[index]):
                    yield pieces
                    pieces, size = [], 0
                shape = shapes[index]
                stop = min(requests[index].num_rollouts, start + self.batch_size - size)
                pieces.append(_Piece(index, start, stop))
                size += stop - start
                start = stop
        if pieces:
            yield pieces

    def _decode(
        self,
        pieces: Sequence[_Piece],
        built: Sequence[tuple[Prompt, list[int]]],
        requests: Sequence[tuple[Problem, RolloutRequest]],
    ) -> list[Completion]:
        prompts: dict[Prompt, int] = {}
        prefixes: list[tuple[int, list[int]]] = []
        rows: list[tuple[int, int]] = []
        for piece in pieces:
            prompt, prefix = built[piece.request]
            rows += [
                (len(prefixes), requests[piece.request][1].seed + number) for number in range(piece.start, piece.stop)
            ]
            prefixes.append((prompts.setdefault(prompt, len(prompts)), prefix))
        inputs = {
            name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in self.prompts.collate(list(prompts), self.sampling.pad_token).items()
        }
        one_step = requests[pieces[0].request][1].one_step
        return decode(self.model, inputs, prefixes, rows, self.sampling, self._step_end() if one_step else None)

    def _step_end(self) -> Stop:
        ends = STEP_ENDS[self.prompts.step_format]
        # A token stands for at least one byte, so the end of a step lies within so many.
        longest = max(len(end.encode()) for end in ends)

        def complete(rows: Sequence[Sequence[int]]) -> list[bool]:
            texts = self.prompts.tokenizer.batch_decode(
                [list(row[-longest:]) for row in rows], skip_special_tokens=True
            )
            return [any(end in text for end in ends) for text in texts]

        return complete

    def _read(self, completions: Sequence[Completion], request: RolloutRequest) -> list[Rollout]:
        if request.one_step:
            return [self._read_step(completion) for completion in completions]
        continues = bool(request.prefix) and self.prompts.prefix_in_turn
        # A confident policy writes the same few solutions again and again.
        texts = {tuple(completion.tokens): "" for completion in completions}
        decoded = self.prompts.tokenizer.batch_decode([list(tokens) for tokens in texts], skip_special_tokens=True)
        steps = {
            tokens: parse_steps(text, self.prompts.step_format, continues)
            for tokens, text in zip(texts, decoded, strict=True)
        }
        rollouts = []
        for completion in completions:
            read = steps[tuple(completion.tokens)]
            status: RolloutStatus = "unparsable" if not read else "finished" if completion.finished else "length"
            rollouts.append(Rollout(read, status, completion.num_tokens, completion.logprob))
        return rollouts

    def _read_step(self, completion: Completion) -> Rollout:
        [text] = self.prompts.tokenizer.batch_decode([completion.tokens], skip_special_tokens=True)
        steps, status = first_step(text, self.prompts.step_format, "finished" if completion.finished else "length")
        return Rollout(steps, status, completion.num_tokens, completion.logprob)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of the tokens at which a model stops: those of its generation settings, and the tokenizer's end token."""
    configured = model.generation_config.eos_token_id
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise ValueError(f"neither the model nor the tokenizer of '{tokenizer.name_or_path}' names an end token")
    return tuple(dict.fromkeys(ids))
