"""VisualProcessBench: 2,866 solutions with pictures, every step labelled right (1), wrong (-1) or neutral (0).

The card declares other types than its rows have, so the JSON lines are read directly, with the pictures in `images.zip`.
"""

from .loading import Benchmark, Row


def _row(row: Row) -> dict:
    image, response = row["image"], row["response"]
    return {
        "question": row["question"],
        "images": image if isinstance(image, list) else [image],
        "steps": response["steps"],
        "step_labels": response["process_correctness"],
        "subset": row["data_source"],
    }


VISUALPROCESSBENCH = Benchmark(
    name="visualprocessbench",
    hub_id="OpenGVLab/VisualProcessBench",
    splits=("test",),
    files=("test.jsonl", "images.zip"),
    columns=("image", "question", "response", "data_source"),
    to_row=_row,
    answer_rule="F1 of right and of wrong steps, neutral ones left out; overall by source and pooled",
    license="mit",
    paper={"macro-F1, MM-PRM": 55.5, "macro-F1, VisualPRM-8B": 62.0},
)
