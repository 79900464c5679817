"""What goes to the Hub with models and data sets: their cards."""

from .cards import CITATION, best_of_n_results, eval_result, model_card, tree_dataset_card

__all__ = ["CITATION", "best_of_n_results", "eval_result", "model_card", "tree_dataset_card"]
