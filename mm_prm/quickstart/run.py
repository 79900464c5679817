"""The quickstart from its first stage to the report."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mm_prm.quickstart.config import QuickstartConfig
from mm_prm.settings import write_settings

# Fixed before anything was measured
AGGREGATOR = "min"
VERIFIERS = ("prm_before", "prm_after", "prm_shipped")


def run_quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """
    Annotate mini problems, train a process reward model, and measure what it adds to Best-of-N.

    Everything is computed here and now, with what comes with the package and without a network. Written into
    `config.output_dir` are `report.html`, `curve.png` and `results.json`; `data` and `prm_after.json`, the data and the
    figures of the model trained in this run, for `mm-prm push`; the terminal shows one search tree and the tables. What a
    run has finished is taken up by the next one with the same settings.

    Args:
        config ([`QuickstartConfig`]):
            Settings of the run.

    Returns:
        `dict[str, Any]`: The content of `results.json`: estimates `{"value", "low", "high"}` of `pass@1`, `greedy`,
        `majority`, `uninformative`, `oracle` and `weighted_majority` (votes weighted by the shipped model); for each of
        `prm_before` (the policy, its reward tokens untrained), `prm_after` (trained in this run) and `prm_shipped` an
        estimate for each aggregator; `num_problems`, `num_candidates`, and `seconds` by stage.
    """
    began = time.perf_counter()
    folder = Path(config.output_dir).expanduser()
    write_settings(folder, config)

    from mm_prm.annotation.identity import checkpoint_digest
    from mm_prm.data import mini
    from mm_prm.embedded import embedded_path
    from mm_prm.quickstart import display
    from mm_prm.quickstart.results import assemble, measure, write_data
    from mm_prm.quickstart.stages import Stages, quiet_libraries

    console = display.console()
    stages = Stages(config)
    seconds = {"start": time.perf_counter() - began}

    @contextmanager
    def stage(name: str, title: str) -> Iterator[None]:
        console.print(f"[bold]{len(seconds)}. {title}[/]")
        stage_began, num_reused = time.perf_counter(), len(stages.reused)
        yield
        seconds[name] = time.perf_counter() - stage_began
        reused = ", taken up from an earlier run" if len(stages.reused) > num_reused else ""
        console.print(f"[dim]{seconds[name]:.1f} s{reused}[/]\n")

    with quiet_libraries():
        with stage("annotate", f"Annotate {config.num_problems} problems live with the embedded policy"):
            trees = stages.annotate()
            tree = display.choose_tree(trees)
            if tree is not None:
                console.print(display.tree_view(tree, mini.problem_from_id(tree["problem_id"]).row()))
        with stage("rows", "Turn these trees and the shipped ones into rows"):
            rows, row_report = stages.make_rows(trees)
            console.print("{trees} trees, {trees_kept} kept, {rows} rows, {labels} labels".format(**row_report))
        with stage("train", f"Train a process reward model from the policy, {config.train_steps} steps"):
            untrained = stages.untrained()
            trained, training = stages.train(rows, untrained)
        problems = list(mini.generate_problems("test", config.num_eval_problems))
        title = f"Sample {config.num_candidates} candidates for each of {config.num_eval_problems} held-out problems"
        with stage("sample", title):
            pools, greedy_correct = stages.sample(problems)
        with stage("score", "Score every step of every candidate with three process reward models"):
            models = dict(zip(VERIFIERS, (untrained, trained, embedded_path("mini_prm")), strict=True))
            scores = {name: stages.score(name, model, problems, pools) for name, model in models.items()}
    with stage("measure", "Measure, with 95 % intervals over problems and paired differences"):
        metric = measure(pools, scores)
        results = assemble(metric, pools, scores, greedy_correct, AGGREGATOR)
        console.print(display.main_table(results, VERIFIERS, AGGREGATOR))
        by_verifier = {name: results[name] for name in VERIFIERS}
        console.print(display.aggregator_table(by_verifier, f"Best-of-{config.num_candidates} by"))
        console.print(display.aggregator_table(results["weighted_majority_by_verifier"], "weighted majority by"))
    with stage("report", "Write the report"):
        from mm_prm.report import render_report

        # The tree of the terminal comes first
        ordered = sorted(trees, key=lambda each: each is not tree)
        page = render_report(
            metric,
            [*problems, *(mini.problem_from_id(each["problem_id"]).row() for each in ordered)],
            [
                {**pool, "step_scores": pool_scores}
                for pool, pool_scores in zip(pools, scores["prm_shipped"], strict=True)
            ],
            ordered,
            verifier="prm_shipped",
            aggregator=AGGREGATOR,
            baselines={"greedy": results["greedy"]},
            facts=_facts(config, trees, row_report, seconds),
            title="mm-prm quickstart: Best-of-N in the mini world",
            max_trees=1,
            plot_folder=folder,
        )
        (folder / "report.html").write_text(page, encoding="utf-8")
        write_data(folder / "data", trees, rows, problems, pools, scores["prm_after"])
        figures = {"model": trained.name, "model_checkpoint": checkpoint_digest(trained), **metric["prm_after"]}
        (folder / "prm_after.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    results |= {
        "rows": row_report,
        "training": training,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "reused": stages.reused,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(f"{sum(seconds.values()):.0f} s in all")
    for name in ("report.html", "curve.png", "results.json"):
        console.print(str(folder / name), style="bold")
    return results


def _facts(
    config: QuickstartConfig, trees: Sequence[Any], row_report: dict[str, Any], seconds: dict[str, float]
) -> dict[str, str]:
    rollouts = sum(tree["cost"]["rollouts"] for tree in trees)
    return {
        "problems": "rendered problems of the mini world, held out from everything that was trained",
        "policy": "mini-policy, sampled at temperature 1",
        "annotated in this run": f"{len(trees)} problems, {rollouts} rollouts by OmegaPRM",
        "prm_before": "the policy with untrained reward tokens",
        "prm_after": f"trained in this run, {config.train_steps} steps of {config.train_batch_size} rows; "
        f"{row_report['rows']} rows of {row_report['trees_kept']} trees, shipped ones among them",
        "prm_shipped": "mini-prm, as it comes with the package",
        "seconds": ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()),
    }
