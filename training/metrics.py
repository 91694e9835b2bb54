"""Means of metrics over many batches, added up on the device and read once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from prefkern.preference import TOKEN_METRICS


class MetricWindow:
    """Weighted sums of 0-dim tensors; adding never waits for the device.

    A metric's mean over a batch is weighted by the batch's response tokens where it is a mean over tokens, by its
    prompts elsewhere, so that the result is the mean over all tokens or prompts of the window.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Tensor], prompts: int, tokens: int) -> None:
        """Add one batch's means."""
        for name, value in metrics.items():
            self.add_weighted(name, value, tokens if name in TOKEN_METRICS else prompts)

    def add_weighted(self, name: str, value: Tensor, weight: float) -> None:
        """Add one mean with a weight of its own."""
        value = value.detach().double() * weight
        self._sums[name] = value if name not in self._sums else self._sums[name] + value
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def flush(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """The means, in one read from the device, and an empty window.

        Args:
            reduce: adds a tensor up over all processes.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        sums = torch.stack([self._sums[n] for n in names])
        weights = torch.tensor([self._weights[n] for n in names], dtype=sums.dtype).to(sums.device)
        total = reduce(torch.stack([sums, weights]))
        self._sums, self._weights = {}, {}
        return dict(zip(names, (total[0] / total[1].clamp(min=1e-9)).tolist()))
