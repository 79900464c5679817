"""MathVision (MATH-V): 3,040 competition problems, one picture each however many markers the question has.

Choices follow the question as `(A) …`, and are left out where they are nothing but letters, as MM-PRM does it.
"""

from .loading import Benchmark, Row


def _row(row: Row) -> dict:
    return {
        "id": row["id"],
        "question": row["question"],
        "answer": row["answer"],
        "choices": row["options"] or [],
        "images": [row["decoded_image"] if row.get("decoded_image") is not None else row["image"]],
        "source": "MathLLMs/MathVision",
        "subject": row.get("subject"),
    }


MATHVISION = Benchmark(
    name="mathvision",
    hub_id="MathLLMs/MathVision",
    splits=("test",),
    columns=("id", "question", "options", "answer", "decoded_image|image"),
    to_row=_row,
    answer_rule="the choice's letter or text, or equal to the gold answer by rules",
    license="mit",
    paper={"policy": 21.74, "policy, Best-of-16 with MM-PRM": 27.11},
)
