"""`AutoModelForProcessReward`: any vision-language or causal language model as a process reward model."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file, is_peft_available

from .modeling import process_reward_class, stock_class
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
        Loads a process reward model, a PEFT adapter of one, or a plain checkpoint whose tokenizer has the reward tokens.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                Folder or Hub repository. An adapter is put on the process reward model that it names as its base.
            config ([`~transformers.PreTrainedConfig`], *optional*):
                Configuration to use instead of the checkpoint's.
            reward_token_ids (`Sequence[int]`, *optional*):
                Ids of the tokens for [wrong, right]. Defaults to those in the configuration, and for a plain checkpoint
                to the ids of `No` and `Yes`.
            kwargs:
                Arguments of [`~transformers.PreTrainedModel.from_pretrained`], such as `dtype` and `quantization_config`.
        """
        path = os.fspath(pretrained_model_name_or_path)
        hub_arguments = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
        base = adapter_base(path, hub_arguments)
        if config is None:
            config = _load_config(path, base, hub_arguments)
        stock = stock_class(config)
        if reward_token_ids is None and not is_process_reward_config(config):
            if base is not None:
                raise ValueError(
                    f"'{path}' is an adapter of '{base}', which is no process reward model (its config.json has no "
                    "`reward_token_ids`): save the model that the adapter was trained on, and name its folder as "
                    "`base_model_name_or_path` in adapter_config.json"
                )
            reward_token_ids = _find_reward_tokens(path, hub_arguments)
        if reward_token_ids is not None:
            config.reward_token_ids = list(reward_token_ids)
        kwargs.pop("trust_remote_code", None)
        loaded: Any = process_reward_class(stock).from_pretrained(path, config=config, use_safetensors=True, **kwargs)
        batch_vision_attention(loaded[0] if kwargs.get("output_loading_info") else loaded)
        return loaded

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
    # vLLM reads the tokens in both places; they are one where there is text only.
    config.classifier_from_token = list(processor.reward_tokens)
    config.get_text_config().classifier_from_token = list(processor.reward_tokens)
    config.method = "no_post_processing"
    config.num_labels = 2
    config.id2label = {0: "wrong", 1: "right"}
    config.label2id = {"wrong": 0, "right": 1}


def adapter_base(path: str, hub_arguments: dict[str, Any]) -> str | None:
    """Path of the base model of an adapter, `None` if the path is not one of an adapter without its base model."""
    if Path(path, "config.json").exists():
        return None
    arguments = {key: value for key, value in hub_arguments.items() if key != "trust_remote_code"}
    file = find_adapter_config_file(path, **arguments)
    if file is None:
        return None
    if not is_peft_available():
        raise ImportError(f"'{path}' is a PEFT adapter; run `pip install 'mm-prm[peft]'` to load it")
    return json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"]


def _load_config(path: str, base: str | None, hub_arguments: dict[str, Any]) -> PreTrainedConfig:
    if base is None:
        return AutoConfig.from_pretrained(path, **hub_arguments)
    try:
        return AutoConfig.from_pretrained(base, **hub_arguments)
    except OSError as error:
        raise OSError(
            f"'{path}' is an adapter of '{base}', whose configuration cannot be loaded; if the model lies elsewhere, "
            "name its place as `base_model_name_or_path` in adapter_config.json"
        ) from error


def _find_reward_tokens(path: str, hub_arguments: dict[str, Any]) -> list[int]:
    vocabulary = AutoTokenizer.from_pretrained(path, **hub_arguments).get_vocab()
    missing = [token for token in REWARD_TOKENS if token not in vocabulary]
    if missing:
        raise ValueError(
            f"'{path}' is no process reward model (its config.json has no `reward_token_ids`) and its tokenizer has no "
            f"token {' and no token '.join(missing)}; mm_prm.models.create_process_reward_model('{path}') adds them"
        )
    return [vocabulary[token] for token in REWARD_TOKENS]
