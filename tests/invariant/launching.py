"""What the tests of split models share: one training by `accelerate launch` with a recipe, the same in one process, and their equality."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from mm_prm.commands.train import main
from mm_prm.models import AutoModelForProcessReward

from ..trainer.toy import toy_dataset

REPOSITORY = Path(__file__).resolve().parents[2]
# Plain gradient descent with large steps: the weights then differ as the gradients do
_SETTINGS = {"max_steps": "2", "optim": "sgd", "learning_rate": "1.0", "lr_scheduler_type": "constant"}
_SETTINGS |= {"max_grad_norm": "0", "logging_steps": "1", "report_to": "none", "label_weighting": "num_judged"}


def _flags(model: str, folder: Path, name: str, **settings: str) -> list[str]:
    rows = folder / "rows.parquet"
    if not rows.exists():
        toy_dataset(16).to_parquet(rows)
    paths = {"model": model, "rows": str(rows), "output_dir": str(folder / name)}
    return [word for key, value in {**paths, **_SETTINGS, **settings}.items() for word in (f"--{key}", value)]


def train_in_one(model: str, folder: Path, **settings: str) -> Path:
    """Trains in this process on batches of 8 rows, without a recipe; returns the folder of the model."""
    flags = _flags(model, folder, "one", per_device_train_batch_size="8", save_strategy="no", **settings)
    assert main(flags, "mm-prm train") == 0
    return folder / "one"


def train_by_recipe(
    recipe: str, module: str, model: str, folder: Path, *, num_processes: int = 2, **settings: str
) -> Path:
    """Trains on steps of 8 rows, half of them on each process, by `accelerate launch`; returns the folder of the model."""
    launch = ["-m", "accelerate.commands.launch", "--config_file", f"recipes/accelerate/{recipe}.yaml"]
    launch += [
        "--num_processes",
        str(num_processes),
        "--mixed_precision",
        "no",
        "--main_process_port",
        "0",
        "-m",
        module,
    ]
    batch_size = str(8 // num_processes)
    flags = _flags(model, folder, recipe, per_device_train_batch_size=batch_size, save_steps="1", **settings)
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(num_processes)))} if torch.cuda.is_available() else {}
    result = subprocess.run(
        [sys.executable, *launch, *flags],
        # The launcher leaves a folder in TMPDIR.
        env={**os.environ, **visible, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("model: ") == 1, "the processes were to train one model"
    return folder / recipe


def assert_same_training(found: Path, expected: Path, start: str, tolerance: float = 1e-5) -> None:
    """
    The saved model loads as it lies there, and each of its tensors moved from the start as in the other one; so does the
    model of its last checkpoint.
    """
    before, one = (AutoModelForProcessReward.from_pretrained(path).state_dict() for path in (start, expected))
    for folder in (found, found / "checkpoint-2"):
        model, loading = AutoModelForProcessReward.from_pretrained(folder, output_loading_info=True)
        assert not any(loading.values()), loading
        split = model.state_dict()
        assert split.keys() == one.keys()
        for name, tensor in one.items():
            assert (split[name] - tensor).norm() <= tolerance * (tensor - before[name]).norm(), name
    head = one["lm_head.weight"] - before["lm_head.weight"]
    rows = model.config.reward_token_ids
    assert all(head[row].norm() > 0 for row in rows), "the reward tokens' rows of the output head are trained"
    moved = [name for name, tensor in one.items() if not torch.equal(tensor, before[name])]
    assert not any("visual" in name for name in moved) and len(moved) > len(one) / 4
