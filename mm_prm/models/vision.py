"""
Vision towers that attend to all images at once.

Qwen2-VL's tower and its descendants pack the patches of all images into one sequence, in which every chunk (an image, a
frame, or a window of one) attends to itself only. Where FlashAttention's package is missing, transformers computes that
chunk by chunk: one call per image, block and direction, and several waits for the GPU. Chunks of equal length are simply
a batch, so here they share one call.
"""

import copy

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Towers hand over the packed sequence with its borders, instead of cutting it themselves, if the name contains "flash".
_IMPLEMENTATION = "flash_chunks_on_sdpa"

_TOWERS = frozenset(
    {
        "glm4v_moe_vision",
        "glm4v_vision",
        "qwen2_5_vl_vision",
        "qwen2_vl_vision",
        "qwen3_5_moe_vision",
        "qwen3_5_vision",
        "qwen3_vl_moe_vision",
        "qwen3_vl_vision",
    }
)


def batch_vision_attention(model: PreTrainedModel) -> PreTrainedModel:
    """
    Lets the vision tower of a model attend to images and windows of equal size in one call, in place.

    The results are those of `sdpa`, up to rounding. Only towers that would otherwise loop over images are changed, and
    only while they use `sdpa`; `model.set_attn_implementation("sdpa")` changes them back. `model.config` stays as it is.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Any model, with or without such a tower.
    """
    # The modules of the tower read the implementation from the configuration that they share with `model.config`. They
    # get a copy, because a new model could not be made from a configuration that names an implementation of ours:
    # transformers would look for a FlashAttention kernel of that name.
    copies: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if (
            isinstance(config, PreTrainedConfig)
            and config.model_type in _TOWERS
            and config._attn_implementation == "sdpa"
        ):
            if id(config) not in copies:
                copies[id(config)] = copy.copy(config)
                copies[id(config)]._attn_implementation = _IMPLEMENTATION
            vars(module)["config"] = copies[id(config)]
    return model


def _attend_within_chunks(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Attends within every chunk of packed sequences of shape (1, heads, tokens, head_dim).

    `cu_seq_lens_q` holds the borders of the chunks, from 0 to the number of tokens. The result has the shape (1, tokens,
    heads, head_dim).
    """

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask=None, dropout=dropout, scaling=scaling, is_causal=False
        )[0]

    num_chunks, num_tokens = len(cu_seq_lens_q) - 1, query.shape[2]
    if num_chunks * max_length_q == num_tokens:  # all are as long as the longest, known without waiting for the GPU
        shape = (num_chunks, max_length_q)
        output = attend(*(states[0].unflatten(1, shape).transpose(0, 1) for states in (query, key, value)))
        return output.flatten(0, 1)[None], None

    lengths = cu_seq_lens_q.diff().tolist()
    members: dict[int, list[int]] = {}
    for chunk, length in enumerate(lengths):
        members.setdefault(length, []).append(chunk)
    states_by_chunk = [states.split(lengths, dim=2) for states in (query, key, value)]
    outputs: dict[int, torch.Tensor] = {}
    for chunks in members.values():
        output = attend(*(torch.cat([states[chunk] for chunk in chunks]) for states in states_by_chunk))
        outputs.update(zip(chunks, output, strict=True))
    return torch.cat([outputs[chunk] for chunk in range(num_chunks)])[None], None


AttentionInterface.register(_IMPLEMENTATION, _attend_within_chunks)
