"""Adapters on models, quantised ones (QLoRA) included."""

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from .prm_config import PRMConfig

if TYPE_CHECKING:
    from peft import PeftConfig


def add_adapter(model: PreTrainedModel, peft_config: "PeftConfig", args: PRMConfig) -> Any:
    """
    Puts an adapter on a model; only the adapter learns.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model. If its weights are quantised, the others become float32, and checkpoints of gradients are enabled
            here.
        peft_config ([`~peft.PeftConfig`]):
            The adapter.
        args ([`PRMConfig`]):
            Settings of the training.
    """
    from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config is a {type(peft_config).__name__}; give a peft.PeftConfig, such as peft.LoraConfig")
    if isinstance(model, PeftModel):
        raise ValueError("the model has an adapter already; give it without peft_config, or merge the adapter first")
    if "quantization_config" in model.config.to_dict():
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=args.gradient_checkpointing,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs or {},
        )
        args.gradient_checkpointing = False
    return get_peft_model(model, peft_config)
