"""From a policy to an untrained process reward model: tokens, embedding rows, configuration."""

import os
from typing import cast

import torch
from torch.nn import functional
from transformers import AutoConfig, AutoProcessor, PreTrainedModel
from transformers.utils import logging

from .auto import _HUB_ARGUMENTS, REWARD_TOKENS, STEP_TOKEN, set_process_reward_config, stock_class
from .modeling import ProcessRewardMixin, get_output_head, process_reward_class
from .processing import ProcessRewardProcessor
from .templates import TemplateStyle
from .vision import batch_vision_attention

logger = logging.get_logger(__name__)

# Two rows closer than this (cosine, after subtracting the mean row) are the same row for all that training can tell.
_COLLAPSED = 0.95


def create_process_reward_model(
    pretrained_model_name_or_path: str | os.PathLike,
    *,
    step_token: str = STEP_TOKEN,
    reward_tokens: tuple[str, str] = REWARD_TOKENS,
    template_style: TemplateStyle = "chat",
    seed: int = 0,
    **kwargs,
) -> tuple[PreTrainedModel, ProcessRewardProcessor]:
    """
    Turns a policy checkpoint into an untrained process reward model and its processor.

    Example:

    ```python
    >>> from mm_prm.models import create_process_reward_model

    >>> model, processor = create_process_reward_model("Qwen/Qwen2.5-VL-3B-Instruct")
    >>> model.save_pretrained("prm")
    >>> processor.save_pretrained("prm")
    ```

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`):
            Folder or Hub repository of a vision-language or causal language model.
        step_token (`str`, *optional*, defaults to `"<prm>"`):
            Token that ends a step. Added if the tokenizer does not have it.
        reward_tokens (`tuple[str, str]`, *optional*, defaults to `("No", "Yes")`):
            Tokens for wrong and right. Added if they are not single tokens of the tokenizer.
        template_style (`str`, *optional*, defaults to `"chat"`):
            `"chat"` or `"mm_prm"`, see [`ProcessRewardProcessor`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of the new embedding rows.
        kwargs:
            Arguments of [`~transformers.PreTrainedModel.from_pretrained`], such as `dtype`.
    """
    path = os.fspath(pretrained_model_name_or_path)
    hub_arguments = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    stock = stock_class(AutoConfig.from_pretrained(path, **hub_arguments))
    processor = ProcessRewardProcessor.from_processor(
        AutoProcessor.from_pretrained(path, **hub_arguments),
        step_token=step_token,
        reward_tokens=reward_tokens,
        template_style=template_style,
    )
    kwargs.pop("trust_remote_code", None)
    model = stock.from_pretrained(path, use_safetensors=True, **kwargs)
    return prepare_model_for_process_reward(model, processor, seed=seed), processor


def prepare_model_for_process_reward(
    model: PreTrainedModel, processor: ProcessRewardProcessor, *, seed: int = 0
) -> PreTrainedModel:
    """
    Makes a model in memory a process reward model for this processor, in place, and returns it.

    Embeddings are resized if the tokenizer has outgrown them. The rows of the step token and the reward tokens are drawn
    anew where the processor added the token, and where they collapsed onto each other: under tied embeddings, training
    pushes the rows of all tokens that never occur to the same place, where no head can tell Yes from No.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A stock language model, or a process reward model.
        processor ([`ProcessRewardProcessor`]):
            Processor whose tokens the model shall know.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the new rows.
    """
    stock_class(model.config)
    get_output_head(model)
    num_rows = _weight(model.get_input_embeddings()).shape[0]
    if len(processor.tokenizer) > num_rows:
        model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    token_ids = (processor.step_token_id, *processor.reward_token_ids)
    known_rows = min(num_rows, len(processor.tokenizer) - len(processor.added_token_ids))
    embeddings, head = _weight(model.get_input_embeddings()), get_output_head(model).weight
    matrices = [embeddings] if head is embeddings else [embeddings, head]
    generator = torch.Generator().manual_seed(seed)
    for matrix in matrices:
        _renew_rows(matrix, token_ids, set(processor.added_token_ids), known_rows, generator)
    processor.added_token_ids = ()

    set_process_reward_config(model.config, processor)
    if not isinstance(model, ProcessRewardMixin):
        model.__class__ = process_reward_class(type(model))
    cast(ProcessRewardMixin, model).install_reward_head()
    return batch_vision_attention(model)


def _weight(module: torch.nn.Module) -> torch.Tensor:
    return cast(torch.Tensor, module.weight)


@torch.no_grad()
def _renew_rows(
    matrix: torch.Tensor, token_ids: tuple[int, ...], added: set[int], known_rows: int, generator: torch.Generator
) -> None:
    """Gives the rows of added and of collapsed tokens normal values with each column's mean and standard deviation."""
    known = matrix[:known_rows].float()
    mean, std = known.mean(dim=0), known.std(dim=0)
    present = [token_id for token_id in token_ids if token_id not in added]
    centred = functional.normalize(matrix[present].float() - mean, dim=-1)
    too_close = (centred @ centred.T).fill_diagonal_(0) > _COLLAPSED
    collapsed = {token_id for token_id, close in zip(present, too_close.any(dim=-1).tolist(), strict=True) if close}
    if collapsed:
        logger.warning(
            f"the embedding rows of tokens {sorted(collapsed)} have collapsed onto each other (they never occurred in "
            "training); they are drawn anew"
        )
    for token_id in token_ids:
        if token_id in added or token_id in collapsed:
            noise = torch.randn(mean.shape, generator=generator).to(mean.device)
            matrix[token_id] = (mean + std * noise).to(matrix.dtype)
