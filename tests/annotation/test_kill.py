"""`kill -9` at random moments: nothing finished is lost, nothing is there twice, and the end is the same."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from mm_prm.annotation import Journal, annotate
from tests.annotation.killed_run import CONFIG, IDENTITIES, make_problems
from tests.annotation.scripted import ScriptedJudge, ScriptedPolicy

ROOT = Path(__file__).parents[2]
NUM_PROBLEMS = 60


def without_seconds(row):
    return {**row, "cost": {**row["cost"], "seconds": 0.0}}


def start(path, report):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.annotation.killed_run", str(path), str(report), str(NUM_PROBLEMS)]
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def num_lines(report):
    return report.read_bytes().count(b"\n") if report.exists() else 0


def test_killed_and_restarted(tmp_path):
    path = tmp_path / "trees.journal.sqlite"
    draw = random.Random(0)
    yielded = []  # what each run reported before its end
    num_kills, finished = 0, 0
    for attempt in range(10):
        report = tmp_path / f"report_{attempt}.jsonl"
        process = start(path, report)
        if num_kills < 4:
            # finished trees are reported again at once; a random number of new ones may follow
            enough = finished + draw.randint(0, 8)
            while process.poll() is None and num_lines(report) < enough:
                time.sleep(0.002)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                num_kills += 1
        process.wait()
        lines = report.read_text().splitlines(keepends=True) if report.exists() else []
        yielded.append([json.loads(line) for line in lines if line.endswith("\n")])
        with Journal(path) as journal:
            stored = [row["problem_id"] for row in journal]
        finished = len(stored)
        assert len(set(stored)) == finished
        assert {row["problem_id"] for row in yielded[-1]} <= set(stored), "what was reported is in the journal"
        if process.returncode == 0:
            break
    assert num_kills == 4 and process.returncode == 0
    assert any(0 < len(rows) < NUM_PROBLEMS for rows in yielded[:-1]), "some run was killed with work done"

    whole = annotate(make_problems(NUM_PROBLEMS), ScriptedPolicy(), ScriptedJudge(), CONFIG, **IDENTITIES)
    expected = {row["problem_id"]: without_seconds(row) for row in whole}
    last = {row["problem_id"]: without_seconds(row) for row in yielded[-1]}
    assert len(yielded[-1]) == NUM_PROBLEMS and last == expected
    with Journal(path) as journal:
        assert {row["problem_id"]: without_seconds(row) for row in journal} == expected
        assert len(journal) == NUM_PROBLEMS
