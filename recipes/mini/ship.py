"""Puts the study's results where the package embeds them.

    python recipes/mini/ship.py --directory outputs/mini --prm soft

Writes `mm_prm/embedded/mini_prm` (weights in bfloat16) and `mm_prm/embedded/mini_trees.parquet` (the first 2,000 trees
of the OmegaPRM annotation, without pictures: `mm_prm.data.mini.problem_from_id` draws them again).
"""

import argparse
from pathlib import Path

import pyarrow.parquet
import torch
from datasets import Dataset

import mm_prm.embedded
from mm_prm.data.features import TREE_FEATURES
from mm_prm.models import AutoModelForProcessReward, ProcessRewardProcessor

NUM_TREES = 2000


def ship_trees(directory: Path, embedded: Path) -> None:
    shards = sorted(map(str, (directory / "trees").glob("omegaprm.*.parquet")))
    trees = sorted(Dataset.from_parquet(shards, features=TREE_FEATURES), key=lambda tree: tree["problem_id"])
    table = Dataset.from_list(trees[:NUM_TREES], features=TREE_FEATURES).data.table
    path = embedded / "mini_trees.parquet"
    pyarrow.parquet.write_table(table, path, compression="zstd", compression_level=22)
    print(f"{path}: {table.num_rows} trees, {path.stat().st_size / 1e6:.2f} MB")


def ship_prm(directory: Path, name: str, embedded: Path) -> None:
    source = directory / "prm" / name
    AutoModelForProcessReward.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(embedded / "mini_prm")
    ProcessRewardProcessor.from_pretrained(source).save_pretrained(embedded / "mini_prm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("outputs/mini"))
    parser.add_argument("--prm", help="name of the training run whose model ships; the trees alone if not given")
    args = parser.parse_args()
    embedded = Path(mm_prm.embedded.__file__).parent
    ship_trees(args.directory, embedded)
    if args.prm:
        ship_prm(args.directory, args.prm, embedded)


if __name__ == "__main__":
    main()
