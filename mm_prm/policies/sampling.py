"""
Choosing the next token, for many rows at once and from noise that is a pure function of (seed, position).

A `torch.Generator` draws one stream for a whole batch, so a rollout would depend on the company it is computed in.
Here the noise of a row is a hash of its seed and of the token's position: the same request gives the same rollouts in
any batch, up to the rounding of the logits.
"""

from collections.abc import Sequence

import torch

# SplitMix64 (Steele, Lea and Flood 2014), in two's complement because torch has no arithmetic on unsigned 64-bit integers.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def _shift_right(bits: torch.Tensor, places: int) -> torch.Tensor:
    """Logical shift: torch's own one copies the sign bit."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _mix(bits: torch.Tensor) -> torch.Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * _MULTIPLIERS[0]
    bits = (bits ^ _shift_right(bits, 27)) * _MULTIPLIERS[1]
    return bits ^ _shift_right(bits, 31)


def uniform_noise(seeds: Sequence[int], num_positions: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """
    Uniform noise in [0, 1) for every seed and token position.

    Args:
        seeds (`Sequence[int]`):
            One seed per row. Neighbouring seeds give independent rows.
        num_positions (`int`):
            Number of token positions.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where to compute.

    Returns:
        `torch.Tensor` of shape `(len(seeds), num_positions)`, float32.
    """
    signed = [(seed + 2**63) % 2**64 - 2**63 for seed in seeds]
    streams = _mix(torch.tensor(signed, dtype=torch.int64, device=device) + _INCREMENT)
    positions = torch.arange(1, num_positions + 1, dtype=torch.int64, device=device) * _INCREMENT
    # The stream is mixed once more, else two seeds whose streams differ by a multiple of the increment would share
    # their noise, shifted by some positions.
    bits = _mix(_mix(streams)[:, None] ^ _mix(streams[:, None] + positions))
    return _shift_right(bits, 40).float() * 2.0**-24


def choose_tokens(
    logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Samples one token per row by inverting the cumulative distribution, filtered as in transformers: temperature, then
    `top_k`, then `top_p`.

    Args:
        logits (`torch.Tensor` of shape `(rows, vocabulary)`):
            Logits of the next token.
        noise (`torch.Tensor` of shape `(rows,)`):
            Uniform noise in [0, 1).
        temperature (`float`):
            Divides the logits; 0 takes the most probable token.
        top_k (`int`):
            Number of most probable tokens to keep; 0 keeps all.
        top_p (`float`):
            Keeps the smallest set of most probable tokens whose probability reaches this; 1 keeps all.

    Returns:
        `tuple` of the token ids and their log-probabilities at temperature 1 before any filter, of shape `(rows,)`.
    """
    logits = logits.float()
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        order = None
        if 0 < top_k < logits.shape[-1]:
            kept, order = logits.topk(top_k, dim=-1)
        elif top_p < 1:
            kept, order = logits.sort(dim=-1, descending=True)
        else:
            kept = logits
        cumulative = (kept / temperature).softmax(-1).cumsum(-1)
        last = torch.full_like(noise, kept.shape[-1] - 1, dtype=torch.long)[:, None]
        if top_p < 1:
            last = torch.minimum((cumulative < top_p).sum(-1, keepdim=True), last)
        target = noise[:, None] * cumulative.gather(-1, last)
        choice = torch.minimum(torch.searchsorted(cumulative, target, right=True), last)
        tokens = choice if order is None else order.gather(-1, choice)
    log_probabilities = logits.gather(-1, tokens).squeeze(-1) - logits.logsumexp(-1)
    return tokens.squeeze(-1), log_probabilities
