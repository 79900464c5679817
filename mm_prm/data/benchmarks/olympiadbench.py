"""OlympiadBench: the 150 open-ended English competition problems of mathematics with pictures."""

from .loading import Benchmark, Row


def _row(row: Row) -> dict:
    return {
        "id": row["id"],
        "question": "\n".join(part for part in (row.get("context"), row["question"]) if part),
        "answer": ", ".join(row["final_answer"] or []),
        "images": [row[f"image_{number}"] for number in range(1, 10) if row.get(f"image_{number}") is not None],
        "source": "Hothan/OlympiadBench",
        "subject": row.get("subfield"),
        "tolerance": _tolerance(row.get("error")),
    }


def _tolerance(error: str | None) -> float | None:
    """One tolerance for the one number of an answer; several, for the parts of an answer, are not used."""
    try:
        return float(error) if error else None
    except ValueError:
        return None


OLYMPIADBENCH = Benchmark(
    name="olympiadbench",
    hub_id="Hothan/OlympiadBench",
    config="OE_MM_maths_en_COMP",
    splits=("train",),
    columns=("id", "question", "final_answer", "image_1"),
    to_row=_row,
    answer_rule="equal to the gold answer by rules, a number within the row's `error`",
    license="apache-2.0",
    paper={"policy": 15.41, "policy, Best-of-16 with MM-PRM": 24.00},
)
