"""The loss of a process reward model: two-way cross-entropy against soft labels."""

import torch
from torch.nn import functional


def process_reward_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_weights: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """
    Computes Σ w·ℓ / Σ w over the labelled steps, where ℓ is the cross-entropy between (1 - label, label) and the softmax
    of the logits [wrong, right].

    Without a labelled step the loss is a zero that still belongs to the graph, so that backward runs everywhere.

    Args:
        logits (`torch.Tensor` of shape `(..., 2)`):
            Logits in the order [wrong, right].
        labels (`torch.Tensor` of shape `(...)`):
            Probability that the step is right, in [0, 1]. NaN where there is no label.
        label_weights (`torch.Tensor` of shape `(...)`, *optional*):
            Weight of each label. Defaults to 1 for all.
        num_items_in_batch (`torch.Tensor` or `float`, *optional*):
            Σ w over everything that one optimizer step sees. Defaults to Σ w over these labels.
    """
    # Selecting (not masking) keeps the logits of padding out of the graph: they may be NaN, and 0 · NaN is NaN.
    labelled = ~labels.isnan()
    labels = labels[labelled].float()
    logits = logits[labelled].float()
    # softmax over two logits is the sigmoid of their difference
    losses = functional.binary_cross_entropy_with_logits(logits[:, 1] - logits[:, 0], labels, reduction="none")
    if label_weights is None:
        weights = torch.ones_like(losses)
    else:
        weights = label_weights[labelled].to(losses)
    total_weight = weights.sum() if num_items_in_batch is None else num_items_in_batch
    if labels.numel() == 0:
        return losses.sum()
    return (losses * weights).sum() / total_weight
