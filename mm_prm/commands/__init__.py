"""One module for each command of `mm-prm`: its settings, and `main`, which parses, calls one room and prints."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# Bad rows in one message.
_MOST_NAMED = 10


class InputError(Exception):
    """Input that cannot be used; the message names file, row and field. Shown without a traceback."""


@contextmanager
def reading_input(name: str = "", value: str | None = None) -> Iterator[None]:
    """
    While input is read, an error is one in the input, and is told in one line.

    Args:
        name (`str`, *optional*, defaults to `""`):
            What is read, put before messages that do not name it.
        value (`str`, *optional*):
            What it is set to, where that is a file or a model: named too if it cannot be had and the message does not say
            which. Errors of the file system say it themselves.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        message = " ".join(str(error).split())
        if value is not None and isinstance(error, OSError) and error.filename is None and value not in message:
            raise InputError(": ".join(part for part in (name, value, message) if part)) from error
        raise InputError(message if name in message.split(":")[0] else f"{name}: {message}") from error


def refuse_rows(bad: Sequence[str]) -> None:
    """
    Stop at rows that cannot be used, with the first of them in the message.

    Args:
        bad (`Sequence[str]`):
            What is wrong with each.
    """
    if bad:
        more = f" (and {len(bad) - _MOST_NAMED} more)" if len(bad) > _MOST_NAMED else ""
        raise InputError("; ".join(bad[:_MOST_NAMED]) + more)


def name_first(args: Sequence[str], name: str, prog: str) -> list[str]:
    """
    Give a command's first word the name of its setting: `app MODEL` is `app --model MODEL`.

    Args:
        args (`Sequence[str]`):
            Words of the command line.
        name (`str`):
            Name of the setting.
        prog (`str`):
            The command, for messages.
    """
    words = list(args)
    is_first = bool(words) and not words[0].startswith("-")
    given = {word.partition("=")[0] for word in words}
    if is_first and f"--{name}" in given:
        raise InputError(f"{name}: is given twice, as {words[0]!r} and as --{name}; leave one of them out")
    if not is_first and not given & {f"--{name}", "--config", "--help", "-h"}:
        raise InputError(f"{name}: is missing; use `{prog} {name.upper()} [settings]`")
    return [f"--{name}", *words] if is_first else words
