"""A policy and a judge without a model, whose P(right) is known for every prefix.

A solution has `num_steps` steps. Each step goes wrong with probability `p_wrong`; after a wrong step every later step
is wrong too, unless one recovers with probability `p_recover`. The last step says whether the solution is right. So

    P(right | right so far, n steps to go) = (1 - p_wrong)^n       if p_recover = 0,
    P(right | wrong so far) = 0                                     if p_recover = 0.

Everything a rollout becomes follows from its own seed, `request.seed + i`, and its prefix.
"""

import random
import time

from mm_prm.annotation.protocols import Generation, Rollout, Verdict


def make_problem(name, **columns):
    return {
        "id": name,
        "images": [],
        "question": f"Question {name}?",
        "answer": "42",
        "choices": [],
        "answer_type": "integer",
        "source": "scripted",
        "subject": "",
        **columns,
    }


class ScriptedPolicy:
    def __init__(
        self, num_steps=6, p_wrong=0.15, p_recover=0.0, p_cut=0.0, num_words=3, variants=8, sleep=0.0, broken=()
    ):
        self.num_steps, self.p_wrong, self.p_recover, self.p_cut = num_steps, p_wrong, p_recover, p_cut
        self.num_words, self.variants, self.sleep = num_words, variants, sleep
        self.broken = set(broken)  # ids of problems for which it raises
        self.calls = []  # the requests of each call

    def generate(self, requests):
        self.calls.append([request for _, request in requests])
        time.sleep(self.sleep)
        for problem, request in requests:
            assert problem["id"] == request.problem_id
            if request.problem_id in self.broken:
                raise RuntimeError(f"no answer for {request.problem_id}")
        return [self._one(request) for _, request in requests]

    def _one(self, request):
        rollouts = [self.complete(request.prefix, request.seed + i) for i in range(request.num_rollouts)]
        return Generation(rollouts, prompt_tokens=10 + len(request.prefix))

    def complete(self, prefix, seed):
        draw = random.Random(repr((seed, prefix)))
        right = not prefix or prefix[-1].startswith("good")
        steps = []
        for number in range(len(prefix) + 1, self.num_steps + 1):
            right = draw.random() >= self.p_wrong if right else draw.random() < self.p_recover
            words = " ".join(f"w{draw.randrange(self.variants)}" for _ in range(draw.randint(1, self.num_words)))
            steps.append(f"{'good' if right else 'bad'} {number} {words}")
        if draw.random() < self.p_cut:
            return Rollout(tuple(steps[:-1]), "length", 4 * len(steps))
        steps[-1] += f". The answer is {42 if right else draw.randrange(41)}."
        return Rollout(tuple(steps), "finished", 4 * len(steps))

    def p_right(self, prefix):
        """P(right) of a prefix; exact for p_recover = 0."""
        if prefix and not prefix[-1].startswith("good"):
            return 0.0
        return (1 - self.p_wrong) ** (self.num_steps - len(prefix))


class ScriptedJudge:
    def __init__(self, unknown_every=0):
        self.unknown_every = unknown_every
        self.num_calls = 0

    def judge(self, problem, solution):
        self.num_calls += 1
        answer = solution[-1].rpartition("The answer is ")[2].rstrip(".")
        if self.unknown_every and sum(map(ord, "".join(solution))) % self.unknown_every == 0:
            return Verdict("unknown", answer, "cannot tell")
        return Verdict("right" if answer == problem["answer"] else "wrong", answer, "compared")


def drive(search, policy, judge, problem):
    """Run one search to its end; returns the requests in order."""
    asked = []
    while not search.done:
        for request in search.requests():
            asked.append(request)
            generation = policy.generate([(problem, request)])[0]
            verdicts = [
                judge.judge(problem, request.prefix + rollout.steps).verdict
                if rollout.status == "finished"
                else "unknown"
                for rollout in generation.rollouts
            ]
            search.receive(request, generation.rollouts, verdicts)
    return asked


def open_policy(path, **settings):
    """Opens a scripted policy as the map stage opens one of its own."""
    assert path == "scripted"
    return ScriptedPolicy(**settings)
