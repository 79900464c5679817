"""What comes with the package, so that everything runs without a network: the models `mini-policy` and `mini-prm`, and
annotated trees of the mini world."""

from importlib.resources import files
from pathlib import Path

EMBEDDED_MODELS = ("mini-policy", "mini-prm")


def embedded_path(name: str) -> Path:
    """
    A file or folder that comes with the package.

    Args:
        name (`str`):
            Its name: `"mini_policy"`, `"mini_prm"` or `"mini_trees.parquet"`.

    Raises:
        `FileNotFoundError`: If this installation does not have it.
    """
    path = Path(str(files(__name__))) / name
    if not path.exists():
        raise FileNotFoundError(
            f"this installation of mm-prm does not have the embedded {name!r} (expected at {path}); install the released "
            "wheel again, or make it with recipes/mini/run.sh"
        )
    return path


def model_path(name: str) -> str:
    """
    The folder of an embedded model; any other name is a folder or a Hub repository.

    Args:
        name (`str`):
            `"mini-policy"`, `"mini-prm"`, a folder or a Hub repository.

    Raises:
        `FileNotFoundError`: If the name can only be a folder's and there is none, or the embedded model is missing.
    """
    if name in EMBEDDED_MODELS:
        return str(embedded_path(name.replace("-", "_")))
    path = Path(name).expanduser()
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):  # no name of a repository
        raise FileNotFoundError(f"{name}: there is no such folder")
    return str(path) if path.is_dir() else name
