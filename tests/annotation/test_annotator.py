import itertools
import json
import threading
import weakref

import PIL.Image
import pytest

from mm_prm.annotation import AnnotationConfig, Journal, Rollout, Verdict, annotate
from mm_prm.annotation.protocols import Generation
from mm_prm.data.features import validate_rows
from tests.annotation.scripted import ScriptedJudge, ScriptedPolicy, make_problem

CONFIG = AnnotationConfig(num_rollouts=4, rollout_budget=60, flat_num_solutions=4)
IDENTITIES = {"policy_identity": "policy", "judge_identity": "judge"}


def make_problems(count):
    return [make_problem(f"p{number}") for number in range(count)]


def by_id(rows):
    """Rows by problem, without the seconds, which differ from run to run."""
    rows = list(rows)
    validate_rows("tree", rows)
    for row in rows:
        assert row["cost"].pop("seconds") >= 0
    found = {row["problem_id"]: row for row in rows}
    assert len(found) == len(rows), "one row a problem"
    return found


def run(problems, policy=None, judge=None, config=CONFIG, **kwargs):
    return by_id(annotate(problems, policy or ScriptedPolicy(), judge or ScriptedJudge(), config, **kwargs))


@pytest.mark.parametrize("strategy", ["omegaprm", "flat"])
def test_trees_do_not_depend_on_their_company(strategy):
    settings = {"strategy": strategy, "num_rollouts": 4, "rollout_budget": 60, "flat_num_solutions": 4}
    results = [
        run(make_problems(25), config=AnnotationConfig(trees_in_flight=in_flight, **settings))
        for in_flight in (1, 3, 256)
    ]
    assert results[0] == results[1] == results[2]
    assert len(results[0]) == 25
    assert any(len(row["nodes"]) > 3 for row in results[0].values())


def test_problems_are_read_as_trees_finish():
    alive = weakref.WeakSet()

    class Text(str):
        """Text that can be watched, as plain text cannot."""

    def source():
        for number in itertools.count():
            question = Text(f"Question {number}?")
            alive.add(question)
            yield make_problem(f"p{number}", question=question)

    config = AnnotationConfig(num_rollouts=4, rollout_budget=60, trees_in_flight=5)
    rows = annotate(source(), ScriptedPolicy(), ScriptedJudge(), config)
    most = 0
    for _ in itertools.islice(rows, 100):
        most = max(most, len(alive))
    assert 5 <= most <= 4 * 5 + 3, "trees that wait for the judge may come on top"
    rows.close()


def test_cost_is_counted():
    policy, judge = ScriptedPolicy(p_cut=0.2, variants=2), ScriptedJudge()
    progress = []
    rows = run(make_problems(10), policy, judge, on_progress=progress.append)
    requests = [request for call in policy.calls for request in call]
    for row in rows.values():
        own = [request for request in requests if request.problem_id == row["problem_id"]]
        assert row["cost"]["rollouts"] == sum(request.num_rollouts for request in own) == len(row["rollouts"])
        assert row["cost"]["prompt_tokens"] == sum(10 + len(request.prefix) for request in own)
        finished = [(r["node_id"], *r["steps"]) for r in row["rollouts"] if r["status"] == "finished"]
        assert row["cost"]["judge_calls"] == len(set(finished)) < len(row["rollouts"]), "equal ones are judged once"
        assert row["cost"]["judge_cache_hits"] == 0
        assert row["cost"]["generated_tokens"] > 0
        cut = [rollout for rollout in row["rollouts"] if rollout["status"] == "length"]
        assert cut and all(rollout["verdict"] == "unknown" for rollout in cut)
    total = progress[-1]
    assert (total.trees_done, total.trees_failed, total.trees_from_journal, total.trees_in_flight) == (10, 0, 0, 0)
    assert (total.rollouts_at_policy, total.solutions_at_judge) == (0, 0)
    assert total.labels == sum(node["num_judged"] > 0 for row in rows.values() for node in row["nodes"][1:])
    for name in ("rollouts", "prompt_tokens", "generated_tokens", "judge_calls"):
        assert getattr(total, name) == sum(row["cost"][name] for row in rows.values())
    assert total.judge_calls == judge.num_calls
    assert [p.trees_done for p in progress] == sorted(p.trees_done for p in progress)
    assert total.seconds > 0


def test_the_row_names_its_settings():
    rows = run(make_problems(1), policy_identity="my policy", judge_identity="my judge")
    settings = json.loads(rows["p0"]["settings"])
    assert settings["policy"] == "my policy" and settings["judge"] == "my judge"
    assert settings["num_rollouts"] == 4 and "flat_num_solutions" not in settings


def test_one_problem_that_fails_does_not_touch_the_others():
    problems = make_problems(20)
    whole = run(problems)
    policy = ScriptedPolicy(broken=["p3", "p11"])
    rows = run(problems, policy)
    for name in ("p3", "p11"):
        failed = rows.pop(name)
        assert failed["status"] == "failed" and failed["nodes"] == []
        assert failed["reason"] == f"policy: RuntimeError: no answer for {name}"
        alone = [call for call in policy.calls if [request.problem_id for request in call] == [name]]
        assert len(alone) == 2, "alone, and once more"
        whole.pop(name)
    assert rows == whole


class Moody:
    """A policy that fails on every other call, whatever it is asked."""

    def __init__(self):
        self.policy, self.count = ScriptedPolicy(), 0

    def generate(self, requests):
        self.count += 1
        if self.count % 2:
            raise TimeoutError("try again")
        return self.policy.generate(requests)


def test_a_passing_failure_leaves_no_trace():
    config = AnnotationConfig(num_rollouts=4, rollout_budget=60, trees_in_flight=1)
    assert run(make_problems(5), Moody(), config=config) == run(make_problems(5))


def test_a_policy_that_breaks_its_promises_is_named():
    class Short:
        def generate(self, requests):
            return [Generation([Rollout(("a",), "finished", 1)], 1) for _ in requests]

    class Blank:
        def generate(self, requests):
            return [Generation([Rollout(("a", " "), "finished", 1)] * r.num_rollouts, 1) for _, r in requests]

    class Surrogate:
        def generate(self, requests):
            return [Generation([Rollout(("a\ud800",), "finished", 1)] * r.num_rollouts, 1) for _, r in requests]

    class Silent:
        def generate(self, requests):
            return []

    for policy, reason in (
        (Short(), "the policy wrote 1 rollouts; 4 were asked for"),
        (Blank(), "a step is stripped and not empty"),
        (Surrogate(), "half of a surrogate pair"),
        (Silent(), "answered 1 requests with 0 generations"),
    ):
        row = run(make_problems(1), policy)["p0"]
        assert row["status"] == "failed" and reason in row["reason"]


def test_a_judge_that_fails_is_asked_again_and_never_makes_a_rollout_wrong():
    class Flaky(ScriptedJudge):
        def __init__(self, dead_for=()):
            super().__init__()
            self.of_thread, self.dead_for = threading.local(), dead_for

        def judge(self, problem, solution):
            self.of_thread.failing = not getattr(self.of_thread, "failing", False)
            if self.of_thread.failing or problem["id"] in self.dead_for:
                raise ConnectionError("the judge's server is away")
            return super().judge(problem, solution)

    rows, whole = run(make_problems(6), judge=Flaky()), run(make_problems(6))
    for name, row in rows.items():
        expected = whole[name]
        assert row["cost"].pop("judge_calls") == 2 * expected["cost"].pop("judge_calls")
    assert rows == whole

    rows = run(make_problems(6), judge=Flaky(dead_for=["p2"]))
    assert rows["p2"]["status"] == "failed" and "ConnectionError: the judge's server is away" in rows["p2"]["reason"]
    assert all(row["status"] == "complete" for name, row in rows.items() if name != "p2")


def test_bad_problems_are_listed_with_their_reason(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    good = tmp_path / "good.png"
    PIL.Image.new("RGB", (4, 4)).save(good)
    problems = [
        make_problem("good", images=[{"path": str(good), "bytes": None}, {"path": None, "bytes": good.read_bytes()}]),
        make_problem("broken", images=[{"path": str(broken), "bytes": None}]),
        make_problem("missing", images=[{"path": str(tmp_path / "none.png"), "bytes": None}]),
        make_problem("no answer", answer=" "),
        {"id": "no columns"},
        make_problem("other columns", nodes=[], difficulty=3),
    ]
    seen = []

    class Looking(ScriptedPolicy):
        def generate(self, requests):
            seen.extend(image for problem, _ in requests for image in problem["images"])
            return super().generate(requests)

    rows = run(problems, Looking())
    assert {name: row["status"] for name, row in rows.items()} == {
        "good": "complete",
        "broken": "failed",
        "missing": "failed",
        "no answer": "skipped",
        "no columns": "skipped",
        "other columns": "complete",
    }
    assert "problem 'broken': images[0] cannot be read" in rows["broken"]["reason"]
    assert "none.png" in rows["missing"]["reason"]
    assert "answer = ' ': must not be empty" in rows["no answer"]["reason"]
    assert seen and all(isinstance(image, PIL.Image.Image) for image in seen), "the policy gets decoded images"


def test_finished_trees_come_from_the_journal_without_a_policy(tmp_path):
    path = tmp_path / "trees.journal.sqlite"
    first = run(make_problems(8), journal=path, **IDENTITIES)
    with Journal(path) as journal:
        assert by_id(journal) == first

    def open_policy():
        raise AssertionError("nobody needs the policy")

    progress = []
    arguments = {"journal": path, "on_progress": progress.append, **IDENTITIES}
    assert by_id(annotate(make_problems(8), open_policy, open_policy, CONFIG, **arguments)) == first
    assert progress[-1].trees_from_journal == progress[-1].trees_done == 8

    opened = []
    more = by_id(
        annotate(make_problems(10), lambda: opened.append(1) or ScriptedPolicy(), ScriptedJudge, CONFIG, **arguments)
    )
    assert len(opened) == 1
    assert {name: more[name] for name in first} == first and len(more) == 10
    assert {row["status"] for row in more.values()} == {"complete"}


def test_the_key_holds_all_that_changes_a_tree(tmp_path):
    path = tmp_path / "trees.journal.sqlite"
    image = PIL.Image.new("RGB", (4, 4), "red")
    problem = make_problem("p", images=[image])

    def num_calls(problem=problem, config=CONFIG, **identities):
        policy = ScriptedPolicy()
        run([problem], policy, config=config, journal=path, **{**IDENTITIES, **identities})
        return len(policy.calls)

    assert num_calls() > 0
    assert num_calls() == 0
    other_image = image.copy()
    other_image.putpixel((0, 0), (0, 0, 255))
    for changed in (
        {"problem": {**problem, "question": "Another?"}},
        {"problem": {**problem, "id": "q"}},
        {"problem": {**problem, "images": [other_image]}},
        {"config": AnnotationConfig(num_rollouts=4, rollout_budget=60, seed=1)},
        {"config": AnnotationConfig(num_rollouts=5, rollout_budget=60)},
        {"policy_identity": "another policy"},
        {"judge_identity": "another judge"},
    ):
        assert num_calls(**changed) > 0, changed
        assert num_calls(**changed) == 0, changed
    assert num_calls(config=AnnotationConfig(num_rollouts=4, rollout_budget=60, trees_in_flight=7)) == 0
    assert num_calls({**problem, "images": [image.convert("RGBA")], "subject": "other"}) == 0


def test_a_journal_needs_to_know_policy_and_judge(tmp_path):
    with pytest.raises(ValueError, match="a journal needs policy_identity and judge_identity"):
        annotate([], ScriptedPolicy(), ScriptedJudge(), CONFIG, journal=tmp_path / "j", policy_identity="policy")


def test_what_failed_is_tried_again_by_the_next_run(tmp_path):
    path = tmp_path / "trees.journal.sqlite"
    rows = run(make_problems(4), ScriptedPolicy(broken=["p1"]), journal=path, **IDENTITIES)
    assert rows["p1"]["status"] == "failed"
    with Journal(path) as journal:
        assert by_id(journal) == rows, "and is in the journal with its reason"
    policy = ScriptedPolicy()
    rows = run(make_problems(4), policy, journal=path, **IDENTITIES)
    assert all(row["status"] == "complete" for row in rows.values())
    assert {request.problem_id for call in policy.calls for request in call} == {"p1"}
    with Journal(path) as journal:
        assert by_id(journal) == rows


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, GeneratorExit])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, interruption):
    path = tmp_path / "trees.journal.sqlite"
    config = AnnotationConfig(num_rollouts=4, rollout_budget=60, trees_in_flight=3)

    class Interrupted(ScriptedPolicy):
        def generate(self, requests):
            if len(self.calls) == 20:
                raise KeyboardInterrupt
            return super().generate(requests)

    policy = Interrupted() if interruption is KeyboardInterrupt else ScriptedPolicy()
    rows = annotate(make_problems(12), policy, ScriptedJudge(), config, journal=path, **IDENTITIES)
    seen = []
    if interruption is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            seen.extend(rows)
    else:
        seen.append(next(rows))
        rows.close()
    with Journal(path) as journal:  # not locked any more
        assert list(journal) == seen
    assert 0 < len(seen) < 12
    assert run(make_problems(12), config=config, journal=path, **IDENTITIES) == run(make_problems(12), **IDENTITIES)


def test_a_policy_that_cannot_be_opened_ends_the_run():
    def open_policy():
        raise OSError("no such checkpoint")

    with pytest.raises(OSError, match="no such checkpoint"):
        list(annotate(make_problems(3), open_policy, ScriptedJudge(), CONFIG))


def test_a_rollout_without_an_answer_is_not_shown_to_the_judge():
    class Cut:
        def generate(self, requests):
            return [Generation([Rollout((), "unparsable", 7)] * r.num_rollouts, 5) for _, r in requests]

    class Deaf:
        def judge(self, problem, solution) -> Verdict:
            raise AssertionError("nothing to judge")

    row = run(make_problems(1), Cut(), Deaf())["p0"]
    assert row["status"] == "complete"
    assert (row["nodes"][0]["num_judged"], row["cost"]["judge_calls"], row["cost"]["generated_tokens"]) == (0, 0, 28)
