"""The server policy: what it sends, how it reads what comes back, and what it does where servers differ or fail."""

import base64
import io
import logging
import time

import pytest
from PIL import Image, ImageChops

from mm_prm.annotation.protocols import Policy, RolloutRequest
from mm_prm.chat_client import ChatRequestError, ChatServerError
from mm_prm.policies.openai import OpenAIPolicy

from ..chat_server import ChatServer
from ..testing_utils import tiny_problem

STEPS = ("Bar A shows 7.", "Bar B shows 3.")


def solve(payload):
    return [f"\n\nSample {payload['seed'] + number}.\n\nThe answer is 4." for number in range(payload["n"])]


def open_policy(*servers, **settings):
    urls = [server.url for server in servers]
    return OpenAIPolicy("tiny", urls, **{"retry_seconds": 0.01, "timeout_seconds": 20.0, **settings})


def request(problem, prefix=(), num_rollouts=2, seed=2**62):
    return problem, RolloutRequest(problem["id"], tuple(prefix), num_rollouts, seed)


class TestWhatIsSent:
    def test_a_root(self):
        problem = tiny_problem(3)
        with ChatServer(solve) as server:
            policy = open_policy(server, max_new_tokens=77, top_k=40, top_p=0.8, temperature=0.7)
            assert isinstance(policy, Policy)
            [generation] = policy.generate([request(problem, num_rollouts=3)])
        [payload] = server.payloads
        [message] = payload.pop("messages")
        assert payload == {
            "model": "tiny",
            "max_tokens": 77,
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 40,
            "n": 3,
            "seed": 2**62,
        }
        image, text = message["content"]
        assert text == {"type": "text", "text": "How much higher is bar A than 3?"}
        kind, data = image["image_url"]["url"].split(",")
        assert kind == "data:image/png;base64"
        sent = Image.open(io.BytesIO(base64.b64decode(data)))
        assert ImageChops.difference(sent, problem["images"][0]).getbbox() is None
        assert [rollout.steps[0] for rollout in generation.rollouts] == [f"Sample {2**62 + i}." for i in range(3)]
        assert [rollout.steps[1] for rollout in generation.rollouts] == ["The answer is 4."] * 3

    def test_pictures_stand_at_their_place_and_choices_after_the_question(self):
        problem = tiny_problem(3, num_images=2)
        problem |= {"question": "Left <image>, right <image>: which?", "choices": ["the left", "the right"]}
        with ChatServer(solve) as server:
            open_policy(server).generate([request(problem)])
        kinds = [part.get("text", "picture") for part in server.payloads[0]["messages"][0]["content"]]
        assert kinds == ["Left ", "picture", ", right ", "picture", ": which?\n(A) the left\n(B) the right"]

    def test_a_prefix_opens_the_assistant_turn(self):
        with ChatServer(solve) as server:
            [generation] = open_policy(server).generate([request(tiny_problem(0, 0), STEPS)])
        [payload] = server.payloads
        assert payload["messages"] == [
            {"role": "user", "content": "How much higher is bar A than 0?"},
            {"role": "assistant", "content": "\n\n".join(STEPS)},
        ]
        assert payload["continue_final_message"] is True
        assert payload["add_generation_prompt"] is False
        assert generation.prompt_tokens == len(server.rendered(payload))

    def test_a_server_that_does_not_continue_gets_the_steps_in_the_question(self, caplog):
        answers = {"text": "The answer is 4."}
        with ChatServer(lambda payload: [answers["text"]] * payload["n"], continues=False) as server:
            policy = open_policy(server)
            [generation] = policy.generate([request(tiny_problem(0, 0), STEPS)])
        assert not policy.prefix_in_turn
        assert f"{server.url} does not continue an unfinished assistant message" in caplog.text
        [payload] = server.payloads
        assert payload["messages"] == [
            {
                "role": "user",
                "content": "How much higher is bar A than 0?\n\nPrevious Steps:\nBar A shows 7.\n\nBar B shows 3.",
            }
        ]
        assert "continue_final_message" not in payload
        assert [rollout.status for rollout in generation.rollouts] == ["finished"] * 2

    def test_a_server_that_refuses_the_flags_does_not_continue_either(self):
        class Strict(ChatServer):
            def reply(self, http_request, payload, failure):
                super().reply(http_request, payload, "400" if "continue_final_message" in payload else failure)

        with Strict(solve) as server:
            assert not open_policy(server).prefix_in_turn

    @pytest.mark.parametrize(
        ("step_format", "written"),
        [
            ("tags", "<step>Bar A shows 7.</step>\n<step>Bar B shows 3.</step>"),
            ("numbered", "Step 1: Bar A shows 7.\nStep 2: Bar B shows 3."),
        ],
    )
    def test_step_formats(self, step_format, written):
        texts = {
            "tags": "\n<step>7 - 3 = 4</step>\n<answer>4</answer>",
            "numbered": "\nStep 3: 7 - 3 = 4\n†Answer: 4",
        }
        with ChatServer(lambda payload: [texts[step_format]]) as server:
            [generation] = open_policy(server, step_format=step_format).generate(
                [request(tiny_problem(0, 0), STEPS, num_rollouts=1)]
            )
        assert server.payloads[0]["messages"][1]["content"] == written
        answer = "4" if step_format == "tags" else "†Answer: 4"
        assert generation.rollouts[0].steps == ("7 - 3 = 4", answer)

    def test_special_tokens_are_broken_up(self, tiny_vlm_path):
        problem = tiny_problem(0, 0)
        problem["question"] = "Is <|im_start|>assistant <prm> a < b [/INST] </s> x<y>z <|x<|y|> ?"
        for tokenizer in (None, tiny_vlm_path):
            with ChatServer(solve) as server:
                open_policy(server, tokenizer=tokenizer).generate([request(problem, ["Yes <|im_end|>"])])
            user, assistant = (message["content"] for message in server.payloads[0]["messages"])
            assert "<|im_start|>" not in user
            assert "<|im_end|>" not in assistant
            assert "a < b" in user
            if tokenizer is None:
                assert user == "Is < |im_start|>assistant < prm> a < b [ /INST] < /s> x<y>z <|x< |y|> ?"

    def test_all_rollouts_of_a_greedy_policy_are_one(self):
        with ChatServer(solve) as server:
            [generation] = open_policy(server, temperature=0).generate([request(tiny_problem(0, 0), num_rollouts=3)])
        assert server.payloads[0]["n"] == 1
        assert generation.rollouts == [generation.rollouts[0]] * 3

    def test_no_top_k_for_servers_that_do_not_know_it(self):
        with ChatServer(solve) as server:
            open_policy(server, top_k=0).generate([request(tiny_problem(0, 0))])
        assert "top_k" not in server.payloads[0]


class TestWhatComesBack:
    def test_every_end_is_counted_as_what_it_is(self):
        answers = [
            ("\n\nOne.\n\nThe answer is 4.", "stop"),
            ("\n\nOne.\n\nThe answ", "length"),
            (" and on.\n\nThe answer is 4.", "stop"),
            ("", "length"),
            (None, "stop"),
            ("\n\nSorry.", "content_filter"),
        ]
        with ChatServer(lambda payload: answers) as server:
            [generation] = open_policy(server).generate([request(tiny_problem(0, 0), STEPS, num_rollouts=6)])
        statuses = [rollout.status for rollout in generation.rollouts]
        assert statuses == ["finished", "length", "unparsable", "unparsable", "unparsable", "unparsable"]
        assert generation.rollouts[1].steps == ("One.", "The answ")
        tokens = [rollout.num_tokens for rollout in generation.rollouts]
        assert sum(tokens) == sum(len((text or "").split()) for text, _ in answers)
        assert tokens[3] == tokens[4] == 0

    def test_a_server_that_limits_the_samples_of_a_request_is_asked_for_the_rest(self):
        with ChatServer(lambda payload: solve({**payload, "n": min(3, payload["n"])})) as server:
            [generation] = open_policy(server).generate([request(tiny_problem(0, 0), num_rollouts=8)])
        assert [(payload["seed"] - 2**62, payload["n"]) for payload in server.payloads] == [(0, 8), (3, 5), (6, 2)]
        assert [rollout.steps[0] for rollout in generation.rollouts] == [f"Sample {2**62 + i}." for i in range(8)]


class TestManyRequests:
    def test_they_come_back_in_their_order_whatever_fails(self):
        failures = ("500", "429", "hang", "close", "half", "nonsense", "no choices")
        problem = tiny_problem(0, 0)
        with ChatServer(solve, failures=failures) as first, ChatServer(solve, failures=failures[::-1]) as second:
            policy = open_policy(first, second, max_concurrency=8, timeout_seconds=1.0)
            generations = policy.generate([request(problem, seed=1000 * number) for number in range(40)])
            used = 2 * len(failures) - len(first.failures) - len(second.failures)
            assert used > 0
            assert len(first.payloads) + len(second.payloads) == 40 + used
        for number, generation in enumerate(generations):
            assert [rollout.steps[0] for rollout in generation.rollouts] == [
                f"Sample {1000 * number + i}." for i in range(2)
            ]

    def test_what_no_server_answers_is_raised_and_the_rest_is_dropped(self):
        with ChatServer(solve, failures=("400",), seconds=0.2) as server:
            policy = open_policy(server, max_concurrency=1)
            with pytest.raises(ChatRequestError, match="as told"):
                policy.generate([request(tiny_problem(0, 0))] * 10)
            time.sleep(0.5)
            assert len(server.payloads) <= 2

    def test_one_server_that_is_down_at_the_start_does_not_matter(self, caplog):
        with ChatServer(solve) as gone:
            pass
        with ChatServer(solve) as server:
            policy = open_policy(gone, server, max_retries=1)
            assert "going on with the other servers" in caplog.text
            assert policy.prefix_in_turn
            assert len(policy.generate([request(tiny_problem(0, 0))] * 10)) == 10

    def test_no_server_is_told_when_the_policy_is_opened(self):
        with ChatServer(solve) as gone:
            pass
        with pytest.raises(ChatServerError, match=f"no server answers at {gone.url}"):
            open_policy(gone, max_retries=1)

    def test_a_picture_is_encoded_once(self, monkeypatch):
        saved = []
        save = Image.Image.save
        monkeypatch.setattr(
            Image.Image, "save", lambda self, *args, **rest: (saved.append(1), save(self, *args, **rest))
        )
        problem = tiny_problem(1)
        with ChatServer(solve) as server:
            open_policy(server).generate([request(problem), request(problem, STEPS), request(tiny_problem(2))])
        assert len(saved) == 2


def test_settings_are_checked_and_the_environment_gives_the_key(monkeypatch, caplog):
    with pytest.raises(ValueError, match="top_p: 2 has to be above 0"):
        OpenAIPolicy("tiny", "http://127.0.0.1:9/v1", top_p=2)
    monkeypatch.setenv("OPENAI_API_KEY", "hush-hush")
    caplog.set_level(logging.DEBUG)
    with ChatServer(solve) as server:
        open_policy(server)
    assert server.headers[0]["Authorization"] == "Bearer hush-hush"
    assert "hush-hush" not in caplog.text
