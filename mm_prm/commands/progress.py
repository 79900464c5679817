"""How far a command is: a bar with the time left on a terminal, plain lines in a log file."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

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
        self._began = self._work_began = self._last_line = time.monotonic()
        self._finished = False
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        self._bar = Progress(
            *columns, TextColumn("{task.fields[note]}"), console=console, disable=not console.is_terminal
        )
        self._task = self._bar.add_task(name, total=total, note="")

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def update(self, done: int, free: int = 0, note: str = "", underway: int = 0) -> None:
        """
        Say how far it is.

        Args:
            done (`int`):
                Number of things done.
            free (`int`, *optional*, defaults to `0`):
                Number of things done that cost no time, such as those from a journal. The time left is estimated from
                the others alone, and not shown before there is one.
            note (`str`, *optional*, defaults to `""`):
                Shown after it.
            underway (`int`, *optional*, defaults to `0`):
                Number of things begun; they count as half done where the time left is estimated.
        """
        now = time.monotonic()
        if done == free and not underway:
            self._work_began = now  # a journal was read until now
        note = ", ".join(part for part in (self._time_left(now, done, free, underway), note) if part)
        if not self._bar.disable:
            self._bar.update(self._task, completed=done, note=note)
            return
        is_last = done == self.total and not self._finished
        if now - self._last_line < _SECONDS_PER_LINE and not is_last:
            return
        self._last_line, self._finished = now, done == self.total
        seconds = now - self._began
        print(f"{self.name}: {done}/{self.total}, {seconds:.0f} s, {note}".rstrip(", "), file=sys.stderr, flush=True)

    def _time_left(self, now: float, done: int, free: int, underway: int) -> str:
        if done <= free:
            return ""
        worked = done - free + underway / 2
        left = round(max(0.0, self.total - free - worked) * (now - self._work_began) / worked)
        minutes, seconds_left = divmod(left, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds_left:02d} left"

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
