"""`AutoModelForProcessReward`: any vision-language or causal language model as a process reward model."""

import os
from collections.abc import Sequence
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    __version__,
)

from .modeling import check_config, process_reward_class
from .vision import batch_vision_attention

STEP_TOKEN = "<prm>"
# [wrong, right], the order of the logits
REWARD_TOKENS = ("No", "Yes")

# What decides which files are read, for configuration, tokenizer and weights alike.
_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


class AutoModelForProcessReward:
    """
    Loads any image-text-to-text or causal language model as a process reward model.

    The model is an instance of the checkpoint's own class with the forward of [`ProcessRewardMixin`], has the same
    state dict, and is saved as the checkpoint it came from.

    Example:

    ```python
    >>> from mm_prm.models import AutoModelForProcessReward, ProcessRewardProcessor

    >>> model = AutoModelForProcessReward.from_pretrained("path/to/prm")
    >>> processor = ProcessRewardProcessor.from_pretrained("path/to/prm")
    >>> inputs = processor([{"question": "What is 1 + 1?", "images": []}], [["1 + 1 = 2.", "The answer is 2."]])
    >>> model(**inputs).logits[inputs["step_mask"]].softmax(-1)[:, 1]  # one score a step
    ```
    """

    def __init__(self):
        raise OSError("use AutoModelForProcessReward.from_pretrained(path) or .from_config(config)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        config: PreTrainedConfig | None = None,
        reward_token_ids: Sequence[int] | None = None,
        **kwargs,
    ) -> PreTrainedModel:
        """
        Loads a process reward model, or a plain checkpoint whose tokenizer has the reward tokens.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                Folder or Hub repository.
            config ([`~transformers.PreTrainedConfig`], *optional*):
                Configuration to use instead of the checkpoint's.
            reward_token_ids (`Sequence[int]`, *optional*):
                Ids of the tokens for [wrong, right]. Defaults to those in the configuration, and for a plain checkpoint
                to the ids of `No` and `Yes`.
            kwargs:
                Arguments of [`~transformers.PreTrainedModel.from_pretrained`].
        """
        path = os.fspath(pretrained_model_name_or_path)
        hub_arguments = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
        if config is None:
            config = AutoConfig.from_pretrained(path, **hub_arguments)
        stock = stock_class(config)
        if reward_token_ids is None and not is_process_reward_config(config):
            reward_token_ids = _find_reward_tokens(path, hub_arguments)
        if reward_token_ids is not None:
            config.reward_token_ids = list(reward_token_ids)
        kwargs.pop("trust_remote_code", None)
        model = process_reward_class(stock).from_pretrained(path, config=config, use_safetensors=True, **kwargs)
        return batch_vision_attention(model)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs) -> PreTrainedModel:
        """
        Builds a process reward model with random weights.

        Args:
            config ([`~transformers.PreTrainedConfig`]):
                Configuration with `reward_token_ids`.
            kwargs:
                `dtype`, `attn_implementation`.
        """
        stock = stock_class(config)
        if not is_process_reward_config(config):
            raise ValueError(
                "the configuration has no `reward_token_ids`: set them to the ids of the tokens `No`, `Yes`"
            )
        return batch_vision_attention(process_reward_class(stock)._from_config(config, **kwargs))


def is_process_reward_config(config: PreTrainedConfig) -> bool:
    """Tells whether a configuration is that of a process reward model."""
    return "reward_token_ids" in vars(config)


def set_process_reward_config(config: PreTrainedConfig, processor: Any) -> None:
    """
    Writes into a configuration what makes a checkpoint a process reward model, for us and for vLLM.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration, changed in place.
        processor ([`ProcessRewardProcessor`]):
            Processor that knows the tokens.
    """
    config.step_token_id = processor.step_token_id
    config.reward_token_ids = list(processor.reward_token_ids)
    config.classifier_from_token = list(processor.reward_tokens)
    config.method = "no_post_processing"
    config.num_labels = 2
    config.id2label = {0: "wrong", 1: "right"}
    config.label2id = {"wrong": 0, "right": 1}


def stock_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """
    Returns the architecture's own class for generating text from images, or from text alone.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of a checkpoint.
    """
    check_config(config)
    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        if type(config) in mapping:
            classes: Any = mapping[type(config)]
            return classes[0] if isinstance(classes, tuple) else classes
    raise ValueError(
        f"{config.model_type!r} models cannot become process reward models: transformers {__version__} has neither an "
        "image-text-to-text nor a causal language model class for them"
    )


def _find_reward_tokens(path: str, hub_arguments: dict[str, Any]) -> list[int]:
    vocabulary = AutoTokenizer.from_pretrained(path, **hub_arguments).get_vocab()
    missing = [token for token in REWARD_TOKENS if token not in vocabulary]
    if missing:
        raise ValueError(
            f"'{path}' is no process reward model (its config.json has no `reward_token_ids`) and its tokenizer has no "
            f"token {' and no token '.join(missing)}; mm_prm.models.create_process_reward_model('{path}') adds them"
        )
    return [vocabulary[token] for token in REWARD_TOKENS]
