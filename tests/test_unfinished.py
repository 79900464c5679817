"""What is not finished lies in one hidden folder beside the output: a killed run leaves it, and the next one removes it."""

import multiprocessing
import os
import signal

import pytest

from mm_prm.commands import InputError
from mm_prm.commands.files import write_rows


def pools(killed=False):
    for number in range(100):
        if killed and number == 90:
            os.kill(os.getpid(), signal.SIGKILL)
        yield {"problem_id": f"q{number}", "candidates": [], "answers": [], "correct": [], "step_scores": []}


def write_and_be_killed(output):
    write_rows("pool", pools(killed=True), output)


def test_what_a_killed_run_leaves_the_next_one_removes(tmp_path):
    other = tmp_path / ".pools.1-of-2.unfinished"  # of the run of a shard
    other.mkdir()
    process = multiprocessing.get_context("spawn").Process(target=write_and_be_killed, args=(tmp_path / "pools",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert {file.name for file in tmp_path.iterdir()} == {".pools.unfinished", ".pools.lock", other.name}
    assert write_rows("pool", pools(), tmp_path / "pools") == 100
    assert {file.name for file in tmp_path.iterdir()} == {"pools", other.name}


def test_two_runs_do_not_write_one_output(tmp_path):
    output = tmp_path / "pools.jsonl"

    def meanwhile():
        yield from pools()
        with pytest.raises(InputError, match=r"another run is writing .*pools.jsonl: wait for it"):
            write_rows("pool", pools(), output)

    assert write_rows("pool", meanwhile(), output) == 100
    assert len(output.read_text().splitlines()) == 100 and list(tmp_path.iterdir()) == [output]
