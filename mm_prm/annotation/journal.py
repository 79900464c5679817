"""
The journal: finished trees on disk, one SQLite file, so that a killed run goes on where it stopped.

One process writes; others may read meanwhile. Keep the file on a local disk: SQLite's locks do not hold on network
disks.
"""

import json
import os
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

# Marks the file as ours: "mprm" in ASCII, and the version of its table.
_APPLICATION_ID = 0x6D70726D
_VERSION = 1


class JournalError(RuntimeError):
    """A journal that cannot be used; the message names the file and the way out."""


class Journal:
    """
    Finished rows by key.

    Args:
        path (`str` or `os.PathLike`):
            The SQLite file; made if it is missing, with its folder.
        read_only (`bool`, *optional*, defaults to `False`):
            Only read, which is possible while another process writes.

    Raises:
        [`JournalError`]: If another process writes to it, or if the file is damaged or no journal.

    Example:

    ```python
    >>> with Journal("trees.journal.sqlite") as journal:
    ...     journal.commit("key", row)
    ...     assert journal.get("key") == row
    ```
    """

    def __init__(self, path: str | os.PathLike[str], read_only: bool = False):
        self.path = Path(path).expanduser()
        self._lock: filelock.BaseFileLock | None = None
        if read_only:
            if not self.path.is_file():
                raise JournalError(f"journal '{self.path}': there is no such file")
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(f"{self.path}.lock", timeout=0)
            try:
                self._lock.acquire()
            except filelock.Timeout:
                raise JournalError(
                    f"journal '{self.path}': another process is writing to it. A journal has one writer: wait for "
                    "that process, end it, or give this run a journal of its own"
                ) from None
        try:
            self._connection = self._connect(read_only)
        except BaseException:
            self._release()
            raise

    def _connect(self, read_only: bool) -> sqlite3.Connection:
        try:
            # isolation_level=None: transactions begin where we say, not where the module guesses.
            connection = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}", uri=True, isolation_level=None
            )
        except sqlite3.Error as error:
            raise self._damaged(error) from error
        try:
            self._prepare(connection, read_only)
        except sqlite3.Error as error:
            connection.close()
            raise self._damaged(error) from error
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection, read_only: bool) -> None:
        (application_id,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (num_tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        # A process killed while it made the file leaves an empty database, which is as good as none.
        is_new = application_id == 0 and num_tables == 0
        if not is_new and application_id != _APPLICATION_ID:
            raise JournalError(
                f"journal '{self.path}': this SQLite file is not a journal of mm-prm; give another path"
            )
        if not is_new and version != _VERSION:
            raise JournalError(
                f"journal '{self.path}': written by another version of mm-prm (format {version}, here {_VERSION}); "
                "use that version, or give another path"
            )
        (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if state != "ok":
            raise self._damaged(state)
        if read_only:
            if is_new:
                raise JournalError(f"journal '{self.path}': it is empty; the run that made it has not begun")
            return
        connection.execute("PRAGMA journal_mode = WAL")  # stays with the old mode where WAL is impossible
        connection.execute("PRAGMA synchronous = FULL")
        if is_new:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(
                "CREATE TABLE rows (number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, row BLOB NOT NULL)"
            )
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {_VERSION}")
            connection.execute("COMMIT")

    def _damaged(self, error: object) -> JournalError:
        return JournalError(
            f"journal '{self.path}': the file is damaged or not a journal ({error}); restore it, or move it away to "
            "start afresh"
        )

    def get(self, key: str) -> dict[str, Any] | None:
        """The row committed under `key`, or `None`."""
        found = self._execute("SELECT row FROM rows WHERE key = ?", (key,)).fetchone()
        return None if found is None else self._decode(found[0])

    def commit(self, key: str, row: Mapping[str, Any]) -> None:
        """Store a row for good, in place of an earlier one of the same key. On return it survives a kill."""
        if self._lock is None:
            raise JournalError(f"journal '{self.path}': opened to read only")
        blob = zlib.compress(json.dumps(row).encode("ascii"), level=1)
        self._execute("BEGIN IMMEDIATE")
        try:
            self._store(key, blob)
            self._execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def take_over(self, other: "Journal") -> int:
        """
        Store the rows of another journal: all of them, or after an error none.

        Where both have a row under a key, a complete one stands and another does not; of two alike, the own one.

        Args:
            other ([`Journal`]):
                The journal that is read.

        Returns:
            `int`: Number of rows stored.
        """
        if self._lock is None:
            raise JournalError(f"journal '{self.path}': opened to read only")
        num_stored = 0
        self._execute("BEGIN IMMEDIATE")
        try:
            for key, blob in other._execute("SELECT key, row FROM rows ORDER BY number"):
                own = self.get(key)
                if own is None or (not _is_complete(own) and _is_complete(other._decode(blob))):
                    self._store(key, blob)
                    num_stored += 1
            self._execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        return num_stored

    def _store(self, key: str, blob: bytes) -> None:
        self._execute(
            "INSERT INTO rows (key, row) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET row = excluded.row", (key, blob)
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All rows, in the order in which their keys were first committed; one is in memory at a time."""
        number = 0
        while True:
            query = "SELECT number, row FROM rows WHERE number > ? ORDER BY number LIMIT 1"
            found = self._execute(query, (number,)).fetchone()
            if found is None:
                return
            number = found[0]
            yield self._decode(found[1])

    def __len__(self) -> int:
        return self._execute("SELECT count(*) FROM rows").fetchone()[0]

    def _execute(self, statement: str, values: tuple = ()) -> sqlite3.Cursor:
        try:
            return self._connection.execute(statement, values)
        except sqlite3.ProgrammingError:
            raise  # used after it was closed, or from another thread: a mistake of the caller
        except sqlite3.OperationalError as error:
            raise JournalError(f"journal '{self.path}': {error}") from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error

    def _decode(self, blob: bytes) -> dict[str, Any]:
        try:
            return json.loads(zlib.decompress(blob))
        except (zlib.error, ValueError) as error:
            raise self._damaged(error) from error

    def close(self) -> None:
        """Close the file and let others write."""
        self._connection.close()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_complete(row: Mapping[str, Any]) -> bool:
    # Of what is no tree, such as scores, only what is finished is ever committed.
    return row.get("status", "complete") == "complete"
