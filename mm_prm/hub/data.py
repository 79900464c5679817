"""What goes to the Hub with data: the tables as parquet files, one configuration each, and how they are read back."""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets

from mm_prm.data import FEATURES, join_problems, load_problems
from mm_prm.data.features import RowKind, validate_rows

from .cards import dataset_card
from .upload import Upload

# Configuration → kind of its rows. Pictures are in the problems, and nowhere else.
CONFIGS: dict[str, RowKind] = {"problems": "problem", "trees": "tree", "rows": "stepwise", "pools": "pool"}

_SHARD_BYTES = 500_000_000


@contextmanager
def dataset_upload(
    tables: Mapping[str, datasets.Dataset],
    repo_id: str,
    *,
    license: str | None = None,
    description: str = "",
    limits: Sequence[str] = (),
) -> Iterator[Upload]:
    """
    Put together what a data set's repository holds. The files live as long as the context.

    Args:
        tables (`Mapping[str, datasets.Dataset]`):
            Rows of any of the configurations `problems`, `trees`, `rows` and `pools`.
        repo_id (`str`):
            The repository, `owner/name`.
        license (`str`, *optional*):
            Licence, as the Hub spells it.
        description (`str`, *optional*, defaults to `""`):
            What a reader should know first, in Markdown.
        limits (`Sequence[str]`, *optional*, defaults to `()`):
            What the data are not good for.

    Yields:
        [`Upload`]
    """
    if not tables or not set(tables) <= set(CONFIGS):
        raise ValueError(f"tables: {', '.join(tables) or 'none'}: give some of {', '.join(CONFIGS)}")
    checked = {name: _checked(name, tables[name]) for name in CONFIGS if name in tables}
    _check_problem_ids(checked)
    with tempfile.TemporaryDirectory(prefix="mm_prm_push.") as folder:
        files: dict[str, Path | bytes] = {}
        for name, table in checked.items():
            num_shards = max(1, math.ceil(table.data.nbytes / _SHARD_BYTES))
            for number in range(num_shards):
                path = f"{name}/train-{number:05}-of-{num_shards:05}.parquet"
                file = Path(folder) / path
                file.parent.mkdir(exist_ok=True)
                table.shard(num_shards, number, contiguous=True).to_parquet(str(file))
                files[path] = file
        files["README.md"] = str(
            dataset_card(
                repo_id.split("/")[-1],
                checked.get("trees", ()),
                data_files={name: f"{name}/train-*.parquet" for name in checked},
                num_rows={name: len(table) for name, table in checked.items()},
                dataset_id=repo_id,
                license=license,
                description=description,
                limits=limits,
            )
        ).encode()
        yield Upload(repo_id, "dataset", files, f"Push {', '.join(checked)} with mm-prm")


def _checked(name: str, table: datasets.Dataset) -> datasets.Dataset:
    kind = CONFIGS[name]
    features = FEATURES[kind]
    if name == "rows" and "images" in table.column_names:
        table = table.remove_columns("images")  # they are in the problems, once
    if not len(table):
        raise ValueError(f"{name}: there are no rows")
    undecoded = table
    if name == "problems":
        undecoded = table.cast_column("images", datasets.List(datasets.Image(decode=False)))
    validate_rows(kind, undecoded)
    return table.select_columns(list(features)).cast(features)


def _check_problem_ids(tables: Mapping[str, datasets.Dataset]) -> None:
    if "problems" not in tables:
        return
    known = set(tables["problems"]["id"])
    for name, table in tables.items():
        missing = sorted(set(table["problem_id"]) - known) if name != "problems" else []
        if missing:
            shown = ", ".join(map(repr, missing[:3]))
            raise ValueError(f"{name}: {len(missing)} problem_id are not among the problems: {shown}")


def read_tables(folder: str | Path) -> dict[str, datasets.Dataset]:
    """
    Read the tables of a folder: `problems`, `trees`, `rows` and `pools`, each a folder that `datasets` saved, or a
    .parquet or .jsonl file (problems also .json).

    Args:
        folder (`str` or `Path`):
            The folder.
    """
    source = Path(folder).expanduser()
    if not source.is_dir():
        raise ValueError(f"{source}: there is no such folder; give one with {', '.join(CONFIGS)}")
    tables: dict[str, datasets.Dataset] = {}
    for name in CONFIGS:
        found = [source / f"{name}{suffix}" for suffix in ("", ".parquet", ".jsonl", ".json")]
        found = [path for path in found if path.exists()]
        if len(found) > 1:
            raise ValueError(f"{source}: holds {' and '.join(path.name for path in found)}; keep one of them")
        if found and name == "problems":
            tables[name] = load_problems(found[0])[0]
        elif found:
            tables[name] = _read(found[0], CONFIGS[name])
    if not tables:
        raise ValueError(f"{source}: holds none of {', '.join(CONFIGS)} (folders, .parquet or .jsonl files)")
    return tables


def _read(path: Path, kind: RowKind) -> datasets.Dataset:
    if path.is_dir():
        table = datasets.load_from_disk(str(path))
        if isinstance(table, datasets.DatasetDict):
            raise ValueError(f"{path}: holds the splits {', '.join(table)}; give one, as {path}/NAME")
        return table
    if path.suffix == ".parquet":
        return datasets.Dataset.from_parquet(str(path))
    return datasets.Dataset.from_json(str(path), features=FEATURES[kind])


def load_rows(repo_id: str, *, revision: str | None = None, split: str = "train") -> datasets.Dataset:
    """
    Load stepwise rows from the Hub in TRL's flat form, with the images of their problems joined.

    Args:
        repo_id (`str`):
            Data set repository with the configurations `rows` and `problems`.
        revision (`str`, *optional*):
            Branch, tag or commit.
        split (`str`, *optional*, defaults to `"train"`):
            Split of both.

    Returns:
        `datasets.Dataset`: `prompt, completions, labels, images, …`, see [`~mm_prm.data.join_problems`].
    """
    rows, problems = (
        datasets.load_dataset(repo_id, name, split=split, revision=revision) for name in ("rows", "problems")
    )
    return join_problems(rows, problems)
