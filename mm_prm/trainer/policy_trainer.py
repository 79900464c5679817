"""`PolicyTrainer`: fine-tunes a vision-language model, on TRL's `SFTTrainer`, to write solutions in steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import datasets
import torch
import trl
from transformers import (
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from trl import SFTTrainer

from ..models import batch_vision_attention
from ..policies.prompts import PromptBuilder
from ..policies.steps import StepFormat
from ..policies.transformers import end_tokens
from .checkpoints import CARD_SETTINGS, CheckpointTrainer
from .freezing import freeze_parts
from .policy_config import PolicyConfig
from .policy_rows import prepare_solutions

if TYPE_CHECKING:
    from peft import PeftConfig

Rows: TypeAlias = datasets.Dataset | Sequence[Mapping[str, Any]]


class PolicyTrainer(CheckpointTrainer, SFTTrainer):
    """
    Trainer for policies: supervised fine-tuning on solutions that are written in steps.

    The prompt is the one that a policy gets at a rollout, token for token, and the loss is that of the solution alone,
    the token that ends the turn included. This class is a wrapper around the [`~trl.SFTTrainer`] class and inherits all of
    its attributes and methods.

    Example:

    ```python
    >>> from mm_prm.trainer.policy_trainer import PolicyConfig, PolicyTrainer

    >>> trainer = PolicyTrainer("path/to/vlm", PolicyConfig("policy"), train_dataset=rows)
    >>> trainer.train()
    >>> trainer.save_model()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Model to train: a folder, a Hub repository or a model, vision-language or text-only. A name is loaded with
            `args.model_init_kwargs`; `dtype` defaults to `float32`.
        args ([`PolicyConfig`], *optional*):
            Configuration of this trainer. If `None`, a default configuration is used.
        train_dataset (`datasets.Dataset` or `Sequence[Mapping[str, Any]]`):
            Rows with `prompt` (the question, bare or as a conversation of one user turn), `completions` (the steps, the
            last of which states the answer), `images` (if there are any) and, to name the row, `problem_id`. Images are
            processed when their batch is formed.
        eval_dataset (`datasets.Dataset` or `Sequence[Mapping[str, Any]]`, *optional*):
            Rows for evaluation, of the same form.
        processing_class ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`], *optional*):
            Processor of the model, or tokenizer of a text-only one, with a chat template. If `None`, it is loaded from
            where the model came from.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Callbacks to customise the training loop.
        optimizers (`tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler to use.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train instead of the model itself.
    """

    _tag_names = ["mm-prm", "policy"]  # noqa: RUF012
    _name = "Policy"
    _card_settings = (*CARD_SETTINGS, "step_format")

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: PolicyConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: "PeftConfig | None" = None,
    ):
        if train_dataset is None:
            raise ValueError("train_dataset: give rows with `prompt` and `completions`")
        name = model if isinstance(model, str) else str(model.config.name_or_path)
        if args is None:
            args = PolicyConfig(f"{Path(name).name}-policy")
        if processing_class is None:
            revision = cast(dict[str, Any], args.model_init_kwargs or {}).get("revision")
            processing_class = AutoProcessor.from_pretrained(
                name, revision=revision, trust_remote_code=args.trust_remote_code
            )
        if tuple(map(int, trl.__version__.split(".")[:2])) < (1, 16) and args.device.type == "cpu":
            raise ValueError(f"trl {trl.__version__} computes this loss on GPUs only; pip install 'trl>=1.16'")
        prompts = PromptBuilder(processing_class, cast(StepFormat, args.step_format))

        def prepare(rows: Rows) -> datasets.Dataset:
            return prepare_solutions(
                rows, prompts, max_length=args.max_length, skip_bad_rows=args.on_bad_row == "skip"
            )

        train_dataset = prepare(train_dataset)
        eval_dataset = None if eval_dataset is None else prepare(eval_dataset)
        # Rows become texts or tokens when they are read
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        policy = cast(PreTrainedModel, self.model)
        freeze_parts(policy, args)
        batch_vision_attention(policy)
        # A policy ends where a turn of its chat template does, also if the model it was made from ended elsewhere
        (end,) = prompts.tokenizer(prompts.end_of_turn, add_special_tokens=False)["input_ids"][-1:]
        ends = end_tokens(policy, prompts.tokenizer)
        if end not in ends:
            policy.generation_config.eos_token_id = [*ends, end]

    def _send_telemetry(self) -> None:
        # TRL counts runs of its own trainers over the network; ours stay here.
        return None

    def _card_fields(self) -> dict[str, Any]:
        args = cast(PolicyConfig, self.args)
        return {"kind": "policy", "reads_images": self._is_vlm, "step_format": args.step_format}
