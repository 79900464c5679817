"""The program that `test_kill` kills: annotates into a journal and appends each row to a report."""

import json
import sys

from mm_prm.annotation import AnnotationConfig, annotate
from tests.annotation.scripted import ScriptedJudge, ScriptedPolicy, make_problem

CONFIG = AnnotationConfig(num_rollouts=4, rollout_budget=60, trees_in_flight=4)
IDENTITIES = {"policy_identity": "scripted", "judge_identity": "scripted"}


def make_problems(count):
    return [make_problem(f"p{number}") for number in range(count)]


def main(path, report, count):
    policy = ScriptedPolicy(sleep=0.005)
    with open(report, "w") as stream:
        for row in annotate(make_problems(count), policy, ScriptedJudge(), CONFIG, journal=path, **IDENTITIES):
            stream.write(json.dumps(row) + "\n")
            stream.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
