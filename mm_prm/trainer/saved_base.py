"""The base of an adapter: the process reward model that a policy was made, saved once beside the adapter."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..models import create_process_reward_model

_RECORD = "made_from.json"


def save_base_model(path: str, base: Path, *, seed: int, **kwargs: Any) -> None:
    """
    Makes a policy a process reward model and saves it, or finds that this was done before.

    Args:
        path (`str`):
            Folder or Hub repository of the policy.
        base (`Path`):
            Folder of the process reward model.
        seed (`int`):
            Seed of the rows for new tokens.
        kwargs:
            What else [`create_process_reward_model`] takes.

    Raises:
        `ValueError`: If the folder holds something else than what is asked.
    """
    asked = {
        "model": str(Path(path).resolve()) if Path(path).is_dir() else path,
        "revision": kwargs.get("revision"),
        "seed": seed,
    }
    if base.exists():
        _check(base, asked)
        return
    model, processor = create_process_reward_model(path, seed=seed, **kwargs)
    # Under its name when complete: what a killed run leaves is never taken for a model.
    unfinished = base.with_name(base.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    (unfinished / _RECORD).write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")
    os.rename(unfinished, base)


def _check(base: Path, asked: dict[str, Any]) -> None:
    advice = f"set another output_dir, or delete {base} with the adapters that belong to it"
    try:
        found = json.loads((base / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(
            f"{base}: its {_RECORD} does not say which model it was made from, but {asked} is asked; {advice}"
        ) from None
    if found != asked:
        raise ValueError(f"{base}: was made from {found}, but {asked} is asked; {advice}")
