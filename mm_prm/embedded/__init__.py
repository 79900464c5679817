"""The models that come with the package, so that everything runs without a network: `mini-policy` and `mini-prm`."""

from importlib.resources import files

EMBEDDED_MODELS = ("mini-policy", "mini-prm")


def model_path(name: str) -> str:
    """
    The folder of an embedded model; any other name is a folder or a Hub repository and stays as it is.

    Args:
        name (`str`):
            `"mini-policy"`, `"mini-prm"`, a folder or a Hub repository.
    """
    return str(files(__name__) / name.replace("-", "_")) if name in EMBEDDED_MODELS else name
