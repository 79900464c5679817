"""Cuts files of rows, in place, to the same number of rows: the first ones, which are those of the first problems.

python recipes/mini/equal_rows.py --most 20000 outputs/mini/rows/fixed.parquet outputs/mini/rows/adaptive.parquet
"""

import argparse
from pathlib import Path

import pyarrow.parquet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--most", type=int, help="no more than so many")
    args = parser.parse_args()
    tables = [pyarrow.parquet.read_table(file) for file in args.files]
    number = min([table.num_rows for table in tables] + ([] if args.most is None else [args.most]))
    for file, table in zip(args.files, tables, strict=True):
        pyarrow.parquet.write_table(table.slice(0, number), file)
        print(f"{file}: {number} of {table.num_rows} rows")


if __name__ == "__main__":
    main()
