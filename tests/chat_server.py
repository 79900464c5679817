"""A real HTTP server that speaks OpenAI's chat protocol, and fails in every way it is told to."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What a server may do instead of answering; each is used once, in turn.
FAILURES = ("500", "429", "hang", "close", "half", "nonsense", "no choices", "empty choices", "null", "abort", "list")


class ChatServer:
    """
    Args:
        answer (`Callable`):
            Gives the texts of a payload's samples, or pairs of text and finish reason, or, for payloads that ask for
            `top_logprobs`, the log-probabilities of first tokens by token.
        continues (`bool`, *optional*, defaults to `True`):
            Whether it goes on with an unfinished assistant message.
        failures (`list[str]`, *optional*):
            What it does to the next requests that sample more than a probe does, before it answers.
        seconds (`float`, *optional*, defaults to `0.0`):
            Time an answer takes.
    """

    def __init__(
        self,
        answer: Callable[[dict], list[Any]],
        continues: bool = True,
        failures: tuple[str, ...] = (),
        seconds: float = 0.0,
    ):
        self.answer, self.continues, self.failures, self.seconds = answer, continues, list(failures), seconds
        self.payloads: list[dict] = []
        self.probes: list[dict] = []
        self.headers: list[dict] = []
        self.times: list[float] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                server.handle(self)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # a client that has gone away is what some tests are about
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def handle(self, request):
        payload = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        assert request.path == "/v1/chat/completions"
        is_probe = payload.get("max_tokens") == 1 and "top_logprobs" not in payload
        with self.lock:
            (self.probes if is_probe else self.payloads).append(payload)
            self.headers.append(dict(request.headers))
            if not is_probe:
                self.times.append(time.monotonic())
            failure = None if is_probe or not self.failures else self.failures.pop(0)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        time.sleep(0 if is_probe else self.seconds)
        with self.lock:
            self.in_flight -= 1  # before the client knows, which may send the next one at once
        self.reply(request, payload, failure)

    def reply(self, request, payload, failure):
        is_probe = payload.get("max_tokens") == 1 and "top_logprobs" not in payload
        answers = ["x"] if is_probe else self.answer(payload)
        first_tokens = [item if isinstance(item, dict) else None for item in answers]
        answers = [(max(item, key=item.get), "length") if isinstance(item, dict) else item for item in answers]
        choices = [
            {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
            for index, (text, reason) in enumerate(
                (item, "stop") if isinstance(item, str | None) else item for item in answers
            )
        ]
        for choice, logprobs in zip(choices, first_tokens, strict=True):
            if logprobs is not None:
                listed = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in logprobs.items()]
                choice["logprobs"] = {"content": [{**listed[0], "top_logprobs": listed}]}
        tokens = sum(len((choice["message"]["content"] or "").split()) for choice in choices)
        body: Any = {
            "choices": choices[::-1],  # their index says the order
            "usage": {"prompt_tokens": len(self.rendered(payload)), "completion_tokens": tokens},
        }
        status, headers = 200, {}
        if failure == "hang":
            self.closing.wait(30)
        elif failure == "close":
            request.connection.close()
            return
        elif failure in ("500", "400", "404"):
            status, body = int(failure), {"error": {"message": f"status {failure}, as told"}}
        elif failure == "429":
            status, headers, body = 429, {"Retry-After": "0.6"}, {"error": "slow down"}
        elif failure == "no choices":
            body = {"object": "error"}
        elif failure == "empty choices":
            body = {"choices": []}
        elif failure == "null":
            body = {"choices": [{"message": None, "finish_reason": "stop"}]}
        elif failure == "abort":
            body["choices"][0]["finish_reason"] = "abort"
        elif failure == "list":
            body = [body]
        content = b"<html>the proxy is sorry" if failure == "nonsense" else json.dumps(body).encode()
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(content[: len(content) // 2] if failure == "half" else content)

    def rendered(self, payload):
        """The prompt as a chat template would write it, one token a character."""
        parts = []
        for message in payload["messages"]:
            content = message["content"]
            if isinstance(content, list):
                content = "".join(part.get("text", "<image>") for part in content)
            parts.append(f"<{message['role']}>{content}")
        if payload["messages"][-1]["role"] == "assistant" and self.continues and payload.get("continue_final_message"):
            return "<end>\n".join(parts)
        return "<end>\n".join([*parts, "<assistant>"])
