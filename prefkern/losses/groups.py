"""What list losses measure of groups of responses, padded to (G, K) with a mask, and of a batch."""

import math

import torch
from torch import Tensor

from prefkern import reference
from prefkern.layout import TailIndex
from prefkern.losses.base import Batch

pad = reference.pad_groups


def unpad(x_GK: Tensor, index: TailIndex) -> Tensor:
    """(S,) values in group order, the inverse of `pad`."""
    group = index.group_of_segment_S
    member = torch.arange(len(group), device=x_GK.device) - index.group_offsets[group]
    return x_GK.flatten()[group * x_GK.shape[1] + member]


def log_softmax(score_GK: Tensor, valid_GK: Tensor) -> Tensor:
    """log softmax over each group's members; 0 at padding."""
    return score_GK.masked_fill(~valid_GK, -torch.inf).log_softmax(-1).masked_fill(~valid_GK, 0.0)


def softmax(score_GK: Tensor, valid_GK: Tensor) -> Tensor:
    """softmax over each group's members; 0 at padding."""
    return score_GK.masked_fill(~valid_GK, -torch.inf).softmax(-1)


def sizes(valid_GK: Tensor) -> Tensor:
    """(G, 1) members, as int64."""
    return valid_GK.sum(-1, keepdim=True)


def mean(x_GK: Tensor, valid_GK: Tensor) -> Tensor:
    """(G, 1) means over the members."""
    return torch.where(valid_GK, x_GK, 0.0).sum(-1, keepdim=True) / sizes(valid_GK)


def centred(x_GK: Tensor, valid_GK: Tensor) -> Tensor:
    """Differences from the group's mean, 0 at padding; near 0 where all members are equal, whatever their size."""
    once = x_GK - mean(x_GK, valid_GK)  # off by the rounding of the mean, the same for all
    return torch.where(valid_GK, once - mean(once, valid_GK), 0.0)


def entropy(p_GK: Tensor) -> Tensor:
    """(G,) entropies in nats of probabilities that are 0 at padding."""
    return torch.special.entr(p_GK).sum(-1)


def within_range(values: Tensor, smallest: float, constant: float | None = None) -> Tensor:
    """(values - min) / (max - min) over the batch, in [0, 1].

    Where the range is at most `smallest`: `constant`, or with None the differences over `smallest`.
    """
    if values.numel() == 0:
        return values
    low = values.amin()
    width = values.amax() - low
    unit = (values - low) / width.clamp(min=smallest)
    return unit if constant is None else torch.where(width > smallest, unit, constant)


def log_vocabulary(batch: Batch, who: str) -> float:
    """log V, the largest entropy of a token.

    Raises:
        ValueError: the caller did not say V.
    """
    if batch.vocab_size is None or batch.vocab_size < 2:
        raise ValueError(
            f"{who} compares entropies with that of a uniform choice: pass vocab_size, at least 2, not"
            f" {batch.vocab_size}"
        )
    return math.log(batch.vocab_size)


def surprise(logp_per_token_R: Tensor, log_vocabulary: float) -> Tensor:
    """Mean over responses of -logp / log V, each kept in [0, 1]: 0 is certain, 1 is a uniform choice of tokens."""
    return (-logp_per_token_R / log_vocabulary).clamp(0, 1).mean()
