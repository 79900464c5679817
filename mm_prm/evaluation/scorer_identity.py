"""What scores depend on, as text: a journal finds them again by the hash of it."""

import json
import os

from mm_prm.annotation.identity import checkpoint_identity, code_digest

# What turns a solution into scores: batches, prompts and templates, and the model's code.
_PACKAGES = ("mm_prm.inference", "mm_prm.models")


def scorer_identity(path: str | os.PathLike[str], engine: str, dtype: str | None = None) -> str:
    """
    The identity of a process reward model that gives scores.

    Args:
        path (`str` or `os.PathLike`):
            Its checkpoint: a local folder, which counts by its content, or a name on the Hub. With a server, that of the
            model that the server has.
        engine (`str`):
            What runs it: transformers, vllm or server. Engines differ in the last digits.
        dtype (`str`, *optional*):
            Type of the weights; that of the checkpoint if not given.
    """
    parts = {
        "code": {name: code_digest(name) for name in _PACKAGES},
        "engine": engine,
        "dtype": dtype,
        "checkpoint": checkpoint_identity(path),
    }
    return json.dumps(parts, sort_keys=True)
