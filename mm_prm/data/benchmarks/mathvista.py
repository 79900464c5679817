"""MathVista: the 1,000 problems of testmini. The prompt is the data set's own `query`, with hint and choices."""

from .loading import Benchmark, Row


def _row(row: Row) -> dict:
    precision = row["precision"] if row["answer_type"] == "float" else None
    return {
        "id": row["pid"],
        "question": row["query"],
        "answer": row["answer"],
        "choices": row.get("choices") or [],
        "images": [row["decoded_image"] if row.get("decoded_image") is not None else row["image"]],
        "source": "AI4Math/MathVista",
        "subject": (row.get("metadata") or {}).get("task"),
        # Rounding to so many decimals is what the official check does, before it compares texts.
        "tolerance": None if precision is None else 0.5 * 10.0 ** -int(precision),
    }


MATHVISTA = Benchmark(
    name="mathvista",
    hub_id="AI4Math/MathVista",
    splits=("testmini",),
    columns=("pid", "query", "answer", "answer_type", "choices", "precision", "decoded_image|image"),
    to_row=_row,
    answer_rule="the choice's letter or text, or the number, decimals rounded to the row's `precision`",
    license="cc-by-sa-4.0, not for training",
    paper={"policy": 62.93, "policy, Best-of-16 with MM-PRM": 67.60},
)
