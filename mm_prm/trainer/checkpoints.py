"""Weights back from a checkpoint, under the names that the model has in memory."""

from typing import Any

from transformers import PreTrainedModel


def load_weights(model: Any, checkpoint: str) -> None:
    """
    Loads a checkpoint's weights into a model.

    transformers' own trainer reads them under the names in the file, without the renaming that `from_pretrained` does: for
    Qwen2.5-VL and others nothing fits, and training goes on from the weights it started with, with no more than a warning
    (huggingface/transformers#43701).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        checkpoint (`str`):
            Folder of the checkpoint.
    """
    assert isinstance(model, PreTrainedModel)
    saved = type(model).from_pretrained(checkpoint, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
