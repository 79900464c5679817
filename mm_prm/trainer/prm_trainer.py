"""
`PRMTrainer`: trains a process reward model on stepwise rows with pictures and soft labels; or, as TRL's did until version
1.13, a plain token classification model.
"""

import functools
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoTokenizer,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction
from trl.trainer.utils import disable_dropout_in_model

from ..models import ProcessRewardProcessor, is_process_reward_config
from .adapters import add_adapter
from .batches import Rows, process_reward_batches, settle_packing, token_classification_batches
from .checkpoints import CARD_SETTINGS, CheckpointTrainer
from .collator import ROW_KEYS
from .freezing import freeze_parts
from .loading import load_model, name_or_path
from .metrics import step_metrics
from .prm_config import PRMConfig
from .rows import RowView
from .sampler import SortedStepSampler, TreeSampler
from .throughput import Throughput
from .token_classification import compute_accuracy, token_label_loss, tokenize_row

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["PRMTrainer", "compute_accuracy", "compute_step_metrics"]


class PRMTrainer(CheckpointTrainer):
    """
    Trainer for process reward models.

    This class is a wrapper around the [`~transformers.Trainer`] class and inherits all of its attributes and methods.

    Example:

    ```python
    >>> from mm_prm.trainer import PRMConfig, PRMTrainer

    >>> trainer = PRMTrainer(model="path/to/policy", args=PRMConfig("prm"), train_dataset=rows)
    >>> trainer.train()
    >>> trainer.save_model()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Model to train. Can be any of:

            - A folder or Hub repository, of a process reward model or of a policy, which then gets a step token and
              reward tokens ([`create_process_reward_model`]). It is loaded with `args.model_init_kwargs`; `dtype` defaults
              to `float32`.
            - A process reward model.
            - A plain token classification model, or its folder. Rows are then text only, and tokenised as TRL's trainer did:
              see [`PRMTrainer.tokenize_row`].
            - A [`~peft.PeftModel`] of one of these.
        args ([`PRMConfig`], *optional*):
            Configuration of this trainer. If `None`, a default configuration is used.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Function to form a batch. Defaults to [`DataCollatorForProcessReward`].
        train_dataset (`datasets.Dataset` or `Sequence[Mapping[str, Any]]`, *optional*):
            Rows with `prompt` (the question, bare or as a conversation of one user turn), `completions` (the steps),
            `labels` (one for each step: a number in [0, 1], a bool, or null), `images` (if there are any) and, if the problem
            is to be told in evaluation, `problem_id`. Images are processed when their batch is formed. For token
            classification models, rows with `input_ids` and `labels` are taken as they are.
        eval_dataset (`datasets.Dataset`, `Sequence[Mapping[str, Any]]` or `dict` of these, *optional*):
            Rows for evaluation, of the same form.
        processing_class ([`ProcessRewardProcessor`] or [`~transformers.PreTrainedTokenizerBase`], *optional*):
            Processor of the model, or tokenizer of a token classification model. If `None`, it is loaded from where the
            model came from.
        model_init (`Callable[[], PreTrainedModel]`, *optional*):
            Function that makes the model, instead of `model`.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*):
            Function that computes the metrics. Gets the step scores as `predictions` and `(labels, problem_key)` as
            `label_ids`, scores and labels padded with NaN or -100. Defaults to [`step_metrics`]. For token classification
            models it gets logits and labels of tokens, and defaults to [`compute_accuracy`].
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Callbacks to customise the training loop.
        optimizers (`tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler to use.
        preprocess_logits_for_metrics (`Callable[[torch.Tensor, torch.Tensor], torch.Tensor]`, *optional*):
            Function that is applied to scores (or logits) and labels before they are gathered.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train instead of the model itself. A policy is made a process reward model and saved first, in
            `base_model` of the output folder: the adapter belongs to that.
    """

    # `compute_loss` divides by the weight of all labels of the optimizer step
    loss_is_scaled_for_ga = True  # type: ignore[assignment]

    _tag_names = ["mm-prm", "process-reward-model"]  # noqa: RUF012
    _name = "PRM"
    _card_settings = (*CARD_SETTINGS, "packing", "max_tokens", "label_mode", "hard_threshold", "label_weighting")

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module | None = None,
        args: PRMConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: ProcessRewardProcessor | PreTrainedTokenizerBase | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        peft_config: "PeftConfig | None" = None,
    ):
        if (model is None) == (model_init is None):
            raise ValueError("give either a model or a model_init")
        if args is None:
            args = PRMConfig("PRM" if model is None else f"{Path(name_or_path(model)).name}-PRM")

        def prepare_model(model: Any) -> Any:
            if peft_config is not None:
                model = add_adapter(model, peft_config, args)
            if args.disable_dropout:
                disable_dropout_in_model(model)
            freeze_parts(model, args)
            if is_process_reward_config(model.config):
                settle_packing(model, args)
            return model

        # The rows of new tokens are drawn when the model is loaded
        set_seed(args.seed)
        if isinstance(model, str):
            model, loaded_processor = load_model(model, args, needs_saved_base=peft_config is not None)
            processing_class = processing_class or loaded_processor
        if model_init is not None:
            make_model, takes_trial = model_init, bool(inspect.signature(model_init).parameters)
            model = make_model(None) if takes_trial else make_model()

            @functools.wraps(make_model)
            def model_init(*trial: Any) -> PreTrainedModel:
                return prepare_model(make_model(*trial))

        assert isinstance(model, nn.Module)
        config = cast(PreTrainedModel, model).config
        self.is_token_classification = not is_process_reward_config(config)
        if self.is_token_classification and cast(PreTrainedModel, model).get_output_embeddings() is not None:
            raise ValueError(
                f"the model is a plain {type(model).__name__}; make it a process reward model with "
                "mm_prm.models.prepare_model_for_process_reward(model, processor), or pass its path"
            )
        if processing_class is None:
            processor_class = AutoTokenizer if self.is_token_classification else ProcessRewardProcessor
            processing_class = processor_class.from_pretrained(name_or_path(model))
        if model_init is None:
            model = prepare_model(model)
        elif not self.is_token_classification:
            settle_packing(cast(PreTrainedModel, model), args)

        setting_up = token_classification_batches if self.is_token_classification else process_reward_batches
        prepare, training_collator, self.eval_collator = setting_up(
            cast(PreTrainedModel, model), processing_class, args
        )
        if data_collator is None:
            data_collator = training_collator
        elif args.packing != "none":
            raise ValueError(f"packing = {args.packing!r}: a data_collator of your own must pack by itself")
        else:
            self.eval_collator = data_collator
        if train_dataset is not None:
            train_dataset = prepare(train_dataset, False)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: prepare(rows, True) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = prepare(eval_dataset, True)
        self.throughput = Throughput()
        super().__init__(
            model=None if model_init is not None else model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_metrics=compute_metrics
            or (compute_accuracy if self.is_token_classification else compute_step_metrics),
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if args.n_gpu > 1:
            raise ValueError(
                "several GPUs are visible to one process; start training with `accelerate launch`, or make one GPU "
                "visible with CUDA_VISIBLE_DEVICES"
            )
        cast(PreTrainedModel, self.model).add_model_tags(self._tag_names)
        self.label_names = ["labels"]
        self.can_return_loss = True

    @staticmethod
    def tokenize_row(
        features: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        step_separator: str,
        max_length: int | None,
        max_completion_length: int | None,
        train_on_last_step_only: bool,
        is_eval: bool,
    ) -> dict[str, list]:
        r"""
        Turns a row into token ids and labels for a token classification model, as TRL's trainer did: the prompt, then each
        step with the separator behind it, whose last token has the step's label.

        Args:
            features (`Mapping[str, Any]`):
                Row with `prompt`, `completions` and `labels`. Whole numbers and bools stay whole numbers; floats, which TRL
                cut to whole numbers, stay floats; null is no label.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the model.
            step_separator (`str`):
                What follows each step.
            max_length (`int`, *optional*):
                Longest sequence. If `None`, it is not cut.
            max_completion_length (`int`, *optional*):
                Longest completion. If `None`, it is not cut.
            train_on_last_step_only (`bool`):
                Whether only the last step has its label.
            is_eval (`bool`):
                Whether the row is for evaluation, in which each step has its label.

        Returns:
            `dict[str, list]`: `input_ids`, and `labels`, -100 where there is none.
        """
        return tokenize_row(
            features, tokenizer, step_separator, max_length, max_completion_length, train_on_last_step_only, is_eval
        )

    def _send_telemetry(self) -> None:
        # TRL counts runs of its own trainers over the network; ours stay here.
        return None

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        args = cast(PRMConfig, self.args)
        if self.is_token_classification:
            return super()._get_train_sampler(train_dataset)
        rows = cast(RowView, train_dataset if train_dataset is not None else self.train_dataset)
        seed = args.seed if args.data_seed is None else args.data_seed
        if args.packing == "tree":
            return TreeSampler(rows.trees(), seed)
        if args.gradient_accumulation_steps == 1 or args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        step_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return SortedStepSampler(rows.text_lengths(), step_size, seed)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        self.throughput = Throughput()  # training begins
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        training_collator = self.data_collator
        self.data_collator = self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor | None]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        # Σ w over all labelled steps of the optimizer step: over accumulation here, over processes by gathering
        total = torch.zeros((), device=device)
        for batch in batches:
            total += _label_weight(batch).to(device)
            self.throughput.add(batch)
        if self.accelerator.num_processes > 1:
            total = self.accelerator.gather(total).sum()
        return batches, total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        rows = inputs.get("row_index")
        inputs = {key: value for key, value in inputs.items() if key not in ROW_KEYS}
        if not model.training:
            num_items_in_batch = None
        if self.is_token_classification:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = token_label_loss(outputs.logits, labels, num_items_in_batch)
        else:
            outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
            loss = outputs.loss
        if not torch.isfinite(loss):
            dataset = "training" if model.training else "evaluation"
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step}, for rows "
                f"{'without numbers' if rows is None else rows.tolist()} of the {dataset} "
                "dataset; training stops before the weights are spoilt. Look at these rows, lower learning_rate, or "
                "train in float32 or bf16 instead of fp16"
            )
        if model.training:
            # Data parallelism averages gradients over processes, but the denominator is already that of all
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.throughput.since_last_log(self.accelerator)
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        if self.is_token_classification:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        # Only steps are kept: one score each, moved to the left of each row
        scores = outputs.logits.float().softmax(dim=-1)[..., 1]
        step_mask = inputs["step_mask"]
        order = step_mask.int().argsort(dim=1, descending=True, stable=True)[:, : int(step_mask.sum(dim=1).max())]
        here = step_mask.gather(1, order)
        scores = scores.gather(1, order).masked_fill(~here, torch.nan)
        labels = inputs["labels"].gather(1, order).masked_fill(~here, torch.nan)
        return loss.detach(), scores, (labels, inputs["problem_key"])

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        began = time.monotonic()
        output = super().evaluation_loop(*args, **kwargs)
        self.throughput.leave_out(time.monotonic() - began)
        metrics = output.metrics or {}
        for key in list(metrics):
            # The mean over all labels, instead of the mean of the batches' means
            if key.endswith("_cross_entropy"):
                metrics[key.replace("_cross_entropy", "_loss")] = metrics.pop(key)
        return output

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.create_model_card()
        super()._save_checkpoint(model, trial)

    def _card_fields(self) -> dict[str, Any] | None:
        if self.is_token_classification:
            return None
        config = cast(PreTrainedModel, self.model).config
        return {"reads_images": type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING}


def compute_step_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """
    Computes [`step_metrics`] from what [`PRMTrainer`] gathers in evaluation.

    Args:
        prediction ([`~transformers.EvalPrediction`]):
            Step scores, labels and problem keys, one row each.
    """
    scores = np.asarray(prediction.predictions)
    labels, problem_keys = cast(tuple[np.ndarray, np.ndarray], prediction.label_ids)
    # Padding is NaN or -100, and so is a step without a label
    labelled = (labels >= 0) & (labels <= 1)
    problems = np.broadcast_to(problem_keys[:, None], labels.shape)
    rows = np.broadcast_to(np.arange(len(labels))[:, None], labels.shape)
    return step_metrics(scores[labelled], labels[labelled], problems[labelled], rows[labelled])


def _label_weight(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    labelled = batch["labels"] >= 0  # neither NaN nor -100
    if "label_weights" in batch:
        return batch["label_weights"][labelled].sum()
    return labelled.sum().float()
