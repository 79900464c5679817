"""Files of rows that commands read and write: folders of `datasets`, parquet, JSON lines; and what lies beside them."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet

from mm_prm.commands import InputError, reading_input
from mm_prm.data.features import FEATURES, RowKind
from mm_prm.settings import write_settings
from mm_prm.unfinished import unfinished_folder

SUFFIXES = (".parquet", ".jsonl")

_ROWS_AT_ONCE = 64


def check_output(path: str, *sources: str | None) -> Path:
    """
    Refuse an output that could not be written, or is what is read, before the work and not after it.

    Args:
        path (`str`):
            A new folder, or a `.parquet` or `.jsonl` file.
        sources (`str`, *optional*):
            The files and folders that are read.
    """
    output = Path(path).expanduser()
    _refuse_what_is_read(output, sources)
    if output.suffix in SUFFIXES:
        if output.is_dir():
            raise InputError(f"output: {output} is a folder; give a file or another folder")
    elif output.suffix in (".json", ".csv", ".tsv", ".txt", ".yaml", ".arrow", ".sqlite"):
        raise InputError(f"output: {output}: rows are written to {' and '.join(SUFFIXES)} files and to folders")
    elif output.is_file():
        raise InputError(f"output: {output} is a file; give a folder, or a name that ends in {' or '.join(SUFFIXES)}")
    elif output.is_dir() and any(output.iterdir()) and not (output / "dataset_info.json").exists():
        raise InputError(f"output: the folder {output} holds something else than rows; give another")
    with reading_input(str(output)):
        output.parent.mkdir(parents=True, exist_ok=True)
    return output


def check_lines_output(path: str, source: str) -> Path:
    """
    Refuse an output of JSON lines that could not be written, or is what is read; see [`check_output`].

    Args:
        path (`str`):
            The file to write.
        source (`str`):
            The file that is read.
    """
    output = Path(path).expanduser()
    _refuse_what_is_read(output, [source])
    with reading_input("output"):
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir():
            raise ValueError(f"{output} is a folder; name a .jsonl file")
    return output


def _refuse_what_is_read(output: Path, sources: Iterable[str | None]) -> None:
    for source in sources:
        read = None if source is None else Path(source).expanduser()
        if read is not None and output.exists() and read.exists() and output.samefile(read):
            raise InputError(f"output: {output} is the input, too; name another file or folder")


def write_settings_beside(output: Path, settings: Any) -> None:
    """Write the settings of a run to `OUTPUT.settings.yaml`, which `--config` reads back."""
    with reading_input("output"):
        write_settings(output.parent, settings, f"{output.name}.settings.yaml")


def write_json(path: str | None, content: Mapping[str, Any]) -> None:
    """Write what a command prints as JSON, where `--output_json` asks for it."""
    if path is not None:
        file = Path(path).expanduser()
        with reading_input("output_json"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_rows(
    kind: RowKind, rows: Iterable[Mapping[str, Any]], output: Path, order: Mapping[str, int] | None = None
) -> int:
    """
    Write rows as they come, never holding all of them.

    Args:
        kind (`str`):
            Kind of the rows.
        rows (`Iterable[Mapping[str, Any]]`):
            The rows.
        output (`Path`):
            Where to, see [`check_output`].
        order (`Mapping[str, int]`, *optional*):
            Place of each problem; the rows are sorted by it, so that the order in which they were finished does not
            show.

    Returns:
        `int`: Number of rows.
    """
    schema = FEATURES[kind].arrow_schema
    with ExitStack() as stack:
        with reading_input("output"):
            folder = stack.enter_context(unfinished_folder(output))
        spool = folder / "rows.arrow"
        with pa.OSFile(str(spool), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in _batches(rows):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
        dataset = datasets.Dataset.from_file(str(spool))
        if order is not None:
            places = [order[problem_id] for problem_id in dataset["problem_id"]]
            dataset = dataset.select(sorted(range(len(places)), key=places.__getitem__))
        if output.suffix not in SUFFIXES:
            dataset.save_to_disk(str(output))
            return len(dataset)
        part = folder / output.name
        if output.suffix == ".parquet":
            dataset.to_parquet(str(part))
        else:
            with part.open("w", encoding="utf-8") as lines:
                for row in dataset:
                    lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        part.replace(output)  # readers never see half a file
        return len(dataset)


def _batches(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    batch: list[Mapping[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _ROWS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def read_table(path: str, key: str = "") -> datasets.Dataset | list[dict[str, Any]]:
    """
    Read rows of any kind, unchecked: a folder written by `Dataset.save_to_disk`, or a parquet, JSON lines or JSON file.

    A `problem_id` that is a number becomes text, as the ids of problems do.

    Args:
        path (`str`):
            The file or folder.
        key (`str`, *optional*, defaults to `""`):
            Key under which a JSON file may hold the list of rows beside other things.
    """
    rows = _read_table(Path(path).expanduser(), key)
    if isinstance(rows, list):
        return [_with_text_id(row) for row in rows]
    if "problem_id" in rows.column_names and pa.types.is_integer(rows.data.schema.field("problem_id").type):
        return rows.cast_column("problem_id", datasets.Value("string"))
    return rows


def _with_text_id(row: Any) -> Any:
    if isinstance(row, dict) and type(row.get("problem_id")) is int:
        return {**row, "problem_id": str(row["problem_id"])}
    return row


def _read_table(source: Path, key: str) -> datasets.Dataset | list[Any]:
    with reading_input(str(source)):
        if source.is_dir():
            dataset = datasets.load_from_disk(str(source))
            if isinstance(dataset, datasets.DatasetDict):
                raise InputError(f"{source}: holds the splits {', '.join(dataset)}; give one, as {source}/NAME")
            return dataset
        if not source.exists():
            raise InputError(f"{source}: there is no such file or folder")
        if source.suffix == ".parquet":
            try:
                table = pa.parquet.read_table(source, memory_map=True)
            except pa.ArrowException as error:
                raise InputError(f"{source}: broken parquet file: {error}") from error
            return datasets.Dataset(table)
        if source.suffix == ".jsonl":
            with source.open(encoding="utf-8-sig") as lines:
                return [
                    _parse(line, f"{source}, line {number}") for number, line in enumerate(lines, 1) if line.strip()
                ]
        if source.suffix == ".json":
            rows = _parse(source.read_text(encoding="utf-8-sig"), str(source))
            if isinstance(rows, dict) and key in rows:
                rows = rows[key]
            if not isinstance(rows, list):
                raise InputError(f"{source}: must be a list of rows")
            return rows
    raise InputError(f"{source}: rows are read from folders and from {', '.join((*SUFFIXES, '.json'))} files")


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        advice = "; JSON lines are read from .jsonl files" if error.msg == "Extra data" else ""
        raise InputError(
            f"{place}: broken JSON, line {error.lineno}, column {error.colno}: {error.msg}{advice}"
        ) from error


def read_trees(path: str) -> Iterable[Mapping[str, Any]]:
    """
    Read trees, from a journal too.

    Args:
        path (`str`):
            What [`read_table`] reads, or the journal of an annotation, which may be running (`.sqlite`).
    """
    if not path.endswith(".sqlite"):
        return read_table(path)
    return _journal_trees(path)


def _journal_trees(path: str) -> Iterator[Mapping[str, Any]]:
    from mm_prm.annotation.journal import Journal, JournalError

    settings: dict[str, str] = {}
    try:
        with Journal(path, read_only=True) as journal:
            for tree in journal:
                if tree["problem_id"] in settings:
                    raise InputError(
                        f"{path}: holds several trees of problem {tree['problem_id']!r}, of runs with other settings or "
                        "models; give the output of `mm-prm annotate` instead of its journal"
                    )
                settings[tree["problem_id"]] = tree["settings"]
                yield tree
    except JournalError as error:
        raise InputError(str(error)) from error


def columns_of(rows: datasets.Dataset | Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the columns of a table."""
    if isinstance(rows, datasets.Dataset):
        return rows.column_names
    return list(rows[0]) if rows and isinstance(rows[0], Mapping) else []
