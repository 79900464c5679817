"""
What a tree depends on, as text: the problem with its pictures, the settings, the policy and the judge.

The journal finds a tree again by the hash of these, so whatever changes a tree has to be among them.
"""

import hashlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import PIL.Image
from huggingface_hub import hf_hub_download

from mm_prm.annotation.config import AnnotationConfig
from mm_prm.annotation.protocols import Problem

# Settings, by the names that policies and judges use for them, that change no rollout and no verdict.
_ONLY_SPEED = {
    "api_key",
    "base_urls",
    "batch_size",
    "device",
    "gpu_memory_utilization",
    "max_concurrency",
    "max_retries",
    "retry_seconds",
    "tensor_parallel_size",
}
# What decides which prefixes are asked, beside the settings.
_SEARCH_FILES = ("flat.py", "omegaprm.py", "tree.py")

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
        "search": _files_digest(Path(__file__).with_name(name) for name in _SEARCH_FILES),
        "policy": policy_identity,
        "judge": judge_identity,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _image_digest(image: PIL.Image.Image) -> str:
    # Pixels, not the file: the same picture may come as a path, as bytes or decoded. RGBA resolves palettes.
    digest = hashlib.sha256(f"{image.size}".encode())
    digest.update(image.convert("RGBA").tobytes())
    return digest.hexdigest()


def describe(
    opener: Callable, path: str | os.PathLike[str] | None, settings: Mapping[str, Any], packages: Iterable[str] = ()
) -> str:
    """
    The identity of a policy or a judge that `opener(path, **settings)` opens.

    A local checkpoint counts by its content, so that a model trained anew in the same folder is another model; one on
    the Hub by its revision. The code counts, too: that of the opener's package. A setting that is left out is the same
    as its default, and those that only say where and how fast do not count.

    Args:
        opener (`Callable`):
            Function or class that opens it; counts by its name and code.
        path (`str` or `os.PathLike`, *optional*):
            Its checkpoint: a local folder, or a name on the Hub.
        settings (`Mapping`):
            Its settings, values that JSON can hold.
        packages (`Iterable[str]`, *optional*):
            Installed distributions whose version changes what it says.
    """
    values = {**_defaults(opener), **settings}
    parts: dict[str, Any] = {
        "opener": f"{opener.__module__}.{opener.__qualname__}",
        "code": code_digest(opener.__module__),
        "settings": {name: value for name, value in values.items() if name not in _ONLY_SPEED},
        "packages": {name: metadata.version(name) for name in packages},
    }
    if path is not None:
        parts["checkpoint"] = checkpoint_identity(path)
    return json.dumps(parts, sort_keys=True)


def _defaults(opener: Callable) -> dict[str, Any]:
    """The defaults of an opener's settings, also of those that a class method hands on to its class."""
    parameters = inspect.signature(opener).parameters.values()
    defaults = {
        parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty
    }
    owner = opener.__self__ if inspect.ismethod(opener) else None
    if inspect.isclass(owner) and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        defaults |= _defaults(owner)
    return defaults


@cache
def code_digest(name: str) -> str:
    """SHA-256 over the Python files of the package that a module lies in; without package, over its own."""
    # What is not loaded yet, such as a package that needs torch, is found without loading it.
    specification = sys.modules[name].__spec__ if name in sys.modules else importlib.util.find_spec(name)
    if specification is None or specification.origin is None:  # typed in a shell or a notebook
        return ""
    file = Path(specification.origin)
    return _files_digest(file.parent.glob("*.py") if specification.parent else [file])


def _files_digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.name}\0{content}\n".encode())
    return digest.hexdigest()


def _hub_revision(name: str) -> str:
    """The commit that the name stands for now; nothing where neither the Hub nor its cache knows."""
    for file in ("config.json", "adapter_config.json"):
        try:
            # The cache keeps files in a folder that is named by the commit.
            return Path(hf_hub_download(name, file)).parent.name
        except (OSError, ValueError):
            continue
    return ""


def checkpoint_identity(path: str | os.PathLike[str]) -> str | list[str]:
    """What a checkpoint is: a local folder's digest, or name and revision of a repository on the Hub."""
    return checkpoint_digest(path) if Path(path).is_dir() else [str(path), _hub_revision(str(path))]


def checkpoint_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 over the names and contents of a folder's files, except hidden ones and cards."""
    return _files_digest(
        file
        for file in Path(path).iterdir()
        if file.is_file() and not file.name.startswith(".") and file.suffix != ".md"
    )
