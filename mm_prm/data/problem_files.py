"""Files of problems as others wrote them: reading their rows, and turning a row into a problem row.

Known are the ancestor's seed JSON (`id, question, correct_answer, image_path`; a list, or JSON lines), parquet files
(problem rows, or MM-K12's `id, question, answer, subject, image`) and the Arrow files of a saved data set.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .features import RowError, validate_problem
from .images import read_image
from .text import normalize_image_markers

JSON_SUFFIXES = (".json", ".jsonl")
SUFFIXES = (*JSON_SUFFIXES, ".parquet", ".arrow")

_IMAGE_COLUMNS = ("images", "image", "image_path")
_ANSWER_COLUMNS = ("answer", "correct_answer")
_COLUMNS = ("id", "question", *_ANSWER_COLUMNS, "choices", "answer_type", "source", "subject", *_IMAGE_COLUMNS)


class ProblemFileError(ValueError):
    """A file of problems that cannot be read at all; the message names file and line."""


def read_rows(file: str) -> Iterator[tuple[str, Any]]:
    """
    Read the rows of a file as they stand there.

    Args:
        file (`str`):
            A `.json`, `.jsonl`, `.parquet` or `.arrow` file.

    Yields:
        `tuple[str, Any]`: Where the row stands (`3 of problems.json`) and the row.

    Raises:
        [`ProblemFileError`]: If the file is broken.
    """
    path = Path(file)
    rows: Iterable[Any] = _read_json(path) if _is_json(path) else _read_table(path)
    for number, row in enumerate(rows):
        yield f"{number} of {path.name}", row


def to_problem(
    row: Any, place: str, file: str, *, image_root: str | None, max_image_bytes: int, max_image_pixels: int
) -> dict[str, Any]:
    """
    Turn a row as others wrote it into a valid problem row, its images read and checked.

    Args:
        row (`Any`):
            Row as [`read_rows`] gives it.
        place (`str`):
            Where it stands, for messages.
        file (`str`):
            File in which it stands.
        image_root (`str`, *optional*):
            Folder within which the images lie; the file's own folder if `None`.
        max_image_bytes (`int`):
            Largest image file.
        max_image_pixels (`int`):
            Largest picture.

    Returns:
        `dict[str, Any]`: The problem row.

    Raises:
        [`RowError`]: If a field is missing or wrong.
        [`ImageError`]: If an image cannot be used.
    """
    if not isinstance(row, Mapping):
        raise RowError("problem", f"row {place}", "row", row, "must be an object with `id`, `question` and `answer`")
    choices = row.get("choices")
    if isinstance(choices, list):
        choices = [_text(choice) for choice in choices]
    problem: dict[str, Any] = {
        "id": _text(row.get("id")),
        "images": [],
        "question": _text(row.get("question")),
        "answer": _text(_first(row, _ANSWER_COLUMNS)),
        "choices": [] if choices is None else choices,
        "answer_type": row.get("answer_type") or "",
        "source": _text(row.get("source") or ""),
        "subject": _text(row.get("subject") or ""),
    }
    images = _first(row, _IMAGE_COLUMNS)
    if images is None or images == "":
        images = []
    elif not isinstance(images, list):
        images = [images]
    # The cheap checks come first, and with an id in hand the images can be named; the images themselves are checked
    # while they are read.
    validate_problem(problem | {"images": [{"path": "not read yet"}] * len(images)}, place)
    root = _image_root(Path(file), image_root)
    limits = {"max_bytes": max_image_bytes, "max_pixels": max_image_pixels}
    problem["question"], order = normalize_image_markers(problem["question"], len(images))
    problem["images"] = [read_image(problem["id"], images[index], root, **limits) for index in order]
    return problem


def fingerprint(files: Iterable[str], image_root: str | None) -> str:
    """
    Hash everything that the rows of these files are made of, so that a changed input is never served from a cache.

    JSON files count by their content. Tables, which can be large, and the image files that rows refer to count by size,
    time of change and inode, as `make` would have it. An image that is missing counts too: it may come.

    Args:
        files (`Iterable[str]`):
            Files of problems.
        image_root (`str`, *optional*):
            Folder within which the images lie; each file's own folder if `None`.

    Returns:
        `str`: The hash.
    """
    digest = hashlib.sha256()
    for path in map(Path, files):
        root = _image_root(path, image_root).resolve()
        content = path.read_bytes() if _is_json(path) else _identity(path)
        digest.update(repr((str(path), str(root), hashlib.sha256(content).hexdigest())).encode())
        for image in sorted(set(_image_paths(path))):
            # Names of files can hold anything but "/" and NUL, so that only repr keeps two names apart safely.
            digest.update(repr((image, _identity(root / image))).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def fingerprint_of_code() -> str:
    """Hash the code that makes the rows (this folder, the mini world included), for the same purpose."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write_skipped(folder: str, split: str, skipped: list[dict[str, str]]) -> None:
    """Write which rows of a split were left out, and why."""
    (Path(folder) / f"skipped-{split}.json").write_text(json.dumps(skipped), encoding="utf-8")


def read_skipped(folder: str, split: str) -> list[dict[str, str]]:
    """Read what [`write_skipped`] wrote."""
    return json.loads((Path(folder) / f"skipped-{split}.json").read_text(encoding="utf-8"))


def _image_root(path: Path, image_root: str | None) -> Path:
    return path.parent if image_root is None else Path(image_root).expanduser()


def _is_json(path: Path) -> bool:
    if path.suffix not in SUFFIXES:
        raise ProblemFileError(f"{path}: a file of problems ends in one of {', '.join(SUFFIXES)}")
    return path.suffix in JSON_SUFFIXES


def _identity(path: Path) -> bytes:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return b"missing"
    return repr((status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_dev, status.st_ino)).encode()


def _first(row: Mapping[str, Any], columns: Iterable[str]) -> Any:
    return next((row[column] for column in columns if row.get(column) is not None), None)


def _text(value: Any) -> Any:
    """Strip text, write a number as text; anything else, NaN for a missing one too, is left for the validator to refuse."""
    if isinstance(value, float) and not math.isfinite(value):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value.strip() if isinstance(value, str) else value


def _read_json(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ProblemFileError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    if text.lstrip().startswith("["):
        return _parse(text, path, 1)
    rows = []
    # Only line feeds end a line of JSON lines; `splitlines` would also cut at characters that JSON text may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append(_parse(line, path, number))
    return rows


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ProblemFileError(f"{path}, line {line}, column {error.colno}: broken JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists nested thousands deep
        raise ProblemFileError(f"{path}, from line {first_line}: JSON that cannot be read: {error}") from error


def _read_table(path: Path) -> Iterator[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            columns = [column for column in file.schema_arrow.names if column in _COLUMNS]
            for batch in file.iter_batches(batch_size=16, columns=columns):
                yield from batch.to_pylist()
        else:
            table = _open_arrow(path)
            table = table.select([column for column in table.column_names if column in _COLUMNS])
            for batch in table.to_batches(max_chunksize=16):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ProblemFileError(f"{path}: broken {path.suffix[1:]} file: {error}") from error


def _open_arrow(path: Path) -> pa.Table:
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def _image_paths(path: Path) -> Iterator[str]:
    """Paths of the images to which the rows of a file refer, without reading embedded images."""
    if _is_json(path):
        for row in _read_json(path):
            if isinstance(row, Mapping):
                images = _first(row, _IMAGE_COLUMNS)
                for image in images if isinstance(images, list) else [images]:
                    image = image.get("path") if isinstance(image, Mapping) else image
                    if isinstance(image, str):
                        yield image
        return
    try:
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            leaves = [file.schema.column(index).path for index in range(len(file.schema))]
            leaves = [leaf for leaf in leaves if leaf.split(".")[0] in _IMAGE_COLUMNS and not leaf.endswith(".bytes")]
            table = file.read(columns=leaves)
        else:
            table = _open_arrow(path)
    except (pa.ArrowException, OSError) as error:
        raise ProblemFileError(f"{path}: broken {path.suffix[1:]} file: {error}") from error
    for column in table.column_names:
        if column in _IMAGE_COLUMNS:
            for chunk in table.column(column).chunks:
                yield from _strings(chunk)


def _strings(array: pa.Array) -> list[str]:
    """The paths in a column of images: text, a struct with a `path`, or lists of either."""
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _strings(array.flatten())
    if pa.types.is_struct(kind):
        return _strings(pc.struct_field(array, "path")) if kind.get_field_index("path") >= 0 else []
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return [path for path in array.to_pylist() if path]
    return []
