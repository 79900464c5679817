"""
    python benchmarks/forward.py

Time and memory of a process reward model's forward pass, alone and with the backward pass under gradient checkpointing,
on a stock Qwen2 language model with random weights. Against logits of the whole vocabulary at every position, of which
two columns at the step tokens are kept (in float32, as InternVL's language models return them, and in the model's own
precision), and against `logits_to_keep` of transformers, given every position at which some row has a step token. All
share the weights and compute the same scores.

Memory is the most that was allocated at once during a pass, less what was allocated before it. Where there is a backward
pass it is taken twice: above the weights, so that gradients count, and above weights and gradients, as in the second
batch of an accumulated step. On the CPU only the time is measured.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from timing import compare, make_parser, report
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from mm_prm.models import AutoModelForProcessReward

REWARD_TOKEN_IDS = [2, 3]
OURS = "process reward model"
# What rounding the logits to the model's precision may change in a score
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--num_layers", type=int, default=24)
    parser.add_argument("--hidden_size", type=int, default=2048)
    parser.add_argument("--num_heads", type=int, default=16)
    parser.add_argument("--vocab_size", type=int, default=150_000)
    parser.add_argument("--num_sequences", type=int, default=8)
    parser.add_argument("--sequence_length", type=int, default=2048, help="the shortest is an eighth shorter")
    parser.add_argument("--num_steps", type=int, default=8, help="step tokens in a sequence (default: 8)")
    args = parser.parse_args()
    torch.manual_seed(0)
    ours, stock = make_models(args)
    print(f"{ours.num_parameters() / 1e9:.2f} billion parameters in {args.dtype}")
    inputs, step_mask, labels = make_batch(args)
    # Computed once, outside the time: these cost `logits_to_keep` nothing
    positions = step_mask.any(0).nonzero().squeeze(1)
    kept_mask = step_mask[:, positions]

    # [wrong, right] at the step tokens, as each way gets them
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "all logits, float32": lambda: stock(**inputs).logits.float()[step_mask][:, REWARD_TOKEN_IDS],
        "all logits": lambda: stock(**inputs).logits[step_mask][:, REWARD_TOKEN_IDS].float(),
        "logits_to_keep": lambda: (
            stock(**inputs, logits_to_keep=positions).logits[kept_mask][:, REWARD_TOKEN_IDS].float()
        ),
        OURS: lambda: ours(**inputs).logits[step_mask],
    }

    def score(way: Callable[[], torch.Tensor]) -> torch.Tensor:
        with torch.inference_mode():
            return way().softmax(-1)[:, 1]

    def backward(way: Callable[[], torch.Tensor]) -> torch.Tensor:
        if way is ways[OURS]:
            loss = ours(**inputs, labels=labels).loss
        else:
            right = labels[step_mask]
            loss = functional.cross_entropy(way(), torch.stack([1 - right, right], dim=-1))
        loss.backward()
        return loss.detach()

    def first_backward(way: Callable[[], torch.Tensor]) -> torch.Tensor:
        ours.zero_grad()
        return backward(way)

    amount = int(inputs["attention_mask"].sum())
    tables = []
    for case, run, what in (
        ("forward", score, "scores"),
        ("forward and backward, gradient checkpointing", first_backward, "losses"),
    ):
        if run is first_backward:
            for model in (ours, stock):
                model.train()
                model.gradient_checkpointing_enable()
        difference = largest_difference([run(way) for way in ways.values()], args.dtype)
        variants = {name: partial(run, way) for name, way in ways.items()}
        table = compare(args, variants, amount, "tokens", case)
        seconds = {name: row["seconds"]["median"] for name, row in table["variants"].items()}
        fastest = min(seconds, key=lambda name: seconds[name])
        print(f"{OURS}: {seconds[OURS] / seconds[fastest]:.3f} times the seconds of the fastest ({fastest})")
        print(f"largest difference of the {what}: {difference:.1e}")
        table["largest_difference"] = difference
        if args.device.startswith("cuda"):
            peaks: dict[str, dict[str, int]] = {"weights": {}}
            for name, way in ways.items():
                ours.zero_grad()
                peaks["weights"][name] = peak_memory(args.device, partial(score if run is score else backward, way))
                if run is first_backward:
                    kept = peaks.setdefault("weights and gradients", {})
                    kept[name] = peak_memory(args.device, partial(backward, way))
            add_memory(table, peaks)
        tables.append(table)
    report(args, tables)


def make_models(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The process reward model and the stock model, made on the device, with the same parameters and gradients."""
    config = Qwen2Config(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=5 * args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
    )
    config.reward_token_ids = REWARD_TOKEN_IDS
    dtype = getattr(torch, args.dtype)
    with torch.device(args.device):
        ours = AutoModelForProcessReward.from_config(config, dtype=dtype).eval()
        stock = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    stock.load_state_dict(ours.state_dict(keep_vars=True), assign=True)
    if any(one is not other for one, other in zip(ours.parameters(), stock.parameters(), strict=True)):
        raise AssertionError("the two models do not share their parameters")
    return ours, stock


def make_batch(args: argparse.Namespace) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Sequences padded on the right, where their step tokens are, and soft labels there, NaN elsewhere."""
    shape = (args.num_sequences, args.sequence_length)
    lengths = torch.linspace(args.sequence_length * 7 // 8, args.sequence_length, args.num_sequences).long()
    step_mask = torch.zeros(shape, dtype=torch.bool)
    for row, length in enumerate(lengths.tolist()):
        step_mask[row, torch.randperm(length)[: args.num_steps]] = True
    labels = torch.rand(shape).masked_fill(~step_mask, torch.nan)
    inputs = {
        "input_ids": torch.randint(args.vocab_size, shape).to(args.device),
        "attention_mask": (torch.arange(args.sequence_length) < lengths[:, None]).long().to(args.device),
    }
    return inputs, step_mask.to(args.device), labels.to(args.device)


def largest_difference(results: list[torch.Tensor], dtype: str) -> float:
    """Compares what the ways computed with what the first did, and refuses to time different computations."""
    difference = max((result - results[0]).abs().max().item() for result in results[1:])
    if not difference <= TOLERANCE[dtype]:
        raise AssertionError(f"the ways differ by {difference:.1e}, more than {TOLERANCE[dtype]:.1e}")
    return difference


def peak_memory(device: str, run: Callable[[], object]) -> int:
    """Bytes that were allocated at once during the run, above those allocated before it."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def add_memory(table: dict, peaks: dict[str, dict[str, int]]) -> None:
    """Prints peaks of memory, how many times less they are than the baseline's, and adds them to the table."""
    rows = table["variants"]
    width = max(map(len, rows))
    for above, values in peaks.items():
        print(f"{'':{width}}  {'GiB above ' + above:>32}  {'ratio':>6}")
        for name, value in values.items():
            ratio = values[table["baseline"]] / value
            rows[name].setdefault("peak_memory", {})[above] = {"bytes": value, "times_less_than_baseline": ratio}
            print(f"{name:{width}}  {value / 2**30:32.2f}  {ratio:6.2f}")


if __name__ == "__main__":
    main()
