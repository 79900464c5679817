"""The policy has work at every moment at which a tree has some for it, whatever the judge does; and memory stays put."""

import itertools
import threading
import time
import tracemalloc
from concurrent.futures import Future

import pytest

from mm_prm.annotation import AnnotationConfig, annotate
from mm_prm.annotation.batching import PolicyThread
from mm_prm.annotation.protocols import Generation, Rollout, RolloutRequest, SubmittingPolicy, Verdict
from tests.annotation.scripted import ScriptedJudge, ScriptedPolicy, make_problem


def make_problems(count):
    return (make_problem(f"p{number}") for number in range(count))


def by_id(rows):
    return {row["problem_id"]: {**row, "cost": {**row["cost"], "seconds": 0.0}} for row in rows}


class Server(ScriptedPolicy):
    """Answers each request by itself, `seconds` after it came, as many at once as come; notes how many it has."""

    def __init__(self, seconds, fail_first=(), **settings):
        super().__init__(**settings)
        self.seconds, self.fail_first = seconds, set(fail_first)
        self.lock, self.num_waiting, self.since = threading.Lock(), 0, time.perf_counter()
        self.time_with = {}  # seconds during which so many requests were waiting
        self.asked = []

    def submit(self, problem, request):
        answer = Future()
        with self.lock:
            self.asked.append(request)
            self._count(1)
        threading.Timer(self.seconds, self.reply, (problem, request, answer)).start()
        return answer

    def _count(self, change):
        now = time.perf_counter()
        self.time_with[self.num_waiting] = self.time_with.get(self.num_waiting, 0.0) + now - self.since
        self.num_waiting, self.since = self.num_waiting + change, now

    def reply(self, problem, request, answer):
        with self.lock:
            self._count(-1)
            failing = request.seed in self.fail_first or problem["id"] in self.broken
            self.fail_first.discard(request.seed)
        if failing:
            answer.set_exception(ConnectionError("the server is away"))
        elif answer.set_running_or_notify_cancel():
            answer.set_result(self._one(request))


class SlowJudge(ScriptedJudge):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def judge(self, problem, solution):
        time.sleep(self.seconds)
        return super().judge(problem, solution)


def test_a_server_has_the_next_requests_while_the_judge_is_slow():
    policy = Server(seconds=0.02)
    assert isinstance(policy, SubmittingPolicy) and not isinstance(ScriptedPolicy(), SubmittingPolicy)
    config = AnnotationConfig(num_rollouts=4, rollout_budget=24, trees_in_flight=4)
    rows = by_id(annotate(make_problems(24), policy, SlowJudge(0.04), config))
    assert rows == by_id(annotate(make_problems(24), ScriptedPolicy(), ScriptedJudge(), config))
    # 0.02 s at the server and 0.04 s at the judge: four trees alone would leave the server without work most of the time.
    whole = sum(policy.time_with.values())
    busy = whole - policy.time_with[0]
    assert busy > 0.6 * whole, policy.time_with
    assert max(policy.time_with) <= 16, "trees that wait for the judge leave room for others, up to a limit"


class Batches(ScriptedPolicy):
    """A policy that computes batches; it notes when, and how many rollouts each has."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.times = seconds, []

    def generate(self, requests):
        began = time.perf_counter()
        time.sleep(self.seconds)
        answers = super().generate(requests)
        self.times.append((began, time.perf_counter(), sum(request.num_rollouts for _, request in requests)))
        return answers


def test_a_policy_that_computes_batches_computes_while_the_judge_judges():
    policy = Batches(seconds=0.05)
    config = AnnotationConfig(num_rollouts=16, rollout_budget=64, trees_in_flight=64)
    judge = SlowJudge(0.002)
    rows = by_id(annotate(make_problems(96), policy, judge, config))
    assert rows == by_id(annotate(make_problems(96), ScriptedPolicy(), ScriptedJudge(), config))
    half = policy.times[: len(policy.times) // 2]
    idle = sum(after[0] - before[1] for before, after in itertools.pairwise(half))
    assert idle < 0.2 * (half[-1][1] - half[0][0]), "the judge's time is hidden behind the policy's"
    assert sum(size for _, _, size in half) / len(half) > 128, "and its calls are large"


def test_a_request_that_fails_is_sent_once_more():
    config = AnnotationConfig(num_rollouts=4, rollout_budget=24, trees_in_flight=8)
    probe = Server(seconds=0.0)
    whole = by_id(annotate(make_problems(6), probe, ScriptedJudge(), config))
    seeds = [request.seed for request in probe.asked]
    policy = Server(seconds=0.0, fail_first=seeds[::5], broken=["p3"])
    rows = by_id(annotate(make_problems(6), policy, ScriptedJudge(), config))
    failed = rows.pop("p3")
    assert failed["status"] == "failed" and failed["reason"] == "policy: ConnectionError: the server is away"
    del whole["p3"]
    assert rows == whole
    assert max(seeds.count(seed) for seed in set(seeds)) == 1


@pytest.mark.parametrize("strategy", ["omegaprm", "flat"])
def test_no_two_samples_of_a_tree_share_a_seed_and_no_tree_depends_on_its_company(strategy):
    settings = {"strategy": strategy, "num_rollouts": 4, "rollout_budget": 80, "flat_num_solutions": 8}
    results = []
    for in_flight in (1, 256):
        policy = Server(seconds=0.0)
        config = AnnotationConfig(trees_in_flight=in_flight, **settings)
        results.append(by_id(annotate(make_problems(30), policy, ScriptedJudge(), config)))
        seeds = {}
        for request in policy.asked:
            seeds.setdefault(request.problem_id, []).extend(request.seed + i for i in range(request.num_rollouts))
        assert all(len(set(own)) == len(own) for own in seeds.values())
    assert results[0] == results[1] and len(results[0]) == 30


def test_seconds_of_the_trees_add_up_to_the_time():
    config = AnnotationConfig(num_rollouts=4, rollout_budget=24, trees_in_flight=8)
    began = time.perf_counter()
    rows = list(annotate(make_problems(20), Server(seconds=0.005), ScriptedJudge(), config))
    seconds = time.perf_counter() - began
    assert 0.8 * seconds < sum(row["cost"]["seconds"] for row in rows) <= seconds


def test_memory_does_not_grow_with_the_number_of_problems():
    config = AnnotationConfig(num_rollouts=4, rollout_budget=8, trees_in_flight=4)

    class Forgetful(ScriptedPolicy):
        def generate(self, requests):
            self.calls = []
            return super().generate(requests)

    problems = (make_problem(f"p{number:03}", question=f"{number:03} " * 10_000) for number in range(300))
    tracemalloc.start()
    for _ in annotate(problems, Forgetful(num_steps=3), ScriptedJudge(), config):
        pass
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 40_000 * 30, "never more than a tenth of the problems is there"


def test_of_equal_solutions_one_is_judged_and_caches_are_counted():
    class Repeating(ScriptedPolicy):
        def complete(self, prefix, seed):
            last = "The answer is 42." if seed % 2 else "The answer is 1."
            return Rollout((last,), "length" if seed % 4 == 3 else "finished", 1)

    class Remembering(ScriptedJudge):
        def judge(self, problem, solution):
            verdict = super().judge(problem, solution)
            return Verdict(verdict.verdict, verdict.extracted, "remembered", from_cache=verdict.verdict == "right")

    judge = Remembering()
    config = AnnotationConfig(num_rollouts=16, rollout_budget=16)
    (row,) = annotate(make_problems(1), Repeating(), judge, config)
    assert judge.num_calls == row["cost"]["judge_calls"] == 2 and row["cost"]["judge_cache_hits"] == 1
    assert row["nodes"][0]["num_right"] == 4 and row["nodes"][0]["num_judged"] == 12
    cut = [rollout for rollout in row["rollouts"] if rollout["status"] == "length"]
    assert {rollout["verdict"] for rollout in cut} == {"unknown"} and len(cut) == 4


def test_closing_a_run_takes_back_its_requests_and_does_not_wait():
    asked = []

    class Never(ScriptedPolicy):
        def submit(self, problem, request):
            asked.append(Future())
            if problem["id"] == "p0":
                asked[-1].set_result(self._one(request))
            return asked[-1]

    config = AnnotationConfig(num_rollouts=4, rollout_budget=4, trees_in_flight=4)
    rows = annotate(make_problems(10), Never(), ScriptedJudge(), config)
    assert next(rows)["problem_id"] == "p0"
    began = time.perf_counter()
    rows.close()
    assert time.perf_counter() - began < 1
    assert len(asked) > 3 and all(answer.done() for answer in asked)

    def hang(*_):
        threading.Event().wait(30)

    class Deaf:
        judge = hang

    class Interrupted(ScriptedPolicy):
        def submit(self, problem, request):
            if problem["id"] == "p3":
                raise KeyboardInterrupt
            return Never.submit(self, make_problem("p0"), request)

    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        list(annotate(make_problems(10), Interrupted(), Deaf(), config))
    assert time.perf_counter() - began < 1


def test_the_thread_of_a_policy_ends_with_it():
    class Once:
        def generate(self, requests):
            return [Generation([Rollout(("a",), "finished", 1)] * r.num_rollouts, 1) for _, r in requests]

    before = threading.active_count()
    policy = PolicyThread(Once())
    assert policy.submit(make_problem("p"), RolloutRequest("p", (), 2, 0)).result(5).rollouts[1].steps == ("a",)
    assert threading.active_count() == before + 1
    del policy
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
