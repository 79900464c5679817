"""One step at a time: step by step a policy writes what it writes at once, on every engine, and pays for no more."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_prm.annotation.protocols import RolloutRequest
from mm_prm.data import mini
from mm_prm.embedded import model_path
from mm_prm.policies.openai import OpenAIPolicy
from mm_prm.policies.steps import SEPARATORS, STEP_ENDS, STEP_FORMATS, first_step, format_steps
from mm_prm.policies.transformers import TransformersPolicy

from ..chat_server import ChatServer
from ..testing_utils import tiny_problem

STEP = st.text(alphabet="abc 0123=+.", min_size=1, max_size=30).map(lambda text: " ".join(text.split())).filter(bool)


@pytest.mark.parametrize("step_format", STEP_FORMATS)
class TestText:
    @given(steps=st.lists(STEP, min_size=1, max_size=5), data=st.data())
    def test_what_follows_a_prefix_begins_with_its_next_step(self, step_format, steps, data):
        cut = data.draw(st.integers(0, len(steps) - 1))
        opening = SEPARATORS[step_format] if cut else ""
        whole, prefix = format_steps(steps, step_format), format_steps(steps[:cut], step_format)
        assert whole.startswith(prefix + opening)
        text = whole[len(prefix + opening) :]
        is_last = cut == len(steps) - 1
        # Tags close every step, the others open the next one.
        status = "finished" if is_last and step_format != "tags" else "stopped"
        assert first_step(text, step_format, "finished") == ((steps[cut],), status)
        # An engine has cut the text where the step ends.
        for end in STEP_ENDS[step_format]:
            text = text.partition(end)[0]
        assert first_step(text, step_format, status) == ((steps[cut],), status)

    def test_nothing_is_unparsable(self, step_format):
        assert first_step("", step_format, "stopped") == ((), "unparsable")
        assert first_step(" \n\n\n", step_format, "finished") == ((), "unparsable")


def test_the_answer_ends_a_solution_in_every_format():
    assert first_step("The answer is 4.", "paragraphs", "finished") == (("The answer is 4.",), "finished")
    assert first_step("\n<answer>4</answer>", "tags", "finished") == (("4",), "finished")
    assert first_step("†Answer: 4", "numbered", "finished") == (("†Answer: 4",), "finished")
    assert first_step("Step 2: b\n†Answer: 4", "numbered", "finished") == (("b",), "stopped")


def step_by_step(policy, problems):
    """Solutions of a greedy policy, with the tokens they took."""
    prefixes, tokens, unfinished = [()] * len(problems), [0] * len(problems), set(range(len(problems)))
    for _ in range(12):
        order = sorted(unfinished)
        asked = [(problems[i], RolloutRequest(problems[i]["id"], prefixes[i], 1, 1, one_step=True)) for i in order]
        for index, generation in zip(order, policy.generate(asked), strict=True):
            [rollout] = generation.rollouts
            assert rollout.status in ("stopped", "finished") and len(rollout.steps) == 1
            prefixes[index] += rollout.steps
            tokens[index] += rollout.num_tokens
            if rollout.status == "finished":
                unfinished.remove(index)
    assert not unfinished
    return prefixes, tokens


def test_steps_of_the_embedded_policy_are_its_solutions():
    policy = TransformersPolicy.from_pretrained(model_path("mini-policy"), device="cpu", temperature=0)
    problems = [mini.problem("test", number).row() for number in range(12)]
    whole = policy.generate([(problem, RolloutRequest(problem["id"], (), 1, 1)) for problem in problems])
    prefixes, tokens = step_by_step(policy, problems)
    assert prefixes == [generation.rollouts[0].steps for generation in whole]
    assert len({len(steps) for steps in prefixes}) > 1
    # No token is generated twice, and none in vain.
    assert tokens == [generation.rollouts[0].num_tokens for generation in whole]


def test_single_steps_and_whole_solutions_in_one_call():
    policy = TransformersPolicy.from_pretrained(model_path("mini-policy"), device="cpu", temperature=0)
    problems = [mini.problem("test", number).row() for number in range(6)]
    asked = [
        (problem, RolloutRequest(problem["id"], (), 2, 1, one_step=number % 2 == 0))
        for number, problem in enumerate(problems)
    ]
    together = policy.generate(asked)
    for request, generation in zip(asked, together, strict=True):
        [alone] = policy.generate([request])
        assert [(r.steps, r.status, r.num_tokens) for r in generation.rollouts] == [
            (r.steps, r.status, r.num_tokens) for r in alone.rollouts
        ]
        assert (len(alone.rollouts[0].steps) == 1) == request[1].one_step


SOLUTION = ("Bar A shows 7.", "7 - 3 = 4", "The answer is 4.")


class Server(ChatServer):
    """Continues `SOLUTION`, and stops where it is told to, as vLLM does."""

    def __init__(self, step_format="paragraphs", keeps_separators=True, says=True):
        super().__init__(self.continuation)
        self.whole, self.keeps, self.says = format_steps(SOLUTION, step_format), keeps_separators, says

    def rendered(self, payload):
        text = super().rendered(payload)
        return text if self.keeps else text.rstrip()

    def continuation(self, payload):
        last = payload["messages"][-1]
        written = last["content"] if last["role"] == "assistant" else ""
        written = written if self.keeps else written.rstrip()
        assert self.whole.startswith(written)
        text, reason = self.whole[len(written) :], None
        for stop in payload.get("stop", []):
            text, found, _ = text.partition(stop)
            reason = found or reason
        return [(text, reason)] * payload["n"]

    def reply(self, request, payload, failure):
        answers = [("x", None)] if payload["max_tokens"] == 1 else self.continuation(payload)
        choices = [
            {"index": index, "message": {"content": text}, "finish_reason": "stop"}
            | ({"stop_reason": reason} if self.says else {})
            for index, (text, reason) in enumerate(answers)
        ]
        tokens = sum(len(text.split()) for text, _ in answers)
        usage = {"prompt_tokens": len(self.rendered(payload)), "completion_tokens": tokens}
        content = json.dumps({"choices": choices, "usage": usage}).encode()
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)


@pytest.mark.parametrize("step_format", STEP_FORMATS)
def test_a_server_is_told_where_to_stop(step_format):
    # The last step of the other formats has its own mark.
    with Server(step_format) as server:
        policy = OpenAIPolicy("tiny", server.url, step_format=step_format)
        statuses = []
        for cut in range(3):
            asked = RolloutRequest("p", SOLUTION[:cut], 2, 1, one_step=True)
            [generation] = policy.generate([(tiny_problem(0, 0), asked)])
            assert {rollout.steps for rollout in generation.rollouts} == {SOLUTION[cut : cut + 1]}
            statuses.append(generation.rollouts[0].status)
    assert statuses == ["stopped", "stopped", "stopped" if step_format == "tags" else "finished"]
    assert server.payloads[0]["stop"] == list(STEP_ENDS[step_format])
    prefix = format_steps(SOLUTION[:2], step_format) + SEPARATORS[step_format]
    assert server.payloads[2]["messages"][1]["content"] == prefix


@pytest.mark.parametrize(
    ("flags", "message"),
    [({"says": False}, "does not say at which text"), ({"keeps_separators": False}, "drops the separator")],
)
def test_a_server_that_cannot_stop_writes_whole_solutions_that_are_cut(flags, message, caplog):
    with Server(**flags) as server, caplog.at_level(logging.WARNING):
        policy = OpenAIPolicy("tiny", server.url)
        assert message not in caplog.text  # nobody has asked for a step yet
        for cut in range(3):
            asked = RolloutRequest("p", SOLUTION[:cut], 1, 1, one_step=True)
            [generation] = policy.generate([(tiny_problem(0, 0), asked)])
            [rollout] = generation.rollouts
            assert (rollout.steps, rollout.status) == (
                SOLUTION[cut : cut + 1],
                ["stopped", "stopped", "finished"][cut],
            )
            # All tokens that were computed are counted.
            assert rollout.num_tokens == sum(len(step.split()) for step in SOLUTION[cut:])
    assert caplog.text.count(message) == 1
    assert all("stop" not in payload for payload in server.payloads)
