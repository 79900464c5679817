"""
    python benchmarks/two_gpus.py --output_json two_gpus.json

Step labels a second of `PRMTrainer` with tree packing on one GPU and on two: each with the whole model (DDP), FSDP2 and
DeepSpeed's ZeRO-1 (left out where DeepSpeed is not installed), with the recipes of accelerate, one launch after the other.
Model and trees are those of `benchmarks/training.py`, as pictures and text that the data loader processes; an optimizer
step sees `--num_trees` trees on each GPU. The first steps, in which kernels are compiled, are left out. The table is
written after each launch, and a launch that fails does not keep the others from being measured.

A single launch, which the above makes four of:

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes 2 benchmarks/two_gpus.py --output_json fsdp2.json

On two H200s with `--steps 12 --warmups 4`: 322 step labels a second on one, 612 (1.90 times), 644 (2.00) and 637 (1.98).
"""

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from transformers import TrainerCallback
from workloads import MINI, add_arguments, vision_language_config

from mm_prm.models import AutoModelForProcessReward, ProcessRewardProcessor
from mm_prm.trainer import PRMConfig, PRMTrainer

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "accelerate"
# Recipe and number of processes; the first is what the others are compared with
LAUNCHES = {"one_gpu": 1, "gpus": 2, "fsdp2": 2, "zero1": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=15, help="optimizer steps (default: 15)")
    parser.add_argument("--warmups", type=int, default=5, help="of these, left out at the beginning (default: 5)")
    parser.add_argument("--workers", type=int, default=4, help="of each data loader (default: 4)")
    parser.add_argument("--recipes", nargs="+", default=list(LAUNCHES), choices=list(LAUNCHES))
    parser.add_argument("--output_json", type=Path)
    args = parser.parse_args()
    # As `accelerate launch` starts it
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        write(args, train(args))
    else:
        launch_all(args)


def write(args: argparse.Namespace, result: dict[str, Any] | None) -> None:
    if args.output_json is not None and result is not None:
        args.output_json.write_text(json.dumps(result, indent=2) + "\n")


class StepTimes(TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def train(args: argparse.Namespace) -> dict[str, Any] | None:
    """One process of a launch; the main one returns the rates."""
    processor = ProcessRewardProcessor.from_pretrained(MINI)
    pixels = 14 * 14 * args.image_height * args.image_width
    processor.processor.image_processor.size = {"shortest_edge": pixels, "longest_edge": pixels}
    rows_a_step = 2 * args.pairs * args.num_trees
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        config = PRMConfig(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=rows_a_step,
            packing="tree",
            bf16=args.dtype == "bfloat16",
            dataloader_num_workers=args.workers,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        # Alike in every process, in float32 as PRMTrainer loads models
        torch.manual_seed(0)
        with torch.device(config.device):
            model = AutoModelForProcessReward.from_config(vision_language_config(args), dtype=torch.float32)
        rows = [
            row for tree in range(args.num_trees * config.world_size * args.steps) for row in tree_rows(tree, args)
        ]
        trainer = PRMTrainer(model, config, train_dataset=rows, processing_class=processor, callbacks=[times])
        trainer.train()
    if not trainer.is_world_process_zero():
        return None
    seconds = [after - before for before, after in pairwise(times.ends[args.warmups - 1 :])]
    labels = rows_a_step * config.world_size * args.num_steps
    result = {
        "num_processes": config.world_size,
        "seconds_a_step": {"median": median(seconds), "low": min(seconds), "high": max(seconds)},
        "step_labels_per_second": labels / median(seconds),
    }
    if torch.cuda.is_available():
        result |= {"device": torch.cuda.get_device_name(), "peak_memory_bytes": torch.cuda.max_memory_allocated()}
    return result


def tree_rows(number: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows in pairs that share an image, a question and their first steps; a digit is a token."""
    draw = random.Random(number)

    def digits(count: int) -> str:
        return "".join(draw.choices("0123456789", k=count))

    # A picture of the size that is not scaled; its few colours are quickly drawn
    size = (14 * args.image_width, 14 * args.image_height)
    image = Image.new("RGB", size, (draw.randrange(256), draw.randrange(256), draw.randrange(256)))
    question = digits(args.question_tokens)
    rows = []
    for _ in range(args.pairs):
        # One token of a step is that of its end
        start = [
            digits(args.solution_tokens // args.num_steps - 1) for _ in range(round(args.shared * args.num_steps))
        ]
        for _ in range(2):
            end = [digits(args.solution_tokens // args.num_steps - 1) for _ in range(args.num_steps - len(start))]
            steps = [*start, *end]
            row = {"problem_id": str(number), "prompt": question, "images": [image], "completions": steps}
            rows.append(row | {"labels": [0.75] * len(steps)})
    return rows


def launch_all(args: argparse.Namespace) -> None:
    """Launches this file with each recipe, prints the table and writes it."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    results: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    table = {"settings": settings, "torch": torch.__version__, "launches": results, "failed": failed}
    with tempfile.TemporaryDirectory() as folder:
        for recipe in args.recipes:
            if recipe.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
                print(f"{recipe}: left out, DeepSpeed is not installed")
                continue
            output = Path(folder) / f"{recipe}.json"
            launch = ["-m", "accelerate.commands.launch", "--config_file", str(RECIPES / f"{recipe}.yaml")]
            launch += ["--num_processes", str(LAUNCHES[recipe]), "--main_process_port", "0"]
            launch += ["--mixed_precision", "bf16" if args.dtype == "bfloat16" else "no", __file__]
            visible = {"CUDA_VISIBLE_DEVICES": "0"} if LAUNCHES[recipe] == 1 else {}
            launched = subprocess.run(
                [sys.executable, *launch, *sys.argv[1:], "--output_json", str(output)],
                env={**os.environ, **visible},
            )
            if launched.returncode:
                failed[recipe] = f"exit status {launched.returncode}"
                print(f"{recipe}: failed, {failed[recipe]}", flush=True)
                write(args, table)
                continue
            results[recipe] = json.loads(output.read_text())
            rate = results[recipe]["step_labels_per_second"]
            results[recipe]["times_first"] = rate / next(iter(results.values()))["step_labels_per_second"]
            seconds = results[recipe]["seconds_a_step"]
            print(
                f"{recipe}: {LAUNCHES[recipe]} processes, {rate:,.1f} step labels/s, {seconds['median']:.3f} s a step "
                f"({seconds['low']:.3f}–{seconds['high']:.3f}), {results[recipe]['times_first']:.2f} times the first",
                flush=True,
            )
            write(args, table)
    if failed:
        raise SystemExit(f"failed: {failed}")


if __name__ == "__main__":
    main()
