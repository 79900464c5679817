"""What an engine leaves behind is killed with the process that opened it."""

import os
import signal
import subprocess
import sys
import time

import pytest

# An engine is a process that `multiprocessing` starts; "other" is none of it.
OPEN = """
import multiprocessing, os, sys, time
from mm_prm.engine_guard import open_guarded

context = multiprocessing.get_context("{method}")

def start(name):
    process = context.Process(target=time.sleep, args=(600,), daemon=True)
    process.start()
    print(process.pid, flush=True)
    return process

def open_engine():
    engine = start("engine")
    {meanwhile}
    return engine

if __name__ == "__main__":
    engine, guard = open_guarded(open_engine)
    {then}
"""


def program(method="fork", meanwhile="pass", then="pass"):
    return OPEN.format(method=method, meanwhile=meanwhile, then=then)


def is_alive(process):
    try:
        with open(f"/proc/{process}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] != "Z"  # nobody need have waited for it yet
    except FileNotFoundError:
        return False


@pytest.fixture
def run(tmp_path):
    """Runs a program until it has printed ids of processes; they end with the test at the latest."""
    processes, printed = [], []

    def run(text, num_printed):
        file = tmp_path / "program.py"
        file.write_text(text, encoding="utf-8")
        processes.append(subprocess.Popen([sys.executable, file], stdout=subprocess.PIPE, text=True))
        ids = [int(processes[-1].stdout.readline()) for _ in range(num_printed)]
        printed.extend(ids)
        return processes[-1], ids

    yield run
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()
    for process in filter(is_alive, printed):
        os.kill(process, signal.SIGKILL)


def wait_until_dead(process):
    deadline = time.monotonic() + 30
    while is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(process)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("place", ["meanwhile", "then"])
def test_a_killed_process_takes_its_engine_with_it(method, place, run):
    """Also while the engine is still being opened."""
    opener, [engine] = run(program(method, **{place: "time.sleep(600)"}), 1)
    time.sleep(0.5)  # the guard looks ten times a second
    assert is_alive(engine)
    opener.send_signal(signal.SIGKILL)
    opener.wait()
    wait_until_dead(engine)


def test_only_the_engine_is_killed(run):
    opener, [engine, other] = run(program(then="start('other'); time.sleep(600)"), 2)
    opener.send_signal(signal.SIGKILL)
    opener.wait()
    wait_until_dead(engine)
    assert is_alive(other)


def test_stopping_kills_what_is_still_there(run):
    """Also where another process was forked meanwhile, which has what this one has."""
    then = "start('other'); guard.stop(); engine.join(); print(engine.exitcode)"
    opener, [engine, _, status] = run(program(then=then), 3)
    assert opener.wait(timeout=30) == 0 and status == -signal.SIGKILL
    assert not is_alive(engine)


def test_an_engine_that_cannot_be_opened_leaves_nothing(run):
    opener, [engine] = run(program(meanwhile="raise SystemExit(3)"), 1)
    assert opener.wait(timeout=30) == 3
    assert not is_alive(engine)
