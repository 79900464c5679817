"""`mm-prm annotate` with a policy and a judge behind servers."""

import json

import datasets
import pytest
from PIL import Image
from transformers import AutoTokenizer

from mm_prm.cli import main
from mm_prm.embedded import model_path

from .chat_server import ChatServer


@pytest.fixture(autouse=True)
def problems(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("red.png")
    rows = [
        {"id": f"q{number}", "question": f"What is {number}?", "correct_answer": "a cat", "image_path": "red.png"}
        for number in range(3)
    ]
    (tmp_path / "problems.json").write_text(json.dumps(rows))


def solve(payload):
    steps = ["First we look.", "Then we count."]
    done = sum(step in str(payload["messages"]) for step in steps)
    ends = ["The answer is one feline.", "The answer is 12."]
    separator = "\n\n" if payload["messages"][-1]["role"] == "assistant" else ""
    return [separator + "\n\n".join([*steps[done:], ends[number % 2]]) for number in range(payload["n"])]


def say(payload):
    return ["Yes" if "feline" in payload["messages"][0]["content"] else "No"]


def annotate(policy, *flags):
    base = ["--problems", "problems.json", "--output", "trees", "--num_rollouts", "4", "--rollout_budget", "24"]
    engine = ["--policy", "m", "--policy_engine", "server", "--policy_base_urls", policy.url]
    return main(["annotate", *base, *engine, *flags])


def test_policy_and_judge_behind_servers():
    with ChatServer(solve, failures=("500", "close", "nonsense")) as policy, ChatServer(say) as judge:
        flags = ["--judge", "cascade", "--judge_model", "j", "--judge_base_urls", judge.url]
        assert annotate(policy, *flags, "--judge_cache", "verdicts.sqlite") == 0
        trees = datasets.load_from_disk("trees")
        assert trees["status"] == ["complete"] * 3
        for tree in trees:
            assert tree["nodes"][0]["num_judged"] == 4
            assert tree["nodes"][0]["num_right"] == 2
            assert any(node["num_judged"] for node in tree["nodes"][1:])
            assert tree["cost"]["rollouts"] == len(tree["rollouts"])
        assert all(payload["n"] == 4 and payload["model"] == "m" for payload in policy.payloads)
        # Rules decide 12 (no number is wanted); one feline is asked about once a problem.
        assert len(judge.payloads) == 1 + 3
    with ChatServer(solve) as policy, ChatServer(say) as judge:  # the same models at other addresses
        flags = ["--judge", "cascade", "--judge_model", "j", "--judge_base_urls", judge.url]
        assert annotate(policy, *flags) == 0
        assert not policy.payloads + judge.payloads
        assert annotate(policy, "--judge", "llm", *flags[2:4], "--judge_base_urls", judge.url) == 0
        assert policy.payloads  # another judge, other trees


def test_trees_of_another_tokenizer_are_grown_anew():
    with ChatServer(solve) as policy:

        def asks(*flags):
            policy.payloads.clear()
            assert annotate(policy, *flags) == 0
            return bool(policy.payloads)

        tokenizer = AutoTokenizer.from_pretrained(model_path("mini-policy"))
        for folder in ("tokenizer", "copy"):
            tokenizer.save_pretrained(folder)
        assert asks() and asks("--policy_tokenizer", "tokenizer")
        assert not asks() and not asks("--policy_tokenizer", "copy")
        tokenizer.add_special_tokens({"additional_special_tokens": ["<count>"]})
        tokenizer.save_pretrained("copy")
        assert asks("--policy_tokenizer", "copy") and not asks("--policy_tokenizer", "tokenizer")


def test_a_problem_that_the_servers_refuse_fails_and_the_others_go_on(capsys):
    def refuse(payload):
        if "What is 1?" in str(payload["messages"]):
            raise ValueError("this handler ends without an answer")
        return solve(payload)

    with ChatServer(refuse) as policy:
        assert annotate(policy, "--policy_max_retries", "0") == 1
    assert datasets.load_from_disk("trees")["status"] == ["complete", "failed", "complete"]
    assert "failed: q1: policy: ChatServerError: no answer after 1 attempts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--policy_engine", "server"], "policy_base_urls: is needed where policy_engine is 'server'"),
        (["--policy_base_urls", "http://a/v1"], "policy_base_urls: is a setting of policy_engine 'server', not of"),
        (["--policy_engine", "vllm", "--policy_batch_size", "9"], "policy_batch_size: is a setting of policy_engine"),
        (["--policy_engine", "server", "--policy_base_urls", "http://a/v1", "--policy_dtype", "float32"], "policy_dtype"),
        (["--policy_engine", "server", "--policy_base_urls", "http://127.0.0.1:9/v1", "--policy_max_retries", "0"], "policy: no server answers at http://127.0.0.1:9/v1"),
        (["--policy_engine", "vllm"], "policy: vLLM cannot be imported"),
        (["--judge", "llm"], "judge_model: is needed"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used(flags, named, capsys):
    assert main(["annotate", "--problems", "problems.json", "--output", "trees", *flags]) == 2
    assert named in capsys.readouterr().err
