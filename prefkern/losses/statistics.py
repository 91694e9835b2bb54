"""Statistics of the whole batch, over all ranks, and their running averages; none waits for the device."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prefkern.reference import accumulator


def global_mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and number of values over all ranks, in at least fp32.

    Every rank of the default process group must call it, also one that has no values; without a group it is local.

    Args:
        values: of any shape, also empty.
    Returns:
        Two 0-dim tensors without gradient: the mean (0 where there is no value at all), and the count.
    """
    x = values.detach().to(accumulator(values.dtype))
    total, count = _over_ranks(torch.stack([x.sum(), x.new_full((), x.numel())])).unbind()
    return total / count.clamp(min=1), count


def global_moments(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation and number of values over all ranks, in at least fp32.

        std = sqrt( sum (x - mean)^2 / (count - 1) )

    In two passes, so that a large mean costs no digits. Every rank must call it, as `global_mean`.

    Returns:
        Three 0-dim tensors without gradient; the deviation of fewer than two values is 0.
    """
    mean, count = global_mean(values)
    squares = _over_ranks((values.detach().to(mean.dtype) - mean).square().sum())
    return mean, (squares / (count - 1).clamp(min=1)).sqrt(), count


def _over_ranks(sums: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    return sums


class RunningAverage(nn.Module):
    """A weighted average over calls, as buffers: saved and loaded by `state_dict`, changed only in training mode.

        weight <- keep * weight + amount,    average <- average + (value - average) * amount / weight

    keep=1 with amount = number of values is the mean of everything seen. keep=d with amount=1-d is the exponential
    moving average with bias correction; weight * average is the one that starts at 0.

    Args:
        size: how many numbers are averaged side by side.
    """

    average: Tensor
    weight: Tensor

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(size))
        self.register_buffer("weight", torch.zeros(()))

    @torch.no_grad()
    def forward(self, values: Tensor, amount: Tensor | float, keep: float = 1.0) -> tuple[Tensor, Tensor]:
        """Average (size,) and weight () including these values; in evaluation mode, those of the calls before.

        Before the first call in training mode there is nothing to fall back on: then evaluation sees its own values.
        """
        average, weight = self.average.to(values), self.weight.to(values)
        new_average, new_weight = blended(average, weight, values, amount, keep)
        if self.training:
            self.average.copy_(new_average)
            self.weight.copy_(new_weight)
            return new_average, new_weight
        unseen = weight == 0
        return torch.where(unseen, new_average, average), torch.where(unseen, new_weight, weight)


def blended(
    average: Tensor, weight: Tensor, values: Tensor, amount: Tensor | float, keep: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Average and weight after one update, see `RunningAverage`; an amount of 0 leaves the average."""
    new_weight = keep * weight + amount
    share = torch.where(new_weight > 0, amount / new_weight, 0.0)
    return average + (values - average) * share, new_weight


def running(
    state: nn.Module | None, values: Tensor, amount: Tensor | float, keep: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`state(values, amount, keep)`; without a state, as its first call."""
    if state is not None:
        return state(values, amount, keep)
    return blended(torch.zeros_like(values), values.new_zeros(()), values, amount, keep)
