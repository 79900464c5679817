"""
The program whose runs `test_kill` kills.

It imports everything once. For each line `JUDGE JOURNAL REPORT` that it reads it forks a run, which annotates into the
journal and appends each row to the report; it prints the run's process id, and its exit status when it has ended.
"""

import json
import os
import random
import sys
import traceback

from mm_prm.annotation import AnnotationConfig, annotate
from mm_prm.annotation.protocols import Rollout
from mm_prm.judges import RulesJudge
from tests.annotation.scripted import ScriptedJudge, ScriptedPolicy, make_problem

CONFIG = AnnotationConfig(num_rollouts=4, rollout_budget=60, trees_in_flight=4)
IDENTITIES = {"policy_identity": "scripted", "judge_identity": "scripted"}


class FormulaPolicy(ScriptedPolicy):
    """Its answers are formulas, which rules compare in a process of their own."""

    def complete(self, prefix, seed):
        rollout = super().complete(prefix, seed)
        number = 42 if "The answer is 42." in rollout.steps[-1] else 100 + random.Random(seed).randrange(900)
        last = rollout.steps[-1].partition(". The answer is")[0] + f". The answer is $\\sqrt{{{number}}} + x$."
        return Rollout((*rollout.steps[:-1], last), "finished", rollout.num_tokens)


def make_parts(judge):
    """The problems, the policy and the judge of a run."""
    if judge == "rules":
        problems = [make_problem(f"p{number}", answer="$x + \\sqrt{42}$", answer_type="") for number in range(8)]
        return problems, FormulaPolicy(sleep=0.005), RulesJudge()
    return [make_problem(f"p{number}") for number in range(80)], ScriptedPolicy(sleep=0.005), ScriptedJudge()


def main(judge, path, report):
    problems, policy, judge = make_parts(judge)
    with open(report, "w") as stream:
        for row in annotate(problems, policy, judge, CONFIG, journal=path, **IDENTITIES):
            stream.write(json.dumps(row) + "\n")
            stream.flush()


if __name__ == "__main__":
    for line in sys.stdin:
        process = os.fork()
        if not process:
            status = 1
            try:
                main(*line.split())
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
