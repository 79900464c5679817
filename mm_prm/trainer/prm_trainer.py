"""
`PRMTrainer`: trains a process reward model on stepwise rows with pictures and soft labels; or, as TRL's did until version
1.13, a plain token classification model.
"""

import functools
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import datasets
import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
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
from .adapters import add_adapter
from .checkpoints import load_weights
from .collator import ROW_KEYS, DataCollatorForProcessReward
from .freezing import freeze_parts
from .metrics import step_metrics
from .prm_config import PRMConfig
from .rows import RowView, prepare_rows
from .sampler import SortedStepSampler, TreeSampler
from .saved_base import save_base_model
from .throughput import Throughput
from .token_classification import (
    DataCollatorForTokenLabels,
    compute_accuracy,
    prepare_tokenized_rows,
    token_label_loss,
    tokenize_row,
)

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["PRMTrainer", "compute_accuracy", "compute_step_metrics"]

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
    "max_tokens",
    "label_mode",
    "hard_threshold",
    "label_weighting",
    "freeze_vision_tower",
    "freeze_connector",
    "freeze_language_model",
    "seed",
)

# Arguments of `from_pretrained` that a model is loaded without before it is saved again
_PLACING = ("quantization_config", "device_map", "max_memory")


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
            args = PRMConfig("PRM" if model is None else f"{Path(_name_or_path(model)).name}-PRM")

        def prepare_model(model: Any) -> Any:
            if peft_config is not None:
                model = add_adapter(model, peft_config, args)
            if args.disable_dropout:
                disable_dropout_in_model(model)
            freeze_parts(model, args)
            return model

        # The rows of new tokens are drawn when the model is loaded
        set_seed(args.seed)
        if isinstance(model, str):
            model, loaded_processor = _load(model, args, needs_saved_base=peft_config is not None)
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
            processing_class = processor_class.from_pretrained(_name_or_path(model))
        if model_init is None:
            model = prepare_model(model)

        setting_up = _token_classification if self.is_token_classification else _process_reward
        prepare, training_collator, self.eval_collator = setting_up(cast(PreTrainedModel, model), processing_class, args)
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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or not isinstance(self.model, ProcessRewardMixin):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(self.model, ProcessRewardMixin):
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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.create_model_card()
        super()._save_checkpoint(model, trial)

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
        Path(str(self.args.output_dir)).mkdir(parents=True, exist_ok=True)
        if self.is_token_classification:
            super().create_model_card(model_name or Path(str(self.args.output_dir)).resolve().name, dataset_name, tags)
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
    rows = np.broadcast_to(np.arange(len(labels))[:, None], labels.shape)
    return step_metrics(scores[labelled], labels[labelled], problems[labelled], rows[labelled])


def _process_reward(
    model: PreTrainedModel, processor: Any, args: PRMConfig
) -> tuple[Callable[[Rows, bool], RowView], DataCollator, DataCollator]:
    """How rows of a process reward model are prepared and become batches in training and in evaluation."""
    defaults = PRMConfig.__dataclass_fields__
    for name in ("step_separator", "max_completion_length"):
        if getattr(args, name) != defaults[name].default:
            raise ValueError(
                f"{name} = {getattr(args, name)!r}: only for token classification models; the template of a process reward "
                "model writes what follows a step, and max_length cuts whole steps"
            )
    max_length = args.longest_sequence(token_classification=False)

    def prepare(rows: Rows, is_eval: bool) -> RowView:
        return prepare_rows(
            rows,
            processor,
            max_length=max_length,
            needs_num_judged=args.needs_num_judged,
            skip_bad_rows=args.on_bad_row == "skip",
        )

    # Evaluation wants the scores of each row, so it does not pack
    evaluation = DataCollatorForProcessReward(
        processor,
        max_length,
        args.label_mode,
        args.hard_threshold,
        args.label_weighting,
        positions=PositionPrecomputer.for_model(model),
    )
    packer = None
    if args.packing != "none":
        packer = TreePacker(model, processor, args.max_tokens, share_prefixes=args.packing == "tree")
    training = replace(evaluation, last_step_only=args.train_on_last_step_only, packer=packer)
    return prepare, training, evaluation


def _token_classification(
    model: PreTrainedModel, tokenizer: Any, args: PRMConfig
) -> tuple[Callable[[Rows, bool], datasets.Dataset], DataCollator, DataCollator]:
    """The same for a token classification model."""
    for name in ("packing", "label_mode", "label_weighting", "on_bad_row"):
        default = PRMConfig.__dataclass_fields__[name].default
        if getattr(args, name) != default:
            raise ValueError(
                f"{name} = {getattr(args, name)!r}: not for token classification models; make the model a process reward "
                "model with mm_prm.models.create_process_reward_model"
            )
    max_length = args.longest_sequence(token_classification=True)

    def prepare(rows: Rows, is_eval: bool) -> datasets.Dataset:
        return prepare_tokenized_rows(rows, tokenizer, args, max_length=max_length, is_eval=is_eval)

    collator = DataCollatorForTokenLabels(tokenizer)
    return prepare, collator, collator


def _label_weight(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    labelled = batch["labels"] >= 0  # neither NaN nor -100
    if "label_weights" in batch:
        return batch["label_weights"][labelled].sum()
    return labelled.sum().float()


def _name_or_path(model: str | PreTrainedModel | nn.Module) -> str:
    return model if isinstance(model, str) else str(cast(PreTrainedModel, model).config.name_or_path)


def _load(path: str, args: PRMConfig, *, needs_saved_base: bool) -> tuple[PreTrainedModel, Any]:
    """Loads a model and its processor; makes a policy a process reward model."""
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
