"""
Decoding many completions of few prompts with a shared key-value cache.

The tree of what is computed has three levels, and each is computed once: prompts (with their images), prefixes of
steps that continue a prompt, and rows, the sampled completions of a prefix. `generate` of transformers knows one level
only: it would encode image, question and prefix again for every completion. It still does the preparation here (each
architecture's positions, masks and cache) and hands over through its `custom_generate` hook, so that nothing in this
file is written for one architecture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .sampling import choose_tokens, uniform_noise

# Looking for finished rows on a GPU waits for it, so it is done now and then; a CPU has nothing to wait for.
_CUDA_STEPS_BETWEEN_LOOKS = 8
# Removing rows copies the cache: it pays once this share of the rows is finished.
_FINISHED_SHARE_TO_REMOVE = 1 / 8


@dataclass(frozen=True)
class Sampling:
    """
    How tokens are drawn.

    Args:
        temperature (`float`):
            Divides the logits; 0 takes the most probable token.
        top_k (`int`):
            Number of most probable tokens to keep; 0 keeps all.
        top_p (`float`):
            Keeps the smallest set of most probable tokens whose probability reaches this; 1 keeps all.
        max_new_tokens (`int`):
            Most tokens of a completion.
        end_tokens (`tuple[int, ...]`):
            Ids of the tokens that end a completion.
        pad_token (`int`):
            Id of the token that fills rows up.
    """

    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int
    end_tokens: tuple[int, ...]
    pad_token: int


@dataclass(frozen=True)
class Completion:
    """One decoded row: its tokens without the end token, whether it ended by itself, and its log-probability."""

    tokens: list[int]
    finished: bool
    num_tokens: int
    logprob: float


# Says of rows of tokens which ones are complete.
Stop = Callable[[Sequence[Sequence[int]]], list[bool]]


@dataclass
class _State:
    """What the next forward pass continues from: one entry per row of the batch."""

    cache: Any
    logits: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor | None  # of the last token, batch in the last dimension but one

    def select(self, rows: torch.Tensor) -> "_State":
        self.cache.reorder_cache(rows)
        positions = None if self.positions is None else self.positions.index_select(-2, rows)
        return _State(self.cache, self.logits[rows], self.mask[rows], positions)


def decode(
    model: Any,
    inputs: dict[str, torch.Tensor],
    prefixes: Sequence[tuple[int, Sequence[int]]],
    rows: Sequence[tuple[int, int]],
    sampling: Sampling,
    stop: Stop | None = None,
) -> list[Completion]:
    """
    Samples completions.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Any decoder-only model that generates.
        inputs (`dict[str, torch.Tensor]`):
            What the processor made of the distinct prompts, padded on the left, on the model's device.
        prefixes (`Sequence[tuple[int, Sequence[int]]]`):
            For every prefix, the index of its prompt and the tokens that follow the prompt (none at a root).
        rows (`Sequence[tuple[int, int]]`):
            For every completion, the index of its prefix and its seed.
        sampling ([`Sampling`]):
            How tokens are drawn.
        stop (`Callable`, *optional*):
            Asked after every token which rows are complete, besides those that an end token ends.

    Returns:
        `list[Completion]`, in the order of `rows`.
    """

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        # The checkpoint's own logits processors (a repetition penalty, say) are left out on purpose: a label is an
        # estimate under one documented distribution.
        state = _prefill_prompts(model, input_ids, model_kwargs)
        state = _prefill_prefixes(model, state, prefixes, sampling)
        state = state.select(torch.tensor([prefix for prefix, _ in rows], device=input_ids.device))
        return _sample_rows(model, state, [seed for _, seed in rows], sampling, stop)

    # `max_new_tokens` and `do_sample` only keep `generate` from warning about what it does not decide here.
    return model.generate(
        **inputs, custom_generate=loop, max_new_tokens=sampling.max_new_tokens, do_sample=False, use_cache=True
    )


def _prefill_prompts(model: Any, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> _State:
    outputs = model(**model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs))
    mask = model_kwargs.get("attention_mask")  # `generate` drops a mask that hides nothing
    positions = model_kwargs.get("position_ids")
    if positions is not None:
        positions = positions[..., -1:].expand(*positions.shape[:-2], len(input_ids), 1)
    return _State(
        cache=outputs.past_key_values,
        logits=outputs.logits[:, -1],
        mask=torch.ones_like(input_ids) if mask is None else mask,
        positions=positions,
    )


def _prefill_prefixes(
    model: Any, state: _State, prefixes: Sequence[tuple[int, Sequence[int]]], sampling: Sampling
) -> _State:
    device = state.logits.device
    state = state.select(torch.tensor([prompt for prompt, _ in prefixes], device=device))
    lengths = torch.tensor([len(tokens) for _, tokens in prefixes], device=device)
    if not any(len(tokens) for _, tokens in prefixes):
        return state
    input_ids = pad_sequence(
        [torch.tensor(list(tokens), dtype=torch.long) for _, tokens in prefixes],
        batch_first=True,
        padding_value=sampling.pad_token,
        padding_side="left",
    ).to(device)
    columns = torch.arange(input_ids.shape[1], device=device)
    mask = (columns >= input_ids.shape[1] - lengths[:, None]).to(state.mask.dtype)
    # The tokens of a prefix stand after a gap of padding, which the mask hides and the positions do not count.
    offsets = mask.cumsum(-1)
    continued = _forward(model, state, input_ids, mask, offsets)
    # A root has no tokens of its own, only padding: it keeps what its prompt predicted.
    continued.logits = torch.where((lengths == 0)[:, None], state.logits, continued.logits)
    return continued


def _forward(model: Any, state: _State, input_ids: torch.Tensor, mask: torch.Tensor, offsets: torch.Tensor) -> _State:
    """Feeds tokens that stand `offsets` after each row's last token."""
    mask = torch.cat([state.mask, mask], dim=-1)
    model_inputs = {"past_key_values": state.cache, "attention_mask": mask, "use_cache": True}
    positions = None
    if state.positions is not None:
        positions = model_inputs["position_ids"] = state.positions + offsets
    outputs = model(**model.prepare_inputs_for_generation(input_ids, **model_inputs), logits_to_keep=1)
    return _State(
        cache=outputs.past_key_values,
        logits=outputs.logits[:, -1],
        mask=mask,
        positions=None if positions is None else positions[..., -1:],
    )


def _sample_rows(
    model: Any, state: _State, seeds: Sequence[int], sampling: Sampling, stop: Stop | None
) -> list[Completion]:
    device = state.logits.device
    num_rows, max_new_tokens = len(seeds), sampling.max_new_tokens
    end_tokens = torch.tensor(sampling.end_tokens, device=device)
    steps_between_looks = _CUDA_STEPS_BETWEEN_LOOKS if device.type == "cuda" else 1
    noise = uniform_noise(seeds, max_new_tokens, device)
    tokens = torch.full((num_rows, max_new_tokens), sampling.pad_token, dtype=torch.long, device=device)
    logprobs = torch.zeros(num_rows, device=device)
    live = torch.arange(num_rows, device=device)
    finished = torch.zeros(num_rows, dtype=torch.bool, device=device)
    stopped_after = torch.full((num_rows,), max_new_tokens + 1, device=device)
    one = torch.ones((num_rows, 1), dtype=state.mask.dtype, device=device)

    for step in range(max_new_tokens):
        chosen, chosen_logprobs = choose_tokens(
            state.logits, noise[live, step], sampling.temperature, sampling.top_k, sampling.top_p
        )
        tokens[live, step] = chosen
        logprobs[live] += chosen_logprobs.masked_fill(finished, 0.0)
        finished = finished | torch.isin(chosen, end_tokens)
        if stop is not None:
            complete = torch.tensor(stop(tokens[live, : step + 1].tolist()), device=device) & ~finished
            stopped_after[live[complete]] = step + 1
            finished = finished | complete
        if step + 1 == max_new_tokens:
            break
        if (step + 1) % steps_between_looks == 0:
            num_finished = int(finished.sum())
            if num_finished == len(live):
                break
            if num_finished >= _FINISHED_SHARE_TO_REMOVE * len(live):
                kept = (~finished).nonzero().squeeze(-1)
                state = state.select(kept)
                live, finished, chosen = live[kept], finished[kept], chosen[kept]
        ones = one[: len(live)]
        state = _forward(model, state, chosen[:, None], ones, ones)
    return _collect(tokens, logprobs, stopped_after, sampling)


def _collect(
    tokens: torch.Tensor, logprobs: torch.Tensor, stopped_after: torch.Tensor, sampling: Sampling
) -> list[Completion]:
    # A finished row goes on until rows are removed: what counts is where it ended first.
    is_end = torch.isin(tokens, torch.tensor(sampling.end_tokens, device=tokens.device))
    lengths = torch.where(is_end.any(-1), is_end.int().argmax(-1), tokens.shape[1])
    stopped = stopped_after <= lengths
    finished = is_end.any(-1) & ~stopped
    lengths = torch.where(stopped, stopped_after, lengths)
    return [
        Completion(tokens=row[:length], finished=ended, num_tokens=length + ended, logprob=logprob)
        for row, length, ended, logprob in zip(
            tokens.tolist(), lengths.tolist(), finished.tolist(), logprobs.tolist(), strict=True
        )
    ]
