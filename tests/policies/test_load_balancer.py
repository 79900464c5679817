"""The recipe for servers behind one address, run: nginx spreads the requests, and goes on when a server is gone."""

import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from mm_prm.annotation.protocols import RolloutRequest
from mm_prm.policies.openai import OpenAIPolicy

from ..chat_server import ChatServer
from ..testing_utils import tiny_problem

NGINX = shutil.which("nginx")
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")  # what nginx keeps in folders of the system
CONFIG = Path(__file__).parents[2] / "recipes" / "vllm_servers" / "nginx.conf"


def solve(payload):
    return [f"\n\nSample {payload['seed'] + number}.\n\nThe answer is 4." for number in range(payload["n"])]


@pytest.fixture
def balance(tmp_path):
    """Starts nginx with the recipe in front of some servers; gives the one address."""
    process = None

    def start(urls):
        nonlocal process
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        text = CONFIG.read_text(encoding="utf-8")
        places = [url.removeprefix("http://").removesuffix("/v1") for url in urls]
        for old, new in (
            ("server 127.0.0.1:8001 ", f"server {places[0]} "),
            ("server 127.0.0.1:8002 ", f"server {places[1]} "),
            ("listen 8000;", f"listen 127.0.0.1:{port};"),
            ("http {", "http {" + "".join(f"{name}_temp_path {tmp_path}/{name};" for name in TEMPORARY)),
        ):
            assert text.count(old) == 1
            text = text.replace(old, new)
        (tmp_path / "nginx.conf").write_text(text, encoding="utf-8")
        options = f"daemon off; user root; pid {tmp_path}/pid; error_log {tmp_path}/log;"
        process = subprocess.Popen(
            [NGINX, "-p", tmp_path, "-c", tmp_path / "nginx.conf", "-g", options], stderr=subprocess.PIPE, text=True
        )
        for _ in range(200):
            assert process.poll() is None, process.stderr.read()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        return f"http://127.0.0.1:{port}/v1"

    yield start
    if process is not None:
        process.terminate()
        process.wait(timeout=30)
        process.stderr.close()


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_requests_are_spread_and_a_lost_server_is_gone_round(balance):
    problem = tiny_problem(3)

    def requests(start):
        return [(problem, RolloutRequest(problem["id"], (), 2, 2**40 + 4096 * (start + n))) for n in range(24)]

    with ChatServer(solve, seconds=0.05) as direct:
        expected = OpenAIPolicy("tiny", direct.url).generate(requests(0) + requests(24))
    with ChatServer(solve, seconds=0.05) as first:
        with ChatServer(solve, seconds=0.05) as second:
            policy = OpenAIPolicy("tiny", balance([first.url, second.url]), max_retries=0)
            assert policy.generate(requests(0)) == expected[:24]
            assert min(len(first.payloads), len(second.payloads)) >= 8
            assert len(first.payloads) + len(second.payloads) == 24
        # The policy is not to notice that one server has gone: nginx asks the other.
        assert policy.generate(requests(24)) == expected[24:]
