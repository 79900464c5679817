"""Benchmarks become problem rows: local parquet files of the Hub's columns, real samples, and rows that are wrong."""

import io
import json
import zipfile
from pathlib import Path

import datasets
import pytest
from PIL import Image

from mm_prm.data import validate_rows
from mm_prm.data.benchmarks import BENCHMARKS, load_benchmark
from mm_prm.data.features import RowError
from mm_prm.data.images import ImageError
from mm_prm.data.problem_files import ProblemFileError

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(color="red"):
    return Image.new("RGB", (28, 28), color)


def png(color="red"):
    buffer = io.BytesIO()
    picture(color).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, rows, images=()):
    dataset = datasets.Dataset.from_list(rows)
    for column in images:
        dataset = dataset.cast_column(column, datasets.Image())
    dataset.to_parquet(str(path))
    return str(path)


MATHVISTA = {
    "pid": "3",
    "question": "Find x.",
    "query": "Hint: Please answer the question and provide the correct option letter.\nQuestion: Find x.\n"
    "Choices:\n(A) 135°\n(B) 145°",
    "image": "images/3.jpg",
    "choices": ["135°", "145°"],
    "unit": None,
    "precision": None,
    "answer": "145°",
    "question_type": "multi_choice",
    "answer_type": "text",
    "metadata": {"task": "geometry problem solving", "split": "testmini"},
}


def test_mathvista(tmp_path):
    decimal = MATHVISTA | {"pid": "4", "choices": None, "precision": 1.0, "answer": "1.2", "answer_type": "float"}
    rows = [row | {"decoded_image": picture()} for row in (MATHVISTA, decimal)]
    loaded = load_benchmark("mathvista", write_parquet(tmp_path / "testmini.parquet", rows, ["decoded_image"]))
    assert validate_rows("problem", loaded.problems) == 2
    first, second = loaded.problems
    assert (first["id"], first["choices"], first["answer"]) == ("3", ["135°", "145°"], "145°")
    assert first["question"] == MATHVISTA["query"] and first["subject"] == "geometry problem solving"
    assert first["images"][0].size == (28, 28)
    assert second["choices"] == [] and loaded.tolerances == {"4": pytest.approx(0.05)}


def test_mathverse(tmp_path):
    row = {
        "sample_index": "421",
        "problem_index": "421",
        "problem_version": "Vision Only",
        "question": "",
        "query_cot": "Please answer the question and provide the correct option letter.",
        "answer": "B",
        "question_type": "multi-choice",
        "image": picture(),
        "metadata": {"subject": "Plane Geometry", "split": "testmini"},
    }
    [problem] = load_benchmark("mathverse", write_parquet(tmp_path / "testmini.parquet", [row], ["image"])).problems
    assert problem["question"].startswith("Please answer") and problem["answer"] == "B"
    assert (problem["source"], problem["subject"]) == ("AI4Math/MathVerse, Vision Only", "Plane Geometry")


def test_olympiadbench(tmp_path):
    row = {
        "id": 2231,
        "context": "A circle has circumference 1.",
        "question": "In <image_2> and <image_1>, find C.",
        "final_answer": ["$\\frac{1}{2}$"],
        "error": "1e-1",
        "subfield": "Geometry",
        "image_1": picture("red"),
        "image_2": picture("blue"),
        "image_3": None,
    }
    path = write_parquet(
        tmp_path / "train.parquet", [row, row | {"id": 5, "error": "1e-1,1e-1"}], ["image_1", "image_2"]
    )
    loaded = load_benchmark("olympiadbench", path)
    problem = loaded.problems[0]
    assert problem["id"] == "2231" and problem["answer"] == "$\\frac{1}{2}$"
    assert problem["question"] == "A circle has circumference 1.\nIn <image> and <image>, find C."
    assert [image.getpixel((0, 0)) for image in problem["images"]] == [(0, 0, 255), (255, 0, 0)]
    assert loaded.tolerances == {"2231": 0.1}


def test_mathvision_on_real_rows():
    path = SHARED / "mathvision_pool"
    if not path.exists():
        pytest.skip(f"the sample of MathVision is not here: {path} is missing")
    problems = load_benchmark("mathvision", str(path)).problems
    assert validate_rows("problem", problems) == 120
    row = problems[[problem_id == "1136" for problem_id in problems["id"]].index(True)]
    assert row["choices"][4] == "$32 \\mathrm{~cm}$" and row["answer"] == "E"
    assert row["question"].endswith("<image>square?")


def test_mm_k12_on_real_rows():
    path = SHARED / "mm_k12_sample" / "problems.json"
    if not path.exists():
        pytest.skip(f"the sample of MM-K12 is not here: {path} is missing")
    loaded = load_benchmark("mm-k12", str(path))
    assert validate_rows("problem", loaded.problems) == 120 and not loaded.left_out
    assert len(load_benchmark("mm-k12", str(path), limit=3).problems) == 3


def test_processbench_on_real_rows():
    path = SHARED / "processbench"
    if not path.exists():
        pytest.skip(f"the sample of ProcessBench is not here: {path} is missing")
    loaded = load_benchmark("processbench", str(path))
    assert len(loaded.solutions) == 160
    assert {solution["subset"] for solution in loaded.solutions} == set(loaded.benchmark.splits)
    found = next(solution for solution in loaded.solutions if solution["subset"] == "omnimath")
    [official] = [
        row
        for row in json.loads((path / "omnimath_sample.json").read_text(encoding="utf-8"))
        if [step.strip() for step in row["steps"]] == found["steps"]
    ]
    assert found["first_error"] == official["label"]
    questions = dict(zip(loaded.problems["id"], loaded.problems["question"], strict=True))
    assert questions[found["problem_id"]] == official["problem"].strip()


def test_visualprocessbench_reads_pictures_from_the_archive(tmp_path):
    def row(image, labels, source="MathVision"):
        response = {"steps": [f"step {number}" for number in range(len(labels))], "process_correctness": labels}
        question = "See <image1> and <image2>." if len(image) == 2 else "See it."
        return {"image": image, "question": question, "answer": "C", "response": response, "data_source": source}

    rows = [row(["a/1.png", "a/2.png"], [1, -1]), row(["a/1.png"], [0], "WeMath"), row(["a/1.png"], [1, 1, -1])]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name, color in (("a/1.png", "red"), ("a/2.png", "blue")):
            archive.writestr(f"images/{name}", png(color))
    loaded = load_benchmark("visualprocessbench", str(tmp_path))
    assert [solution["step_labels"] for solution in loaded.solutions] == [[1, -1], [0], [1, 1, -1]]
    assert [solution["subset"] for solution in loaded.solutions] == ["MathVision", "WeMath", "MathVision"]
    first, second, third = (solution["problem_id"] for solution in loaded.solutions)
    assert first != second == third  # solutions of one problem share it
    assert loaded.problems[0]["question"] == "See <image> and <image>."
    assert [image.getpixel((0, 0)) for image in loaded.problems[0]["images"]] == [(255, 0, 0), (0, 0, 255)]

    rows[1]["image"] = ["b/9.png"]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(ImageError, match=r"b/9.png.*images.zip 0 times.*images/a/1.png"):
        load_benchmark("visualprocessbench", str(tmp_path))
    loaded = load_benchmark("visualprocessbench", str(tmp_path), on_bad_row="skip")
    assert len(loaded.solutions) == 2 and "b/9.png" in loaded.left_out[0]["reason"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_missing_column_is_named_with_those_that_are_there(name, tmp_path):
    benchmark = BENCHMARKS[name]
    path = write_parquet(tmp_path / f"{benchmark.splits[0]}.parquet", [{"first": 1, "second": "two"}])
    named = " or ".join(map(repr, benchmark.columns[0].split("|"))).replace("|", r"\|")
    with pytest.raises(ProblemFileError, match=f"column {named} is missing; there are first, second"):
        load_benchmark(name, path)


def test_bad_rows_are_named_or_skipped(tmp_path):
    rows = [
        {"id": str(number), "question": "?", "answer": "1" * (number > 0), "image": picture()} for number in range(2)
    ]
    path = write_parquet(tmp_path / "test.parquet", rows, ["image"])
    with pytest.raises(RowError, match="problem '0': answer = None"):
        load_benchmark("mm-k12", path)
    loaded = load_benchmark("mm-k12", path, on_bad_row="skip")
    assert loaded.problems["id"][:] == ["1"] and loaded.left_out[0]["id"] == "row 0 of test.parquet"
    write_parquet(path, [rows[1], rows[1]], ["image"])
    with pytest.raises(RowError, match="used by an earlier row"):
        load_benchmark("mm-k12", path)


def test_of_a_folder_of_splits_only_the_one_that_is_measured_is_read(tmp_path):
    def row(number):
        return {"id": str(number), "question": "?", "answer": "1", "image": picture()}

    names = ["problems", "test-00000-of-00002", "test-00001-of-00002", "testmini-00000", "train-00000-of-00001"]
    for number, name in enumerate(names):
        write_parquet(tmp_path / f"{name}.parquet", [row(number)], ["image"])
    assert load_benchmark("mm-k12", str(tmp_path)).problems["id"][:] == ["1", "2"]
    for name in names[1:3]:
        (tmp_path / f"{name}.parquet").unlink()
    with pytest.raises(ProblemFileError, match="no rows that can be used"):
        load_benchmark("mm-k12", str(tmp_path))
    for name in names[3:]:
        (tmp_path / f"{name}.parquet").unlink()
    assert load_benchmark("mm-k12", str(tmp_path)).problems["id"][:] == ["0"]


def test_labels_that_do_not_fit_are_refused(tmp_path):
    row = {"problem": "1 + 1?", "steps": ["It is 2."], "label": 1}
    (tmp_path / "gsm8k.json").write_text(json.dumps([row]), encoding="utf-8")
    with pytest.raises(RowError, match="first_error = 1: must be -1 or the index of one of the 1 steps"):
        load_benchmark("processbench", str(tmp_path))


def test_unknown_benchmark():
    with pytest.raises(ValueError, match="use one of mm-k12, olympiadbench"):
        load_benchmark("mmk12")
