"""Step scores -> one number for a candidate. They live in the metric, which stands alone; this is their public address."""

from mm_prm.metrics.best_of_n.best_of_n import AGGREGATORS, PROBABILITY_AGGREGATORS

__all__ = ["AGGREGATORS", "PROBABILITY_AGGREGATORS"]
