"""What scores depend on, as text: a journal finds them again by the hash of it."""

import json

from mm_prm.annotation.identity import code_digest

# What turns a solution into scores: batches, prompts and templates, and the model's code.
_PACKAGES = ("mm_prm.inference", "mm_prm.models")


def scorer_identity(checkpoint: str | list[str], engine: str, dtype: str | None = None) -> str:
    """
    The identity of a process reward model that gives scores.

    Args:
        checkpoint (`str` or `list[str]`):
            What [`~mm_prm.annotation.identity.checkpoint_identity`] says of its checkpoint. With a server, that of the
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
        "checkpoint": checkpoint,
    }
    return json.dumps(parts, sort_keys=True)
