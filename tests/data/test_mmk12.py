import json
import logging
from pathlib import Path

import datasets
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm_prm.data.features import PROBLEM_FEATURES, RowError, validate_rows
from mm_prm.data.images import ImageError
from mm_prm.data.mmk12 import MMK12
from mm_prm.data.problem_files import ProblemFileError
from mm_prm.data.problems import load_problems

SAMPLE = Path(__file__).parents[2].parent / "shared" / "data" / "mm_k12_sample" / "problems.json"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    for name, color in (("a", "red"), ("b", "green"), ("c", "blue")):
        PIL.Image.new("RGB", (5, 4), color).save(root / "images" / f"{name}.png")
    return root


def seed_rows():
    return [
        {"id": "q1", "question": " What is $x$? ", "correct_answer": "$$4$$\n", "image_path": "images/a.png"},
        {
            "id": 2,
            "question": "Compare <image2> to <image_1>",
            "answer": 7,
            "image_path": ["images/a.png", "images/b.png"],
        },
        {
            "id": "q3",
            "question": "Is <image1> blue?",
            "answer": "A",
            "choices": ["yes", "no"],
            "image_path": "images/c.png",
        },
    ]


def write(path, rows, lines=False):
    text = "\n".join(json.dumps(row) for row in rows) if lines else json.dumps(rows, indent=1)
    path.write_text(text, encoding="utf-8")
    return path


def color(image):
    return image.convert("RGB").getpixel((0, 0))


RED, GREEN, BLUE = (255, 0, 0), (0, 128, 0), (0, 0, 255)


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("name", ["problems.json", "[x] p*oblems::1.json"])
def test_seed_json(folder, cache, lines, name):
    dataset, skipped = load_problems(write(folder / name, seed_rows(), lines), cache_dir=cache)
    assert skipped == []
    assert dataset.features == PROBLEM_FEATURES
    assert validate_rows("problem", dataset) == 3
    assert dataset["id"][:] == ["q1", "2", "q3"]
    assert dataset["question"][:] == ["What is $x$?", "Compare <image> to <image>", "Is <image> blue?"]
    assert dataset["answer"][:] == ["$$4$$", "7", "A"]
    assert dataset["choices"][:] == [[], [], ["yes", "no"]]
    # The k-th marker is the k-th image: image 2 is named first.
    assert [[color(image) for image in images] for images in dataset["images"]] == [[RED], [GREEN, RED], [BLUE]]


def test_json_lines_may_hold_line_separators_of_unicode(folder, cache):
    rows = seed_rows()
    rows[0]["question"] = "a\u2028b\x85c"
    path = folder / "problems.jsonl"
    path.write_text(
        "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8"
    )
    dataset, _ = load_problems(path, cache_dir=cache)
    assert dataset[0]["question"] == "a\u2028b\x85c"


def test_a_changed_file_and_a_changed_picture_are_read_anew(folder, cache):
    path = write(folder / "problems.json", seed_rows())
    first, _ = load_problems(path, cache_dir=cache)
    again, _ = load_problems(path, cache_dir=cache)
    assert again.cache_files == first.cache_files

    rows = seed_rows()
    rows[0]["correct_answer"] = "$$5$$"  # as many bytes as before
    write(path, rows)
    changed, _ = load_problems(path, cache_dir=cache)
    assert changed["answer"][0] == "$$5$$"

    # A link is not changed when the picture behind it is.
    PIL.Image.new("RGB", (5, 4), "blue").save(folder / "images" / "new.png")
    (folder / "images" / "a.png").unlink()
    (folder / "images" / "a.png").symlink_to(folder / "images" / "new.png")
    changed, _ = load_problems(path, cache_dir=cache)
    assert color(changed[0]["images"][0]) == BLUE
    PIL.Image.new("RGB", (5, 4), "red").save(folder / "images" / "new.png")
    changed, _ = load_problems(path, cache_dir=cache)
    assert color(changed[0]["images"][0]) == RED
    assert color(changed[1]["images"][1]) == RED


def test_a_picture_that_comes_later_is_found(folder, cache):
    path = write(folder / "problems.json", seed_rows())
    (folder / "images" / "c.png").rename(folder / "away.png")
    dataset, skipped = load_problems(path, on_bad_row="skip", cache_dir=cache)
    assert len(dataset) == 2
    assert [entry["id"] for entry in skipped] == ["q3"]
    (folder / "away.png").rename(folder / "images" / "c.png")
    dataset, skipped = load_problems(path, on_bad_row="skip", cache_dir=cache)
    assert (len(dataset), skipped) == (3, [])


def test_the_builder_alone(folder, cache):
    path = write(folder / "problems.json", seed_rows())
    builder = MMK12(data_files={"train": str(path), "test": [str(path)]}, cache_dir=str(cache), limit=2)
    builder.download_and_prepare()
    both = builder.as_dataset()
    assert {split: len(dataset) for split, dataset in both.items()} == {"train": 2, "test": 2}
    assert builder.skipped("test") == []
    write(path, seed_rows()[2:])
    builder = MMK12(data_files=str(path), cache_dir=str(cache))
    builder.download_and_prepare()
    assert builder.as_dataset(split="train")["id"][:] == ["q3"]


def bad_rows(folder):
    """Rows that cannot be used, each with what its message must hold."""
    (folder / "text.png").write_text("no image")
    (folder.parent / "secret.png").write_bytes((folder / "images" / "a.png").read_bytes())
    with open(folder / "huge.png", "wb") as file:
        file.truncate(100 * 1024 * 1024)
    good = {"question": "x?", "answer": "4"}
    return [
        ({"id": "b1", **good, "image_path": "images/none.png"}, ["'b1'", "images/none.png", "missing"], ImageError),
        ({"id": "b2", **good, "image_path": "text.png"}, ["'b2'", "text.png", "is not an image"], ImageError),
        ({"id": "b3", **good, "image_path": "../secret.png"}, ["'b3'", "../secret.png", "outside"], ImageError),
        ({"id": "b4", **good, "image_path": "huge.png"}, ["'b4'", "huge.png", "over the limit"], ImageError),
        ({"id": "q1", **good}, ["id = 'q1'", "already used by row 0 of problems.json"], RowError),
        ({"id": "b5", "question": "x?", "answer": " "}, ["'b5'", "answer", "must not be empty"], RowError),
        ({"id": "b6", "question": "x?"}, ["'b6'", "answer"], RowError),
        ({"question": "x?", "answer": "4"}, ["of problems.json", "id"], RowError),
        ({"id": "b7", "question": None, "answer": "4"}, ["'b7'", "question"], RowError),
        ({"id": "b8", **good, "choices": "AB"}, ["'b8'", "choices", "must be a list"], RowError),
        ({"id": "b9", "question": "half \ud800", "answer": "4"}, ["'b9'", "question", "surrogate"], RowError),
        ({"id": "b10", **good, "image_path": {"a": 1}}, ["'b10'", "give a path"], ImageError),
        ({"id": "b12", "question": "x?", "answer": float("nan")}, ["'b12'", "answer", "must be text"], RowError),
        ({"id": "b11", **good, "answer": ["4"]}, ["'b11'", "answer"], RowError),
        ("just text", ["of problems.json", "just text"], RowError),
    ]


def test_each_bad_row_is_named_and_refused(folder, cache):
    for row, parts, kind in bad_rows(folder):
        path = write(folder / "problems.json", [*seed_rows(), row])
        with pytest.raises(kind) as caught:
            load_problems(path, cache_dir=cache)
        assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_bad_rows_are_skipped_with_their_reasons(folder, cache, caplog):
    cases = bad_rows(folder)
    rows = seed_rows()
    path = write(folder / "problems.json", [rows[0], *(row for row, _, _ in cases), *rows[1:]])
    with caplog.at_level(logging.WARNING, logger="mm_prm.data.mmk12"):
        dataset, skipped = load_problems(path, on_bad_row="skip", cache_dir=cache)
    assert dataset["id"][:] == ["q1", "2", "q3"]
    assert len(skipped) == len(cases)
    for (row, parts, _), entry in zip(cases, skipped, strict=True):
        assert all(part in entry["reason"] for part in parts)
        named = isinstance(row, dict) and "id" in row
        assert entry["id"] == row["id"] if named else entry["id"].startswith("row ")
    assert f"Skipped {len(cases)} problems, kept 3." in caplog.text
    # The reasons are kept with the rows in the cache.
    assert load_problems(path, on_bad_row="skip", cache_dir=cache)[1] == skipped


def test_all_rows_bad(folder, cache):
    path = write(folder / "problems.json", [{"id": "q1"}])
    dataset, skipped = load_problems(path, on_bad_row="skip", cache_dir=cache)
    assert len(dataset) == 0
    assert dataset.features == PROBLEM_FEATURES
    assert len(skipped) == 1


@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"id": "q1"},\n{"id": }]', "problems.json, line 2, column 8: broken JSON"),
        (b'{"id": "q1", "question": "x", "answer": "4"}\n\n{"id"\n', "problems.json, line 3, column 6: broken JSON"),
        (b'[{"id": "q1", "question": "\xff"}]', "problems.json: not UTF-8"),
        (b"[" * 100_000, "problems.json, from line 1: JSON that cannot be read"),
        (b"", "problems.json: holds no problems"),
        (b"[]", "problems.json: holds no problems"),
    ],
)
def test_broken_json_names_file_and_line(folder, cache, content, message, on_bad_row):
    (folder / "problems.json").write_bytes(content)
    with pytest.raises(ProblemFileError) as caught:
        load_problems(folder / "problems.json", on_bad_row=on_bad_row, cache_dir=cache)
    assert message in str(caught.value)


def test_image_root_and_limits(folder, cache):
    path = write(folder.parent / "elsewhere.json", seed_rows())
    dataset, _ = load_problems(path, image_root=folder, limit=2, cache_dir=cache)
    assert dataset["id"][:] == ["q1", "2"]
    with pytest.raises(ImageError, match="over the limit of 10;"):
        load_problems(path, image_root=folder, max_image_bytes=10, cache_dir=cache)
    with pytest.raises(ImageError, match="over the limit of 10;"):
        load_problems(path, image_root=folder, max_image_pixels=10, cache_dir=cache)
    with pytest.raises(ImageError, match="missing"):
        load_problems(path, cache_dir=cache)


def test_mm_k12_parquet(folder, cache):
    images = [{"bytes": (folder / "images" / f"{name}.png").read_bytes(), "path": None} for name in "ab"]
    table = {"id": [1, 2], "question": ["x?", "y?"], "answer": ["1", "2"], "subject": ["Math", None], "image": images}
    pq.write_table(pa.table(table), folder / "train.parquet")
    dataset, _ = load_problems(folder / "train.parquet", cache_dir=cache)
    assert dataset["subject"][:] == ["Math", ""]
    assert [color(row["images"][0]) for row in dataset] == [RED, GREEN]


def test_parquet_with_paths_follows_the_pictures(folder, cache):
    rows = [{"id": "q1", "question": "x?", "answer": "1", "images": [{"bytes": None, "path": "images/a.png"}]}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    first, _ = load_problems(folder / "train.parquet", cache_dir=cache)
    assert color(first[0]["images"][0]) == RED
    PIL.Image.new("RGB", (5, 4), "blue").save(folder / "images" / "a.png")
    second, _ = load_problems(folder / "train.parquet", cache_dir=cache)
    assert color(second[0]["images"][0]) == BLUE


def test_rows_survive_a_saved_folder_and_parquet(folder, cache, tmp_path):
    dataset, _ = load_problems(write(folder / "problems.json", seed_rows()), cache_dir=cache)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "rows.parquet")
    for path in (tmp_path / "saved", tmp_path / "rows.parquet"):
        loaded, _ = load_problems(path, cache_dir=cache)
        assert list(loaded) == list(dataset)


def test_paths_that_are_no_problems(folder, cache, tmp_path):
    with pytest.raises(ProblemFileError, match="no such file"):
        load_problems(tmp_path / "none.json", cache_dir=cache)
    with pytest.raises(ProblemFileError, match="save_to_disk"):
        load_problems(folder, cache_dir=cache)
    (folder / "x.csv").write_text("id")
    with pytest.raises(ProblemFileError, match="ends in one of"):
        load_problems(folder / "x.csv", cache_dir=cache)
    (folder / "x.parquet").write_text("id")
    with pytest.raises(ProblemFileError, match=r"x.parquet: broken parquet file"):
        load_problems(folder / "x.parquet", cache_dir=cache)
    rows = datasets.Dataset.from_list([{"id": "q1", "question": "x?", "answer": "1"}])
    datasets.DatasetDict({"dev": rows}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ProblemFileError, match="holds the splits dev"):
        load_problems(tmp_path / "splits", cache_dir=cache)
    assert load_problems(tmp_path / "splits" / "dev", cache_dir=cache)[0]["id"][:] == ["q1"]


def test_settings_are_checked(folder, cache):
    path = write(folder / "problems.json", seed_rows())
    with pytest.raises(ValueError, match="on_bad_row = 'ignore'"):
        load_problems(path, on_bad_row="ignore", cache_dir=cache)
    with pytest.raises(ValueError, match="limit = 0"):
        load_problems(path, limit=0, cache_dir=cache)
    for bad in ("mini:test", "mini:test:x", "mini::4", "mini:test:1:2:3"):
        with pytest.raises(ValueError, match="mini:SPLIT:NUMBER"):
            load_problems(bad, cache_dir=cache)
    with pytest.raises(ValueError, match="needs `data_files`"):
        MMK12(cache_dir=str(cache)).download_and_prepare()


def test_mini_world(cache):
    first, skipped = load_problems("mini:test:6", cache_dir=cache)
    assert (len(first), skipped) == (6, [])
    assert validate_rows("problem", first) == 6
    tail, _ = load_problems("mini:test:2:4", cache_dir=cache)
    assert list(tail) == list(first.select([4, 5]))
    assert len(load_problems("mini:test:6", limit=3, cache_dir=cache)[0]) == 3


@pytest.mark.skipif(not SAMPLE.exists(), reason=f"needs {SAMPLE}")
def test_real_problems(cache):
    dataset, skipped = load_problems(SAMPLE, cache_dir=cache)
    assert (len(dataset), skipped) == (120, [])
    assert validate_rows("problem", dataset) == 120
    # 16 of these pictures have a transparent ground; turned into RGB naively, 5 of them would be wholly black.
    darkest = min(max(high for _, high in image.convert("RGB").getextrema()) for [image] in dataset["images"])
    assert darkest > 200
