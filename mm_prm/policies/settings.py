"""The settings that every policy has, checked in one place."""

from typing import Any

from .steps import STEP_FORMATS


def default_dtype(device: Any = None) -> str:
    """
    Type of the weights of a policy on transformers where none is asked for.

    Args:
        device (`str` or `torch.device`, *optional*):
            Where the policy computes; the GPU by default if there is one.

    Returns:
        `str`: `"auto"`, the checkpoint's own, on a GPU; `"float32"` on a CPU, where many processors have no bfloat16
        arithmetic and compute it several times slower.
    """
    import torch

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return "float32" if device.type == "cpu" else "auto"


def check_sampling(max_new_tokens: int, temperature: float, top_k: int, top_p: float, step_format: str) -> None:
    """Raises `ValueError` at a setting that no policy can use; it names the setting, its value and what is wanted."""
    for name, value, holds, wanted in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, temperature >= 0, "0 or more"),
        ("top_k", top_k, top_k >= 0, "0 (off) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (off)"),
        ("step_format", step_format, step_format in STEP_FORMATS, f"one of {', '.join(STEP_FORMATS)}"),
    ):
        if not holds:
            raise ValueError(f"{name}: {value!r} has to be {wanted}")
