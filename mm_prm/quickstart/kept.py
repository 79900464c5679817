"""What a second run takes up again: results in files, each with the key of all that it was made from."""

import hashlib
import json
from pathlib import Path
from typing import Any


def key_of(*parts: Any) -> str:
    """
    A key that changes with anything in `parts`.

    Args:
        parts (`Any`):
            What a result is made from, as JSON can hold it.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_kept(path: Path, key: str) -> Any | None:
    """
    The result in a file, or `None` if there is none, or one that was made from something else.

    Args:
        path (`Path`):
            File of [`write_kept`].
        key (`str`):
            Key of what the result is made from.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None  # a damaged file is made anew, too
    return content["result"] if content["key"] == key else None


def write_kept(path: Path, key: str, result: Any) -> None:
    """
    Keep a result.

    Args:
        path (`Path`):
            File to write; its folder is made.
        key (`str`):
            Key of what the result is made from.
        result (`Any`):
            What JSON can hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps({"key": key, "result": result}), encoding="utf-8")
    part.replace(path)  # a run that is killed leaves no half a file
