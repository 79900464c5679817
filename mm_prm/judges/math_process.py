"""
math-verify behind a time limit that holds anywhere.

math-verify's own limit is a signal, which works in a main thread only, and a thread cannot be stopped from outside. So
it runs in a process of its own, started when it is first needed, kept for the next answers, and killed when an answer
takes too long.
"""

import json
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Literal, cast

logger = logging.getLogger(__name__)

MathOutcome = Literal["equal", "different", "gold", "answer", "timeout", "error"]

_START_SECONDS = 120.0
_WORKER = Path(__file__).with_name("_math_worker.py")


class MathProcessError(RuntimeError):
    """math-verify cannot be started, so that no formula can be compared."""


class MathProcess:
    """
    Compares two LaTeX formulas in a process of its own.

    Args:
        timeout_seconds (`float`):
            Time limit of one comparison.
    """

    def __init__(self, timeout_seconds: float):
        self.timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._replies: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._owner = 0
        self._close: weakref.finalize | None = None

    def compare(self, gold: str, answer: str) -> MathOutcome:
        """
        Compares two formulas.

        Args:
            gold (`str`):
                LaTeX of the gold answer, without dollars.
            answer (`str`):
                LaTeX of the answer.

        Returns:
            `str`: `"equal"` or `"different"`; `"gold"` or `"answer"` if that one cannot be read; `"timeout"`; `"error"`.
        """
        with self._lock:
            # A process that ended may have been killed by another hand, so the answer gets another one.
            reply = self._ask(gold, answer) or self._ask(gold, answer)
        if reply is None:
            return "error"
        return "error" if reply.startswith("error") else cast(MathOutcome, reply)

    def _ask(self, gold: str, answer: str) -> str | None:
        """What the process says, or nothing if it ended: killed, out of memory, or out of its stack."""
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([gold, answer]) + "\n")
            process.stdin.flush()
            reply = self._replies.get(timeout=self.timeout_seconds)
        except queue.Empty:
            self._stop()
            return "timeout"
        except OSError:
            reply = ""
        if not reply:
            self._stop()
            return None
        return json.loads(reply)

    def _running(self) -> subprocess.Popen[str]:
        # A forked process must not share its parent's pipes.
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        for attempt in (1, 2):  # the machine may have been out of processes or memory for a moment
            failure = self._start()
            if not failure:
                assert self._process is not None
                return self._process
            logger.warning("math-verify did not start (attempt %d): %s", attempt, failure)
            self._stop()
        raise MathProcessError(f"math-verify cannot be started: {failure}")

    def _start(self) -> str:
        """Starts the process; returns why it did not start, or nothing."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with tempfile.TemporaryFile("w+") as messages:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", str(_WORKER), str(self.timeout_seconds)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=messages,
                    text=True,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for the run, which then closes this process
                )
            except OSError as error:
                return str(error)
            self._owner = os.getpid()
            self._replies = queue.SimpleQueue()
            self._close = weakref.finalize(self, _end, self._process, self._owner)
            threading.Thread(target=_forward, args=(self._process, self._replies), daemon=True).start()
            try:
                first = self._replies.get(timeout=_START_SECONDS)
            except queue.Empty:
                return f"it was not ready after {_START_SECONDS:.0f} s"
            if first == "ready\n":
                return ""
            messages.seek(0)
            return (messages.read().strip().splitlines() or ["it ended without a word"])[-1]

    def _stop(self) -> None:
        if self._close is not None:
            self._close()
        self._process = None


def _forward(process: subprocess.Popen[str], replies: queue.SimpleQueue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        replies.put(line)
    replies.put("")


def _end(process: subprocess.Popen[str], owner: int) -> None:
    if os.getpid() == owner:
        process.kill()
        process.wait()
