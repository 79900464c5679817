"""ProcessBench: 3,400 solutions of text problems, each with the index of its first wrong step (-1 if there is none)."""

from .loading import Benchmark, Row


def _row(row: Row) -> dict:
    return {"question": row["problem"], "images": [], "steps": row["steps"], "first_error": row["label"]}


PROCESSBENCH = Benchmark(
    name="processbench",
    hub_id="Qwen/ProcessBench",
    splits=("gsm8k", "math", "olympiadbench", "omnimath"),
    columns=("problem", "steps", "label"),
    to_row=_row,
    answer_rule="the first step below the threshold is the labelled one; overall is the mean of the four F1",
    license="apache-2.0",
)
