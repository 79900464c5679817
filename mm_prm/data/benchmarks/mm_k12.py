"""MM-K12: school mathematics with pictures that matter, the 500 test problems of the MM-PRM paper."""

from typing import Any

from .loading import Benchmark, Row


def _row(row: Row) -> dict:
    columns = (row.get(name) for name in ("image", "image_path", "images"))
    image: Any = next((value for value in columns if value is not None), [])
    return {
        "id": row["id"],
        "question": row["question"],
        "answer": row.get("answer") or row.get("correct_answer"),
        "images": image if isinstance(image, list) else [image],
        "source": "Cierra0506/MM-K12",
        "subject": row.get("subject"),
    }


MM_K12 = Benchmark(
    name="mm-k12",
    hub_id="Cierra0506/MM-K12",
    splits=("test",),
    # What the Hub's files are called was seen in no source; these are the seed format's columns and a relative's.
    columns=("id", "question", "answer|correct_answer", "image|image_path|images"),
    to_row=_row,
    answer_rule="equal to the gold answer by rules; several lines are several answers",
    license="not stated",
    paper={"MM-Policy": 33.92, "MM-Policy, Best-of-16 with MM-PRM": 42.80, "InternVL2.5-8B": 27.01}
    | {"InternVL2.5-8B, Best-of-16 with MM-PRM": 37.80},
)
