"""Loads the model that a trainer is given as a path."""

from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from torch import nn
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ..models import (
    AutoModelForProcessReward,
    ProcessRewardProcessor,
    create_process_reward_model,
    is_process_reward_config,
)
from .prm_config import PRMConfig
from .saved_base import save_base_model

# Arguments of `from_pretrained` that a model is loaded without before it is saved again
_PLACING = ("quantization_config", "device_map", "max_memory")


def name_or_path(model: str | PreTrainedModel | nn.Module) -> str:
    """Where a model came from."""
    return model if isinstance(model, str) else str(cast(PreTrainedModel, model).config.name_or_path)


def load_model(path: str, args: PRMConfig, *, needs_saved_base: bool) -> tuple[PreTrainedModel, Any]:
    """
    Loads a model and its processor (or tokenizer), and makes a policy a process reward model.

    Args:
        path (`str`):
            Folder or Hub repository.
        args ([`PRMConfig`]):
            Settings, of which `model_init_kwargs`, `seed` and `output_dir` are read.
        needs_saved_base (`bool`):
            Whether what a policy is made is saved first, because an adapter will belong to it.
    """
    init_kwargs = dict(cast(dict[str, Any] | None, args.model_init_kwargs) or {})
    init_kwargs.setdefault("dtype", "float32")
    config_kwargs = {key: init_kwargs[key] for key in ("revision", "trust_remote_code") if key in init_kwargs}
    config = AutoConfig.from_pretrained(path, **config_kwargs)
    if is_process_reward_config(config):
        model = AutoModelForProcessReward.from_pretrained(path, **init_kwargs)
        return model, ProcessRewardProcessor.from_pretrained(path, **config_kwargs)
    if (config.architectures or [""])[0].endswith("ForTokenClassification"):
        classifier = AutoModelForTokenClassification.from_pretrained(path, **init_kwargs)
        return classifier, AutoTokenizer.from_pretrained(path, **config_kwargs)
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"{path!r} is a policy, and ZeRO-3 scatters its weights before rows for new tokens can be drawn; save the model and "
            "the processor that mm_prm.models.create_process_reward_model gives, and train from that folder"
        )
    if not needs_saved_base:
        return create_process_reward_model(path, seed=args.seed, **init_kwargs)
    base = Path(str(args.output_dir)) / "base_model"
    with PartialState().main_process_first():
        whole = {key: value for key, value in init_kwargs.items() if key not in _PLACING}
        save_base_model(path, base, seed=args.seed, **whole)
    init_kwargs = {key: value for key, value in init_kwargs.items() if key not in config_kwargs}
    return AutoModelForProcessReward.from_pretrained(base, **init_kwargs), ProcessRewardProcessor.from_pretrained(base)
