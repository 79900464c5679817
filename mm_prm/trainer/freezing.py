"""Which parts of a vision-language model learn: vision tower, connector, language model."""

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .prm_config import PRMConfig

if TYPE_CHECKING:
    from .policy_config import PolicyConfig


def freeze_parts(model: PreTrainedModel, args: "PRMConfig | PolicyConfig") -> None:
    """
    Freezes what the settings name, adapters in it included.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, also with adapters.
        args ([`PRMConfig`]):
            Settings of the training.
    """
    if not (args.freeze_vision_tower or args.freeze_connector or args.freeze_language_model):
        return
    tower, language_model = model.get_encoder(modality="image"), model.get_decoder()
    # A model without a vision tower gives itself, or its base model
    has_tower = not any(module is language_model for module in tower.modules())
    tower_parameters = _ids(tower) if has_tower else set()
    language_parameters = _ids(language_model)
    for head in (model.get_input_embeddings(), model.get_output_embeddings()):
        language_parameters |= _ids(head) if head is not None else set()
    connector = _ids(model) - tower_parameters - language_parameters
    if args.freeze_connector and not (has_tower and connector):
        raise ValueError(
            f"freeze_connector = True: this {type(model).__name__} has no connector of its own; freeze_vision_tower freezes "
            "the tower with what belongs to it"
        )
    frozen: set[int] = set()
    frozen |= tower_parameters if args.freeze_vision_tower else set()
    frozen |= connector if args.freeze_connector else set()
    frozen |= language_parameters if args.freeze_language_model else set()
    for parameter in model.parameters():
        if id(parameter) in frozen:
            parameter.requires_grad_(False)
    if has_tower and args.freeze_vision_tower:
        _spare_backward(tower)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("every part of the model is frozen; leave one of the freeze_… settings false")


def _spare_backward(tower: nn.Module) -> None:
    """
    Computes a tower without gradients while all its parameters are frozen.

    For gradient checkpointing transformers lets the inputs of every model in the model require gradients, the patches of
    the tower among them: it would be computed a second time and go through backward, all in vain.
    """
    forward = tower.forward

    @functools.wraps(forward)
    def forward_without_gradients(*args: Any, **kwargs: Any) -> Any:
        learns = any(parameter.requires_grad for parameter in tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            return forward(*args, **kwargs)

    tower.forward = forward_without_gradients


def _ids(module: Any) -> set[int]:
    assert isinstance(module, nn.Module)
    return {id(parameter) for parameter in module.parameters()}
