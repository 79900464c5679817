"""
    python benchmarks/training.py --num_trees 2

Forward and backward pass of a training step, gradient checkpointing on and vision tower frozen, on trees whose rows share
an image, a question and the first steps in pairs: rows padded, with logits of the whole vocabulary, as MM-PRM trains; rows
padded; and tree-packed. A stock Qwen2.5-VL with random weights in bfloat16; batches are formed beforehand, as workers
of the data loader do.

Beside step labels a second: the model's own arithmetic (6 floating point operations a parameter of the language
model's layers and token, 2 a parameter of the frozen vision tower and patch, and attention; recomputation not counted) as a share of
what a large matrix product reaches on the device. Attention that a mask hides is not counted.
"""

import argparse
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from timing import compare, make_parser, report
from torch.nn import functional
from transformers import PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mm_prm.models import AutoModelForProcessReward, PositionPrecomputer, TreePacker, batch_vision_attention
from mm_prm.models.processing import EncodedRows
from mm_prm.models.prompts import PromptTensors

STEP_TOKEN, IMAGE_TOKEN, REWARD_TOKENS = 1, 4, [2, 3]
FIRST_WORD = 10


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--num_layers", type=int, default=24)
    parser.add_argument("--hidden_size", type=int, default=2048)
    parser.add_argument("--vision_depth", type=int, default=32)
    parser.add_argument("--vision_size", type=int, default=1280)
    parser.add_argument("--vocab_size", type=int, default=150_000)
    parser.add_argument("--num_trees", type=int, default=2, help="trees a step (default: 2)")
    parser.add_argument("--pairs", type=int, default=6, help="pairs of rows of a tree (default: 6)")
    parser.add_argument("--image_height", type=int, default=64, help="in patches; 4 patches are a token (default: 64)")
    parser.add_argument("--image_width", type=int, default=112)
    parser.add_argument("--question_tokens", type=int, default=200)
    parser.add_argument("--solution_tokens", type=int, default=400)
    parser.add_argument("--num_steps", type=int, default=8)
    parser.add_argument("--shared", type=float, default=0.4, help="share of a solution that a pair has in common")
    args = parser.parse_args()
    torch.manual_seed(0)
    ours, stock = make_models(args)
    text = sum(p.numel() for p in ours.model.language_model.layers.parameters())
    vision = sum(p.numel() for p in ours.model.visual.parameters())
    embeddings = ours.get_input_embeddings().weight.numel()
    print(
        f"billions of parameters: {text / 1e9:.2f} in the language model's layers, {embeddings / 1e9:.2f} in its "
        f"embeddings, {vision / 1e9:.2f} in the vision tower"
    )

    padded, packed = (on_device(batch, args) for batch in make_batches(ours, args))
    labelled = ~padded["labels"].isnan()

    def whole_vocabulary() -> torch.Tensor:
        stock.zero_grad()
        inputs = {key: value for key, value in padded.items() if key not in ("labels", "step_mask")}
        logits = stock(**inputs).logits.float()[labelled][:, REWARD_TOKENS]
        right = padded["labels"][labelled]
        loss = functional.cross_entropy(logits, torch.stack([1 - right, right], dim=-1))
        loss.backward()
        return loss.detach()

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ours.zero_grad()
        loss = ours(**batch).loss
        loss.backward()
        return loss.detach()

    ways = {
        "padded rows, all logits": whole_vocabulary,
        "padded rows": partial(step, padded),
        "tree-packed": partial(step, packed),
    }
    losses = [way().item() for way in ways.values()]
    tolerance = 1e-4 if args.dtype == "float32" else 3e-2
    if max(losses) - min(losses) > tolerance:
        raise AssertionError(f"the ways compute different losses: {losses}")
    tables = [compare(args, ways, int(labelled.sum()), "step labels")]
    peak = matrix_product_peak(args)
    print(f"a matrix product reaches {peak / 1e12:.0f} TFLOP/s")
    for name, batch in (("padded rows", padded), ("tree-packed", packed)):
        operations = model_operations(ours, batch, text, vision)
        row = tables[0]["variants"][name]
        row["tokens"] = num_tokens(batch)
        row["share_of_peak"] = operations / row["seconds"]["median"] / peak
        print(f"{name}: {row['tokens']} tokens, {100 * row['share_of_peak']:.1f} % of it")
    report(args, tables)


def make_models(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The process reward model and the stock model on the device, with the same parameters."""
    head_size = 128 if args.hidden_size >= 512 else 16
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": args.vocab_size,
            "hidden_size": args.hidden_size,
            "intermediate_size": 5 * args.hidden_size,
            "num_hidden_layers": args.num_layers,
            "num_attention_heads": args.hidden_size // head_size,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [head_size // 8, 3 * head_size // 16, 3 * head_size // 16],
            },
            "tie_word_embeddings": True,
            "use_cache": False,
        },
        vision_config={
            "depth": args.vision_depth,
            "hidden_size": args.vision_size,
            # A multiple of 8, without which bfloat16 products fall back to kernels several times slower
            "intermediate_size": 8 * args.vision_size // 3 // 8 * 8,
            "num_heads": max(1, args.vision_size // 80),
            "out_hidden_size": args.hidden_size,
            "fullatt_block_indexes": list(range(7, args.vision_depth, 8)),
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=5,
        vision_start_token_id=6,
        vision_end_token_id=7,
        tie_word_embeddings=True,
    )
    config.reward_token_ids = REWARD_TOKENS
    dtype = getattr(torch, args.dtype)
    with torch.device(args.device):
        ours = AutoModelForProcessReward.from_config(config, dtype=dtype)
        stock = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    stock.load_state_dict(ours.state_dict(keep_vars=True), assign=True)
    stock.tie_weights()
    for model in (ours, batch_vision_attention(stock)):
        model.model.visual.requires_grad_(False)
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return ours, stock


def make_batches(model: PreTrainedModel, args: argparse.Namespace) -> tuple[dict, dict]:
    """The same rows padded and packed."""
    generator = np.random.default_rng(0)

    def words(number: int) -> np.ndarray:
        return generator.integers(FIRST_WORD, args.vocab_size, number)

    def solution(number: int, steps: int) -> np.ndarray:
        tokens = words(number)
        tokens[np.linspace(0, number, steps + 1).astype(int)[1:] - 1] = STEP_TOKEN
        return tokens

    image_tokens = args.image_height * args.image_width // 4
    shared_steps = round(args.shared * args.num_steps)
    shared_tokens = args.solution_tokens * shared_steps // args.num_steps
    prompts, types, numbers, rows = [], [], [], []
    for tree in range(args.num_trees):
        prompts.append(np.concatenate([np.full(image_tokens, IMAGE_TOKEN), words(args.question_tokens)]))
        types.append((prompts[-1] == IMAGE_TOKEN).astype(np.int64))
        for _ in range(args.pairs):
            start = solution(shared_tokens, shared_steps)
            for _ in range(2):
                end = solution(args.solution_tokens - shared_tokens, args.num_steps - shared_steps)
                rows.append(np.concatenate([prompts[tree], start, end]))
                numbers.append(tree)
    labels = []
    for row in rows:
        values = np.full(len(row), np.nan, dtype=np.float32)
        values[row == STEP_TOKEN] = 0.75
        labels.append(values)
    grid = torch.tensor([[1, args.image_height, args.image_width]])
    patches = args.image_height * args.image_width
    pixels = torch.randn(args.num_trees, patches, 3 * 2 * 14 * 14).to(getattr(torch, args.dtype))

    def images(chosen: list[int]) -> dict[str, torch.Tensor]:
        return {"pixel_values": pixels[chosen].flatten(0, 1), "image_grid_thw": grid.expand(len(chosen), 3)}

    encoded = EncodedRows(PromptTensors(numbers, prompts, {"mm_token_type_ids": types}, images), rows, labels)
    ids = torch.from_numpy(np.stack(rows))
    padded = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        "step_mask": ids == STEP_TOKEN,
        "labels": torch.from_numpy(np.stack(labels)),
        **images(numbers),
    }
    positions = PositionPrecomputer.for_model(model)
    assert positions is not None
    padded |= positions(padded)
    packer = TreePacker(model, SimpleNamespace(padding_id=0, step_token_id=STEP_TOKEN))  # type: ignore[arg-type]
    return padded, packer.collate(encoded, packer.pack(encoded))


def on_device(batch: dict, args: argparse.Namespace) -> dict:
    return {key: value.to(args.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def num_tokens(batch: dict[str, torch.Tensor]) -> int:
    return batch["input_ids"].numel()


def model_operations(model: PreTrainedModel, batch: dict[str, torch.Tensor], text: int, vision: int) -> float:
    """Floating point operations of forward and backward."""
    config = model.config.get_text_config()
    mask = batch["attention_mask"]
    if mask.dim() == 2:
        pairs = sum(length * (length + 1) / 2 for length in mask.sum(dim=1).tolist())
    else:
        pairs = mask.sum().item()
    # Two products (scores, values) of 2 operations, forward once and backward twice
    attention = 12 * config.num_hidden_layers * config.hidden_size * pairs
    return 6 * text * num_tokens(batch) + attention + 2 * vision * len(batch["pixel_values"])


def matrix_product_peak(args: argparse.Namespace) -> float:
    """Operations a second of a large matrix product in the type of the model."""
    size = 8192 if args.device.startswith("cuda") else 512
    matrix = torch.randn(size, size, device=args.device, dtype=getattr(torch, args.dtype))
    quiet = argparse.Namespace(**{**vars(args), "repeats": 10})
    table = compare(quiet, {"matrix product": lambda: matrix @ matrix}, 2 * size**3, "operations", "peak")
    return table["variants"]["matrix product"]["operations_per_second"]


if __name__ == "__main__":
    main()
