"""`PRMTrainer`: trains a process reward model on stepwise rows with pictures and soft labels."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import datasets
import numpy as np
import torch
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    DataCollator,
    PreTrainedModel,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import disable_dropout_in_model

from ..hub import model_card
from ..models import (
    AutoModelForProcessReward,
    PositionPrecomputer,
    ProcessRewardMixin,
    ProcessRewardProcessor,
    TreePacker,
    create_process_reward_model,
    is_process_reward_config,
)
from .collator import ROW_KEYS, DataCollatorForProcessReward
from .metrics import step_metrics
from .prm_config import PRMConfig
from .rows import RowView, prepare_rows
from .sampler import SortedStepSampler, TreeSampler

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
    "packing",
    "label_mode",
    "hard_threshold",
    "label_weighting",
    "freeze_vision_tower",
    "seed",
)


class PRMTrainer(_BaseTrainer):
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
        model (`str` or [`~transformers.PreTrainedModel`]):
            Model to train. Can be either:

            - A folder or Hub repository, of a process reward model or of a policy, which then gets a step token and
              reward tokens ([`create_process_reward_model`]). It is loaded with `args.model_init_kwargs`; `dtype` defaults
              to `float32`.
            - A process reward model.
        args ([`PRMConfig`], *optional*):
            Configuration of this trainer. If `None`, a default configuration is used.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Function to form a batch. Defaults to [`DataCollatorForProcessReward`].
        train_dataset (`datasets.Dataset` or `Sequence[Mapping[str, Any]]`, *optional*):
            Rows with `prompt` (the question), `completions` (the steps), `labels` (one for each step: a number in [0, 1],
            a bool, or null), `images` (if there are any) and, if the problem is to be told in evaluation, `problem_id`.
            Images are processed when their batch is formed.
        eval_dataset (`datasets.Dataset`, `Sequence[Mapping[str, Any]]` or `dict` of these, *optional*):
            Rows for evaluation, of the same form.
        processing_class ([`ProcessRewardProcessor`], *optional*):
            Processor of the model. If `None`, it is loaded from where the model came from.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*):
            Function that computes the metrics. Gets the step scores as `predictions` and `(labels, problem_key)` as
            `label_ids`, scores and labels padded with NaN or -100. Defaults to [`step_metrics`].
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Callbacks to customise the training loop.
        optimizers (`tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler to use.
    """

    # `compute_loss` divides by the weight of all labels of the optimizer step
    loss_is_scaled_for_ga = True  # type: ignore[assignment]

    _tag_names = ["mm-prm", "process-reward-model"]  # noqa: RUF012
    _name = "PRM"

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: PRMConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: ProcessRewardProcessor | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        if args is None:
            args = PRMConfig(f"{Path(_name_or_path(model)).name}-PRM")

        # The rows of new tokens are drawn when the model is loaded
        set_seed(args.seed)
        if isinstance(model, str):
            model, loaded_processor = _load(model, args)
            processing_class = processing_class or loaded_processor
        elif processing_class is None:
            processing_class = ProcessRewardProcessor.from_pretrained(_name_or_path(model))
        if not is_process_reward_config(model.config):
            raise ValueError(
                f"the model is a plain {type(model).__name__}; make it a process reward model with "
                "mm_prm.models.prepare_model_for_process_reward(model, processor), or pass its path"
            )
        if args.disable_dropout:
            disable_dropout_in_model(model)
        if args.freeze_vision_tower:
            _freeze_vision_tower(model)

        def prepare(rows: Rows) -> RowView:
            return prepare_rows(
                rows,
                processing_class,
                max_length=args.max_length,
                needs_num_judged=args.label_weighting == "num_judged",
            )

        if train_dataset is not None:
            train_dataset = prepare(train_dataset)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: prepare(rows) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = prepare(eval_dataset)
        self.eval_collator: DataCollator | None = None
        if data_collator is None:
            data_collator = DataCollatorForProcessReward(
                processing_class,
                args.max_length,
                args.label_mode,
                args.hard_threshold,
                args.label_weighting,
                PositionPrecomputer.for_model(model),
            )
            if args.packing == "tree":
                # Evaluation wants the scores of each row
                self.eval_collator = data_collator
                data_collator = replace(data_collator, packer=TreePacker(model, processing_class, args.max_tokens))
        elif args.packing != "none":
            raise ValueError(f"packing = {args.packing!r}: a data_collator of your own must pack by itself")
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics or compute_step_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.n_gpu > 1:
            raise ValueError(
                "several GPUs are visible to one process; start training with `accelerate launch`, or make one GPU "
                "visible with CUDA_VISIBLE_DEVICES"
            )
        self.label_names = ["labels"]
        self.can_return_loss = True

    def _send_telemetry(self) -> None:
        # TRL counts runs of its own trainers over the network; ours stay here.
        return None

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        args = cast(PRMConfig, self.args)
        rows = cast(RowView, train_dataset if train_dataset is not None else self.train_dataset)
        seed = args.seed if args.data_seed is None else args.data_seed
        if args.packing == "tree":
            return TreeSampler(rows.trees(), seed)
        if args.gradient_accumulation_steps == 1 or args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        step_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return SortedStepSampler(rows.text_lengths(), step_size, seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        training_collator = self.data_collator
        self.data_collator = self.eval_collator or training_collator
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
        rows = inputs["row_index"]
        inputs = {key: value for key, value in inputs.items() if key not in ROW_KEYS}
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch if model.training else None)
        loss = outputs.loss
        if not torch.isfinite(loss):
            dataset = "training" if model.training else "evaluation"
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step}, for rows {rows.tolist()} of the {dataset} "
                "dataset; training stops before the weights are spoilt. Look at these rows, lower learning_rate, or "
                "train in float32 or bf16 instead of fp16"
            )
        if model.training:
            # Data parallelism averages gradients over processes, but the denominator is already that of all
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def prediction_step(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, torch.Tensor] | None]:
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
        output = super().evaluation_loop(*args, **kwargs)
        metrics = output.metrics or {}
        for key in list(metrics):
            # The mean over all labels, instead of the mean of the batches' means
            if key.endswith("_cross_entropy"):
                metrics[key.replace("_cross_entropy", "_loss")] = metrics.pop(key)
        return output

    # transformers reads a checkpoint's weights back under the names in the file, without the renaming that
    # `from_pretrained` does: for Qwen2.5-VL and others nothing fits, and training goes on from the weights it started
    # with, with no more than a warning (huggingface/transformers#43701).

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or not isinstance(self.model, ProcessRewardMixin):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            _load_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(self.model, ProcessRewardMixin):
            super()._load_best_model()
        else:
            _load_weights(self.model, str(self.state.best_model_checkpoint))

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
        config, args = cast(PreTrainedModel, self.model).config, cast(PRMConfig, self.args)
        folder, base_model = Path(str(args.output_dir)), str(config.name_or_path)
        model_name = model_name or folder.resolve().name
        settings = args.to_dict()
        card = model_card(
            model_name,
            model_id=args.hub_model_id or model_name,
            # Where a folder lies on this machine is nobody's business
            base_model=Path(base_model).name if Path(base_model).is_dir() else base_model,
            datasets=[dataset_name] if dataset_name else [],
            license=license,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            reads_images=type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
            settings={"num_processes": args.world_size} | {name: settings[name] for name in _CARD_SETTINGS},
        )
        card.save(folder / "README.md")


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
    return step_metrics(scores[labelled], labels[labelled], problems[labelled])


def _label_weight(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    labelled = ~batch["labels"].isnan()
    if "label_weights" in batch:
        return batch["label_weights"][labelled].sum()
    return labelled.sum().float()


def _load_weights(model: Any, checkpoint: str) -> None:
    saved = type(model).from_pretrained(checkpoint, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())


def _name_or_path(model: str | PreTrainedModel) -> str:
    return model if isinstance(model, str) else str(model.config.name_or_path)


def _load(path: str, args: PRMConfig) -> tuple[PreTrainedModel, ProcessRewardProcessor]:
    init_kwargs = dict(cast(dict[str, Any] | None, args.model_init_kwargs) or {})
    init_kwargs.setdefault("dtype", "float32")
    config_kwargs = {key: init_kwargs[key] for key in ("revision", "trust_remote_code") if key in init_kwargs}
    if is_process_reward_config(AutoConfig.from_pretrained(path, **config_kwargs)):
        model = AutoModelForProcessReward.from_pretrained(path, **init_kwargs)
        return model, ProcessRewardProcessor.from_pretrained(path, **config_kwargs)
    return create_process_reward_model(path, seed=args.seed, **init_kwargs)


def _freeze_vision_tower(model: PreTrainedModel) -> None:
    tower = model.get_encoder(modality="image")
    # A model without a vision tower returns itself, or its base model
    if tower is model or tower is model.base_model:
        return
    tower.requires_grad_(False)
