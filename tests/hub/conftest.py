"""A Hub on this machine and a Python that talks to it, for the tests of this room."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .loopback import LoopbackHub

TOKENS = {
    "hf_writes_secret": ("me", "write"),
    "hf_reads_secret": ("me", "read"),
    "hf_other_secret": ("other", "write"),
}


@pytest.fixture(scope="session")
def hub():
    server = LoopbackHub(TOKENS)
    yield server
    server.stop()


class Session:
    """Runs commands and code in a Python whose Hub is the loopback."""

    def __init__(self, hub, home):
        removed = ("HF_HUB_OFFLINE", "HF_TOKEN")
        environment = {name: value for name, value in os.environ.items() if name not in removed} | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TQDM_DISABLE": "1",  # as the command line sets it before anything is imported
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).parent / "session.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=home,
        )

    def ask(self, token="hf_writes_secret", **request):
        self.process.stdin.write(json.dumps(request | {"env": {"HF_TOKEN": token}}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert not [secret for secret in [*TOKENS, token] if secret and secret in answer["out"] + answer["err"]]
        return answer

    def push(self, *args, token="hf_writes_secret"):
        answer = self.ask(token, args=["push", *map(str, args)])
        assert answer["status"] is not None, answer["err"]
        return answer

    def run(self, code):
        answer = self.ask(code=code)
        assert "Traceback" not in answer["err"], answer["err"]
        return answer["result"]


@pytest.fixture(scope="session")
def session(hub, tmp_path_factory):
    session = Session(hub, tmp_path_factory.mktemp("home"))
    yield session
    session.process.stdin.close()
    session.process.wait()


@pytest.fixture(autouse=True)
def _no_faults(hub):
    hub.large_files_until_refused = None
    hub.requests.clear()
