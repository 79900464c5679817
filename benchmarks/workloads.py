"""Rows to train on and a model of any size that reads them: what the benchmarks of training share."""

import argparse
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, Qwen2_5_VLConfig, Qwen2Config

from mm_prm.data import RowConfig, mini, trees_to_rows
from mm_prm.embedded import embedded_path
from mm_prm.models import PositionPrecomputer, ProcessRewardProcessor, TreePacker
from mm_prm.models.processing import EncodedRows, pad
from mm_prm.models.prompts import PromptTensors

# Special tokens are those of the mini world, so that one model reads its rows and random ones
MINI = embedded_path("mini_prm")
SPECIAL = AutoConfig.from_pretrained(MINI)
PADDING, FIRST_WORD = 0, 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Adds the shape of the model and of random trees to a parser.

    Args:
        parser (`argparse.ArgumentParser`):
            Parser of a benchmark.
    """
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
    parser.add_argument(
        "--shared", type=float, default=0.4, help="share of a solution that a pair has in common (default: 0.4)"
    )


def text_settings(args: argparse.Namespace) -> dict[str, Any]:
    """
    Returns the configuration of a language model of Qwen2's kind.

    Args:
        args (`argparse.Namespace`):
            Parsed arguments.
    """
    head_size = 128 if args.hidden_size >= 512 else 16
    return {
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": 5 * args.hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": args.hidden_size // head_size,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def text_config(args: argparse.Namespace) -> PreTrainedConfig:
    """
    Returns the configuration of a language model alone.

    Args:
        args (`argparse.Namespace`):
            Parsed arguments.
    """
    config = Qwen2Config(**text_settings(args), num_labels=2)
    config.reward_token_ids = SPECIAL.reward_token_ids
    return config


def vision_language_config(args: argparse.Namespace) -> PreTrainedConfig:
    """
    Returns the configuration of a Qwen2.5-VL.

    Args:
        args (`argparse.Namespace`):
            Parsed arguments.
    """
    head_size = 128 if args.hidden_size >= 512 else 16
    sections = [head_size // 8, 3 * head_size // 16, 3 * head_size // 16]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    config = Qwen2_5_VLConfig(
        text_config={**text_settings(args), "rope_parameters": rope},
        vision_config={
            "depth": args.vision_depth,
            "hidden_size": args.vision_size,
            # A multiple of 8, without which bfloat16 products fall back to kernels several times slower
            "intermediate_size": 8 * args.vision_size // 3 // 8 * 8,
            "num_heads": max(1, args.vision_size // 80),
            "out_hidden_size": args.hidden_size,
            "fullatt_block_indexes": list(range(7, args.vision_depth, 8)),
        },
        image_token_id=SPECIAL.image_token_id,
        video_token_id=SPECIAL.video_token_id,
        vision_start_token_id=SPECIAL.vision_start_token_id,
        vision_end_token_id=SPECIAL.vision_end_token_id,
        tie_word_embeddings=True,
    )
    config.reward_token_ids = SPECIAL.reward_token_ids
    return config


def random_trees(args: argparse.Namespace, *, images: bool = True) -> EncodedRows:
    """
    Returns rows of random words: trees of pairs that share an image, a question and the beginning of their solutions; or,
    if `args.shared` is 0, rows that share nothing.

    Args:
        args (`argparse.Namespace`):
            Parsed arguments.
        images (`bool`, *optional*, defaults to `True`):
            Whether the problems have an image.
    """
    generator = np.random.default_rng(0)

    def words(number: int) -> np.ndarray:
        return generator.integers(FIRST_WORD, args.vocab_size, number)

    def solution(number: int, steps: int) -> np.ndarray:
        tokens = words(number)
        tokens[np.linspace(0, number, steps + 1).astype(int)[1:] - 1] = SPECIAL.step_token_id
        return tokens

    image = np.full(args.image_height * args.image_width // 4 if images else 0, SPECIAL.image_token_id)
    shared_steps = round(args.shared * args.num_steps)
    shared_tokens = args.solution_tokens * shared_steps // args.num_steps
    prompts: list[np.ndarray] = []
    numbers, rows = [], []
    for _ in range(args.num_trees):
        for pair in range(args.pairs):
            start = solution(shared_tokens, shared_steps)
            for row in range(2):
                if (pair == row == 0) or not args.shared:
                    prompts.append(np.concatenate([image, words(args.question_tokens)]))
                end = solution(args.solution_tokens - shared_tokens, args.num_steps - shared_steps)
                rows.append(np.concatenate([prompts[-1], start, end]))
                numbers.append(len(prompts) - 1)
    labels = [np.where(row == SPECIAL.step_token_id, 0.75, np.nan).astype(np.float32) for row in rows]
    if not images:
        return EncodedRows(PromptTensors(numbers, prompts, {}, lambda chosen: {}), rows, labels)
    types = [(prompt == SPECIAL.image_token_id).astype(np.int64) for prompt in prompts]
    grid = torch.tensor([[1, args.image_height, args.image_width]])
    patches = torch.randn(args.image_height * args.image_width, 3 * 2 * 14 * 14)

    def pixels(chosen: list[int]) -> dict[str, torch.Tensor]:
        # What is in a picture changes no time
        return {"pixel_values": patches.repeat(len(chosen), 1), "image_grid_thw": grid.repeat(len(chosen), 1)}

    return EncodedRows(PromptTensors(numbers, prompts, {"mm_token_type_ids": types}, pixels), rows, labels)


def mini_rows(most: int) -> EncodedRows:
    """
    Returns the rows that `mm-prm rows` makes of the mini world's first trees.

    Args:
        most (`int`):
            How many rows.
    """
    trees = pyarrow.parquet.read_table(embedded_path("mini_trees.parquet")).slice(0, most).to_pylist()
    rows = trees_to_rows(trees, RowConfig())[0][:most]
    problems = [mini.problem_from_id(row["problem_id"]).row() for row in rows]
    processor = ProcessRewardProcessor.from_pretrained(MINI)
    return processor.encode(problems, [row["completions"] for row in rows], [row["labels"] for row in rows])


def padded_batch(model: PreTrainedModel, rows: EncodedRows) -> dict[str, Any]:
    """
    Returns the rows as they are, padded.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model that takes the batch.
        rows ([`EncodedRows`]):
            The rows.
    """
    input_ids = torch.from_numpy(pad(rows.input_ids, PADDING))
    mask = torch.from_numpy(pad([np.ones_like(ids) for ids in rows.input_ids], 0))
    batch = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "step_mask": (input_ids == SPECIAL.step_token_id) & mask.bool(),
        "labels": torch.from_numpy(pad(rows.labels, np.nan)),
        **rows.prompts.images(rows.prompts.numbers),
    }
    for key, types in rows.prompts.token_types.items():
        of_rows = [types[number] for number in rows.prompts.numbers]
        batch[key] = torch.from_numpy(pad(of_rows, 0, like=rows.input_ids))
    positions = PositionPrecomputer.for_model(model)
    return batch if positions is None else batch | positions(batch)


def packed_batch(
    model: PreTrainedModel, rows: EncodedRows, *, share_prefixes: bool
) -> tuple[dict[str, Any], np.ndarray]:
    """
    Returns the rows packed, one behind another or as trees, and the index that each token has in its own row.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model that takes the batch.
        rows ([`EncodedRows`]):
            The rows.
        share_prefixes (`bool`):
            Whether they become trees.
    """
    tokens: Any = SimpleNamespace(padding_id=PADDING, step_token_id=SPECIAL.step_token_id)
    packer = TreePacker(model, tokens, share_prefixes=share_prefixes)
    packed = packer.pack(rows)
    return packer.collate(rows, packed, packer.layout(packed)), np.concatenate([tree.depths for tree in packed])
