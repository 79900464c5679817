"""Where a run writes what is not finished: in one hidden folder beside its output, which appears when it is whole."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock


@contextmanager
def only_run(output: Path, doing: str) -> Iterator[None]:
    """
    Keeps other processes from an output, since what two runs have beside it would mix.

    Args:
        output (`Path`):
            The file or folder that is made.
        doing (`str`):
            What a run does with it, for the message to the other: `"writing"`.

    Raises:
        `ValueError`: If another process has the output.
    """
    lock = filelock.FileLock(output.with_name(f".{output.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(f"another run is {doing} {output}: wait for it, end it, or name another output") from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def unfinished_folder(output: Path) -> Iterator[Path]:
    """
    A hidden folder beside an output, gone at the end. What a killed run has left there, the next run removes.

    Args:
        output (`Path`):
            The file or folder that is made.

    Yields:
        `Path`: The folder, empty.

    Raises:
        `ValueError`: If another process is writing the same output.
    """
    with only_run(output, "writing"):
        folder = output.with_name(f".{output.name}.unfinished")
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
