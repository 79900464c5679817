"""`mm-prm push`: a model, data, a metric or a Space to the Hub, with its card, in one commit.

mm-prm push model path/to/prm owner/name --license apache-2.0 --results evaluation/results.json
mm-prm push dataset folder owner/name --dry_run
mm-prm push metric best_of_n owner/best_of_n
mm-prm push space path/to/app owner/name --private
"""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Literal

from mm_prm.commands import InputError, reading_input
from mm_prm.settings import parse_settings

if TYPE_CHECKING:
    from mm_prm.hub import Upload

_POSITIONAL = ("kind", "source", "repo")


@dataclass
class PushSettings:
    """
    What goes to which repository. The first three may be given in this order without their names.

    Args:
        kind (`str`):
            What is pushed.
        source (`str`):
            model: folder of a checkpoint, or mini-prm. dataset: folder with any of problems, trees, rows and pools (each a
            folder, a .parquet or a .jsonl file). metric: best_of_n, step_errors, or the folder of an `evaluate` module.
            space: folder with app.py, or with the report.html of `mm-prm report`.
        repo (`str`):
            The repository, OWNER/NAME.
        private (`bool`, *optional*, defaults to `False`):
            Whether a new repository is private.
        revision (`str`, *optional*):
            Branch to commit to, made if it is missing.
        dry_run (`bool`, *optional*, defaults to `False`):
            Show what would go, and send nothing.
        license (`str`, *optional*):
            Licence for the card, as the Hub spells it, for example apache-2.0.
        description (`str`, *optional*, defaults to `""`):
            What a reader of the card should know first.
        base_model (`str`, *optional*):
            For the card of a model: what training started from; read from its settings if not given.
        trained_on (`list[str]`, *optional*):
            For the card of a model: data sets it was trained on.
        results (`str`, *optional*):
            For the card of a model: its figures, as `mm-prm evaluate` or `mm-prm best-of-n --model` write them with
            --output_json. Those of another checkpoint are refused.
        results_dataset (`str`, *optional*):
            Data set of these figures, where the file does not say it, or they are of a part or a local copy of a
            benchmark.
        aggregator (`str`, *optional*, defaults to `"min"`):
            Aggregator of these figures, fixed before they were known.
    """

    kind: Literal["model", "dataset", "metric", "space"]
    source: str
    repo: str
    private: bool = False
    revision: str | None = None
    dry_run: bool = False
    license: str | None = None
    description: str = ""
    base_model: str | None = None
    trained_on: list[str] | None = None
    results: str | None = None
    results_dataset: str | None = None
    aggregator: str = "min"


def main(args: Sequence[str], prog: str) -> int:
    """Run the command; returns its exit status."""
    words = list(takewhile(lambda word: not word.startswith("-"), args))
    if len(words) > len(_POSITIONAL):
        raise InputError(f"{words[len(_POSITIONAL)]!r} is one word too many; give KIND SOURCE OWNER/NAME, then flags")
    named = [part for name, word in zip(_POSITIONAL, words, strict=False) for part in (f"--{name}", word)]
    settings = parse_settings(
        PushSettings,
        [*named, *args[len(words) :]],
        prog=prog,
        description=f"Push to the Hub: {prog} model|dataset|metric|space SOURCE OWNER/NAME",
    )
    return run(settings)


def run(settings: PushSettings) -> int:
    """Put the files together, and send or show them."""
    from huggingface_hub.utils import logging

    from mm_prm.hub import HubError

    logging.set_verbosity_error()  # what goes wrong is told below, once
    with reading_input(settings.kind), _upload(settings) as upload:
        print_upload(upload)
        if settings.dry_run:
            return 0
        try:
            address = upload.push(private=settings.private, revision=settings.revision)
        except HubError as error:
            print(f"mm-prm push: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("mm-prm push: interrupted; nothing was committed, the same command goes on", file=sys.stderr)
            return 130
    print(f"pushed: {address}")
    return 0


def _upload(settings: PushSettings) -> "AbstractContextManager[Upload]":
    from mm_prm.hub import dataset_upload, eval_results_of, metric_upload, model_upload, read_tables, space_upload

    if settings.kind == "dataset":
        return dataset_upload(
            read_tables(settings.source), settings.repo, license=settings.license, description=settings.description
        )
    if settings.kind == "metric":
        return nullcontext(metric_upload(settings.source, settings.repo))
    if settings.kind == "space":
        return nullcontext(space_upload(settings.source, settings.repo))
    from mm_prm.embedded import model_path

    source, results = model_path(settings.source), settings.results
    return nullcontext(
        model_upload(
            source,
            settings.repo,
            license=settings.license,
            base_model=settings.base_model,
            datasets=settings.trained_on or (),
            eval_results=eval_results_of(results, settings.aggregator, settings.results_dataset, source)
            if results
            else (),
            description=settings.description,
        )
    )


def print_upload(upload: "Upload") -> None:
    """Print the files with their sizes, and the metadata of the card."""
    from pathlib import Path

    print(f"{upload.repo_type} {upload.repo_id}:")
    for path, size in upload.sizes().items():
        print(f"  {path}  {size:,} bytes")
    content = upload.files["README.md"]
    text = content.read_text(encoding="utf-8") if isinstance(content, Path) else content.decode()
    print("card:")
    for line in text.split("---\n")[1].rstrip().splitlines():
        print(f"  {line}")
