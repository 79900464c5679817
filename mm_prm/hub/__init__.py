"""What goes to the Hub and comes back: models, data, metrics and Spaces, with their cards."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cards import CITATION, best_of_n_results, dataset_card, eval_result, metric_card, model_card
    from .data import dataset_upload, load_rows, read_tables
    from .models import eval_results_of, model_upload
    from .spaces import metric_upload, space_upload
    from .upload import HubError, Upload

# Loaded when first used: cards need no `datasets`.
_MODULES = {
    "CITATION": "cards",
    "HubError": "upload",
    "Upload": "upload",
    "best_of_n_results": "cards",
    "dataset_card": "cards",
    "dataset_upload": "data",
    "eval_result": "cards",
    "eval_results_of": "models",
    "load_rows": "data",
    "metric_card": "cards",
    "metric_upload": "spaces",
    "model_card": "cards",
    "model_upload": "models",
    "read_tables": "data",
    "space_upload": "spaces",
}

__all__ = [
    "CITATION",
    "HubError",
    "Upload",
    "best_of_n_results",
    "dataset_card",
    "dataset_upload",
    "eval_result",
    "eval_results_of",
    "load_rows",
    "metric_card",
    "metric_upload",
    "model_card",
    "model_upload",
    "read_tables",
    "space_upload",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
