"""
Vision towers that attend to all images at once, and embed patches by a matrix product.

Qwen2-VL's tower and its descendants pack the patches of all images into one sequence, in which every chunk (an image, a
frame, or a window of one) attends to itself only. Where FlashAttention's package is missing, transformers computes that
chunk by chunk: one call per image, block and direction, and several waits for the GPU. Chunks of equal length are simply
a batch, so here they share one call.

A patch is embedded by a convolution as large as itself, which is a matrix product; as a convolution in three dimensions
it is many times slower on a GPU.
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


def speed_up_vision_tower(model: PreTrainedModel) -> PreTrainedModel:
    """
    Lets the vision tower of a model attend to images and windows of equal size in one call, and embed patches by a matrix
    product, in place.

    The results are those of `sdpa` and of the convolution, up to rounding. Only towers that would otherwise loop over
    images are changed, their attention only while they use `sdpa`; `model.set_attn_implementation("sdpa")` changes that
    back. `model.config` and the state dict stay as they are.

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
        if isinstance(config, PreTrainedConfig) and config.model_type in _TOWERS:
            for part in module.modules():
                # The convolution changes its class, not its place: parameters and hooks stay as they are.
                if type(part) is nn.Conv3d and part.stride == part.kernel_size and part.groups == 1:
                    part.__class__ = PatchConvolution
    return model


class PatchConvolution(nn.Conv3d):
    """A convolution of patches that are as large as its kernel, on a GPU as a matrix product."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.device.type == "cpu" or input.shape[2:] != self.weight.shape[2:]:
            return super().forward(input)
        return self.multiply(input)

    def multiply(self, input: torch.Tensor) -> torch.Tensor:
        """The output for patches of the kernel's size."""
        output = nn.functional.linear(input.flatten(1), self.weight.flatten(1), self.bias)
        return output[:, :, None, None, None]


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
