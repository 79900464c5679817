"""The models that come with the package, so that everything runs without a network: `mini-policy` and `mini-prm`."""

from importlib.resources import files
from pathlib import Path

EMBEDDED_MODELS = ("mini-policy", "mini-prm")


def model_path(name: str) -> str:
    """
    The folder of an embedded model; any other name is a folder or a Hub repository.

    Args:
        name (`str`):
            `"mini-policy"`, `"mini-prm"`, a folder or a Hub repository.

    Raises:
        `FileNotFoundError`: If the name can only be a folder's and there is none.
    """
    if name in EMBEDDED_MODELS:
        return str(files(__name__) / name.replace("-", "_"))
    path = Path(name).expanduser()
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):  # no name of a repository
        raise FileNotFoundError(f"{name}: there is no such folder")
    return str(path) if path.is_dir() else name
