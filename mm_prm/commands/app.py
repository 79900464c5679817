"""`mm-prm app`: score solutions in the browser, on this machine or as a Space of the Hub.

mm-prm app mini-prm
mm-prm app me/my-prm --space folder && mm-prm push space folder me/my-app
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mm_prm.commands import InputError, name_first, reading_input
from mm_prm.settings import parse_settings


@dataclass
class AppSettings:
    """
    Which model scores, and where the application is served. The first may be given without its name.

    Args:
        model (`str`):
            Process reward model: a folder, a Hub repository, or mini-prm for the embedded one.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen at; 0.0.0.0 for all of this machine's.
        port (`int`, *optional*, defaults to `7860`):
            Port to listen at.
        dtype (`str`, *optional*):
            Type to compute in; that of the checkpoint if not given.
        device (`str`, *optional*):
            Where to compute, for example cuda:0; the GPU if there is one.
        space (`str`, *optional*):
            Write the files of a Space to this new folder, which `mm-prm push space` takes, and serve nothing.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 7860
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    space: str | None = None


def main(args: Sequence[str], prog: str) -> int:
    """Run the command; it ends when it is interrupted."""
    words = name_first(args, "model", prog)
    description = f"Score solutions in the browser: {prog} MODEL [settings]"
    return run(parse_settings(AppSettings, words, prog=prog, description=description))


def run(settings: AppSettings) -> int:
    """Serve the application, or write it down as a Space."""
    from mm_prm.embedded import model_path

    with reading_input("model", settings.model):
        path = model_path(settings.model)
    if settings.space is not None:
        return _write_space(settings.model, Path(settings.space).expanduser())
    if importlib.util.find_spec("gradio") is None:
        raise InputError("gradio is not installed: `pip install 'mm-prm[app]'`")

    from mm_prm.inference import Scorer
    from mm_prm.report.app import build_app

    with reading_input("model", settings.model):
        scorer = Scorer.from_pretrained(path, dtype=settings.dtype, device=settings.device)
    app = build_app(scorer, settings.model)
    with reading_input(f"{settings.host}:{settings.port}"):
        _, address, _ = app.launch(
            server_name=settings.host, server_port=settings.port, share=False, quiet=True, prevent_thread_lock=True
        )
    print(f"{address} (stop with Ctrl-C)", flush=True)
    app.block_thread()
    return 0


def _write_space(model: str, folder: Path) -> int:
    from mm_prm.embedded import EMBEDDED_MODELS
    from mm_prm.hub.spaces import app_files

    if model not in EMBEDDED_MODELS and (Path(model).expanduser().is_dir() or model.count("/") != 1):
        raise InputError(
            f"model: a Space loads its model from the Hub; `mm-prm push model {model} OWNER/NAME`, then give OWNER/NAME"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"space: {folder} is there already; give a new folder")
    with reading_input(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in app_files(model, f"Step scores by {model.split('/')[-1]}").items():
            (folder / name).write_text(text, encoding="utf-8")
    print(f"space: {folder}")
    print(f"next: mm-prm push space {folder} OWNER/NAME")
    return 0
