"""Two training steps on the toy task for each packing; the weights go to a file of its name in the output folder."""

import sys

import torch
from safetensors.torch import save_file

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


if __name__ == "__main__":
    for name in ("none", "rows", "tree"):
        train(sys.argv[1], f"{sys.argv[3]}/two-{name}.safetensors", int(sys.argv[2]), sys.argv[3], name)
