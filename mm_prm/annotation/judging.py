"""The judge in threads of its own, so that a slow one keeps nobody waiting but the trees that need its verdicts."""

import logging
import queue
import threading
import weakref
from collections.abc import Callable, Sequence

from mm_prm.annotation.protocols import Judge, Problem, Verdict

logger = logging.getLogger(__name__)

# What a judge said, or why it said nothing, and how often it was asked.
Answer = Callable[[Verdict | BaseException, int], None]
_Job = tuple[Problem, Sequence[str], Answer]


class JudgeThreads:
    """
    Asks a judge about many solutions at once.

    Where the judge raises, it is asked once more.

    Args:
        judge ([`Judge`]):
            The judge; up to `concurrency` threads call it.
        concurrency (`int`):
            Most solutions shown to it at a time.
    """

    # Threads of an executor would be waited for at the end of the program, and with them a judge that hangs.

    def __init__(self, judge: Judge, concurrency: int):
        self._judge, self._concurrency = judge, concurrency
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._num_threads = 0
        # The threads hold no reference to this object, so that they end with it.
        weakref.finalize(self, self._jobs.put, None)

    def submit(self, problem: Problem, solution: Sequence[str], answer: Answer) -> None:
        """Have a solution judged; `answer` is called in another thread."""
        if not self._idle.acquire(blocking=False) and self._num_threads < self._concurrency:
            self._num_threads += 1
            threading.Thread(
                target=_work, args=(self._judge, self._jobs, self._idle), name="judge", daemon=True
            ).start()
        self._jobs.put((problem, solution, answer))

    def drop(self) -> None:
        """Forget what is not under way."""
        try:
            while True:
                self._jobs.get_nowait()
        except queue.Empty:
            return


def _work(judge: Judge, jobs: "queue.SimpleQueue[_Job | None]", idle: threading.Semaphore) -> None:
    while True:
        job = jobs.get()
        if job is None:
            jobs.put(None)  # for the next thread
            return
        problem, solution, answer = job
        answer(*_ask(judge, problem, solution))
        del job, problem, solution, answer  # a thread that waits keeps nothing
        idle.release()


def _ask(judge: Judge, problem: Problem, solution: Sequence[str]) -> tuple[Verdict | BaseException, int]:
    try:
        return judge.judge(problem, solution), 1
    except Exception as error:
        logger.warning("The judge failed on problem %r and is asked again: %s", problem["id"], error)
    except BaseException as error:  # ends the run, in the thread that waits for the verdict
        return error, 1
    try:
        return judge.judge(problem, solution), 2
    except BaseException as error:
        return error, 2
