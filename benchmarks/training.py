"""
    python benchmarks/training.py --repeats 3 --output_json training.json
    python benchmarks/training.py --repeats 3 --workloads trees --num_trees 4

Forward and backward pass of a training step, vision tower frozen and gradient checkpointing on unless told otherwise, on a
stock Qwen2.5-VL with random weights in bfloat16; batches are formed beforehand, as workers of the data loader do. The
workloads:

- `trees`: trees of 12 rows in 6 pairs that share an image of 1,792 tokens, a question of 200 and the first 40 % of their
  solutions, of 400 tokens in 8 steps;
- `unshared`: as many rows as one such tree has, each with an image and a question of its own;
- `mini`: rows of the trees that the mini world gives, as `mm-prm rows` makes them;
- `text`: `trees` without images, on the language model alone.

The ways: rows one behind another (the baseline), tree-packed, padded, padded with logits of the whole vocabulary (as
MM-PRM trains) and, on text, a token classification model with two labels on every padded token, as TRL trained until
version 1.13. All but the last compute one loss, which is checked.

Beside step labels a second: the model's own arithmetic (6 floating point operations a parameter of the language model's
layers and token that is no padding, 2 a parameter of the frozen vision tower and patch, and attention; recomputation,
output heads and what masks hide not counted) as a share of what a large matrix product reaches on the device, and the
most memory that was allocated. Each table is written when it is complete.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from timing import compare, make_parser, report
from torch.nn import functional
from transformers import (
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2ForCausalLM,
)
from workloads import (
    add_arguments,
    mini_rows,
    packed_batch,
    padded_batch,
    random_trees,
    text_config,
    vision_language_config,
)

from mm_prm.models import AutoModelForProcessReward, batch_vision_attention, use_flex_attention
from mm_prm.models.processing import EncodedRows
from mm_prm.trainer import PRMConfig
from mm_prm.trainer.freezing import freeze_parts

WORKLOADS = ("trees", "unshared", "mini", "text")


def main() -> None:
    parser = make_parser(__doc__)
    add_arguments(parser)
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, choices=WORKLOADS)
    parser.add_argument("--mini_rows", type=int, default=512, help="rows of the mini world (default: 512)")
    parser.add_argument(
        "--attention", choices=["flex", "sdpa"], help="for packed rows (default: flex on a GPU, sdpa elsewhere)"
    )
    parser.add_argument(
        "--no_gradient_checkpointing", action="store_true", help="keep all activations, which takes more memory"
    )
    args = parser.parse_args()
    args.attention = args.attention or ("flex" if args.device.startswith("cuda") else "sdpa")
    # The losses are compared before time is taken, which warms up
    args.warmups = 0
    torch.manual_seed(0)
    peak, tables = matrix_product_peak(args), []
    print(f"a matrix product reaches {peak / 1e12:.0f} TFLOP/s")
    if set(args.workloads) - {"text"}:
        ours, stock = make_models(args, vision_language_config(args), Qwen2_5_VLForConditionalGeneration)
        for workload in args.workloads:
            if workload != "text":
                tables.append(measure(args, workload, rows_of(args, workload), ours, stock, peak))
                report(args, tables)
        del ours, stock
    if "text" in args.workloads:
        config = text_config(args)
        ours, stock = make_models(args, config, Qwen2ForCausalLM)
        with torch.device(args.device):
            classifier = AutoModelForTokenClassification.from_config(config, dtype=getattr(torch, args.dtype))
        tables.append(measure(args, "text", rows_of(args, "text"), ours, stock, peak, prepare(classifier, args)))
        report(args, tables)


def rows_of(args: argparse.Namespace, workload: str) -> EncodedRows:
    if workload == "mini":
        return mini_rows(args.mini_rows)
    if workload == "unshared":
        return random_trees(argparse.Namespace(**{**vars(args), "shared": 0, "num_trees": 1}))
    return random_trees(args, images=workload == "trees")


def make_models(
    args: argparse.Namespace, config: PreTrainedConfig, stock_class: type[PreTrainedModel]
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The process reward model and the stock model on the device, with the same parameters."""
    dtype = getattr(torch, args.dtype)
    with torch.device(args.device):
        ours = AutoModelForProcessReward.from_config(config, dtype=dtype)
        stock = stock_class._from_config(config, dtype=dtype)
    stock.load_state_dict(ours.state_dict(keep_vars=True), assign=True)
    stock.tie_weights()
    text, vision = num_parameters(ours)
    embeddings = ours.get_input_embeddings().weight.numel()
    print(
        f"\nbillions of parameters: {text / 1e9:.2f} in the language model's layers, {embeddings / 1e9:.2f} in its "
        f"embeddings, {vision / 1e9:.2f} in the vision tower"
    )
    if args.attention == "flex":
        use_flex_attention(ours)
    return prepare(ours, args), prepare(stock, args)


def prepare(model: PreTrainedModel, args: argparse.Namespace) -> PreTrainedModel:
    if vision_tower(model) is not None:
        batch_vision_attention(model)
        freeze_parts(model, PRMConfig(report_to="none"))
    # No dropout, as trainers have it; gradient checkpointing is for training mode
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    if not args.no_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def vision_tower(model: PreTrainedModel) -> Any:
    return getattr(model.base_model, "visual", None)


def num_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Of the language model's layers and of the vision tower."""
    tower = vision_tower(model)
    text = sum(parameter.numel() for parameter in model.get_decoder().layers.parameters())
    return text, 0 if tower is None else sum(parameter.numel() for parameter in tower.parameters())


def measure(
    args: argparse.Namespace,
    workload: str,
    rows: EncodedRows,
    ours: PreTrainedModel,
    stock: PreTrainedModel,
    peak: float,
    classifier: PreTrainedModel | None = None,
) -> dict:
    """Checks that the ways compute one loss, times them and adds tokens, share of the peak and memory to their table."""
    # Kernels are compiled for each shape, and torch gives up after a few
    torch._dynamo.reset()
    padded = on_device(padded_batch(ours, rows), args)
    one_by_one, _ = packed_batch(ours, rows, share_prefixes=False)
    tree, depths = packed_batch(ours, rows, share_prefixes=True)
    alone = np.concatenate([np.arange(len(ids)) for ids in rows.input_ids])
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "rows": partial(step, ours, on_device(one_by_one, args)),
        "tree": partial(step, ours, on_device(tree, args)),
        "padded": partial(step, ours, padded),
        "padded, all logits": partial(step_with_all_logits, stock, padded),
    }
    images = {name: padded.get("image_grid_thw") for name in ways} | {"tree": tree.get("image_grid_thw")}
    if classifier is not None:
        ways["token classification"] = partial(token_classification_step, classifier, padded)
    losses, memory = {}, {}
    for name, way in ways.items():
        if args.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        losses[name] = way().item()
        if args.device.startswith("cuda"):
            memory[name] = torch.cuda.max_memory_allocated()
    equal = [loss for name, loss in losses.items() if name != "token classification"]
    tolerance = 1e-4 if args.dtype == "float32" else 3e-2
    if not max(equal) - min(equal) <= tolerance or not all(map(math.isfinite, losses.values())):
        raise AssertionError(f"{workload}: the ways compute different losses: {losses}")

    num_labels = int((~padded["labels"].isnan()).sum())
    table = compare(args, ways, num_labels, "step labels", f"{workload}: {len(rows.input_ids)} rows")
    for name, row in table["variants"].items():
        places = depths if name == "tree" else alone
        row["tokens"] = len(places)
        operations = model_operations(ours, places, images.get(name))
        row["share_of_peak"] = operations / row["seconds"]["median"] / peak
        shown = f"{name}: {len(places):,} tokens, {100 * row['share_of_peak']:.1f} % of the peak"
        if name in memory:
            row["peak_memory_bytes"] = memory[name]
            shown += f", {memory[name] / 2**30:.1f} GiB"
        print(shown)
    return table


def step(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def step_with_all_logits(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    model.zero_grad()
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "step_mask")}
    labelled = ~batch["labels"].isnan()
    logits = model(**inputs).logits.float()[labelled][:, model.config.reward_token_ids]
    right = batch["labels"][labelled]
    loss = functional.cross_entropy(logits, torch.stack([1 - right, right], dim=-1))
    loss.backward()
    return loss.detach()


def token_classification_step(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """Labels are whole numbers at the last token of each step and -100 elsewhere."""
    labels = torch.where(batch["labels"].isnan(), -100, (batch["labels"] > 0.5).long())
    model.zero_grad()
    loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    loss.backward()
    return loss.detach()


def on_device(batch: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    moved = {key: value.to(args.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    if "pixel_values" in moved:
        moved["pixel_values"] = moved["pixel_values"].to(getattr(torch, args.dtype))
    return moved


def model_operations(model: PreTrainedModel, depths: np.ndarray, images: torch.Tensor | None) -> float:
    """Floating point operations of forward and backward; a token attends to itself and what precedes it in its row."""
    text, vision = num_parameters(model)
    config = model.config.get_text_config()
    # Two products (scores, values) of 2 operations, forward once and backward twice
    attention = 12 * config.num_hidden_layers * config.hidden_size * float((depths + 1).sum())
    operations = 6 * text * len(depths) + attention
    if images is not None:
        tower = model.config.vision_config
        patches = images.prod(dim=1).double()
        num_whole = len(tower.fullatt_block_indexes)
        in_window = (tower.window_size // tower.patch_size) ** 2
        pairs = num_whole * patches**2 + (tower.depth - num_whole) * patches * in_window
        operations += float((2 * vision * patches + 4 * tower.hidden_size * pairs).sum())
    return operations


def matrix_product_peak(args: argparse.Namespace) -> float:
    """Operations a second of a large matrix product in the type of the model."""
    size = 8192 if args.device.startswith("cuda") else 512
    matrix = torch.randn(size, size, device=args.device, dtype=getattr(torch, args.dtype))
    often = argparse.Namespace(**{**vars(args), "repeats": 10, "warmups": 3})
    table = compare(often, {"matrix product": lambda: matrix @ matrix}, 2 * size**3, "operations", "peak")
    return table["variants"]["matrix product"]["operations_per_second"]


if __name__ == "__main__":
    main()
