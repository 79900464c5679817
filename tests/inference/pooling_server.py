"""A small HTTP server that speaks the part of vLLM's protocol that scoring needs, computes real scores, and fails on order."""

import base64
import io
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from PIL import Image

from mm_prm.models import AutoModelForProcessReward, ProcessRewardProcessor

# Status, headers and body of an answer.
Answer = tuple[int, dict[str, str], bytes]


class PoolingServer:
    """
    Renders chats with the model's chat template, tokenises with its processor and scores with the model itself.

    Args:
        path (`str`):
            Folder of a process reward model.
        api_key (`str`, *optional*):
            Key without which requests are refused.
    """

    def __init__(self, path: str, api_key: str | None = None):
        self.path, self.api_key = path, api_key
        self.model: Any = AutoModelForProcessReward.from_pretrained(path, dtype=torch.float32).eval()
        self.processor = ProcessRewardProcessor.from_pretrained(path)
        self.requests: list[tuple[str, Any]] = []
        # What happens to the next requests to /pooling instead of an answer: a status with headers, or no answer at all.
        self.failures: deque[tuple[int, dict[str, str]] | None] = deque()
        self.replace: dict[str, Answer | Callable[[Any], Any]] = {}
        self.seconds_per_request = 0.0
        self.most_in_flight = self._in_flight = 0
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, path: str, body: Any, headers: Any) -> Answer | None:
        """The answer to a request, `None` to close the connection without one."""
        with self._lock:
            self.requests.append((path, body))
            failure = self.failures.popleft() if path == "/pooling" and self.failures else ()
        if failure is None:
            return None
        if failure:
            return failure[0], failure[1], b'{"error": {"message": "busy"}}'
        if self.api_key is not None and headers.get("Authorization") != f"Bearer {self.api_key}":
            return 401, {}, b'{"error": "Unauthorized"}'
        replaced = self.replace.get(path)
        if isinstance(replaced, tuple):
            return replaced
        answers = {"/v1/models": self._models, "/tokenize": self._tokenize, "/pooling": self._pooling}
        if path not in answers:
            return 404, {}, b'{"detail": "Not Found"}'
        result = answers[path](body)
        if replaced is not None:
            result = replaced(result)
        return 200, {"Content-Type": "application/json"}, json.dumps(result).encode()

    def _models(self, body: Any) -> Any:
        return {"object": "list", "data": [{"id": "prm", "root": self.path, "max_model_len": 2048}]}

    def _inputs(self, body: Any) -> Any:
        if "input" in body:
            return {"input_ids": torch.tensor([body["input"]])}
        images = []
        if "prompt" in body:
            text = body["prompt"]
        else:
            assert body["continue_final_message"] and not body["add_generation_prompt"]
            (message,) = body["messages"]
            urls = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
            images = [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) for url in urls]
            content = [part if part["type"] == "text" else {"type": "image"} for part in message["content"]]
            text = self.processor.processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, continue_final_message=True
            )
        arguments = {"images": [images]} if images else {}
        return self.processor.processor(text=[text], add_special_tokens=False, return_tensors="pt", **arguments)

    def _tokenize(self, body: Any) -> Any:
        tokens = self._inputs(body)["input_ids"][0].tolist()
        return {"tokens": tokens, "count": len(tokens)}

    def _pooling(self, body: Any) -> Any:
        assert body["model"] == "prm" and body["task"] == "token_classify"
        with self._lock:
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        time.sleep(self.seconds_per_request)
        inputs = dict(self._inputs(body))
        with self._lock, torch.inference_mode():
            self._in_flight -= 1
            steps = inputs["input_ids"] == self.processor.step_token_id
            rows = self.model(**inputs).logits[steps].softmax(dim=-1).tolist()
        return {"object": "list", "data": [{"index": 0, "object": "pooling", "data": rows}]}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._reply(None)

            def do_POST(self) -> None:
                self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _reply(self, body: Any) -> None:
                answer = server.answer(self.path, body, self.headers)
                if answer is None:
                    self.close_connection = True
                    return
                status, headers, content = answer
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler
