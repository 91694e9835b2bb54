"""Statistics of the whole batch, over all ranks, and their running averages; none waits for the device."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prefkern.losses.base import Batch
from prefkern.reference import accumulator, span_sums


def global_mean(values: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and number of values over all ranks, in at least fp32.

    Every rank of the default process group must call it, also one that has no values; without a group it is local.

    Args:
        values: of any shape, also empty.
        counted: bool, of the same shape: which of them count; None: all.
    Returns:
        Two 0-dim tensors without gradient: the mean (0 where there is no value at all), and the count.
    """
    x = values.detach().to(accumulator(values.dtype))
    number = x.new_full((), x.numel()) if counted is None else counted.sum(dtype=x.dtype)
    total, count = _over_ranks(torch.stack([_kept(x, counted).sum(), number])).unbind()
    return total / count.clamp(min=1), count


def global_moments(values: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation and number of values over all ranks, in at least fp32.

        std = sqrt( sum (x - mean)^2 / (count - 1) )

    In two passes, so that a large mean costs no digits. Every rank must call it, as `global_mean`.

    Returns:
        Three 0-dim tensors without gradient; the deviation of fewer than two values is 0.
    """
    mean, count = global_mean(values, counted)
    squares = _over_ranks(_kept((values.detach().to(mean.dtype) - mean).square(), counted).sum())
    return mean, (squares / (count - 1).clamp(min=1)).sqrt(), count


def pairs_that_count(batch: Batch) -> Tensor:
    """(P,) whether any token of a pair takes part in the loss."""
    counted_R = batch.count_R
    if batch.weights_N is not None:
        counted_R = span_sums((batch.weights_N != 0).to(counted_R), batch.index.response_offsets)
    chosen, rejected = batch.pairs(counted_R)
    return chosen + rejected > 0


def _kept(x: Tensor, counted: Tensor | None) -> Tensor:
    return x if counted is None else torch.where(counted, x, 0.0)


def _over_ranks(sums: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    return sums


class RunningAverage(nn.Module):
    """Weighted averages over calls, as buffers: saved and loaded by `state_dict`, changed only in training mode.

        weight <- keep * weight + amount,    average <- average + (value - average) * amount / weight

    keep=1 with amount = number of values is the mean of everything seen. keep=d with amount=1-d is the exponential
    moving average with bias correction; weight * average is the one that starts at 0. An amount of 0 with keep=1
    changes nothing.

    Args:
        size: how many numbers are averaged, each with its own weight.
    """

    average: Tensor
    weight: Tensor

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(size))
        self.register_buffer("weight", torch.zeros(size))

    @torch.no_grad()
    def forward(self, values: Tensor, amount: Tensor | float, keep: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """Averages and weights (size,) including these values; in evaluation mode, those of the calls before.

        Where no call in training mode has left a weight, evaluation sees its own values.
        """
        average, weight = self.average.to(values), self.weight.to(values)
        new_average, new_weight = _blended(average, weight, values, amount, keep)
        if self.training:
            self.average.copy_(new_average)
            self.weight.copy_(new_weight)
            return new_average, new_weight
        unseen = weight == 0
        return torch.where(unseen, new_average, average), torch.where(unseen, new_weight, weight)


def running(
    state: nn.Module | None, values: Tensor, amount: Tensor | float, keep: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """`state(values, amount, keep)`; without a state, as its first call."""
    if state is not None:
        return state(values, amount, keep)
    nothing = torch.zeros_like(values)
    return _blended(nothing, nothing, values, amount, keep)


def _blended(
    average: Tensor, weight: Tensor, values: Tensor, amount: Tensor | float, keep: Tensor | float
) -> tuple[Tensor, Tensor]:
    new_weight = keep * weight + amount
    share = torch.where(new_weight > 0, amount / new_weight, 0.0)
    return average + (values - average) * share, new_weight
