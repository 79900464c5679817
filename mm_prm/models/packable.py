"""Which architectures read packed rows as they read single ones, and why others do not."""

import inspect
from typing import Any

from transformers import PreTrainedModel

from .positions import PositionPrecomputer

# Vision-language models that give the tokens of images plain positions and a causal mask. A configuration does not tell.
_PLAIN_IMAGE_READERS = frozenset({"idefics3", "internvl", "llava_onevision", "smolvlm"})


def packing_obstacle(model: PreTrainedModel) -> str | None:
    """
    Returns why an architecture cannot read packed rows as it reads single ones, or `None` if it can.

    It can if each layer attends to all tokens that a mask lets through, and knows their positions from `position_ids` alone.
    Windows, chunks, convolutions and states would reach from one row, or branch, into the next.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Any model, also with adapters.
    """
    text = model.config.get_text_config()
    settings = text.to_dict()
    name = f"{model.config.model_type!r} models"
    kinds = _layer_kinds(settings) - {"full_attention"}
    if kinds:
        return f"{name} have layers that do not attend to all tokens ({', '.join(sorted(kinds))})"
    if model._is_stateful:
        return f"{name} carry a state from token to token (linear attention or state space layers)"
    if settings.get("alibi"):
        return f"{name} count positions in the sequence, not in the row (ALiBi)"
    reads_images = text is not model.config
    if (
        reads_images
        and model.config.model_type not in _PLAIN_IMAGE_READERS
        and not PositionPrecomputer.can_have(model)
    ):
        return f"{name} are not known to read the images of packed rows as they read those of single rows"
    takes_positions = "position_ids" in inspect.signature(model.get_decoder().forward).parameters
    if not takes_positions or not model._supports_attention_backend:
        return f"{name} do not let positions and masks of one's own reach each layer"
    return None


def _layer_kinds(settings: dict[str, Any]) -> set[str]:
    kinds = settings.get("layer_types") or settings.get("layers_block_type")
    if kinds:
        return set(kinds)
    # Some have a window, or chunks, and no list of layers
    windows = ("sliding_window", "attention_window", "attention_chunk_size")
    return {window for window in windows if settings.get(window) and settings.get(f"use_{window}", True)}
