"""Annotation on a Ray cluster of two nodes, one of which is killed half way: the trees of a run on one machine."""

import os
import time
from functools import partial
from pathlib import Path

import pytest
from datasets import Dataset

from mm_prm.annotation import AnnotationConfig, Journal, annotate
from mm_prm.data.features import PROBLEM_FEATURES
from tests.annotation.scripted import ScriptedJudge, ScriptedPolicy, make_problem

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'mm-prm[ray]'")

CONFIG = AnnotationConfig(num_rollouts=4, rollout_budget=20, trees_in_flight=8)
IDENTITIES = {"policy_identity": "scripted", "judge_identity": "scripted"}
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}


def open_policy(opened):
    """Leaves a file named after the node and the process that opens it, and waits until both workers are there."""
    Path(opened, f"{ray.get_runtime_context().get_node_id()} {os.getpid()}").touch()
    while len(os.listdir(opened)) < 2:
        time.sleep(0.1)
    return ScriptedPolicy(sleep=0.02)


def by_id(rows):
    rows = list(rows)
    found = {row["problem_id"]: {**row, "cost": {**row["cost"], "seconds": 0.0}} for row in rows}
    assert len(found) == len(rows), "each once"
    return found


@pytest.fixture
def cluster(monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.timeout(900)  # a dozen processes start, which takes its time on a busy machine
def test_a_node_is_killed_half_way(cluster, tmp_path):
    from mm_prm.annotation.ray import RayWorkers, annotate_on_ray

    second = cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False)
    nodes = {node["NodeID"] for node in ray.nodes()}
    assert len(nodes) == 2
    problems = [make_problem(f"p{number}") for number in range(24)]
    problems[5]["answer"] = ""
    dataset = Dataset.from_list(problems, features=PROBLEM_FEATURES)
    path, opened = tmp_path / "trees.journal.sqlite", tmp_path / "opened"
    opened.mkdir()
    with Journal(path) as journal:  # some trees are there from an earlier run
        list(annotate(problems[:4], ScriptedPolicy(), ScriptedJudge(), CONFIG, journal, **IDENTITIES))
    workers = RayWorkers(number=2, num_cpus=0.5, problems_at_once=2)
    progress, rows = [], []
    trees = annotate_on_ray(
        dataset, partial(open_policy, opened), ScriptedJudge, CONFIG, workers, path, progress.append, **IDENTITIES
    )
    for row in trees:
        rows.append(row)
        if len(rows) == 8:
            assert {file.name.split()[0] for file in opened.iterdir()} == nodes, "each node works"
            cluster.remove_node(second, allow_graceful=False)
    assert len(list(opened.iterdir())) == 3, "the lost worker was started again, on the node that is left"
    assert wait_for_one_node() == 1
    found = by_id(rows)
    assert found == by_id(annotate(problems, ScriptedPolicy(), ScriptedJudge(), CONFIG, **IDENTITIES))
    assert found["p5"]["status"] == "skipped" and len(found) == 24
    assert progress[-1].trees_done == 24 and progress[-1].trees_from_journal == 4
    with Journal(path) as journal:
        assert by_id(journal) == {name: row for name, row in found.items() if name != "p5"}
    # Everything is in the journal now: no worker is asked, and there is nothing that could be opened.
    assert by_id(annotate_on_ray(dataset, None, None, CONFIG, workers, path, **IDENTITIES)) == found


def wait_for_one_node():
    """The number of nodes that are alive, once the cluster has noticed."""
    for _ in range(60):
        alive = sum(node["Alive"] for node in ray.nodes())
        if alive == 1:
            break
        time.sleep(1)
    return alive
