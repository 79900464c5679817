"""`mm-prm quickstart`: the whole path on the embedded mini world, with a report."""

from collections.abc import Sequence
from pathlib import Path

from mm_prm.commands import reading_input
from mm_prm.settings import parse_settings


def main(args: Sequence[str], prog: str) -> int:
    """Run the command; returns its exit status."""
    from mm_prm.quickstart import QuickstartConfig, run_quickstart

    description = "Annotate, train, score and choose on the embedded mini world, and write a report."
    config = parse_settings(QuickstartConfig, args, prog=prog, description=description)
    with reading_input("output_dir"):
        Path(config.output_dir).expanduser().mkdir(parents=True, exist_ok=True)
    run_quickstart(config)
    return 0
