"""Benchmarks load from the Hub: repositories with the layout of the real ones, over HTTP."""

import io
import json
import zipfile

import datasets
import pytest
from PIL import Image

from .loopback import Repository


def png(color):
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28), color).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(rows, *images):
    dataset = datasets.Dataset.from_list(rows)
    for column in images:
        dataset = dataset.cast_column(column, datasets.Image())
    buffer = io.BytesIO()
    dataset.to_parquet(buffer)
    return buffer.getvalue()


def card(*configs):
    """A card that names the files of each configuration and split."""
    lines = ["---", "configs:"]
    for name, split, path in configs:
        lines += [f"- config_name: {name}", "  data_files:", f"  - split: {split}", f"    path: {path}"]
    return "\n".join([*lines, "---", ""]).encode()


def image(color):
    return {"bytes": png(color), "path": None}


@pytest.fixture(scope="module")
def benchmarks(hub):
    mathvista = {"pid": "1", "query": "Find x.", "answer": "1.2", "answer_type": "float", "choices": None}
    mathvista |= {"precision": 1.0, "image": "images/1.jpg", "decoded_image": image("red")}
    olympiad = {"id": 7, "question": "See <image_1>.", "context": None, "final_answer": ["$2$"], "error": None}
    olympiad |= {"subfield": "Algebra", "image_1": image("red")}
    process = [{"id": "gsm8k-0", "problem": "1 + 1?", "steps": ["It is 2.", "So 3."], "label": 1}]
    visual = {"image": ["a/1.png"], "question": "See.", "answer": "C", "policy_model": "m", "data_source": "WeMath"}
    visual |= {"response": {"steps": ["One."], "process_correctness": [-1]}}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("images/a/1.png", png("blue"))
    splits = ("gsm8k", "math", "olympiadbench", "omnimath")
    config = "OE_MM_maths_en_COMP"
    repositories = {
        "AI4Math/MathVista": {
            "README.md": card(("default", "testmini", "data/testmini-*")),
            "data/testmini-00000-of-00001.parquet": parquet([mathvista], "decoded_image"),
        },
        "Hothan/OlympiadBench": {
            "README.md": card(
                (config, "train", f"{config}/*.parquet"),
                ("TP_TO_maths_en_COMP", "train", "TP_TO_maths_en_COMP/*.parquet"),
            ),
            f"{config}/{config}.parquet": parquet([olympiad], "image_1"),
            "TP_TO_maths_en_COMP/TP_TO_maths_en_COMP.parquet": parquet([{"id": 1}]),
        },
        "Qwen/ProcessBench": {
            "README.md": "\n".join(
                ["---", "configs:", "- config_name: default", "  data_files:"]
                + [line for split in splits for line in (f"  - split: {split}", f"    path: {split}.json")]
                + ["---", ""]
            ).encode(),
            **{f"{split}.json": json.dumps(process).encode() for split in splits},
        },
        "OpenGVLab/VisualProcessBench": {
            "test.jsonl": json.dumps(visual).encode(),
            "images.zip": archive.getvalue(),
        },
    }
    for repo, files in repositories.items():
        hub.repositories["dataset", repo] = Repository(False, branches={"main": files})
    return hub


def loaded(session, name, expression):
    return session.run(
        f"from mm_prm.data.benchmarks import load_benchmark\nloaded = load_benchmark({name!r})\nresult = {expression}"
    )


def test_parquet_with_embedded_pictures(benchmarks, session):
    row = "[loaded.problems[0]['answer'], loaded.problems[0]['images'][0].getpixel((0, 0)), loaded.tolerances]"
    assert loaded(session, "mathvista", row) == ["1.2", [255, 0, 0], {"1": 0.05}]


def test_one_of_many_configurations(benchmarks, session):
    row = "[loaded.problems['id'][:], loaded.problems[0]['question'], loaded.problems[0]['answer']]"
    assert loaded(session, "olympiadbench", row) == [["7"], "See <image>.", "$2$"]


def test_splits_are_subsets(benchmarks, session):
    rows = "[[row['subset'], row['first_error'], row['steps']] for row in loaded.solutions]"
    steps = ["It is 2.", "So 3."]
    splits = ("gsm8k", "math", "olympiadbench", "omnimath")
    assert loaded(session, "processbench", rows) == [[split, 1, steps] for split in splits]


def test_lines_and_an_archive(benchmarks, session):
    rows = "[loaded.solutions[0]['step_labels'], loaded.problems[0]['images'][0].getpixel((0, 0))]"
    assert loaded(session, "visualprocessbench", rows) == [[-1], [0, 0, 255]]


def test_a_repository_that_is_not_there_is_told_in_one_line(benchmarks, session):
    answer = session.ask(args=["evaluate", "--benchmark", "mathverse", "--output", "out"])
    assert answer["status"] == 2
    [line] = answer["err"].splitlines()
    assert "AI4Math/MathVerse" in line
