"""FlexAttention without a GPU: its plain implementation, slow but with gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.nn.attention import flex_attention


@contextmanager
def flex_on_cpu() -> Iterator[None]:
    """Takes transformers' compilation away, and torch's refusal of gradients, which only compiled kernels lack on a CPU."""
    with torch.compiler.set_stance("force_eager"), patch.object(flex_attention, "_validate_device"):
        yield
