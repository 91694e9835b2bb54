"""Means of metrics over many batches, added up on the device and read once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from prefkern.preference import TOKEN_METRICS

_MARGINS = "rewards/margins"


class MetricWindow:
    """Weighted sums of 0-dim tensors; adding never waits for the device.

    A metric's mean over a batch is weighted by the batch's response tokens where it is a mean over tokens, by its
    prompts elsewhere, so that the result is the mean over all tokens or prompts of the window. Where a metric is a mean
    over a share of the batch's prompts only, so is the result; of no prompt there is none.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float | Tensor] = {}
        self._apart = False  # whether chosen and rejected rewards are of different prompts

    def add(
        self, metrics: Mapping[str, Tensor], prompts: int, tokens: int, shares: Mapping[str, Tensor] | None = None
    ) -> None:
        """Add one batch's means.

        Args:
            shares: see `Loss.metric_shares`. With any, rewards/margins is the difference of the window's rewards.
        """
        shares = shares or {}
        self._apart = self._apart or bool(shares)
        for name, value in metrics.items():
            if name != _MARGINS or not shares:
                weight = tokens if name in TOKEN_METRICS else prompts
                self.add_weighted(name, value, weight * shares[name].double() if name in shares else weight)

    def add_weighted(self, name: str, value: Tensor, weight: float | Tensor) -> None:
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
        weights = torch.stack([torch.as_tensor(self._weights[n]).to(sums) for n in names])
        totals = reduce(torch.stack([sums, weights])).T.tolist()
        self._sums, self._weights = {}, {}
        means = {name: total / weight for name, (total, weight) in zip(names, totals) if weight > 0}
        if self._apart and "rewards/chosen" in means and "rewards/rejected" in means:
            means[_MARGINS] = means["rewards/chosen"] - means["rewards/rejected"]
        return means
