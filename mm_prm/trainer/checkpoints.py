"""What the trainers share in saving and loading: weights back from a checkpoint, and a model card of our own."""

from pathlib import Path
from typing import Any, ClassVar, cast

from torch import nn
from transformers import PreTrainedModel
from trl.trainer.base_trainer import _BaseTrainer

from ..hub import model_card

# What a reader of the model card wants to know of any training
CARD_SETTINGS = (
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
    "freeze_vision_tower",
    "freeze_connector",
    "freeze_language_model",
    "seed",
)


class CheckpointTrainer(_BaseTrainer):
    """A trainer whose checkpoints load under any names of weights, and whose model has a card of ours."""

    _card_settings: ClassVar[tuple[str, ...]] = CARD_SETTINGS

    def _card_fields(self) -> dict[str, Any] | None:
        """What [`model_card`] is told of this kind of model; `None` where TRL's own card says more."""
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or not isinstance(self.model, PreTrainedModel):  # an adapter
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            _load_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(self.model, PreTrainedModel):
            super()._load_best_model()
        else:
            _load_weights(self.model, str(self.state.best_model_checkpoint))

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
        folder = Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        model_name = model_name or folder.resolve().name
        fields = self._card_fields()
        if fields is None:
            super().create_model_card(model_name, dataset_name, tags)
            return
        base_model = str(cast(PreTrainedModel, self.model).config.name_or_path)
        settings = self.args.to_dict()
        card = model_card(
            model_name,
            model_id=self.args.hub_model_id or model_name,
            # Where a folder lies on this machine is nobody's business
            base_model=Path(base_model).name if Path(base_model).is_dir() else base_model,
            datasets=[dataset_name] if dataset_name else [],
            license=license,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            settings={"num_processes": self.args.world_size} | {name: settings[name] for name in self._card_settings},
            **fields,
        )
        card.save(folder / "README.md")


def _load_weights(model: PreTrainedModel, checkpoint: str) -> None:
    # transformers' own trainer reads them under the names in the file, without the renaming that `from_pretrained` does: for
    # Qwen2.5-VL and others nothing fits, and training goes on from the weights it started with, with no more than a warning
    # (huggingface/transformers#43701).
    saved = cast(Any, type(model)).from_pretrained(checkpoint, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
