"""
Ends the processes of an engine together with the process that opened it, however that one ends.

vLLM's engine notices when it is told to stop, not when the process that would tell it was killed: it would stay, with its
memory, and a run that goes on after a kill would find the GPU taken.
"""

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

Engine = TypeVar("Engine")

# Standard input alone would not tell of a death: whatever this process has forked holds the other end as well.
_PROGRAM = """
import os, select, signal, sys
told = b""
while b"." not in told:
    if select.select([0], [], [], 0.5)[0]:
        told += os.read(0, 4096) or b"."
    elif os.getppid() != int(sys.argv[1]):
        break
for process in told.strip(b".").split():
    try:
        os.kill(int(process), signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


class EngineGuard:
    """A small process that outlives this one and kills what this one leaves behind."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, str(os.getpid())],
            stdin=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # so that Ctrl-C in a terminal does not end it first
        )

    def add(self, processes: Iterable[int]) -> None:
        """
        Takes in processes that are to end with this one.

        Args:
            processes (`Iterable[int]`):
                Their ids.
        """
        assert self._process.stdin is not None
        self._process.stdin.write("".join(f"{process} " for process in processes).encode())

    def stop(self) -> None:
        """Kills what is still there, and ends."""
        self._process.communicate(b".")


def open_guarded(open_engine: Callable[[], Engine]) -> tuple[Engine, EngineGuard]:
    """
    Opens an engine; its processes are guarded from their start on, which lies minutes before the engine is open.

    Args:
        open_engine (`Callable`):
            Opens it. The processes that `multiprocessing` starts meanwhile are the engine's.
    """
    others = multiprocessing.active_children()
    guard, opened = EngineGuard(), threading.Event()

    def watch() -> None:
        known = {child.pid for child in others}
        last = False
        while not last:
            last = opened.wait(0.1)
            started = {child.pid for child in multiprocessing.active_children() if child.pid} - known
            guard.add(started)
            known |= started

    watcher = threading.Thread(target=watch, name="engine-guard", daemon=True)
    watcher.start()
    try:
        try:
            engine = open_engine()
        finally:
            opened.set()
            watcher.join()
    except BaseException:
        guard.stop()
        raise
    return engine, guard
