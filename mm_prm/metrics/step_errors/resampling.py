"""Bootstrap intervals of figures that are functions of sums, such as F1. Pure functions; numpy is all they need."""

import math

import numpy as np


def resampled_sums(values: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """
    Sums over resampled rows.

    Args:
        values (`np.ndarray`):
            (rows, columns), one row for each problem.
        num_resamples (`int`):
            Number of resamples.
        seed (`int`):
            Seed.

    Returns:
        `np.ndarray` of shape (resamples, columns).
    """
    total = len(values)
    generator = np.random.default_rng(seed)
    block = max(1, 4_000_000 // total)  # bounds the memory at any number of problems
    sums = []
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        drawn = generator.integers(total, size=(size, total)) + np.arange(size)[:, None] * total
        sums.append(np.bincount(drawn.ravel(), minlength=size * total).reshape(size, total) @ values)
    return np.concatenate(sums)


def interval(value: float, resampled: np.ndarray, confidence: float) -> dict[str, float] | None:
    """A figure with its percentile interval, or `None` where it is not defined. Resamples without it are left out."""
    if math.isnan(value):
        return None
    low, high = np.nanquantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    # Rounding alone could put a value that all resamples share outside of its own interval.
    return {"value": float(value), "low": min(float(low), float(value)), "high": max(float(high), float(value))}
