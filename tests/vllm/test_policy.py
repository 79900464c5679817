"""Rollouts of vLLM in this process and behind its server: the same for the same seeds, whatever else is under way."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest
import torch

from mm_prm.annotation.protocols import RolloutRequest
from mm_prm.data import mini
from mm_prm.embedded import model_path
from mm_prm.judges import RulesJudge
from mm_prm.policies.openai import OpenAIPolicy
from mm_prm.policies.transformers import TransformersPolicy
from mm_prm.policies.vllm import VLLMPolicy
from mm_prm.policies.vllm_engines import _places

ENGINE = {"max_model_len": 1024, "dtype": "float32"}
PROBLEMS = [mini.problem("test", number).row() for number in range(24)]


def requests(num_rollouts=4, prefix=()):
    """One request a problem; with the seeds of annotation, which lie far apart."""
    return [
        (problem, RolloutRequest(problem["id"], tuple(prefix), num_rollouts, 2**62 + 4096 * number))
        for number, problem in enumerate(PROBLEMS)
    ]


@pytest.fixture(scope="module")
def policy():
    policy = VLLMPolicy(model_path("mini-policy"), enforce_eager=True, **ENGINE)
    yield policy
    policy.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ["--port", str(port), "--enforce-eager", "--max-model-len", "1024", "--dtype", "float32"]
    flags += ["--no-enable-chunked-prefill"]  # seeds on the CPU, see VLLMPolicy
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model_path("mini-policy"),
        *flags,
    ]
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, "--served-model-name", "mini"], stdout=output, stderr=subprocess.STDOUT, env={**os.environ}
        )
    try:
        for _ in range(280):
            assert process.poll() is None, "the server ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    except BaseException:
        print(log.read_text(encoding="utf-8")[-5000:])
        raise
    finally:
        process.terminate()
        process.wait(timeout=60)


def steps(generations):
    return [[(rollout.steps, rollout.status) for rollout in generation.rollouts] for generation in generations]


def test_rollouts_depend_on_their_request_alone(policy):
    together = policy.generate(requests())
    assert policy.generate(requests()[::-1])[::-1] == together
    assert [policy.generate([request])[0] for request in requests()[:3]] == together[:3]
    # Sample i draws from seed + i, so a request that begins later gives the tail of the other.
    problem, request = requests()[0]
    later = RolloutRequest(request.problem_id, (), 2, request.seed + 2)
    assert policy.generate([(problem, later)])[0].rollouts == together[0].rollouts[2:]
    texts = {rollout.steps for generation in policy.generate(requests(16)[:8]) for rollout in generation.rollouts}
    assert len(texts) > 16


def test_they_are_the_solutions_of_the_model(policy):
    """As often right as those of transformers: the prompt is the same, pictures and all."""
    judge = RulesJudge()

    def share_right(generations):
        verdicts = [
            judge.judge(problem, rollout.steps).verdict == "right"
            for problem, generation in zip(PROBLEMS, generations, strict=True)
            for rollout in generation.rollouts
        ]
        return sum(verdicts) / len(verdicts)

    torch.set_num_threads(1)
    other = TransformersPolicy.from_pretrained(model_path("mini-policy"), device="cpu")
    asked = requests(16)
    own, others = policy.generate(asked), other.generate(asked)
    assert [generation.prompt_tokens for generation in own] == [generation.prompt_tokens for generation in others]
    assert abs(share_right(own) - share_right(others)) < 0.1
    assert share_right(own) > 0.2
    assert all(rollout.status == "finished" for generation in own for rollout in generation.rollouts)
    greedy = greedy_rollouts(policy)
    expected = TransformersPolicy.from_pretrained(model_path("mini-policy"), device="cpu", temperature=0)
    assert steps(greedy) == steps(expected.generate(requests(2)))


def greedy_rollouts(policy, asked=None):
    """The same engine at temperature 0."""
    sampling, policy._greedy = policy._sampling, True

    def at_zero(num_rollouts, seed, stop=()):
        params = sampling(num_rollouts, seed, stop)
        params.temperature = 0.0
        params.top_k, params.top_p = 0, 1.0
        return params

    policy._sampling = at_zero
    try:
        return policy.generate(asked or requests(2))
    finally:
        policy._sampling, policy._greedy = sampling, False


def test_a_prefix_is_continued(policy):
    prefix = policy.generate(requests()[:1])[0].rollouts[0].steps[:2]
    [generation] = policy.generate(requests(8, prefix)[:1])
    assert all(rollout.status == "finished" for rollout in generation.rollouts)
    assert not any(step in rollout.steps for step in prefix for rollout in generation.rollouts)
    assert generation.prompt_tokens > policy.generate(requests(1)[:1])[0].prompt_tokens


def test_a_single_step_ends_where_it_ends(policy, server):
    """At temperature 0 the steps, one after the other, are the solution; and the server gives the same."""
    served = OpenAIPolicy("mini", server, timeout_seconds=120, max_concurrency=8, temperature=0, top_k=0, top_p=1.0)
    whole = served.generate(requests(1))
    assert steps(whole) == steps(greedy_rollouts(policy, requests(1)))
    prefixes, unfinished = [()] * len(PROBLEMS), list(range(len(PROBLEMS)))
    while unfinished:
        asked = [
            (PROBLEMS[i], RolloutRequest(PROBLEMS[i]["id"], prefixes[i], 1, 1, one_step=True)) for i in unfinished
        ]
        own, other = greedy_rollouts(policy, asked), served.generate(asked)
        assert steps(own) == steps(other)
        for index, generation in zip(list(unfinished), own, strict=True):
            [rollout] = generation.rollouts
            assert len(rollout.steps) == 1 and rollout.status in ("stopped", "finished")
            prefixes[index] += rollout.steps
            if rollout.status == "finished":
                unfinished.remove(index)
    assert prefixes == [generation.rollouts[0].steps for generation in whole]


def test_one_request_that_cannot_be_answered_fails_alone(policy):
    problem, request = requests()[0]
    long = {**problem, "question": problem["question"] + " and so on" * 2000}
    futures = [policy.submit(long, request), policy.submit(problem, request)]
    with pytest.raises(Exception, match="maximum context length is 1024"):
        futures[0].result()
    assert len(futures[1].result().rollouts) == 4
    cancelled = policy.submit(problem, RolloutRequest("p", (), 4096, 1))
    assert cancelled.cancel()
    assert len(policy.generate([(problem, request)])[0].rollouts) == 4


def test_the_server_gives_what_the_engine_gives(policy, server):
    served = OpenAIPolicy("mini", server, timeout_seconds=120, max_concurrency=8)
    assert served.prefix_in_turn
    for asked in (requests(), requests(4, policy.generate(requests()[:1])[0].rollouts[0].steps[:1])[:1]):
        own, other = policy.generate(asked), served.generate(asked)
        assert steps(own) == steps(other)
        assert [generation.prompt_tokens for generation in own] == [generation.prompt_tokens for generation in other]
        for one, two in zip(own, other, strict=True):
            assert sum(r.num_tokens for r in one.rollouts) == sum(r.num_tokens for r in two.rollouts)


@pytest.fixture
def several():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs a CPU core for each engine")
    policy = VLLMPolicy(model_path("mini-policy"), enforce_eager=True, num_engines=2, **ENGINE)
    yield policy
    policy.close()


def test_several_engines_share_the_problems_and_give_the_same(policy, several):
    together = several.generate(requests())
    assert together == policy.generate(requests())
    engine_of = dict(several._engines._of_problem)
    assert engine_of.keys() == {problem["id"] for problem in PROBLEMS}
    numbers = [list(engine_of.values()).count(engine) for engine in several._engines._engines]
    assert numbers == [len(PROBLEMS) // 2] * 2
    prefix = together[-1].rollouts[0].steps[:1]
    assert several.generate(requests(4, prefix)[::-1]) == policy.generate(requests(4, prefix)[::-1])
    assert several._engines._of_problem == engine_of  # where a problem's images are


def test_an_engine_that_dies_leaves_its_problems_to_the_others(policy, several):
    one, other = sorted(engines_of(psutil.Process()), key=psutil.Process.create_time)[-2:]
    under_way = [several.submit(*asked) for asked in requests(256)[:2]]  # one to each
    one.kill()
    failed = [future.exception(timeout=300) for future in under_way]
    assert sorted(type(error).__name__ for error in failed) == ["NoneType", "RuntimeError"]
    assert several.generate(requests()) == policy.generate(requests())
    other.kill()
    with pytest.raises(RuntimeError, match=r"vLLM failed|has stopped"):
        several.generate(requests(256))


@pytest.mark.parametrize(
    ("number", "visible", "settings", "expected"),
    [
        (1, None, {}, [(None, None)]),
        (4, None, {}, [("0", 0.45), ("1", 0.45), ("0", 0.45), ("1", 0.45)]),
        (3, "5,7", {"gpu_memory_utilization": 0.8}, [("5", 0.4), ("7", 0.8), ("5", 0.4)]),
        (1, "5,7", {"tensor_parallel_size": 2}, [(None, None)]),
        (2, "4,5,6,7", {"tensor_parallel_size": 2}, [("4,5", 0.9), ("6,7", 0.9)]),
        (2, "4,5", {"tensor_parallel_size": 2}, [("4,5", 0.45), ("4,5", 0.45)]),
    ],
)
def test_engines_have_a_gpu_each_or_share_its_memory(monkeypatch, number, visible, settings, expected):
    class Platform:
        device_control_env_var = "CUDA_VISIBLE_DEVICES"
        is_cpu = staticmethod(lambda: False)
        device_count = staticmethod(lambda: 2)

    monkeypatch.setattr("vllm.platforms.current_platform", Platform)
    monkeypatch.setattr("vllm.EngineArgs.gpu_memory_utilization", 0.9)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [
        (variables.get("CUDA_VISIBLE_DEVICES"), arguments.get("gpu_memory_utilization"))
        for variables, arguments in _places(number, settings)
    ] == expected


def test_every_engine_needs_a_core():
    with pytest.raises(ValueError, match="num_engines: 10000 has to be at most"):
        VLLMPolicy(model_path("mini-policy"), num_engines=10_000)
    with pytest.raises(ValueError, match="num_engines: 0 has to be at least 1"):
        VLLMPolicy(model_path("mini-policy"), num_engines=0)


OPEN = f"""
import time
from mm_prm.embedded import model_path
from mm_prm.inference import VLLMScorer
from mm_prm.policies.vllm import VLLMPolicy

if __name__ == "__main__":
    policy = VLLMPolicy(model_path("mini-policy"), enforce_eager=True, **{ENGINE})
    print("open", flush=True)
    scorer = VLLMScorer(model_path("mini-prm"), enforce_eager=True, **{ENGINE})
    time.sleep(600)
"""


def engines_of(process, name="VLLM::EngineCore"):
    """The processes of its engines, which have a name of their own as soon as they load a model."""
    return [child for child in process.children(recursive=True) if name in command_of(child)]


def command_of(process):
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # also one that has ended and for which nobody has waited yet
        return ""


def test_a_killed_process_leaves_no_engine(tmp_path):
    """Neither that of the policy, which is open, nor that of the scorer, which is just being opened."""
    program = tmp_path / "program.py"
    program.write_text(OPEN, encoding="utf-8")
    process = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True)
    while process.stdout.readline().strip() != "open":
        assert process.poll() is None
    while len(engines_of(psutil.Process(process.pid))) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    left = engines_of(psutil.Process(process.pid), "VLLM::")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 60
    while any(map(command_of, left)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [child for child in left if command_of(child)] == []
