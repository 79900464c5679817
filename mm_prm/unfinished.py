"""Where a run writes what is not finished: in one hidden folder beside its output, which appears when it is whole."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock


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
    lock = filelock.FileLock(output.with_name(f".{output.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(f"another run is writing {output}: wait for it, end it, or name another output") from None
    folder = output.with_name(f".{output.name}.unfinished")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
