"""
FlexAttention for packed sequences in any architecture.

It skips the blocks of a mask in which nothing is seen, so sequences of many trees cost what the trees cost. transformers
offers it for some architectures only, and would compile a kernel for every padded batch that evaluation brings. So this
implementation has a name of its own: batches that come with a mask of blocks go to FlexAttention, all others to SDPA.
"""

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# transformers refuses names that contain "flex_attention" for the architectures that it does not offer it for.
_IMPLEMENTATION = "flex_for_block_masks"


def use_flex_attention(model: PreTrainedModel) -> PreTrainedModel:
    """
    Lets the language model of a model compute packed sequences with FlexAttention, in place.

    Only models that use `sdpa` and have no dropout of attention, which FlexAttention lacks, are changed; and none with heads
    of less than 16 dimensions, which its kernels do not take. Vision towers keep their attention.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Any model, also with adapters.
    """
    text = model.config.get_text_config()
    settings = text.to_dict()
    head_size = settings.get("head_dim") or text.hidden_size // text.num_attention_heads
    if text._attn_implementation == "sdpa" and not settings.get("attention_dropout") and head_size >= 16:
        # Not by `set_attn_implementation`, which also sets back what `batch_vision_attention` did
        text._attn_implementation = _IMPLEMENTATION
    return model


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # Where queries and keys are normalised, autocast leaves them in float32. It casts them for SDPA, but not here.
    query, key = query.to(value.dtype), key.to(value.dtype)
    return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_IMPLEMENTATION, _attend)
AttentionMaskInterface.register(_IMPLEMENTATION, sdpa_mask)
