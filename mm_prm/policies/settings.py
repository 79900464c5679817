"""The settings that every policy has, checked in one place."""

from .steps import STEP_FORMATS


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
