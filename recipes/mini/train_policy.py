"""Trains the mini policy: first the vision tower learns to read, then the model learns to write solutions.

    python recipes/mini/train_policy.py --output_dir outputs/mini/policy

1. Perception. The vision tower names the characters in each merged image token's cell, through a head that is thrown
   away. Without it, a million solutions teach arithmetic and no reading.
2. Fine-tuning on (problem, solution) pairs that are made on the fly, right methods and wrong ones at the rates of
   `mm_prm.data.mini`, cross-entropy on the solution's tokens.

Made for one GPU; `--perception_steps 5 --steps 5 --batch_size 8` shows on a CPU that it runs.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import model as mini_model
import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from mm_prm.data import mini, mini_pictures
from mm_prm.data.text import split_image_markers

ALPHABET = " 0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
CELL_CHARACTERS = 3
IMAGE_TOKENS = 16


# --- data ------------------------------------------------------------------------------------------------------------


class _Stream(IterableDataset):
    """Problems of the policy split without end; worker w of n takes every n-th block."""

    def __init__(self, batch_size: int, first_index: int):
        self.batch_size, self.first_index = batch_size, first_index

    def indices(self) -> Iterator[int]:
        worker = get_worker_info()
        number, step = (worker.id, worker.num_workers) if worker else (0, 1)
        torch.set_num_threads(1)
        index = self.first_index + number
        while True:
            yield index
            index += step


class CellStream(_Stream):
    """Batches of (pictures, characters in their cells)."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        images, targets = [], []
        for index in self.indices():
            problem = mini.problem("policy", index)
            for image, cells in mini_pictures.cell_texts(problem.scene, random.Random(index)):
                images.append(np.asarray(image))
                targets.append([[ALPHABET.index(c) for c in text.ljust(CELL_CHARACTERS)] for text in cells])
            if len(images) >= self.batch_size:
                yield torch.from_numpy(np.stack(images)), torch.tensor(targets)
                images, targets = [], []


class SolutionStream(_Stream):
    """Right-padded batches of whole dialogues; several solutions of a problem stand in different batches' rows."""

    def __init__(self, batch_size: int, first_index: int, tokenizer, solutions_per_problem: int = 2):
        super().__init__(batch_size, first_index)
        self.tokenizer, self.solutions_per_problem = tokenizer, solutions_per_problem

    def prompt(self, problem: mini.MiniProblem, num_images: int) -> list[int]:
        pad = "<|vision_start|>" + "<|image_pad|>" * IMAGE_TOKENS + "<|vision_end|>"
        parts = split_image_markers(problem.question, num_images)
        text = "".join(pad if part is None else part for part in parts)
        return self.tokenizer(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rows, images = [], []
        eos = self.tokenizer.eos_token_id
        for index in self.indices():
            problem = mini.problem("policy", index)
            rng = random.Random(index)
            pictures = [np.asarray(image) for image in problem.images()]
            prompt = self.prompt(problem, len(pictures))
            for _ in range(self.solutions_per_problem):
                _, steps = problem.sample_solution(rng)
                solution = [*self.tokenizer("\n\n".join(steps))["input_ids"], eos]
                rows.append((prompt, solution))
                images += pictures
            if len(rows) >= self.batch_size:
                yield collate(rows, images, self.tokenizer)
                rows, images = [], []


def collate(rows: list[tuple[list[int], list[int]]], images: list[np.ndarray], tokenizer) -> dict[str, torch.Tensor]:
    """Pads on the right; positions are worked out here because the stock code does it row by row on the GPU."""
    length = max(len(prompt) + len(solution) for prompt, solution in rows)
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    input_ids = np.full((len(rows), length), tokenizer.pad_token_id)
    labels = np.full((len(rows), length), -100)
    positions = np.zeros((3, len(rows), length), dtype=np.int64)
    for number, (prompt, solution) in enumerate(rows):
        ids = prompt + solution
        input_ids[number, : len(ids)] = ids
        labels[number, len(prompt) : len(ids)] = solution
        positions[:, number] = rotary_positions(input_ids[number], image_id)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
        "images": torch.from_numpy(np.stack(images)),
    }


def rotary_positions(input_ids: np.ndarray, image_id: int) -> np.ndarray:
    """Qwen2.5-VL's multimodal positions for pictures of 4 × 4 tokens, as its `get_rope_index` gives them; (3, length)."""
    side = math.isqrt(IMAGE_TOKENS)
    rows, columns = np.divmod(np.arange(IMAGE_TOKENS), side)
    positions = np.zeros((3, len(input_ids)), dtype=np.int64)
    place, following = 0, 0
    while place < len(input_ids):
        if input_ids[place] == image_id:
            positions[:, place : place + IMAGE_TOKENS] = following + np.stack([np.zeros_like(rows), rows, columns])
            place, following = place + IMAGE_TOKENS, following + side
        else:
            positions[:, place] = following
            place, following = place + 1, following + 1
    return positions


def patches(images: torch.Tensor) -> torch.Tensor:
    """Pictures (n, 112, 112, 3) of bytes as the stock processor's patches (n * 64, 1176)."""
    pixels = (images.permute(0, 3, 1, 2).float() / 255 - 1.0) / 0.35
    n = len(pixels)
    grid = pixels.reshape(n, 3, 4, 2, 14, 4, 2, 14).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return grid.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(n * 64, 3 * 2 * 14 * 14)


def encode(visual, images: torch.Tensor) -> torch.Tensor:
    """The vision tower on pictures of one size in a single batch, (n * 16, width); the stock one loops over pictures."""
    n = len(images)
    if not hasattr(visual, "one_image_rotary"):
        caught: list = []
        hook = visual.blocks[0].register_forward_pre_hook(
            lambda module, args, kwargs: caught.append(kwargs["position_embeddings"]), with_kwargs=True
        )
        grid = torch.tensor([[1, 8, 8]], device=images.device)
        with torch.no_grad():
            visual(patches(images[:1]).to(visual.dtype), grid_thw=grid)
        hook.remove()
        visual.one_image_rotary = caught[0]
    cos, sin = (part.repeat(n, 1) for part in visual.one_image_rotary)
    hidden = visual.patch_embed(patches(images))
    for block in visual.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(hidden)).reshape(n * 64, 3, attention.num_heads, -1)
        query, key, value = qkv.permute(1, 0, 2, 3).unbind(0)
        query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
        query, key, value = (
            part.reshape(n, 64, attention.num_heads, -1).transpose(1, 2) for part in (query, key, value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value.to(query.dtype))
        hidden = hidden + attention.proj(mixed.transpose(1, 2).reshape(n * 64, -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden)


# --- training --------------------------------------------------------------------------------------------------------


def _loader(stream: IterableDataset, workers: int) -> Iterator:
    return iter(DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=6 if workers else None))


def _optimizer(parameters, learning_rate: float, steps: int):
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    warm_up = min(200, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    return optimizer, schedule


def train_perception(model, args, device: str) -> float:
    """Returns the share of cells read right on pictures of the last steps, empty cells left out."""
    visual = model.model.visual
    head = torch.nn.Linear(model.config.text_config.hidden_size, CELL_CHARACTERS * len(ALPHABET)).to(device)
    optimizer, schedule = _optimizer([*visual.parameters(), *head.parameters()], 1e-3, args.perception_steps)
    batches = _loader(CellStream(args.batch_size, 10_000_000), args.workers)
    started, right, cells = time.time(), 0.0, 0
    for step in range(args.perception_steps):
        images, targets = (part.to(device, non_blocking=True) for part in next(batches))
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = head(encode(visual, images)).reshape(-1, len(ALPHABET))
        loss = F.cross_entropy(logits.float(), targets.reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step >= args.perception_steps - 20:
            read = (logits.argmax(-1).reshape(-1, CELL_CHARACTERS) == targets.reshape(-1, CELL_CHARACTERS)).all(-1)
            filled = targets.reshape(-1, CELL_CHARACTERS).ne(0).any(-1)
            right, cells = right + (read & filled).sum().item(), cells + int(filled.sum())
        if step % 200 == 0:
            print(f"perception step {step} loss {loss.item():.4f} {time.time() - started:.0f} s", flush=True)
    print(f"perception: {right / cells:.4f} of the filled cells read right", flush=True)
    return right / cells


def train_solutions(model, tokenizer, args, device: str) -> None:
    visual = model.model.visual
    optimizer, schedule = _optimizer(model.parameters(), args.learning_rate, args.steps)
    batches = _loader(SolutionStream(args.batch_size, 0, tokenizer), args.workers)
    started, waited = time.time(), 0.0
    for step in range(args.steps):
        asked = time.time()
        batch = {key: value.to(device, non_blocking=True) for key, value in next(batches).items()}
        waited += time.time() - asked
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            embeddings = model.get_input_embeddings()(batch["input_ids"])
            features = encode(visual, batch["images"]).to(embeddings.dtype)
            slots = (batch["input_ids"] == model.config.image_token_id).unsqueeze(-1).expand_as(embeddings)
            embeddings = embeddings.masked_scatter(slots, features)
            # causal attention never looks right, where the padding is: no mask is needed
            hidden = model.model.language_model(
                inputs_embeds=embeddings, position_ids=batch["position_ids"], use_cache=False
            ).last_hidden_state
            logits = model.lm_head(hidden[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == args.steps - 1:
            seconds = time.time() - started
            print(f"step {step} loss {loss.item():.4f} {seconds:.0f} s, waited {waited:.0f} s for data", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--perception_steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    processor = mini_model.build_processor()
    model = mini_model.build_model(processor).to(device)
    print(f"{model.num_parameters():,} parameters", flush=True)
    if args.perception_steps:
        train_perception(model, args, device)
    train_solutions(model, processor.tokenizer, args, device)
    del model.model.visual.one_image_rotary
    model.to(torch.bfloat16).save_pretrained(Path(args.output_dir))
    processor.save_pretrained(Path(args.output_dir))


if __name__ == "__main__":
    main()
