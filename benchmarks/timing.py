"""
What the benchmarks share: variants of one computation, timed against a named baseline in the same run.

Machines are shared and their load drifts, so the variants take turns, each ratio is taken within one turn, and the
median over the turns is given with its extremes. Absolute times mean little anywhere else.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from statistics import median

import torch
import transformers


def make_parser(description: str) -> argparse.ArgumentParser:
    """
    Returns a parser with what every benchmark takes.

    Args:
        description (`str`):
            Docstring of the benchmark.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"where to compute (default: {device})")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads on the CPU")
    parser.add_argument("--repeats", type=int, default=5, help="turns that are timed (default: 5)")
    parser.add_argument("--warmups", type=int, default=1, help="turns before them (default: 1)")
    parser.add_argument("--output_json", type=Path, help="file to write the table to as JSON")
    return parser


def compare(
    args: argparse.Namespace,
    variants: Mapping[str, Callable[[], object]],
    amount: float,
    unit: str,
    case: str = "",
    optional: Collection[str] = (),
) -> dict:
    """
    Times the variants, prints each turn as it ends, then their table, and returns it.

    Args:
        args (`argparse.Namespace`):
            Parsed with [`make_parser`].
        variants (`Mapping[str, Callable]`):
            What to time; the first is the baseline.
        amount (`float`):
            How many units one call does.
        unit (`str`):
            What is done, in the plural.
        case (`str`, *optional*, defaults to `""`):
            Heading, where a benchmark has several tables.
        optional (`Collection[str]`, *optional*, defaults to `()`):
            Variants whose failure is not the benchmark's: one takes no further turn, and the table has its error
            instead of its times.
    """
    torch.set_num_threads(args.threads)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    failed: dict[str, str] = {}
    for turn in range(args.warmups + args.repeats):
        told = []
        for name in list(seconds):
            start = time.perf_counter()
            try:
                variants[name]()
            except Exception as error:
                if name not in optional:
                    raise
                traceback.print_exc()
                failed[name] = f"{type(error).__name__}: {error}"
                del seconds[name]
                continue
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            took = time.perf_counter() - start
            told.append(f"{name} {took:.3f} s")
            if turn >= args.warmups:
                seconds[name].append(took)
        kind = "turn" if turn >= args.warmups else "warm-up"
        print(f"{kind}: {', '.join(told)}", file=sys.stderr, flush=True)
    baseline = next(iter(variants))
    rows = {}
    for name, values in seconds.items():
        ratios = [old / new for old, new in zip(seconds[baseline], values, strict=True)]
        rows[name] = {
            "seconds": {"median": median(values), "low": min(values), "high": max(values)},
            f"{unit}_per_second": amount / median(values),
            "times_baseline": {"median": median(ratios), "low": min(ratios), "high": max(ratios)},
        }
    width = max(map(len, rows))
    print(f"\n{case or 'baseline: ' + baseline}\n{'':{width}}  {unit + '/s':>14}  {'seconds':>24}  {'ratio':>22}")
    for name, row in rows.items():
        print(
            f"{name:{width}}  {row[f'{unit}_per_second']:14,.1f}  {_spread(row['seconds'], 3):>24}  "
            f"{_spread(row['times_baseline'], 2):>22}"
        )
    return {"case": case, "baseline": baseline, "amount": amount, "unit": unit, "variants": rows, "failed": failed}


def report(args: argparse.Namespace, tables: list[dict]) -> None:
    """
    Writes the tables with the circumstances of the run, if asked to.

    Args:
        args (`argparse.Namespace`):
            Parsed with [`make_parser`].
        tables (`list[dict]`):
            What [`compare`] returned.
    """
    if args.output_json is None:
        return
    circumstances = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
        "processors": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    args.output_json.write_text(json.dumps({**circumstances, "tables": tables}, indent=2) + "\n")


def _spread(value: Mapping[str, float], digits: int) -> str:
    return f"{value['median']:.{digits}f} ({value['low']:.{digits}f}–{value['high']:.{digits}f})"
