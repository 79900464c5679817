"""`mm-prm COMMAND`: parses, calls one room, prints. See `mm-prm --help`.

Nothing heavy is imported before the command is known, so that help and version answer at once.
"""

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from mm_prm import __version__
from mm_prm.commands import InputError

# Each is a module of `mm_prm.commands` with `main(args, prog) -> exit status`.
COMMANDS = {
    "write-steps": "let a language model write plain solutions down in steps",
    "train-policy": "fine-tune a policy to write its solutions in steps",
    "annotate": "grow a tree of judged rollouts for each problem",
    "journal": "join the journals of a job array",
    "judge": "check answers against gold answers",
    "judge-steps": "let a language model judge every step of trees",
    "audit": "measure how good the labels of trees are",
    "rows": "turn trees into stepwise rows to train on",
    "train": "train a process reward model on stepwise rows",
    "score": "give every step of every candidate solution its score",
    "search": "write solutions step by step, guided by a process reward model",
    "serve": "serve a process reward model with vLLM",
    "best-of-n": "measure how often the best-scored candidate is right",
    "evaluate": "measure a policy and a process reward model on a benchmark",
    "report": "write a page that shows results to a person",
    "app": "score solutions in the browser",
    "push": "push a model, data, a metric or a Space to the Hub",
    "quickstart": "run the whole path on the embedded mini world, with a report",
    "convert": "make a checkpoint in a foreign layout one that transformers loads without remote code",
}

_EPILOG = """\
Every command reads its settings from --config FILE.yaml and from flags, which win over the file.
`mm-prm COMMAND --help` lists them. The settings of a run are written beside its output.

exit status: 0 done (problems that the settings say to skip are no failure), 1 done but some problems failed, or
             the Hub did not take what was pushed,
             2 settings or input that cannot be used, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`Sequence[str]`, *optional*):
            Command line without the program's name; that of the program if not given.

    Returns:
        `int`: The exit status.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        "mm-prm",
        description="Multimodal process reward models: annotate, train, score, search, share.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mm-prm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, help_text in COMMANDS.items():
        commands.add_parser(name, help=help_text, add_help=False)
    command = parser.parse_args(args[:1]).command  # the rest is the command's own

    if not sys.stderr.isatty():
        # Bars that redraw a line fill log files with copies of it; the commands print lines there.
        os.environ.setdefault("TQDM_DISABLE", "1")
    from mm_prm.settings import SettingsError

    module = import_module(f"mm_prm.commands.{command.replace('-', '_')}")
    try:
        return module.main(args[1:], f"mm-prm {command}")
    except (SettingsError, InputError) as error:
        print(f"mm-prm {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mm-prm {command}: interrupted", file=sys.stderr)
        return 130


def program() -> NoReturn:
    """Run the command of the command line and end the process with its status."""
    status = main()
    if any(thread.daemon and thread.name == "policy" for thread in threading.enumerate()):
        # A model that is in the midst of a batch cannot be stopped, and Python's own way out would abort in it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    program()
