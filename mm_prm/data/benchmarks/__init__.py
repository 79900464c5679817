"""Public benchmarks: one short file each says where its rows are, what they become, and what the paper reached.

loaded = load_benchmark("mathvista")                        # from the Hub
loaded = load_benchmark("mathvista", "testmini.parquet")    # from a local copy
"""

from .loading import Benchmark, LoadedBenchmark, load_rows
from .mathverse import MATHVERSE
from .mathvision import MATHVISION
from .mathvista import MATHVISTA
from .mm_k12 import MM_K12
from .olympiadbench import OLYMPIADBENCH
from .processbench import PROCESSBENCH
from .visualprocessbench import VISUALPROCESSBENCH

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (MM_K12, OLYMPIADBENCH, MATHVISTA, MATHVERSE, MATHVISION, PROCESSBENCH, VISUALPROCESSBENCH)
}

__all__ = ["BENCHMARKS", "Benchmark", "LoadedBenchmark", "load_benchmark"]


def load_benchmark(
    name: str, path: str | None = None, *, on_bad_row: str = "raise", limit: int | None = None
) -> LoadedBenchmark:
    """
    Load the problems of a benchmark, and the solutions with labelled steps where it has them.

    Args:
        name (`str`):
            One of [`BENCHMARKS`].
        path (`str`, *optional*):
            Local copy: a .parquet, .json or .jsonl file of the benchmark's columns, or a folder of them. From the Hub if
            not given.
        on_bad_row (`str`, *optional*, defaults to `"raise"`):
            `"raise"` an error at the first row that cannot be used, or `"skip"` such rows and list them.
        limit (`int`, *optional*):
            Load at most so many rows of each split.

    Returns:
        [`LoadedBenchmark`]

    Raises:
        [`ProblemFileError`]: If a column is missing; the message lists those that are there.
        [`RowError`], [`ImageError`]: At a row that cannot be used.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark = {name!r}: there is no such benchmark; use one of {', '.join(BENCHMARKS)}")
    return load_rows(BENCHMARKS[name], path, on_bad_row=on_bad_row, limit=limit)
