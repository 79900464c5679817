"""What the rows are, where problems come from, and how trees become rows to train on.

Names load their module when they are first used, so that the plain text functions do not wait for `datasets`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .features import (
        FEATURES,
        POOL_FEATURES,
        PROBLEM_FEATURES,
        STEPWISE_FEATURES,
        TREE_FEATURES,
        RowError,
        validate_problem,
        validate_row,
        validate_rows,
    )
    from .images import ImageError
    from .mmk12 import MMK12
    from .problem_files import ProblemFileError
    from .problems import load_problems
    from .rows import RowConfig, join_problems, trees_to_rows

_MODULES = {
    "FEATURES": "features",
    "MMK12": "mmk12",
    "POOL_FEATURES": "features",
    "PROBLEM_FEATURES": "features",
    "STEPWISE_FEATURES": "features",
    "TREE_FEATURES": "features",
    "ImageError": "images",
    "ProblemFileError": "problem_files",
    "RowConfig": "rows",
    "RowError": "features",
    "join_problems": "rows",
    "load_problems": "problems",
    "trees_to_rows": "rows",
    "validate_problem": "features",
    "validate_row": "features",
    "validate_rows": "features",
}

__all__ = [
    "FEATURES",
    "MMK12",
    "POOL_FEATURES",
    "PROBLEM_FEATURES",
    "STEPWISE_FEATURES",
    "TREE_FEATURES",
    "ImageError",
    "ProblemFileError",
    "RowConfig",
    "RowError",
    "join_problems",
    "load_problems",
    "trees_to_rows",
    "validate_problem",
    "validate_row",
    "validate_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
