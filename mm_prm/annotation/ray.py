"""
Annotation over the machines of a Ray cluster: the same function in every worker, the journal in the driver.

Ray Data hands problems, with their pictures, to workers that each hold a policy and a judge; trees come back, and the
driver commits and yields them. What a lost worker or node had not handed back is computed again elsewhere.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import datasets
import pyarrow as pa
from datasets.table import embed_table_storage

from mm_prm.annotation.annotator import Annotation, Progress
from mm_prm.annotation.config import AnnotationConfig
from mm_prm.annotation.journal import Journal
from mm_prm.annotation.protocols import Judge, Policy
from mm_prm.annotation.schedule import num_labels


@dataclass(frozen=True)
class RayWorkers:
    """
    What annotates where.

    Args:
        number (`int`, *optional*, defaults to `1`):
            Workers, each with a policy of its own.
        num_cpus (`float`, *optional*, defaults to `1.0`):
            Processor cores of a worker.
        num_gpus (`float`, *optional*, defaults to `0.0`):
            GPUs of a worker.
        problems_at_once (`int`, *optional*, defaults to `64`):
            Problems that a worker is given together. Their trees are in the journal when all of them are finished.
        address (`str`, *optional*):
            The cluster; that of `RAY_ADDRESS`, or else a new one on this machine, if not given.
    """

    number: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    problems_at_once: int = 64
    address: str | None = None

    def __post_init__(self) -> None:
        for name in ("number", "problems_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be at least 1")


def annotate_on_ray(
    problems: datasets.Dataset,
    open_policy: Callable[[], Policy],
    open_judge: Callable[[], Judge],
    config: AnnotationConfig,
    workers: RayWorkers,
    journal: str | os.PathLike[str] | Journal | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    *,
    judge_concurrency: int = 64,
    policy_identity: str = "",
    judge_identity: str = "",
) -> Iterator[dict[str, Any]]:
    """
    Grow a tree for each problem, as [`annotate`] does, in the workers of a Ray cluster.

    Args:
        problems (`datasets.Dataset`):
            Problem rows.
        open_policy, open_judge (`Callable`):
            Functions without arguments that open policy and judge; they travel to the workers.
        config, journal, on_progress, judge_concurrency, policy_identity, judge_identity:
            As for [`annotate`].
        workers ([`RayWorkers`]):
            What annotates where.

    Returns:
        `Iterator[dict]`: Tree rows, in the order in which they come back.
    """
    check_ray()
    import ray
    import ray.data

    if journal is not None and not (policy_identity and judge_identity):
        raise ValueError("a journal needs policy_identity and judge_identity")
    driver = Annotation(open_policy, open_judge, config, None, judge_concurrency, policy_identity, judge_identity)
    arguments = (open_policy, open_judge, config, judge_concurrency, policy_identity, judge_identity)
    progress, began = Progress(), time.perf_counter()

    def report(row: dict[str, Any], is_new: bool) -> None:
        progress.trees_done += 1
        progress.trees_failed += row["status"] != "complete"
        progress.trees_from_journal += not is_new and row["status"] == "complete"
        if is_new:
            progress.labels += num_labels(row["nodes"])
            for name in ("rollouts", "prompt_tokens", "generated_tokens", "judge_calls", "judge_cache_hits"):
                setattr(progress, name, getattr(progress, name) + row["cost"][name])
        progress.seconds = time.perf_counter() - began
        if on_progress is not None:
            on_progress(replace(progress))

    with ExitStack() as stack:
        if journal is not None and not isinstance(journal, Journal):
            journal = stack.enter_context(Journal(journal))
        keys: dict[int, str] = {}  # of the problems that have no tree yet
        for index, known in driver.known_rows(problems, journal):
            if isinstance(known, str):
                keys[index] = known
            else:
                report(known, is_new=False)
                yield known
        if not keys:
            return
        if not ray.is_initialized():
            ray.init(address=workers.address, log_to_driver=False)
            stack.callback(ray.shutdown)
        blocks = [ray.put(block) for block in _blocks(problems, list(keys), workers.problems_at_once)]
        trees = ray.data.from_arrow_refs(blocks).map_batches(
            _Worker,
            fn_constructor_args=arguments,
            batch_size=workers.problems_at_once,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers.number),
            num_cpus=workers.num_cpus,
            num_gpus=workers.num_gpus,
        )
        for returned in trees.iter_rows():
            key = keys.pop(returned["index"], None)
            if key is None:  # a block that was computed again
                continue
            row = json.loads(returned["tree"])
            if journal is not None:
                journal.commit(key, row)
            report(row, is_new=True)
            yield row


def check_ray() -> None:
    """Raises `ValueError` where Ray is not installed."""
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"Ray cannot be imported ({error}): install it (`pip install 'mm-prm[ray]'`), or annotate on this machine"
        ) from error


def _blocks(problems: datasets.Dataset, indices: list[int], size: int) -> Iterator[pa.Table]:
    """Problems as Arrow tables that hold their pictures: the files may not be there where the workers are."""
    for start in range(0, len(indices), size):
        chosen = indices[start : start + size]
        table = problems.select(chosen).with_format("arrow")[:]
        yield embed_table_storage(table).append_column("index", pa.array(chosen, pa.int64()))


class _Worker:
    """Holds policy and judge in a process of Ray's."""

    def __init__(self, open_policy: Any, open_judge: Any, config: AnnotationConfig, *settings: Any):
        self._annotation = Annotation(open_policy, open_judge, config, None, *settings)

    def __call__(self, batch: pa.Table) -> pa.Table:
        problems = batch.to_pylist()
        rows = list(self._annotation.rows(problems, None))
        return pa.table(
            {
                "index": pa.array([problems[number]["index"] for number, _ in rows], pa.int64()),
                "tree": pa.array([json.dumps(row) for _, row in rows], pa.large_string()),
            }
        )
