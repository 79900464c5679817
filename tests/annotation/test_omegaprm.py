import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import HfArgumentParser

from mm_prm.annotation import AnnotationConfig, FlatRollouts, OmegaPRM, Rollout
from mm_prm.data.features import validate_row
from tests.annotation.scripted import ScriptedJudge, ScriptedPolicy, drive, make_problem

policies = st.builds(
    ScriptedPolicy,
    num_steps=st.sampled_from([6, 4, 8, 5, 1]),
    p_wrong=st.sampled_from([0.1, 0.15, 0.2, 0.3, 1.0]),
    p_recover=st.sampled_from([0.2, 0.0]),
    p_cut=st.sampled_from([0.0, 0.3]),
    num_words=st.just(1),
    variants=st.integers(1, 3),  # few: rollouts and prefixes repeat
)
judges = st.builds(ScriptedJudge, unknown_every=st.sampled_from([0, 3, 7]))


def configs(**fixed):
    return st.builds(
        AnnotationConfig,
        num_rollouts=st.sampled_from([8, 6, 5, 4, 1]),
        rollout_budget=st.sampled_from([300, 101, 37, 9]),
        seed=st.integers(0, 2**70),
        max_search_count=st.sampled_from([30, 20, 10, 0]),
        flat_num_solutions=st.sampled_from([8, 6, 2, 1]),
        flat_solutions_per_verdict=st.integers(1, 3),
        **{name: st.just(value) for name, value in fixed.items()},
    )


def grow(strategy, config, policy=None, judge=None, name="p"):
    problem = make_problem(name)
    search = strategy(name, config)
    asked = drive(search, policy or ScriptedPolicy(), judge or ScriptedJudge(), problem)
    return asked, search.to_row()


def prefixes(row):
    """The prefix of each node, by node id."""
    found = {}
    for node in row["nodes"]:
        found[node["node_id"]] = found.get(node["parent_id"], ()) + tuple(node["steps"])
    return found


@settings(max_examples=150, deadline=None)
@given(
    config=st.one_of(configs(strategy="omegaprm"), configs(strategy="flat"), configs(ancestor_compatible=True)),
    policy=policies,
    judge=judges,
)
def test_invariants_of_every_tree(config, policy, judge):
    strategy = FlatRollouts if config.strategy == "flat" else OmegaPRM
    asked, row = grow(strategy, config, policy, judge)
    validate_row("tree", row)
    spent = sum(request.num_rollouts for request in asked)
    assert row["cost"]["rollouts"] == spent
    assert len(row["rollouts"]) == spent
    if not config.ancestor_compatible:
        assert spent <= config.rollout_budget

    seeds = [request.seed + i for request in asked for i in range(request.num_rollouts)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)

    drawn = {}
    for rollout in row["rollouts"]:
        drawn.setdefault(rollout["node_id"], []).append(rollout["verdict"])
    for node in row["nodes"]:
        verdicts = drawn.get(node["node_id"], [])
        assert 0 <= node["num_right"] <= node["num_judged"]
        if verdicts:
            assert node["num_right"] == verdicts.count("right")
            unknown = 0 if config.ancestor_compatible else verdicts.count("unknown")
            assert node["num_judged"] == len(verdicts) - unknown
        assert all(node["steps"]) and (node["steps"] or node["kind"] == "root")
    if not config.ancestor_compatible:
        assert len(set(prefixes(row).values())) == len(row["nodes"]), "a prefix is measured once"
        assert len(asked) == len(row["nodes"])

    assert grow(strategy, config, policy, judge) == (asked, row), "the same settings give the same tree"


@pytest.mark.parametrize("strategy", [OmegaPRM, FlatRollouts])
def test_seeds_depend_on_run_problem_prefix_and_number(strategy):
    config = AnnotationConfig(num_rollouts=4, flat_num_solutions=4, rollout_budget=40)
    other_run = AnnotationConfig(num_rollouts=4, flat_num_solutions=4, rollout_budget=40, seed=1)
    root = strategy("a", config).requests()[0]
    assert root.seed == strategy("a", config).requests()[0].seed
    assert root.seed != strategy("a", other_run).requests()[0].seed
    assert root.seed != strategy("b", config).requests()[0].seed


def test_settings_that_do_not_concern_a_strategy_do_not_change_its_trees():
    first = grow(OmegaPRM, AnnotationConfig(rollout_budget=200, flat_num_solutions=4))
    assert first == grow(OmegaPRM, AnnotationConfig(rollout_budget=200, flat_num_solutions=100, trees_in_flight=3))


def test_values_are_those_of_the_policy():
    policy = ScriptedPolicy(num_steps=6, p_wrong=0.2)
    config = AnnotationConfig(num_rollouts=1024, rollout_budget=60_000, max_search_count=30)
    _, row = grow(OmegaPRM, config, policy)
    by_prefix = prefixes(row)
    assert len(row["nodes"]) > 20
    for node in row["nodes"]:
        expected = policy.p_right(by_prefix[node["node_id"]])
        deviation = math.sqrt(expected * (1 - expected) / node["num_judged"])
        assert abs(node["num_right"] / node["num_judged"] - expected) <= 5 * deviation
    assert any(policy.p_right(prefix) == 0 for prefix in by_prefix.values())


def test_search_finds_the_first_wrong_step():
    """With enough rollouts, each searched rollout ends with its last right and its first wrong prefix measured."""
    policy = ScriptedPolicy(num_steps=8, p_wrong=0.1, variants=1000)
    config = AnnotationConfig(num_rollouts=64, rollout_budget=100_000, max_search_count=10, c_puct=0.0)
    _, row = grow(OmegaPRM, config, policy)
    by_prefix = prefixes(row)
    measured = {prefix: node for node_id, prefix in by_prefix.items() for node in [row["nodes"][node_id]]}
    located = 0
    for rollout in row["rollouts"]:
        if rollout["verdict"] != "wrong":
            continue
        solution = by_prefix[rollout["node_id"]] + tuple(rollout["steps"])
        first_wrong = next(i for i, step in enumerate(solution) if step.startswith("bad"))
        before, after = solution[:first_wrong], solution[: first_wrong + 1]
        if before in measured and (after in measured or after == solution):
            assert measured[before]["num_right"] > 0
            assert after == solution or measured[after]["num_right"] == 0
            located += 1
    assert located >= 10
    assert sum(node["visits"] for node in row["nodes"]) == 10


def naive_omegaprm(config, policy, judge, problem):
    """The default mode written the slow, obvious way: every pair's score from scratch in every round."""
    values, pool, visits, asked = {}, [], {}, []

    def measure(prefix):
        if len(asked) * config.num_rollouts + config.num_rollouts > config.rollout_budget:
            raise StopIteration
        seed = answers[prefix]
        rollouts = [policy.complete(prefix, seed + i) for i in range(config.num_rollouts)]
        verdicts = [
            judge.judge(problem, prefix + r.steps).verdict if r.status == "finished" else "unknown" for r in rollouts
        ]
        asked.append(prefix)
        right, judged = verdicts.count("right"), len(verdicts) - verdicts.count("unknown")
        values[prefix] = right / judged if judged else None
        wrong = {r.steps for r, v in zip(rollouts, verdicts, strict=True) if v == "wrong" and len(r.steps) > 1}
        visits[prefix] = 0
        if right:
            pool.extend((prefix, steps) for steps in wrong)

    def score(pair):
        prefix, steps = pair
        words = len(" ".join(steps).split())
        quality = config.alpha ** (1 - values[prefix]) * config.beta ** (words / config.length_scale)
        explore = config.c_puct * math.sqrt(sum(visits.values())) / (1 + visits[prefix])
        return -(quality + explore), "\n".join(steps), asked.index(prefix)

    search = OmegaPRM(problem["id"], config)  # only for the seeds, which are no part of what is compared
    answers = {request.prefix: request.seed for request in drive(search, policy, judge, problem)}
    try:
        measure(())
        for _ in range(config.max_search_count):
            if not pool:
                break
            pool.sort(key=score)
            prefix, steps = pool.pop(0)
            visits[prefix] += 1
            low, high = 0, len(steps) - 2
            while low <= high:
                middle = (low + high + (high == len(steps) - 2)) // 2  # the whole rollout counts as its last prefix
                probed = prefix + steps[: middle + 1]
                if probed not in values:
                    measure(probed)
                if values[probed] is None:
                    break
                low, high = (middle + 1, high) if values[probed] > 0 else (low, middle - 1)
    except StopIteration:
        pass
    return asked, visits


@pytest.mark.parametrize("c_puct", [0.0, 0.125, 1.0])
def test_selection_equals_scoring_every_pair_anew(c_puct):
    searches = 0
    for seed in range(25):
        config = AnnotationConfig(
            num_rollouts=6, rollout_budget=400, max_search_count=30, seed=seed, c_puct=c_puct, length_scale=20.0
        )
        policy = ScriptedPolicy(num_steps=7, p_wrong=0.2, p_recover=0.1, p_cut=0.1, variants=2)
        judge = ScriptedJudge(unknown_every=7)
        asked, row = grow(OmegaPRM, config, policy, judge)
        naive_asked, naive_visits = naive_omegaprm(config, policy, judge, make_problem("p"))
        assert [request.prefix for request in asked] == naive_asked
        by_prefix = prefixes(row)
        assert {by_prefix[node["node_id"]]: node["visits"] for node in row["nodes"]} == naive_visits
        searches += sum(naive_visits.values())
    assert searches > 250, "most trees are really searched"


def answer_root(config, rollouts, verdicts):
    search = OmegaPRM("p", config)
    (request,) = search.requests()
    search.receive(request, [Rollout(tuple(steps), "finished", 1) for steps in rollouts], verdicts)
    return search


def test_a_wrong_rollout_of_one_step_is_not_searched():
    search = answer_root(AnnotationConfig(num_rollouts=2), [["5"], ["4"]], ["wrong", "right"])
    assert search.done and search.search_count == 0
    row = search.to_row()
    assert [rollout["verdict"] for rollout in row["rollouts"]] == ["wrong", "right"], "their labels are kept"


def test_unknown_is_neither_wrong_nor_searched():
    config = AnnotationConfig(num_rollouts=3)
    rollouts = [["a", "b", "c"], ["d", "e", "f"], ["g", "h", "i"]]
    search = answer_root(config, rollouts, ["right", "unknown", "unknown"])
    assert search.done
    root = search.to_row()["nodes"][0]
    assert (root["num_right"], root["num_judged"]) == (1, 1)
    compatible = AnnotationConfig(num_rollouts=3, ancestor_compatible=True)
    search = answer_root(compatible, rollouts, ["right", "unknown", "unknown"])
    assert not search.done, "the ancestor takes unknown for wrong"


def test_a_search_ends_where_no_rollout_has_a_verdict():
    config = AnnotationConfig(num_rollouts=2)
    search = answer_root(config, [["a", "b", "c", "d"], ["x"]], ["wrong", "right"])
    (request,) = search.requests()
    assert request.prefix == ("a", "b")
    search.receive(request, [Rollout(("q",), "finished", 1)] * 2, ["unknown", "unknown"])
    assert search.done
    assert search.to_row()["nodes"][1]["num_judged"] == 0


def test_a_prefix_that_was_measured_is_not_sampled_again():
    config = AnnotationConfig(num_rollouts=3)
    search = answer_root(config, [["a", "b", "c", "d"], ["a", "b", "x", "y"], ["z"]], ["wrong", "wrong", "right"])
    (request,) = search.requests()
    assert request.prefix == ("a", "b")
    search.receive(request, [Rollout(("z",), "finished", 1)] * 3, ["right"] * 3)
    (request,) = search.requests()
    assert request.prefix == ("a", "b", "c")
    search.receive(request, [Rollout(("z",), "finished", 1)] * 3, ["wrong"] * 3)
    (request,) = search.requests()
    assert request.prefix == ("a", "b", "x"), "the second rollout's middle, (a, b), is known"


def test_parents_are_the_longest_measured_prefixes():
    search = answer_root(AnnotationConfig(num_rollouts=2), [["a", "b", "c"], ["z"]], ["wrong", "right"])
    (request,) = search.requests()
    assert request.prefix == ("a", "b")
    search.receive(request, [Rollout(("z",), "finished", 1)] * 2, ["wrong", "wrong"])
    (request,) = search.requests()
    assert request.prefix == ("a",)
    search.receive(request, [Rollout(("z",), "finished", 1)] * 2, ["right", "right"])
    nodes = search.to_row()["nodes"]
    assert [(node["parent_id"], node["steps"]) for node in nodes] == [(-1, []), (0, ["a"]), (1, ["b"])]


def test_requests_are_handed_out_once_and_answers_are_checked():
    search = OmegaPRM("p", AnnotationConfig(num_rollouts=2))
    (request,) = search.requests()
    assert search.requests() == [] and not search.done
    rollouts = [Rollout(("a",), "finished", 1)] * 2
    with pytest.raises(ValueError, match="2 rollouts were asked for, but 1 rollouts and 1 verdicts"):
        search.receive(request, rollouts[:1], ["right"])
    with pytest.raises(ValueError, match=r"rollout 1 has the steps .*: a step is stripped and not empty"):
        search.receive(request, [rollouts[0], Rollout(("a ",), "finished", 1)], ["right", "right"])
    search.receive(request, rollouts, ["right", "right"])
    with pytest.raises(ValueError, match="nobody waits"):
        search.receive(request, rollouts, ["right", "right"])


def test_two_thousand_searches_in_one_tree_take_under_two_seconds():
    policy = ScriptedPolicy(num_steps=10, p_wrong=0.1, variants=10**6)
    problem, judge = make_problem("p"), ScriptedJudge()
    config = AnnotationConfig(num_rollouts=16, rollout_budget=10**9, max_search_count=2000)
    seconds = 0.0
    began = time.perf_counter()
    search = OmegaPRM("p", config)
    while requests := search.requests():
        seconds += time.perf_counter() - began
        rollouts = policy.generate([(problem, requests[0])])[0].rollouts
        verdicts = [judge.judge(problem, rollout.steps).verdict for rollout in rollouts]
        began = time.perf_counter()
        search.receive(requests[0], rollouts, verdicts)
    seconds += time.perf_counter() - began
    assert search.search_count == 2000
    assert seconds < 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strategy": "beam"}, "strategy = 'beam': use one of 'omegaprm', 'flat'"),
        ({"num_rollouts": 0}, "num_rollouts = 0: must be at least 1"),
        ({"num_rollouts": 5000, "rollout_budget": 9000}, "num_rollouts = 5000: must not exceed 4096"),
        ({"rollout_budget": 15}, "rollout_budget = 15: does not cover the 16 rollouts of the root"),
        ({"alpha": 0.0}, "alpha = 0.0: must lie above 0"),
        ({"length_scale": 0.0}, "length_scale = 0.0: must be positive"),
        ({"max_search_count": -1}, "max_search_count = -1: must not be negative"),
        ({"c_puct": -0.1}, "c_puct = -0.1: must not be negative"),
    ],
)
def test_impossible_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        AnnotationConfig(**wrong)


def test_settings_are_read_from_the_command_line():
    arguments = ["--strategy", "flat", "--num_rollouts", "8", "--ancestor_compatible", "true", "--c_puct", "0.5"]
    (config,) = HfArgumentParser(AnnotationConfig).parse_args_into_dataclasses(arguments)
    assert config == AnnotationConfig(strategy="flat", num_rollouts=8, ancestor_compatible=True, c_puct=0.5)
