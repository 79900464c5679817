"""`PolicyTrainer`: fine-tunes a vision-language model, on TRL's `SFTTrainer`, to write solutions in steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import datasets
import torch
import trl
from torch import nn
from transformers import (
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from trl import SFTTrainer

from ..hub import model_card
from ..models import batch_vision_attention
from ..policies.prompts import PromptBuilder
from ..policies.steps import StepFormat
from ..policies.transformers import end_tokens
from .checkpoints import load_weights
from .freezing import freeze_parts
from .policy_config import PolicyConfig
from .policy_rows import prepare_solutions

if TYPE_CHECKING:
    from peft import PeftConfig

Rows: TypeAlias = datasets.Dataset | Sequence[Mapping[str, Any]]

# What a reader of the model card wants to know of a training
_CARD_SETTINGS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "bf16",
    "fp16",
    "max_length",
    "step_format",
    "freeze_vision_tower",
    "freeze_connector",
    "freeze_language_model",
    "seed",
)


class PolicyTrainer(SFTTrainer):
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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or not isinstance(self.model, PreTrainedModel):  # an adapter
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(self.model, PreTrainedModel):
            super()._load_best_model()
        else:
            load_weights(self.model, str(self.state.best_model_checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves the model, its processor and, in the output folder, its card.

        Args:
            output_dir (`str`, *optional*):
                Folder to write. Defaults to the output folder.
        """
        super().save_model(output_dir, _internal_call)
        if output_dir is None and not _internal_call:
            self.create_model_card()

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
    ) -> None:
        """
        Writes the model card into the output folder, without asking the network for anything.

        Args:
            model_name (`str`, *optional*):
                Name of the model. Defaults to the output folder's name.
            dataset_name (`str`, *optional*):
                Name of the dataset it was trained on.
            tags (`str` or `list[str]`, *optional*):
                Tags beside those of this trainer.
            license (`str`, *optional*):
                Licence of the model, as the Hub spells it.
        """
        if not self.is_world_process_zero():
            return
        args = cast(PolicyConfig, self.args)
        folder, base_model = Path(str(args.output_dir)), str(cast(PreTrainedModel, self.model).config.name_or_path)
        folder.mkdir(parents=True, exist_ok=True)
        model_name = model_name or folder.resolve().name
        settings = args.to_dict()
        card = model_card(
            model_name,
            "policy",
            model_id=args.hub_model_id or model_name,
            # Where a folder lies on this machine is nobody's business
            base_model=Path(base_model).name if Path(base_model).is_dir() else base_model,
            datasets=[dataset_name] if dataset_name else [],
            license=license,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            reads_images=self._is_vlm,
            step_format=args.step_format,
            settings={"num_processes": args.world_size} | {name: settings[name] for name in _CARD_SETTINGS},
        )
        card.save(folder / "README.md")
