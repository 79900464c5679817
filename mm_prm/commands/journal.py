"""`mm-prm journal merge`: the journals of a job array become one.

mm-prm journal merge trees.*-of-8.journal.sqlite --output trees.journal.sqlite
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from mm_prm.commands import InputError
from mm_prm.settings import parse_settings


@dataclass
class MergeSettings:
    """
    Which journals become one.

    Args:
        inputs (`list[str]`):
            Journals to read, for example of the shards of `mm-prm annotate --shard`; they stay as they are.
        output (`str`):
            Journal to write into. What it holds already stays, so that a merge that was killed can be repeated.
    """

    inputs: list[str]
    output: str


def main(args: Sequence[str], prog: str) -> int:
    """Run the command; returns its exit status."""
    if args[:1] not in (["merge"], ["--help"], ["-h"]):
        raise InputError(f"{args[0]!r} is no action; use `{prog} merge`" if args else f"use `{prog} merge`")
    words = list(takewhile(lambda word: not word.startswith("-"), args[1:]))
    named = ["--inputs", *words] if words else []
    flags = args if args[0] != "merge" else [*named, *args[len(words) + 1 :]]
    settings = parse_settings(
        MergeSettings, flags, prog=f"{prog} merge", description=f"Join journals: {prog} merge FILE … --output FILE"
    )
    return run(settings)


def run(settings: MergeSettings) -> int:
    """Merge, and say what came from where."""
    from pathlib import Path

    from mm_prm.annotation.journal import Journal, JournalError

    output = Path(settings.output).expanduser()
    inputs = [Path(path).expanduser() for path in settings.inputs]
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise InputError(f"output: {output} is one of the inputs; name another file")
        if not path.is_file():
            raise InputError(f"inputs: journal '{path}': there is no such file")
    try:
        with Journal(output) as merged:
            for path in inputs:
                with Journal(path, read_only=True) as shard:
                    num_rows = len(shard)
                    print(f"{path}: {num_rows} rows, {merged.take_over(shard)} of them new")
            print(f"{output}: {len(merged)} rows")
    except JournalError as error:
        raise InputError(str(error)) from error
    return 0
