"""What an engine leaves behind is killed with the process that opened it."""

import os
import signal
import subprocess
import sys
import time

OPEN = """
import subprocess, sys, time
from mm_prm.policies.engine_guard import EngineGuard

engine = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
guard = EngineGuard([engine.pid])
print(engine.pid, flush=True)
"""


def is_alive(process):
    try:
        with open(f"/proc/{process}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] != "Z"  # nobody need have waited for it yet
    except FileNotFoundError:
        return False


def test_a_killed_process_takes_its_engine_with_it():
    process = subprocess.Popen([sys.executable, "-c", OPEN + "time.sleep(600)"], stdout=subprocess.PIPE, text=True)
    engine = int(process.stdout.readline())
    try:
        assert is_alive(engine)
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 30
        while is_alive(engine) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_alive(engine)
    finally:
        process.stdout.close()
        if is_alive(engine):
            os.kill(engine, signal.SIGKILL)


def test_stopping_kills_what_is_still_there():
    stop = OPEN + "guard.stop()\nprint(engine.wait())"
    printed = subprocess.run([sys.executable, "-c", stop], capture_output=True, text=True, check=True, timeout=60)
    assert printed.stdout.split()[1] == str(-signal.SIGKILL)
