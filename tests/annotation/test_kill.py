"""`kill -9` at random moments: nothing finished is lost, nothing is there twice, and the end is the same."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mm_prm.annotation import Journal, annotate
from tests.annotation.killed_run import CONFIG, IDENTITIES, make_parts

ROOT = Path(__file__).parents[2]


def by_id(rows):
    rows = list(rows)
    found = {row["problem_id"]: {**row, "cost": {**row["cost"], "seconds": 0.0}} for row in rows}
    assert len(found) == len(rows), "each once"
    return found


class Runs:
    """Starts runs of `killed_run`, and waits for them."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.annotation.killed_run"]
        self.program = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, *arguments):
        self.program.stdin.write(" ".join(map(str, arguments)) + "\n")
        self.program.stdin.flush()
        self.status = None
        self.process = int(self.program.stdout.readline())
        self.waiting = threading.Thread(target=self._wait)
        self.waiting.start()
        return self

    def _wait(self):
        self.status = int(self.program.stdout.readline())

    def kill(self):
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process, signal.SIGKILL)

    def wait(self):
        self.waiting.join(120)
        return self.status

    def workers(self):
        try:
            children = Path(f"/proc/{self.process}/task/{self.process}/children").read_text().split()
            threads = Path(f"/proc/{self.process}/task").iterdir()
            children += [child for thread in threads for child in (thread / "children").read_text().split()]
        except OSError:
            return set()
        return {int(child) for child in children}


@pytest.fixture
def runs():
    runs = Runs()
    yield runs
    runs.program.stdin.close()
    runs.program.wait(30)


def num_lines(report):
    return report.read_bytes().count(b"\n") if report.exists() else 0


def read_report(report):
    lines = report.read_text().splitlines(keepends=True) if report.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_killed_twenty_times_and_restarted(runs, tmp_path):
    path = tmp_path / "trees.journal.sqlite"
    draw = random.Random(0)
    num_kills, stored = 0, {}
    expected = by_id(annotate(*make_parts("scripted"), CONFIG, **IDENTITIES))
    while True:
        report = tmp_path / f"report_{num_kills}.jsonl"
        run = runs.start("scripted", path, report)
        if num_kills < 20:
            # Finished trees are reported again at once; a few new ones may follow, then a moment in the midst of others.
            enough = len(stored) + draw.randint(0, 4)
            while run.status is None and num_lines(report) < enough:
                time.sleep(0.001)
            time.sleep(draw.random() * 0.03)
            run.kill()
        status = run.wait()
        reported = by_id(read_report(report))
        with Journal(path) as journal:
            now_stored = by_id(journal)
        assert reported.items() <= now_stored.items(), "what was reported is in the journal"
        assert stored.items() <= now_stored.items() and now_stored.items() <= expected.items()
        stored = now_stored
        if status == 0:
            break
        assert status == -signal.SIGKILL
        num_kills += 1
    assert num_kills == 20
    assert reported == stored == expected and len(stored) == 80


def test_killed_workers_and_runs(runs, tmp_path):
    """The process in which rules compare formulas is killed, and the run now and then, too."""
    path = tmp_path / "trees.journal.sqlite"
    draw = random.Random(1)
    expected = by_id(annotate(*make_parts("rules"), CONFIG, **IDENTITIES))
    assert sum(rollout["verdict"] == "unknown" for row in expected.values() for rollout in row["rollouts"]) == 0
    killed_workers, killed_runs, status = set(), 0, None
    while status != 0:
        report = tmp_path / f"report_{killed_runs}.jsonl"
        run = runs.start("rules", path, report)
        while run.status is None:
            for worker in run.workers() - killed_workers if len(killed_workers) < 3 else ():
                time.sleep(draw.random() * 0.3)
                killed_workers.add(worker)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
            if killed_runs < len(killed_workers) // 3:
                killed_runs += 1
                last_workers = run.workers()
                run.kill()
                break
            time.sleep(0.005)
        status = run.wait()
    assert len(killed_workers) >= 3 and killed_runs == 1
    assert by_id(read_report(report)) == expected
    with Journal(path) as journal:
        assert by_id(journal) == expected
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(Path(f"/proc/{worker}").exists() for worker in last_workers):
        time.sleep(0.05)
    assert not any(Path(f"/proc/{worker}").exists() for worker in last_workers), "workers end with their run"
