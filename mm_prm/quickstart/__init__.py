"""The whole path on the embedded mini world, from problems to a verifier that picks better answers, in one call."""

from mm_prm.quickstart.config import QuickstartConfig
from mm_prm.quickstart.run import run_quickstart

__all__ = ["QuickstartConfig", "run_quickstart"]
