"""
Ends the processes of an engine together with the process that opened it, however that one ends.

vLLM's engine notices when it is told to stop, not when the process that would tell it was killed: it would stay, with its
memory, and a run that goes on after a kill would find the GPU taken.
"""

import subprocess
import sys
from collections.abc import Iterable

# Standard input ends when whoever holds its other end does.
_PROGRAM = """
import os, signal, sys
sys.stdin.buffer.read()
for process in map(int, sys.argv[1:]):
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


class EngineGuard:
    """
    A small process that outlives this one and kills what this one leaves behind.

    Args:
        processes (`Iterable[int]`):
            Ids of the processes that are to end with this one.
    """

    def __init__(self, processes: Iterable[int]):
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, *map(str, processes)],
            stdin=subprocess.PIPE,
            start_new_session=True,  # so that Ctrl-C in a terminal does not end it first
        )

    def stop(self) -> None:
        """Kills what is still there, and ends."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
