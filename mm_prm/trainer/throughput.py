"""How fast training is, and what packing saves."""

import time
from collections.abc import Mapping

import torch
from accelerate import Accelerator


class Throughput:
    """Counts tokens and labels between two logs."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.began = time.monotonic()
        # Positions that the model computes, those that are no padding, tokens of rows alone, labels
        self.counts = torch.zeros(4, dtype=torch.float64)

    def add(self, batch: Mapping[str, torch.Tensor]) -> None:
        """
        Counts a batch.

        Args:
            batch (`Mapping[str, torch.Tensor]`):
                What the collator made. Batches without `counts`, of collators of other make, are not counted.
        """
        if "counts" in batch:
            positions = torch.tensor([batch["input_ids"].numel()])
            self.counts += torch.cat([positions, batch["counts"].cpu()])

    def leave_out(self, seconds: float) -> None:
        """
        Leaves time out that did not go into training.

        Args:
            seconds (`float`):
                How much.
        """
        self.began += seconds

    def since_last_log(self, accelerator: Accelerator) -> dict[str, float]:
        """
        Returns the rates since the last call, over all processes, and begins anew.

        Args:
            accelerator ([`~accelerate.Accelerator`]):
                Gathers the counts; each process must call.

        Returns:
            `dict[str, float]`: `tokens_per_second` (padding included), `useful_tokens_per_second` (tokens of the rows as
            they stand alone), `step_labels_per_second` and `tokens_saved_by_packing`, the share of these tokens that
            packing did without. Empty if nothing was counted.
        """
        seconds = time.monotonic() - self.began
        # In float32, which every device has
        counts = accelerator.gather(self.counts.float().to(accelerator.device)[None]).double().sum(dim=0).tolist()
        self._start()
        positions, packed, alone, labels = counts
        if not alone or seconds <= 0:
            return {}
        return {
            "tokens_per_second": positions / seconds,
            "useful_tokens_per_second": alone / seconds,
            "step_labels_per_second": labels / seconds,
            "tokens_saved_by_packing": 1 - packed / alone,
        }
