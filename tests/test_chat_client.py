"""The client of OpenAI-compatible servers, against a server that fails in every way."""

import logging
import socket
import threading
import time

import pytest

from mm_prm.chat_client import ChatClient, ChatRequestError, ChatServerError

from .chat_server import FAILURES, ChatServer

PAYLOAD = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}


def echo(payload):
    return [payload["messages"][0]["content"]] * payload.get("n", 1)


def client(*servers, **settings):
    urls = [server.url for server in servers]
    return ChatClient(urls, **{"retry_seconds": 0.01, "timeout_seconds": 1.0, **settings})


@pytest.mark.parametrize("failure", FAILURES)
def test_whatever_fails_is_asked_again(failure):
    with ChatServer(echo, failures=(failure,)) as server:
        answer = client(server).complete(PAYLOAD)
        assert [choice.text for choice in answer.choices] == ["Hello"]
        assert (answer.prompt_tokens, answer.completion_tokens) == (len("<user>Hello<end>\n<assistant>"), 1)
        assert server.payloads == [PAYLOAD, PAYLOAD]


def test_all_failures_in_a_row_and_then_no_more_attempts():
    with ChatServer(echo, failures=FAILURES) as server:
        assert (
            client(server, max_retries=len(FAILURES), retry_seconds=0.0005).complete(PAYLOAD).choices[0].text
            == "Hello"
        )
        assert len(server.payloads) == len(FAILURES) + 1
    with ChatServer(echo, failures=("500",) * 9) as server:
        with pytest.raises(ChatServerError, match=r"no answer after 3 attempts; .*status 500: .*status 500, as told"):
            client(server, max_retries=2).complete(PAYLOAD)
        assert len(server.payloads) == 3


@pytest.mark.parametrize("status", ["400", "404"])
def test_a_refusal_is_told_at_once(status):
    with ChatServer(echo, failures=(status,)) as server:
        with pytest.raises(ChatRequestError, match=f"status {status}, as told"):
            client(server).complete(PAYLOAD)
        assert len(server.payloads) == 1


def test_waits_grow_and_retry_after_is_kept():
    with ChatServer(echo, failures=("500", "500", "500", "429")) as server:
        client(server, retry_seconds=0.1).complete(PAYLOAD)
        waits = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
        assert waits[0] >= 0.05
        assert waits[1] >= 0.1
        assert waits[2] >= 0.2
        assert waits[3] >= 0.6  # what the server asked for, above the 0.4 to 0.8 of its turn or not


def test_requests_are_bounded_and_spread_over_the_servers():
    with ChatServer(echo, seconds=0.05) as first, ChatServer(echo, seconds=0.05) as second:
        both = client(first, second, max_concurrency=6)
        futures = [both.submit({**PAYLOAD, "seed": seed}) for seed in range(30)]
        assert all(future.result().choices for future in futures)
        assert first.most_in_flight + second.most_in_flight <= 6
        assert first.most_in_flight == second.most_in_flight == 3
        assert len(first.payloads) == len(second.payloads) == 15
        assert sorted(payload["seed"] for payload in first.payloads + second.payloads) == list(range(30))


def test_a_slow_server_gets_less_and_a_dead_one_next_to_nothing():
    with ChatServer(echo, seconds=0.2) as slow, ChatServer(echo, seconds=0.01) as fast:
        pair = client(slow, fast, max_concurrency=4)
        for future in [pair.submit(PAYLOAD) for _ in range(60)]:
            future.result()
        assert len(fast.payloads) > 3 * len(slow.payloads)
    with ChatServer(echo) as alive, ChatServer(echo, failures=("close",) * 99) as dead:
        pair = client(alive, dead, max_concurrency=1)
        for future in [pair.submit(PAYLOAD) for _ in range(20)]:
            future.result()
        assert len(dead.payloads) == 1


def test_no_server_at_all():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with pytest.raises(ChatServerError, match=f"{url}: ClientConnector"):
            ChatClient(url, max_retries=1, retry_seconds=0.01).complete(PAYLOAD)


def test_a_cancelled_request_frees_its_slot():
    with ChatServer(echo, failures=("hang",)) as server:
        one = client(server, max_concurrency=1, timeout_seconds=60)
        hanging = one.submit(PAYLOAD)
        while not server.payloads:
            time.sleep(0.01)
        began = time.monotonic()
        assert hanging.cancel()
        assert one.complete(PAYLOAD).choices[0].text == "Hello"
        assert time.monotonic() - began < 10.0  # not the 30 s for which the server hangs


def test_the_key_is_sent_and_never_told(caplog):
    caplog.set_level(logging.DEBUG)
    with ChatServer(echo, failures=("400",)) as server:
        with pytest.raises(ChatRequestError) as told:
            client(server, api_key="hush-hush").complete(PAYLOAD)
        assert server.headers[0]["Authorization"] == "Bearer hush-hush"
    assert "hush-hush" not in str(told.value) + caplog.text


def test_closing_ends_the_thread_and_what_waits():
    with ChatServer(echo, failures=("hang",)) as server:
        closing = client(server, timeout_seconds=60)
        future = closing.submit(PAYLOAD)
        while not server.payloads:
            time.sleep(0.01)
        num_threads = sum(thread.name == "chat-client" for thread in threading.enumerate())
        closing.close()
        assert future.cancelled()
        assert sum(thread.name == "chat-client" for thread in threading.enumerate()) == num_threads - 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"base_urls": []}, "base_urls: give at least one"),
        ({"base_urls": "localhost:8000"}, "'localhost:8000' has to begin with http"),
        ({"base_urls": "http://a/v1", "max_concurrency": 0}, "max_concurrency: 0 has to be at least 1"),
        ({"base_urls": "http://a/v1", "timeout_seconds": 0}, "timeout_seconds: 0 has to be above 0"),
    ],
)
def test_settings_that_cannot_be_used(settings, named):
    with pytest.raises(ValueError, match=named):
        ChatClient(**settings)
