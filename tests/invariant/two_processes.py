"""
Two training steps on the toy task for each packing, and the gradients of a model whose weights FSDP2 splits over the
processes; each goes to a file of its name in the output folder.
"""

import sys

import torch
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard

from mm_prm.models import AutoModelForProcessReward, ProcessRewardProcessor
from mm_prm.trainer import PRMConfig, PRMTrainer

from ..trainer.toy import toy_rows


def train(model_path: str, output_file: str, batch_size: int, output_dir: str, packing: str = "none") -> None:
    torch.set_num_threads(1)
    args = PRMConfig(
        output_dir,
        per_device_train_batch_size=batch_size,
        max_steps=2,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        label_weighting="num_judged",
        packing=packing,
        logging_steps=1,
    )
    trainer = PRMTrainer(model_path, args, train_dataset=toy_rows(16), eval_dataset=toy_rows(7))
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        numbers = [*losses, metrics["eval_loss"], metrics["eval_num_labels"], metrics["eval_auc"]]
        tensors = {name: parameter.detach().contiguous() for name, parameter in trainer.model.named_parameters()}
        save_file({**tensors, "numbers": torch.tensor(numbers, dtype=torch.float64)}, output_file)


def sharded_gradients(model_path: str, output_file: str) -> None:
    """Gradients of this process's half of the rows; the output head, of which two rows are read, is split too."""
    model = AutoModelForProcessReward.from_pretrained(model_path)
    for layer in model.get_decoder().layers:
        fully_shard(layer)
    fully_shard(model)
    rank = torch.distributed.get_rank()
    batch, total = half_a_batch(model_path, rank)
    # FSDP averages over processes
    (model(**batch, num_items_in_batch=total).loss * 2).backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    if rank == 0:
        save_file(gradients, output_file)


def half_a_batch(model_path: str, half: int | None = None) -> tuple[dict, int]:
    """Every other row of a batch, or all; and the number of labels in all of them."""
    rows = toy_rows(8)
    total = sum(label is not None for row in rows for label in row["labels"])
    rows = rows if half is None else rows[half::2]
    problems = [{"question": row["prompt"], "images": row["images"]} for row in rows]
    processor = ProcessRewardProcessor.from_pretrained(model_path)
    return dict(processor(problems, [row["completions"] for row in rows], [row["labels"] for row in rows])), total


if __name__ == "__main__":
    for name in ("none", "rows", "tree"):
        train(sys.argv[1], f"{sys.argv[3]}/two-{name}.safetensors", int(sys.argv[2]), sys.argv[3], name)
    sharded_gradients(sys.argv[1], f"{sys.argv[3]}/two-sharded.safetensors")
