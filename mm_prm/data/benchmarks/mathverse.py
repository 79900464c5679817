"""MathVerse: 788 problems in five versions, from text that says all to a picture that does (3,940 rows).

The prompt is the data set's own `query_cot`; choices stand in it. In the version Vision Only it holds the instruction
alone, and the problem is in the picture.
"""

from .loading import Benchmark, Row


def _row(row: Row) -> dict:
    return {
        "id": row["sample_index"],
        "question": row["query_cot"],
        "answer": row["answer"],
        "images": [row["image"]],
        "source": f"AI4Math/MathVerse, {row['problem_version']}",
        "subject": (row.get("metadata") or {}).get("subject"),
    }


MATHVERSE = Benchmark(
    name="mathverse",
    hub_id="AI4Math/MathVerse",
    config="testmini",
    splits=("testmini",),
    columns=("sample_index", "problem_version", "query_cot", "answer", "image"),
    to_row=_row,
    answer_rule="the choice's letter, or equal to the gold answer by rules",
    license="mit",
    paper={"policy": 42.99, "policy, Best-of-16 with MM-PRM": 46.27},
)
