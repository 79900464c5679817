from mm_prm.annotation import AnnotationConfig, FlatRollouts, Rollout
from mm_prm.data.features import validate_row


def rollout(*steps):
    return Rollout(steps, "finished", 1)


def measured(search):
    """Prefixes that the strategy asks for after its root."""
    return [request.prefix for request in search.requests()]


def answer_root(config, rollouts, verdicts):
    search = FlatRollouts("p", config)
    (request,) = search.requests()
    assert request.prefix == () and request.num_rollouts == config.flat_num_solutions
    search.receive(request, rollouts, verdicts)
    return search


def test_right_and_wrong_are_balanced_and_distinct():
    config = AnnotationConfig(strategy="flat", flat_num_solutions=6, num_rollouts=2)
    rollouts = [rollout("a", "1"), rollout("a", "1"), rollout("b", "1"), rollout("c", "2"), rollout("d", "3")]
    rollouts.append(rollout("e", "4"))
    search = answer_root(config, rollouts, ["right", "right", "right", "wrong", "unknown", "wrong"])
    assert measured(search) == [("a",), ("c",), ("b",), ("e",)]
    one_wrong = answer_root(config, rollouts, ["right", "right", "right", "wrong", "unknown", "unknown"])
    assert measured(one_wrong) == [("a",), ("c",)], "as many right ones as wrong ones"


def test_shared_prefixes_are_measured_once_and_the_last_step_not_at_all():
    config = AnnotationConfig(strategy="flat", flat_num_solutions=2, num_rollouts=3)
    search = answer_root(config, [rollout("a", "b", "c", "1"), rollout("a", "b", "x", "2")], ["right", "wrong"])
    requests = search.requests()
    assert [request.prefix for request in requests] == [
        ("a",), ("a", "b"), ("a", "b", "c"), ("a", "b", "x")
    ]  # fmt: skip
    assert all(request.num_rollouts == 3 for request in requests)
    for request in reversed(requests):  # any order will do
        assert not search.done
        search.receive(request, [rollout("z")] * 3, ["right", "unknown", "wrong"])
    assert search.done
    row = search.to_row()
    validate_row("tree", row)
    assert [(node["parent_id"], node["steps"]) for node in row["nodes"]] == [
        (-1, []), (0, ["a"]), (1, ["b"]), (2, ["c"]), (2, ["x"])
    ]  # fmt: skip
    assert {(node["num_right"], node["num_judged"]) for node in row["nodes"]} == {(1, 2)}
    assert row["cost"]["rollouts"] == 2 + 4 * 3


def test_the_budget_cuts_the_last_prefixes():
    config = AnnotationConfig(strategy="flat", flat_num_solutions=2, num_rollouts=3, rollout_budget=10)
    search = answer_root(config, [rollout("a", "b", "1"), rollout("x", "y", "2")], ["right", "wrong"])
    assert measured(search) == [("a",), ("a", "b")]


def test_nothing_is_measured_where_all_solutions_agree():
    config = AnnotationConfig(strategy="flat", flat_num_solutions=2, num_rollouts=3)
    for verdict in ("right", "wrong", "unknown"):
        search = answer_root(config, [rollout("a", "b", "1"), rollout("x", "y", "2")], [verdict] * 2)
        assert search.done and search.requests() == []
        validate_row("tree", search.to_row())
