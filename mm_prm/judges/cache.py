"""Verdicts that outlive the run: an answer of a problem is shown to a language model once, ever."""

import hashlib
import json
import logging
import os
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

from mm_prm.annotation.protocols import Judge, Problem, Verdict

from .extraction import final_step

logger = logging.getLogger(__name__)

# Several runs may share a cache; a writer waits for another that long.
_BUSY_SECONDS = 60.0
# Of what is kept; once, `extracted` held the whole step that states the answer. Other formats are not found.
_FORMAT = 2
_SCHEMA = """
CREATE TABLE IF NOT EXISTS verdicts (
    key TEXT PRIMARY KEY, verdict TEXT NOT NULL, extracted TEXT NOT NULL, reason TEXT NOT NULL
) WITHOUT ROWID
"""


class CachedJudge:
    """
    Puts a cache in front of a judge, see [`~mm_prm.annotation.protocols.Judge`].

    The key is the judge, the question with its choices, the gold answer and the step that states the answer. Right and
    wrong are kept. Unknown is not: a time-out or a server that was down says nothing about the answer.

    Args:
        judge ([`~mm_prm.annotation.protocols.Judge`]):
            The judge that is asked where the cache does not know.
        path (`str` or `os.PathLike`):
            SQLite file, made if it is not there. Keep it on a local disk.
        identity (`str`):
            What the judge is, for example [`LLMJudge.identity`]. Verdicts of another identity are not used.
    """

    def __init__(self, judge: Judge, path: str | os.PathLike[str], identity: str):
        self.cached_judge = judge
        self.path = Path(path).expanduser()
        self.identity = identity
        self.hits = self.misses = 0
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(
                self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute(_SCHEMA)
        except sqlite3.Error as error:
            raise OSError(f"{self.path}: is no cache of verdicts, or cannot be opened: {error}") from error

    def judge(self, problem: Problem, solution: Sequence[str]) -> Verdict:
        """Judges a solution; see [`~mm_prm.annotation.protocols.Judge`]."""
        key = self._key(problem, solution)
        with self._lock:
            row = self._database.execute(
                "SELECT verdict, extracted, reason FROM verdicts WHERE key = ?", (key,)
            ).fetchone()
            self.hits += row is not None
            self.misses += row is None
        if row is not None:
            return Verdict(row[0], row[1], row[2], from_cache=True)
        verdict = self.cached_judge.judge(problem, solution)
        if verdict.verdict != "unknown":
            try:
                with self._lock:
                    self._database.execute(
                        "INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?)",
                        (key, verdict.verdict, verdict.extracted, verdict.reason),
                    )
            except sqlite3.OperationalError as error:  # a full disk: the verdict is good all the same
                logger.warning("%s: a verdict is not kept: %s", self.path, error)
        return verdict

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._database.close()

    def _key(self, problem: Problem, solution: Sequence[str]) -> str:
        parts = [
            _FORMAT,
            self.identity,
            problem["question"],
            list(problem["choices"] or ()),
            problem["answer"],
            final_step(solution),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
