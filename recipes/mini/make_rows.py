"""Turns the annotated trees into the rows of every training run of the study.

    python recipes/mini/make_rows.py outputs/mini

Reads `trees/{omegaprm,flat}.*.parquet` and writes `rows/*.parquet`:

- `omegaprm`, `flat`: the rows of each strategy as `mm-prm rows` makes them, and `both` together;
- `measured`: the rows of `omegaprm` with labels only where rollouts were sampled (`step_values: measured`);
- `quarter`: the rows of every fourth tree of `omegaprm`;
- `outcome`: the rows of `omegaprm` with nothing but the label of the final answer, for an outcome reward model.
"""

import json
import sys
from pathlib import Path

from datasets import Dataset

from mm_prm.data import RowConfig, trees_to_rows
from mm_prm.data.features import STEPWISE_FEATURES, TREE_FEATURES


def main(directory: str) -> None:
    folder = Path(directory)
    (folder / "rows").mkdir(exist_ok=True)
    reports, both = {}, []
    for strategy in ("omegaprm", "flat"):
        shards = sorted(map(str, (folder / "trees").glob(f"{strategy}.*.parquet")))
        trees = sorted(Dataset.from_parquet(shards, features=TREE_FEATURES), key=lambda tree: tree["problem_id"])
        rows, report = trees_to_rows(trees, RowConfig())
        report["rollouts"] = sum(tree["cost"]["rollouts"] for tree in trees)
        reports[strategy] = report
        save(rows, folder / "rows" / f"{strategy}.parquet")
        both += rows
        if strategy == "omegaprm":
            quarter, reports["quarter"] = trees_to_rows(trees[::4], RowConfig())
            save(quarter, folder / "rows" / "quarter.parquet")
            measured, reports["measured"] = trees_to_rows(trees, RowConfig(step_values="measured"))
            save(measured, folder / "rows" / "measured.parquet")
            outcome = [{**row, "labels": [*[None] * (len(row["labels"]) - 1), row["labels"][-1]]} for row in rows]
            save([row for row in outcome if row["labels"][-1] is not None], folder / "rows" / "outcome.parquet")
    save(both, folder / "rows" / "both.parquet")
    (folder / "rows" / "report.json").write_text(json.dumps(reports, indent=1) + "\n")
    print(json.dumps(reports, indent=1))


def save(rows: list[dict], path: Path) -> None:
    Dataset.from_list(rows, features=STEPWISE_FEATURES).to_parquet(str(path))


if __name__ == "__main__":
    main(sys.argv[1])
