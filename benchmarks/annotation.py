"""
    VLLM_CPU_KVCACHE_SPACE=2 python benchmarks/annotation.py --num_engines 2 --judge_delay 0 0.2 --engine_settings '{"enforce_eager": true, "dtype": "float32"}'

Step labels a second: `annotate` against MM-PRM's own loop. That grows one tree at a time, sends a prompt 16 times for 16
rollouts, has the steps so far in the user turn, and waits for all rollouts, then for all verdicts (from 32 threads), before
it asks for more. Same engine, model, problems, seeds and judge, which may be told to take longer, as one behind a server
does.

Both grow the same trees, to the last rollout, so a label is the same thing: the value of a measured prefix. In each turn
`annotate` goes first and its rollouts are kept. The loop's search is given them; its engine writes from the loop's own
prompts as many tokens as they have, which are thrown away. What the engine has cached of the prompts by then serves the
loop. "engine alone" is the limit: all requests of the trees at once, as if they were known before, and nobody judges.
Of several engines (`--num_engines`) `annotate` has all; the loop, whose tree one engine grows, has one of its own beside
them, which vLLM gives the cores that it gives to a single one.
Each turn has problems of its own; one of a few problems comes first, to warm up.

- busy: share of the time in which the engine had at least one request that it had not answered.
- at once: rollouts that the engine had been asked for and had not handed back, on average over the time.

On a GPU, with the embedded policy, and with a model of 2.2 B parameters with random weights that writes rollouts of 256 tokens
about pictures of 256 tokens; the loop takes the first problems of a turn only, and rates are compared (where CUDA graphs
cannot be made, --engine_settings '{"enforce_eager": true}'):

    python benchmarks/annotation.py --num_engines 2 --num_problems 320 --baseline_problems 8 --trees_in_flight 128
        --rollout_budget 112 --judge_delay 0 0.2 --judge_concurrency 1024 --repeats 2 --output_json mini.json
    python benchmarks/annotation.py --model random --num_engines 3 --num_problems 448 --baseline_problems 6
        --trees_in_flight 160 --rollout_budget 112 --judge_concurrency 512 --repeats 2 --output_json random.json
        --engine_settings '{"compilation_config": {"max_cudagraph_capture_size": 1024}}'
"""

import argparse
import itertools
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from annotation_engines import RandomModelEngine, TransformersEngine, VLLMEngine, make_random_model
from timing import make_parser, report

from mm_prm.annotation import AnnotationConfig, OmegaPRM, annotate
from mm_prm.annotation.protocols import Generation, Judge, Policy, Problem, RolloutRequest, Verdict
from mm_prm.annotation.schedule import num_labels
from mm_prm.data.mini import generate_problems
from mm_prm.embedded import model_path
from mm_prm.judges import RulesJudge

LOOP, OURS, LIMIT = "one tree at a time", "annotate", "engine alone"
_JUDGE_THREADS_OF_LOOP = 32
_LABELS = 1000
_WARM_UP = 4


class Meter:
    """Whether an engine has work, and how much."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = self._looked = time.perf_counter()
        self._rollouts, self._busy, self._sum = 0, 0.0, 0.0

    def add(self, num_rollouts: int) -> None:
        """Counts rollouts that were asked for, or, below 0, handed back."""
        with self._lock:
            now = time.perf_counter()
            self._busy += (now - self._looked) * (self._rollouts > 0)
            self._sum += (now - self._looked) * self._rollouts
            self._looked = now
            self._rollouts += num_rollouts

    def read(self) -> dict[str, float]:
        """The time since it was made, and what it saw."""
        self.add(0)
        seconds = self._looked - self._began
        return {"seconds": seconds, "busy": self._busy / seconds, "at_once": self._sum / seconds}


class Watched:
    """A policy whose work is metered and whose rollouts are kept."""

    def __init__(self, policy: Policy, meter: Meter, kept: dict[RolloutRequest, Generation]):
        self._policy, self._meter, self._kept = policy, meter, kept

    def generate(self, requests: Sequence[tuple[Problem, RolloutRequest]]) -> list[Generation]:
        """Answers requests, as the policy does."""
        num_rollouts = sum(request.num_rollouts for _, request in requests)
        self._meter.add(num_rollouts)
        generations = self._policy.generate(requests)
        self._meter.add(-num_rollouts)
        for (_, request), generation in zip(requests, generations, strict=True):
            self._kept[request] = generation
        return generations


class WatchedEngine(Watched):
    """The same for a policy that takes further requests while it works on others."""

    def submit(self, problem: Problem, request: RolloutRequest) -> "Future[Generation]":
        """Sends a request, as the policy does."""
        self._meter.add(request.num_rollouts)
        future = self._policy.submit(problem, request)

        def answered(future: "Future[Generation]") -> None:
            self._meter.add(-request.num_rollouts)
            self._kept[request] = future.result()

        future.add_done_callback(answered)
        return future


class SlowJudge:
    """A judge that takes longer, as one behind a server."""

    def __init__(self, judge: Judge, delay: float):
        self._judge, self._delay = judge, delay

    def judge(self, problem: Problem, solution: Sequence[str]) -> Verdict:
        """What the judge says."""
        time.sleep(self._delay)
        return self._judge.judge(problem, solution)


def grow_all(
    engine: Any, problems: list[Problem], judge: Judge, config: AnnotationConfig, concurrency: int
) -> tuple[dict[str, dict], dict[RolloutRequest, Generation], dict[str, float]]:
    """`annotate` with a journal; the trees by their problem, the rollouts by their request, and what the meter saw."""
    kept: dict[RolloutRequest, Generation] = {}
    meter = Meter()
    policy = (Watched if isinstance(engine, TransformersEngine) else WatchedEngine)(engine, meter, kept)
    identities = {"policy_identity": "benchmark", "judge_identity": "benchmark"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trees.journal.sqlite")
        rows = list(annotate(problems, policy, judge, config, path, judge_concurrency=concurrency, **identities))
        seen = meter.read()
    for row in rows:
        if row["status"] != "complete":
            raise RuntimeError(f"{row['problem_id']}: {row['status']}: {row['reason']}")
    return {row["problem_id"]: row for row in rows}, kept, seen


def grow_one_by_one(
    engine: Any,
    problems: list[Problem],
    judge: Judge,
    config: AnnotationConfig,
    kept: dict[RolloutRequest, Generation],
) -> tuple[dict[str, dict], dict[str, float]]:
    """MM-PRM's loop over the same trees."""
    rows = {}
    meter = Meter()
    with ThreadPoolExecutor(_JUDGE_THREADS_OF_LOOP) as threads:
        for problem in problems:

            def verdict(solution: tuple[str, ...], problem: Problem = problem) -> str:
                return judge.judge(problem, solution).verdict

            search = OmegaPRM(problem["id"], config)
            while not search.done:
                [request] = search.requests()
                rollouts = kept[request].rollouts
                meter.add(len(rollouts))
                engine.write_copies(problem, request, [rollout.num_tokens for rollout in rollouts])
                meter.add(-len(rollouts))
                judged = threads.map(
                    verdict, [request.prefix + rollout.steps for rollout in rollouts if rollout.status == "finished"]
                )
                verdicts = [next(judged) if rollout.status == "finished" else "unknown" for rollout in rollouts]
                search.receive(request, rollouts, verdicts)
            rows[problem["id"]] = search.to_row()
    return rows, meter.read()


def ask_for_all(engine: Any, problems: list[Problem], kept: dict[RolloutRequest, Generation]) -> dict[str, float]:
    """The engine with every request of the trees at once."""
    by_id = {problem["id"]: problem for problem in problems}
    meter = Meter()
    Watched(engine, meter, {}).generate([(by_id[request.problem_id], request) for request in kept])
    return meter.read()


def run_turn(
    args: argparse.Namespace, engine: Any, loop_engine: Any, judge: Judge, first: int, number: int
) -> dict[str, dict[str, float]]:
    """Each way once over the problems; what it did in how many seconds."""
    config = AnnotationConfig(
        num_rollouts=args.num_rollouts, rollout_budget=args.rollout_budget, trees_in_flight=args.trees_in_flight
    )
    problems = list(generate_problems("annotation", number, first))
    trees, kept, ours = grow_all(engine, problems, judge, config, args.judge_concurrency)
    loop_trees, loop = grow_one_by_one(loop_engine, problems[: args.baseline_problems], judge, config, kept)
    for name, tree in loop_trees.items():
        if any(tree[part] != trees[name][part] for part in ("nodes", "rollouts")):
            raise AssertionError(f"{name}: the two ways grew different trees")

    def did(rows: dict[str, dict]) -> dict[str, float]:
        return {
            "labels": sum(num_labels(row["nodes"]) for row in rows.values()),
            "rollouts": sum(len(row["rollouts"]) for row in rows.values()),
            "tokens": sum(
                rollout.num_tokens
                for request, generation in kept.items()
                if request.problem_id in rows
                for rollout in generation.rollouts
            ),
        }

    turn = {
        LOOP: did(loop_trees) | loop,
        OURS: did(trees) | ours,
        LIMIT: did(trees) | ask_for_all(engine, problems, kept),
    }
    told = ", ".join(f"{name} {seen['labels']} labels in {seen['seconds']:.0f} s" for name, seen in turn.items())
    print(f"{number} problems: {told}", file=sys.stderr, flush=True)
    return turn


def make_table(turns: list[dict[str, dict[str, float]]], case: str) -> dict:
    """Prints the table of some turns and returns it."""

    def spread(values: list[float]) -> dict[str, float]:
        return {"median": median(values), "low": min(values), "high": max(values)}

    rows: dict[str, dict[str, Any]] = {}
    for name in (LOOP, OURS, LIMIT):
        seconds = spread([_LABELS * turn[name]["seconds"] / turn[name]["labels"] for turn in turns])
        speeds = [turn[name]["labels"] / turn[name]["seconds"] for turn in turns]
        baseline = [turn[LOOP]["labels"] / turn[LOOP]["seconds"] for turn in turns]
        rows[name] = {
            "seconds": seconds,
            "labels_per_second": _LABELS / seconds["median"],
            "times_baseline": spread([ours / loop for ours, loop in zip(speeds, baseline, strict=True)]),
            **{
                f"{what}_per_second": median(turn[name][what] / turn[name]["seconds"] for turn in turns)
                for what in ("rollouts", "tokens")
            },
            **{what: spread([turn[name][what] for turn in turns]) for what in ("busy", "at_once")},
        }
    print(f"\n{case}: {sum(turn[OURS]['labels'] for turn in turns):.0f} labels in {len(turns)} turns")
    print(
        f"{'':{len(LOOP)}}  {'labels/s':>9}  {'rollouts/s':>10}  {'tokens/s':>9}  {'busy':>22}  {'at once':>8}  {'ratio':>22}"
    )
    for name, row in rows.items():
        print(
            f"{name:{len(LOOP)}}  {row['labels_per_second']:9,.2f}  {row['rollouts_per_second']:10,.1f}  "
            f"{row['tokens_per_second']:9,.0f}  {_text(row['busy'], '.1%'):>22}  {row['at_once']['median']:8,.1f}  "
            f"{_text(row['times_baseline'], '.2f'):>22}"
        )
    return {"case": case, "baseline": LOOP, "amount": _LABELS, "unit": "labels", "variants": rows, "turns": turns}


def _text(value: dict[str, float], form: str) -> str:
    return f"{value['median']:{form}} ({value['low']:{form}}–{value['high']:{form}})"


def open_engines(args: argparse.Namespace, folder: Path) -> tuple[Any, Any]:
    """The engine with its model, and that of the loop: the same one, unless there are several."""
    if args.num_engines == 1:
        engine = open_engine(args, folder)
        return engine, engine
    engine = open_engine(args, folder, num_engines=args.num_engines, **_share_of_memory(0.7))
    loop_engine = open_engine(args, folder, **_share_of_memory(0.2))
    if args.model == "random":
        loop_engine.know_steps_of(engine)
    return engine, loop_engine


def _share_of_memory(share: float) -> dict[str, float]:
    return {"gpu_memory_utilization": share} if torch.cuda.is_available() else {}


def open_engine(args: argparse.Namespace, folder: Path, **own_settings: Any) -> Any:
    """An engine with its model."""
    if args.engine == "transformers":
        if args.num_engines > 1:
            raise SystemExit("--num_engines: needs --engine vllm")
        if args.model == "random":
            raise SystemExit("--model random: needs --engine vllm, which draws the weights")
        return TransformersEngine.from_pretrained(
            model_path(args.model), device=args.device, max_new_tokens=args.max_new_tokens
        )
    settings: dict[str, Any] = {"max_model_len": 2048, **own_settings, **args.engine_settings}
    if args.model != "random":
        return VLLMEngine(model_path(args.model), max_new_tokens=args.max_new_tokens, **settings)
    path = make_random_model(folder, args.num_layers, args.hidden_size, args.image_tokens)
    settings = {"load_format": "dummy", "dtype": "bfloat16", **settings}
    return RandomModelEngine(path, args.num_steps, args.step_tokens, **settings)


def main() -> None:
    parser = make_parser(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--engine", default="vllm", choices=["vllm", "transformers"])
    parser.add_argument("--engine_settings", type=json.loads, default={}, help="of vLLM, as JSON")
    parser.add_argument("--num_engines", type=int, default=1, help="of vLLM, for annotate (default: 1)")
    parser.add_argument("--model", default="mini-policy", help="embedded model, folder, Hub repository, or random")
    parser.add_argument("--max_new_tokens", type=int, default=192)
    parser.add_argument("--num_problems", type=int, default=60, help="a turn (default: 60)")
    parser.add_argument("--baseline_problems", type=int, help="those of them that the loop takes (default: all)")
    parser.add_argument("--first_problem", type=int, default=60_000)
    parser.add_argument("--num_rollouts", type=int, default=16)
    parser.add_argument("--rollout_budget", type=int, default=160)
    parser.add_argument("--trees_in_flight", type=int, default=16)
    parser.add_argument("--judge_delay", type=float, nargs="+", default=[0.0], help="seconds a call, a table for each")
    parser.add_argument("--judge_concurrency", type=int, default=64, help="of annotate (default: 64)")
    parser.add_argument("--num_layers", type=int, default=28, help="of the random model (default: 28)")
    parser.add_argument("--hidden_size", type=int, default=1536, help="of the random model (default: 1536)")
    parser.add_argument("--image_tokens", type=int, default=256, help="of the random model (default: 256)")
    parser.add_argument("--num_steps", type=int, default=8, help="of a random rollout (default: 8)")
    parser.add_argument("--step_tokens", type=int, default=32, help="of a random step (default: 32)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        engine, loop_engine = open_engines(args, Path(folder))
        run_turn(args, engine, loop_engine, RulesJudge(), args.first_problem - _WARM_UP, _WARM_UP)
        tables = []
        problems = itertools.count(args.first_problem, args.num_problems)
        for delay in args.judge_delay:
            judge = SlowJudge(RulesJudge(), delay)
            turns = [
                run_turn(args, engine, loop_engine, judge, next(problems), args.num_problems)
                for _ in range(args.repeats)
            ]
            if not all(seen["labels"] for turn in turns for seen in turn.values()):
                raise SystemExit("some turn gave no label: take more problems")
            tables.append(make_table(turns, f"a judge of {delay:g} s more a call"))
            report(args, tables)


if __name__ == "__main__":
    main()
