"""
    python benchmarks/scoring.py --vllm --repeats 3 --output_json scoring.json

Candidates scored a second: N solutions of one problem after the other, which share a picture and a question. A stock
Qwen2.5-VL with random weights as process reward model, 2.2 billion parameters unless told otherwise.

- batches of 4, all logits: MM-PRM's way, the baseline. Batches of 4 candidates padded on the left, the picture encoded for
  each, logits of the whole vocabulary in float32, of which two are kept at the step tokens.
- padded rows: `Scorer` without shared prefixes; large batches, and no logits but the two.
- packed rows: the same one behind another instead of padded.
- shared prefix: `Scorer`; what candidates share is computed once.
- vLLM: `VLLMScorer` (with `--vllm`), which recomputes the prefix of each candidate, since its STEP pooling allows no prefix
  cache. Its engine is a process of its own on the same device, with `--gpu_memory_utilization` of its memory, and serves the
  checkpoint that the others hold, so that all take turns in one run. Where it fails, the others are measured all the same.

Each turn has pictures, questions and solutions of its own, since vLLM keeps pictures that it has seen. Preparing texts and
pictures is in the time of all. Memory is the most that a way allocated at once above the weights; of vLLM it is all that
its engine took when it started.

On a GPU: the command above, with vLLM installed; --gpu_memory_utilization 0.35 on one of 80 GB; where CUDA
graphs cannot be made, --engine_settings '{"enforce_eager": true}'.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from annotation_engines import make_random_model
from PIL import Image
from timing import compare, make_parser, report
from transformers import AutoConfig, AutoModelForImageTextToText

from mm_prm.inference import Scorer, VLLMScorer
from mm_prm.models import TreePacker, batch_vision_attention, create_process_reward_model

AT_ONCE = 4
BASELINE = f"batches of {AT_ONCE}, all logits"
Turn = tuple[list[dict[str, Any]], list[list[list[str]]]]
Scores = list[list[list[float]]]


class Baseline:
    """MM-PRM's way, with the same weights."""

    def __init__(self, model: Any, processor: Any):
        self.processor = processor
        self.stock = stock_model(model)
        self.reward_token_ids = model.config.reward_token_ids

    @torch.inference_mode()
    def score(self, problems: list[dict[str, Any]], candidates: list[list[list[str]]]) -> Scores:
        """Scores of every step of every candidate."""
        scores: Scores = []
        for problem, solutions in zip(problems, candidates, strict=True):
            found: list[list[float]] = []
            for start in range(0, len(solutions), AT_ONCE):
                found += self._batch(problem, solutions[start : start + AT_ONCE])
            scores.append(found)
        return scores

    def _batch(self, problem: dict[str, Any], solutions: list[list[str]]) -> list[list[float]]:
        inputs = dict(self.processor([problem] * len(solutions), solutions))
        lengths = inputs["attention_mask"].sum(dim=1)
        longest = int(lengths.max())
        for name, value in inputs.items():
            if value.shape[:2] == (len(solutions), longest):  # what has an entry for each token
                inputs[name] = torch.stack(
                    [row.roll(longest - length) for row, length in zip(value, lengths.tolist(), strict=True)]
                )
        step_mask = inputs.pop("step_mask")
        device, dtype = self.stock.device, self.stock.dtype
        inputs = {
            name: value.to(device, dtype if value.is_floating_point() else None) for name, value in inputs.items()
        }
        logits = self.stock(**inputs, use_cache=False).logits.float()
        right = logits[step_mask.to(device)][:, self.reward_token_ids].softmax(dim=-1)[:, 1]
        return [values.tolist() for values in right.split(step_mask.sum(dim=1).tolist())]


class PackedRows:
    """Whole rows one behind another, none of which sees another."""

    def __init__(self, model: Any, processor: Any, max_tokens: int):
        self.model, self.processor = model, processor
        self.packer = TreePacker(model, processor, max_tokens, share_prefixes=False)

    @torch.inference_mode()
    def score(self, problems: list[dict[str, Any]], candidates: list[list[list[str]]]) -> Scores:
        """Scores of every step of every candidate."""
        rows = [(index, steps) for index, solutions in enumerate(candidates) for steps in solutions]
        encoded = self.processor.encode([problems[index] for index, _ in rows], [steps for _, steps in rows])
        packed = self.packer.pack(encoded)
        found: list[list[float]] = [[] for _ in rows]
        for numbers in self.packer.layout(packed):
            inputs = self.packer.collate(encoded, packed, [numbers])
            step_mask = inputs.pop("step_mask")[0]
            inputs = {
                name: to_device(value, self.model)
                for name, value in inputs.items()
                if name not in ("labels", "label_weights")
            }
            values = self.model(**inputs).logits[0].float().softmax(dim=-1)[:, 1].cpu()
            start = 0
            for tree in (packed[number] for number in numbers):
                place = slice(start, start + len(tree))
                start = place.stop
                [row] = tree.rows
                found[row] = values[place][step_mask[place]].tolist()
        each = iter(found)
        return [list(itertools.islice(each, len(solutions))) for solutions in candidates]


class Unopened:
    """A scorer that could not be opened: it fails when its turn comes."""

    def __init__(self, error: Exception):
        self.error = error

    def score(self, problems: list[dict[str, Any]], candidates: list[list[list[str]]]) -> Scores:
        """Says what the error was."""
        raise self.error


def to_device(value: Any, model: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


def stock_model(model: Any) -> Any:
    """The stock class on the same parameters, its vision tower as ours."""
    with torch.device(model.device):  # the weights that are drawn here are not used, and slow to draw on a CPU
        stock = AutoModelForImageTextToText.from_config(model.config, dtype=model.dtype)
    stock.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    stock.tie_weights()
    return batch_vision_attention(stock).to(model.device).eval()


class Inputs:
    """Problems and candidates of random digits, each of which is a token."""

    def __init__(self, args: argparse.Namespace, processor: Any):
        self.args, self.processor = args, processor
        self.generator = np.random.default_rng(args.seed)

    def turns(self) -> list[Turn]:
        """For each turn, those for warming up included, problems that no other turn has."""
        return [self._turn() for _ in range(self.args.warmups + self.args.repeats)]

    def _turn(self) -> Turn:
        args = self.args
        problems = [
            {
                "id": "1",
                "question": self._digits(args.question_tokens),
                "images": [self._picture()],
                "choices": [],
            }
            for _ in range(args.num_problems)
        ]
        # Between three and five quarters of the length, as padding would have it; the mean is what was asked for
        lengths = np.linspace(0.75, 1.25, args.num_candidates) * args.solution_tokens
        return problems, [[self._solution(round(length)) for length in lengths] for _ in problems]

    def _digits(self, number: int) -> str:
        return "".join(map(str, self.generator.integers(0, 10, number)))

    def _solution(self, tokens: int) -> list[str]:
        step = tokens // self.args.num_steps - 1  # the step token
        return [self._digits(step) for _ in range(self.args.num_steps)]

    def _picture(self) -> Image.Image:
        pixels = self.generator.integers(0, 256, (self.args.image_height * 28, self.args.image_width * 28, 3))
        return Image.fromarray(pixels.astype(np.uint8))

    def num_tokens(self, turn: Turn) -> dict[str, float]:
        """Tokens of picture and of the rest of the prompt, and of a solution with its step tokens, as they are."""
        [problem, *_], [solutions, *_] = turn
        lengths = self.processor([problem] * len(solutions), solutions)["attention_mask"].sum(dim=1).tolist()
        # What a candidate without its steps has, and one with a step of a single token.
        one = int(self.processor([problem], [["1"]])["attention_mask"].sum())
        image = self.args.image_height * self.args.image_width
        return {"image": image, "prompt": one - 2 - image, "solution": sum(lengths) / len(lengths) - one + 2}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--num_layers", type=int, default=28, help="of the language model (default: 28)")
    parser.add_argument("--hidden_size", type=int, default=1536, help="of the language model (default: 1536)")
    parser.add_argument("--num_problems", type=int, default=4, help="problems a turn (default: 4)")
    parser.add_argument("--num_candidates", type=int, default=16)
    parser.add_argument("--image_height", type=int, default=32, help="of a picture, in tokens (default: 32)")
    parser.add_argument("--image_width", type=int, default=56)
    parser.add_argument("--question_tokens", type=int, default=200)
    parser.add_argument("--solution_tokens", type=int, default=400, help="on average, step tokens included")
    parser.add_argument("--num_steps", type=int, default=8)
    parser.add_argument("--max_tokens", type=int, default=16384, help="of a batch (default: 16384)")
    parser.add_argument("--vllm", action="store_true", help="with VLLMScorer")
    parser.add_argument("--gpu_memory_utilization", type=float, default=0.3, help="vLLM's share (default: 0.3)")
    parser.add_argument("--engine_settings", type=json.loads, default={}, help="further ones of vLLM, as JSON")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory(prefix="scoring.") as folder:
        measure(args, Path(folder))


def measure(args: argparse.Namespace, folder: Path) -> None:
    prm = make_prm(args, folder)
    memory: dict[str, int] = {}
    vllm: VLLMScorer | Unopened | None = None
    if args.vllm:  # the engine first: it looks at how much memory is free
        before = free_memory(args)
        vllm = open_vllm(args, prm)
        if args.device.startswith("cuda"):
            memory["vLLM"] = before - free_memory(args)
    shared = Scorer.from_pretrained(prm, dtype=args.dtype, device=args.device, max_tokens=args.max_tokens)
    model, processor = shared.model, shared.processor
    print(
        f"{model.num_parameters() / 1e9:.2f} billion parameters, vocabulary {model.config.get_text_config().vocab_size}"
    )
    ways: dict[str, Any] = {
        BASELINE: Baseline(model, processor),
        "padded rows": Scorer(model, processor, args.max_tokens, share_prefix=False),
        "packed rows": PackedRows(model, processor, args.max_tokens),
        "shared prefix": shared,
    }
    if vllm is not None:
        ways["vLLM"] = vllm
    inputs = Inputs(args, processor)
    turns = inputs.turns()
    lengths = inputs.num_tokens(turns[0])
    print(", ".join(f"{name} {number:.0f} tokens" for name, number in lengths.items()))
    found: dict[str, Scores] = {}

    def runs(name: str, way: Any) -> Callable[[], None]:
        each: Iterator[Turn] = iter(turns)

        def run() -> None:
            if args.device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats()
                start = torch.cuda.memory_allocated()
            scores = way.score(*next(each))
            if name not in found:
                found[name] = scores
            elif args.device.startswith("cuda") and name != "vLLM":
                memory[name] = max(memory.get(name, 0), torch.cuda.max_memory_allocated() - start)

        return run

    variants = {name: runs(name, way) for name, way in ways.items()}
    table = compare(args, variants, args.num_problems * args.num_candidates, "candidates", optional=["vLLM"])
    flat = {name: [step for one in scores for steps in one for step in steps] for name, scores in found.items()}
    table["largest_difference"] = max(
        abs(new - old) for scores in flat.values() for new, old in zip(scores, flat[BASELINE], strict=True)
    )
    print(f"largest difference of the scores: {table['largest_difference']:.1e}")
    for name, row in table["variants"].items():
        if name in memory:
            row["memory_bytes"] = memory[name]
            print(f"{name}: {memory[name] / 2**30:.1f} GiB")
    table |= {"tokens": lengths, "parameters": model.num_parameters()}
    report(args, [table])
    if table["failed"]:
        raise SystemExit(f"failed: {table['failed']}")


def open_vllm(args: argparse.Namespace, prm: str) -> VLLMScorer | Unopened:
    """vLLM's scorer, or its error."""
    settings = {
        "max_model_len": min(args.max_tokens, 8192),
        "max_num_batched_tokens": args.max_tokens,
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "enforce_eager": args.device == "cpu",
        **args.engine_settings,
    }
    try:
        return VLLMScorer(prm, dtype=args.dtype, max_images=1, **settings)
    except Exception as error:
        return Unopened(error)


def make_prm(args: argparse.Namespace, folder: Path) -> str:
    """A process reward model with random weights on the disk, which vLLM takes as it is."""
    for name in ("vlm", "prm"):
        (folder / name).mkdir()
    path = make_random_model(
        folder / "vlm", args.num_layers, args.hidden_size, image_tokens=args.image_height * args.image_width
    )
    config = AutoConfig.from_pretrained(path)
    with torch.device(args.device):
        AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, args.dtype)).save_pretrained(path)
    model, processor = create_process_reward_model(path, dtype=args.dtype)
    for part in (model, processor):
        part.save_pretrained(folder / "prm")
    return str(folder / "prm")


def free_memory(args: argparse.Namespace) -> int:
    """Bytes that are free on the device, 0 on the CPU."""
    return torch.cuda.mem_get_info()[0] if args.device.startswith("cuda") else 0


if __name__ == "__main__":
    main()
