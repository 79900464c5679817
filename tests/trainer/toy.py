"""A toy task that a tiny model learns in seconds: a step is right if it says so."""

import datasets

from ..testing_utils import tiny_image

FEATURES = datasets.Features(
    {
        "problem_id": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "images": datasets.List(datasets.Image()),
        "completions": datasets.List(datasets.Value("string")),
        "labels": datasets.List(datasets.Value("float32")),
        "num_judged": datasets.List(datasets.Value("int32")),
    }
)


def toy_row(number: int) -> dict:
    """Row of one to three steps, alternately right and wrong, the second without a label."""
    right = [(number + step) % 2 == 0 for step in range(1 + number % 3)]
    return {
        "problem_id": f"problem-{number // 4}",
        "prompt": "<image>How much higher is bar A?",
        "images": [tiny_image(number // 4)],
        "completions": [f"Bar A shows {'7' if good else '3'}." for good in right],
        "labels": [None if step == 1 else (0.875 if good else 0.125) for step, good in enumerate(right)],
        "num_judged": [None if step == 1 else 8 * (1 + number % 2) for step, _ in enumerate(right)],
    }


def toy_rows(count: int) -> list[dict]:
    """Rows in memory, pictures shared by the rows of a problem."""
    rows = [toy_row(number) for number in range(count)]
    for number, row in enumerate(rows):
        row["images"] = rows[number - number % 4]["images"]
    return rows


def toy_dataset(count: int) -> datasets.Dataset:
    """The same rows as a `datasets.Dataset`."""
    return datasets.Dataset.from_list(toy_rows(count), features=FEATURES)
