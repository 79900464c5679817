"""`mm-prm train`: stepwise rows in, a process reward model out.

mm-prm train --config train.yaml
accelerate launch --config_file recipes/accelerate/gpus.yaml -m mm_prm.train --config train.yaml
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from mm_prm.commands import InputError, reading_input
from mm_prm.settings import parse_settings, write_settings

if TYPE_CHECKING:
    import datasets
    from peft import LoraConfig
    from transformers import Trainer

    from mm_prm.trainer import PRMConfig


@dataclass
class TrainSettings:
    """
    What a process reward model is trained from.

    Args:
        rows (`str`):
            Stepwise rows: a folder, a .parquet or a .jsonl file, as `mm-prm rows` writes them.
        model (`str`, *optional*, defaults to `"mini-policy"`):
            Model to start from, a policy or a process reward model: a folder, a Hub repository, mini-policy or mini-prm.
        problems (`str`, *optional*):
            Problems of the rows, for their images; see `mm-prm annotate`. Not needed for rows without images.
        eval_rows (`str`, *optional*):
            Rows to evaluate on.
        eval_problems (`str`, *optional*):
            Problems of the rows to evaluate on. Those of the training rows if not given.
        image_root (`str`, *optional*):
            Folder within which image paths of the problems lie. The file's own folder if not given.
        output_json (`str`, *optional*):
            Write the metrics there, too.
    """

    rows: str
    model: str = "mini-policy"
    problems: str | None = None
    eval_rows: str | None = None
    eval_problems: str | None = None
    image_root: str | None = None
    output_json: str | None = None


@dataclass
class AdapterSettings:
    """
    Whether an adapter is trained instead of the model itself.

    Args:
        use_peft (`bool`, *optional*, defaults to `False`):
            Train a LoRA adapter. A policy is made a process reward model and saved first, in `base_model` of the output
            folder. For QLoRA, let `model_init_kwargs` hold a `quantization_config`.
        lora_r (`int`, *optional*, defaults to `16`):
            Rank.
        lora_alpha (`int`, *optional*, defaults to `32`):
            Scale, divided by the rank.
        lora_dropout (`float`, *optional*, defaults to `0.0`):
            Dropout of the adapter; needs `disable_dropout` to be false.
        lora_target_modules (`list[str]`, *optional*):
            Names of modules that get the adapter. All linear ones but the head if not given.
    """

    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | None = None


def main(args: Sequence[str], prog: str) -> int:
    """Run the command; returns its exit status."""
    from mm_prm.trainer.prm_config import PRMConfig

    settings, config, adapter = parse_settings(
        (TrainSettings, PRMConfig, AdapterSettings),
        args,
        prog=prog,
        description="Train a process reward model on stepwise rows.",
    )
    return run(settings, config, adapter)


def run(settings: TrainSettings, config: "PRMConfig", adapter: AdapterSettings) -> int:
    """Train, save the model and print the metrics."""
    from transformers.trainer_utils import IntervalStrategy

    from mm_prm.embedded import model_path
    from mm_prm.trainer import PRMTrainer

    if adapter.use_peft and adapter.lora_dropout and config.disable_dropout:
        raise InputError(f"lora_dropout: {adapter.lora_dropout} does nothing while disable_dropout is true")
    peft_config = open_adapter(adapter)
    rows = _read(settings.rows, settings.problems, settings, config.on_bad_row)
    eval_rows = None
    if settings.eval_rows is not None:
        eval_rows = _read(settings.eval_rows, settings.eval_problems or settings.problems, settings, config.on_bad_row)
    elif config.eval_strategy != "no":
        raise InputError(f"eval_strategy: {IntervalStrategy(config.eval_strategy).value} needs eval_rows")
    with reading_input("model"):
        model = model_path(settings.model)
    with reading_input("", settings.model):  # of rows as of models: the message says which
        trainer = PRMTrainer(model, config, train_dataset=rows, eval_dataset=eval_rows, peft_config=peft_config)
    return train_and_save(trainer, (settings, config, adapter), settings.output_json)


def train_and_save(trainer: "Trainer", settings: Sequence[Any], output_json: str | None) -> int:
    """
    Train from the last checkpoint where that is asked, evaluate, save the model beside its settings, and print the metrics.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer.
        settings (`Sequence[Any]`):
            The instances whose values are written.
        output_json (`str`, *optional*):
            Write the metrics there, too.

    Returns:
        `int`: The exit status.
    """
    from transformers.trainer_utils import get_last_checkpoint

    from mm_prm.commands.files import write_json

    output_dir = str(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        write_settings(output_dir, settings)
    _log_lines(trainer)
    checkpoint = trainer.args.resume_from_checkpoint
    if checkpoint == "last":
        checkpoint = get_last_checkpoint(output_dir)
    metrics: dict[str, Any] = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_json(output_json, metrics)
        for name, value in metrics.items():
            print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
        print(f"model: {output_dir}")
    return 0


def open_adapter(adapter: AdapterSettings) -> "LoraConfig | None":
    """The adapter to train, if one is asked for."""
    if not adapter.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=adapter.lora_r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=adapter.lora_target_modules or "all-linear",
    )


def _read(
    path: str, problems_path: str | None, settings: TrainSettings, on_bad_row: str
) -> "datasets.Dataset | list[dict[str, Any]]":
    """Read rows, and join their problems' images."""
    from mm_prm.commands.files import columns_of, read_table
    from mm_prm.data import join_problems, load_problems
    from mm_prm.data.features import validate_rows

    rows = read_table(path)
    if "images" in columns_of(rows):
        return rows
    if problems_path is None:
        print(f"train: {path} has no images and `problems` is not given: no picture will be seen", file=sys.stderr)
        return rows
    if on_bad_row == "skip":
        rows = _good_rows(path, rows)
    with reading_input(path):
        validate_rows("stepwise", rows)
    with reading_input(problems_path):
        problems, skipped = load_problems(
            problems_path, image_root=settings.image_root, on_bad_row=cast("Literal['raise', 'skip']", on_bad_row)
        )
        bad_ids = {entry["id"] for entry in skipped} - set(problems["id"])  # a duplicate's id is also a good one's
        kept = [row for row in rows if row["problem_id"] not in bad_ids] if bad_ids else rows
        if len(kept) < len(rows):
            print(f"train: {len(rows) - len(kept)} rows of {len(bad_ids)} bad problems are left out", file=sys.stderr)
        return join_problems(kept, problems)


def _good_rows(path: str, rows: Any) -> list[dict[str, Any]]:
    """Leave out rows that are no stepwise rows; count and list them."""
    from mm_prm.data.features import RowError, validate_rows

    good = []
    for number, row in enumerate(rows):
        try:
            validate_rows("stepwise", [row])
            good.append(row)
        except RowError as error:
            print(f"train: {path}: row {number}: {error}", file=sys.stderr)
    if len(good) < len(rows):
        print(f"train: {len(rows) - len(good)} of {len(rows)} rows are bad and are left out", file=sys.stderr)
    return good


def _log_lines(trainer: Any) -> None:
    """Without a terminal, print a line for each log instead of bars and dictionaries."""
    if sys.stderr.isatty():
        return
    import time

    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    class LogLines(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.began, self.first_step = time.monotonic(), state.global_step

        def on_log(self, args, state, control, logs=None, **kwargs):
            if not state.is_world_process_zero:
                return
            numbers = [f"{name} {value:.4g}" for name, value in (logs or {}).items() if isinstance(value, float)]
            line = f"train: {state.global_step}/{state.max_steps}, " + ", ".join(numbers)
            if self.first_step < state.global_step < state.max_steps:
                seconds = (time.monotonic() - self.began) / (state.global_step - self.first_step)
                line += f", {seconds * (state.max_steps - state.global_step):.0f} s left"
            print(line, file=sys.stderr, flush=True)

    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogLines())
