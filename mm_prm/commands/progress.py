"""How far a command is: a bar with the time left on a terminal, plain lines in a log file."""

import sys
import time
from types import TracebackType

# Without a terminal, a line after at least so many seconds.
_SECONDS_PER_LINE = 15.0


class ProgressBar:
    """
    A bar on standard error.

    Args:
        name (`str`):
            What is being done.
        total (`int`):
            Number of things to do.
    """

    def __init__(self, name: str, total: int):
        self.name, self.total = name, total
        self._bar = None
        self._began = self._last_line = time.monotonic()
        self._task = 0
        self._finished = False

    def __enter__(self) -> "ProgressBar":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Progress(*columns, *times, console=Console(stderr=True), speed_estimate_period=600)
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=self.total, note="")
        return self

    def update(self, done: int, note: str = "", free: int = 0) -> None:
        """
        Say how far it is.

        Args:
            done (`int`):
                Number of things done.
            note (`str`, *optional*, defaults to `""`):
                Shown after it.
            free (`int`, *optional*, defaults to `0`):
                Number of these that cost no time, and say nothing of the time left.
        """
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        is_last = done == self.total and not self._finished
        if now - self._last_line < _SECONDS_PER_LINE and not is_last:
            return
        self._last_line, self._finished = now, done == self.total
        seconds = now - self._began
        left = f"{seconds / (done - free) * (self.total - done):.0f} s left" if done > free else "time left unknown"
        parts = [f"{self.name}: {done}/{self.total}", f"{seconds:.0f} s, {left}", note]
        print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
