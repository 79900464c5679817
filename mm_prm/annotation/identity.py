"""
What a tree depends on, as text: the problem with its pictures, the settings, the policy and the judge.

The journal finds a tree again by the hash of these, so whatever changes a tree has to be among them.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import PIL.Image

from mm_prm.annotation.config import AnnotationConfig
from mm_prm.annotation.protocols import Problem

_PROBLEM_FIELDS = ("id", "question", "answer", "choices", "answer_type")


def tree_key(problem: Problem, config: AnnotationConfig, policy_identity: str, judge_identity: str) -> str:
    """
    The journal's key of a problem's tree.

    Args:
        problem (`Mapping`):
            The problem, its images decoded.
        config ([`AnnotationConfig`]):
            Settings of the run; those that do not change the tree do not change the key.
        policy_identity (`str`):
            What the policy is, see [`describe`].
        judge_identity (`str`):
            What the judge is, see [`describe`].
    """
    parts = {
        "problem": {name: problem[name] for name in _PROBLEM_FIELDS},
        "images": [_image_digest(image) for image in problem["images"]],
        "settings": config.tree_settings(),
        "policy": policy_identity,
        "judge": judge_identity,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _image_digest(image: PIL.Image.Image) -> str:
    # Pixels, not the file: the same picture may come as a path, as bytes or decoded. RGBA resolves palettes.
    digest = hashlib.sha256(f"{image.size}".encode())
    digest.update(image.convert("RGBA").tobytes())
    return digest.hexdigest()


def describe(opener: Callable, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> str:
    """
    The identity of a policy or a judge that `opener(path, **settings)` opens.

    A local checkpoint counts by its content, so that a model trained anew in the same folder is another model.

    Args:
        opener (`Callable`):
            Function or class that opens it; counts by its name.
        path (`str` or `os.PathLike`, *optional*):
            Its checkpoint: a local folder, or a name on the Hub.
        settings (`Mapping`):
            Its settings, values that JSON can hold.
    """
    parts: dict[str, Any] = {"opener": f"{opener.__module__}.{opener.__qualname__}", "settings": dict(settings)}
    if path is not None:
        parts["checkpoint"] = checkpoint_digest(path) if Path(path).is_dir() else str(path)
    return json.dumps(parts, sort_keys=True)


def checkpoint_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 over the names and contents of a folder's files, except hidden ones and cards."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).iterdir()):
        if file.is_file() and not file.name.startswith(".") and file.suffix != ".md":
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{file.name}\0{content}\n".encode())
    return digest.hexdigest()
