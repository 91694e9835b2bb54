"""Row statistics of a block of logits and their gradient in plain torch: the twin of kernels/row_softmax*.py.

Forward:   logp = z_y - lse,  lse = m + log sum_v exp(z_v - m)
Backward:  dz = g (onehot - p) - e p (log p + entropy),  then times dz/dz0 of the head's transform

The block is walked in pieces of a few rows that stay in a core's cache, with the exponential taken in place, so
that memory sees each logit once. Arithmetic is fp32 (float64 for float64).
"""

import sys
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from prefkern.head import Head, Operands, RowStats
from prefkern.planner import uses_compiled, uses_triton
from prefkern.reference import accumulator

# Elements of one piece: 2 MiB in fp32, about one core's second-level cache.
_PIECE = 1 << 19
_PIECE_ON_DEVICE = 1 << 23  # 32 MiB, a few hundred launches a gigabyte of logits


class RowSums(NamedTuple):
    """What a row's statistics are made of, over the vocabulary or a part of it; each (N,), fp32 (float64 of float64).

    Fields:
        top: max z, -inf where there is none but -inf.
        sum: sum exp(z - top), 0 in such a row.
        label: z of the label, 0 where it is not in this part.
        dot: sum exp(z - top) (z - top), where an excluded entry, z = -inf, adds 0.
        total: sum z.
        square: sum exp(z - top)^2.
    """

    top: Tensor
    sum: Tensor
    label: Tensor
    dot: Tensor | None = None
    total: Tensor | None = None
    square: Tensor | None = None


def fold(
    tile: Tensor,
    labels_N: Tensor,
    head: Head,
    *,
    bias_V: Tensor | None = None,
    want_entropy: bool = False,
    want_mean: bool = False,
    want_collision: bool = False,
    gradient: int = 0,
    overwrite: bool = True,
) -> RowSums:
    """Sums over the columns of a block of raw logits.

    Args:
        tile: (N, W) raw logits of a slice of the vocabulary, any floating dtype.
        labels_N: (N,) int64 less the slice's start; outside [0, W) it is another slice's.
        head: the transform between raw logits and softmax.
        bias_V: (W,), added to the raw logits.
        want_entropy, want_mean, want_collision: whether dot, total and square are wanted.
        gradient: in the place of so many leading rows goes exp(z - top), times the softcap's slope, 0 at the label.
        overwrite: whether the other rows may be written over.
    """
    rows, width = tile.shape
    wanted = (True, True, True, want_entropy, want_mean, want_collision)
    dtype = accumulator(tile.dtype)
    sums = RowSums(*(tile.new_empty(rows, dtype=dtype) if wants else None for wants in wanted))
    inside = ((labels_N >= 0) & (labels_N < width))[:, None]
    column = labels_N.clamp(0, width - 1)[:, None]
    for piece in pieces(tile):
        own = RowSums(*(x if x is None else x[piece, None] for x in sums))
        z = transformed(tile[piece], head, bias_V, overwrite=overwrite or piece.stop <= gradient)
        torch.amax(z, 1, keepdim=True, out=own.top)
        own.label.copy_(torch.where(inside[piece], z.gather(1, column[piece]), 0.0))
        if want_mean:
            torch.sum(z, 1, keepdim=True, out=own.total)
        slope = slope_of(z, head) if piece.start < gradient else None
        z.sub_(own.top.masked_fill(own.top.isneginf(), 0.0))  # -inf less -inf is NaN, and exp(-inf) nothing
        e = z.exp() if want_entropy else z.exp_()
        torch.sum(e, 1, keepdim=True, out=own.sum)
        if want_collision:
            torch.sum(e.square(), 1, keepdim=True, out=own.square)
        if want_entropy:
            own.dot.copy_(_expected(z, e)[:, None])
        count = min(gradient, piece.stop) - piece.start
        if count > 0:
            own_column, e = column[piece][:count], e[:count]
            e.scatter_(1, own_column, torch.where(inside[piece][:count], 0.0, e.gather(1, own_column)))
            tile[piece][:count] = e if slope is None else e.mul_(slope[:count])
    return sums


def _expected(z: Tensor, e: Tensor) -> Tensor:
    """(rows,) sums of e z; an excluded entry, e = 0 and z = -inf, adds 0. Writes over z."""
    if z.device.type == "cpu":
        dot = torch.bmm(e[:, None, :], z[:, :, None])[:, 0, 0]
        if dot.isfinite().all():
            return dot
    return z.clamp_(min=-1e30).mul_(e).sum(1)


def statistics(sums: RowSums, labels_N: Tensor, vocab: int, head: Head, *, want_top1: bool = False) -> RowStats:
    """Row statistics of sums over the whole vocabulary: those that the sums allow, and is_top1 if wanted."""
    log_sum = sums.sum.log()
    valid = labels_N != head.ignore_index
    wrong = valid & ((labels_N < 0) | (labels_N >= vocab))
    every = RowStats(
        logp(sums).masked_fill(wrong, torch.nan),
        sums.top + log_sum,
        None if sums.dot is None else log_sum - sums.dot / sums.sum,
        sums.label >= sums.top if want_top1 else None,
        None if sums.total is None else sums.total / vocab,
        None if sums.square is None else sums.square.log() - 2 * log_sum,
    )
    return RowStats(*(None if x is None else x.masked_fill(~valid, 0) for x in every))


def logp(sums: RowSums) -> Tensor:
    """Log-probability of the label, from sums over the whole vocabulary."""
    # (label - top) first: both are large when logits are, their difference is not.
    return (sums.label - sums.top) - sums.sum.log()


def row_softmax_forward(
    logits_NV: Tensor,
    labels_N: Tensor,
    head: Head,
    *,
    bias_V: Tensor | None = None,
    want_entropy: bool = False,
    want_top1: bool = False,
    want_mean: bool = False,
    want_collision: bool = False,
) -> RowStats:
    """Row statistics of raw logits, which stay as they are.

    Args:
        logits_NV: (N, V) raw logits, any floating dtype.
        labels_N: (N,) int64 in [0, V), or head.ignore_index. Another value gives a NaN log-probability.
        head: the transform between raw logits and softmax.
        bias_V: (V,), added to the raw logits.
    Returns:
        RowStats, fp32.
    """
    want = dict(want_entropy=want_entropy, want_mean=want_mean, want_collision=want_collision)
    sums = fold(logits_NV, labels_N, head, bias_V=bias_V, overwrite=False, **want)
    return statistics(sums, labels_N, logits_NV.shape[1], head, want_top1=want_top1)


def row_softmax_backward(
    logits_NV: Tensor,
    labels_N: Tensor,
    lse_N: Tensor,
    grad_logps_N: Tensor,
    head: Head,
    *,
    bias_V: Tensor | None = None,
    entropy_N: Tensor | None = None,
    grad_entropy_N: Tensor | None = None,
    grad_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient with respect to the raw logits, given dL/dlogp and optionally dL/dentropy.

    Args:
        logits_NV: (N, V) raw logits, or a slice of the vocabulary of them.
        labels_N: (N,); a label outside [0, V) adds no one-hot term, so a slice takes labels less its start.
        lse_N, entropy_N: (N,) from the forward pass over the whole vocabulary.
        grad_logps_N, grad_entropy_N: (N,) dL/dlogp, and dL/dentropy or None.
        grad_scale: 0-dim, multiplies both.
        out: where to write; the logits themselves are allowed. None: a new tensor.
    Returns:
        (N, V) in the dtype of the logits; rows with head.ignore_index are zero.
    """
    vocab = logits_NV.shape[1]
    out = torch.empty_like(logits_NV) if out is None else out
    valid = labels_N != head.ignore_index

    def upstream(g: Tensor) -> Tensor:
        g = torch.where(valid, g * (head.logit_scale / head.temperature), 0.0)
        return g[:, None] if grad_scale is None else (g * grad_scale)[:, None]

    g, e = upstream(grad_logps_N), None if grad_entropy_N is None else upstream(grad_entropy_N)
    lse_N = torch.where(valid, lse_N, torch.inf)  # an ignored row's lse is not its own: with infinity, p is 0
    inside = valid & (labels_N >= 0) & (labels_N < vocab)
    label = labels_N.clamp(0, vocab - 1)[:, None]
    hit = torch.where(inside[:, None], g, 0.0)
    for piece in pieces(logits_NV):
        raw = logits_NV[piece]
        z = transformed(raw, head, bias_V, overwrite=out is logits_NV)
        slope = slope_of(z, head)
        log_p = z.sub_(lse_N[piece, None])
        if e is None:
            dz = log_p.exp_().mul_(-g[piece])
        else:
            p = log_p.exp()
            dz = log_p.clamp_(min=-1e30).add_(entropy_N[piece, None]).mul_(e[piece])
            dz = dz.add_(g[piece]).mul_(p).neg_()
        dz.scatter_add_(1, label[piece], hit[piece])
        dz = dz if slope is None else dz.mul_(slope)
        if dz is not raw:
            out[piece].copy_(dz)
    if out.device.type == "cpu":
        return out.index_fill_(0, (~valid).nonzero()[:, 0], 0.0)  # 0 times a logit that is not finite is NaN
    return out.masked_fill_(~valid[:, None], 0.0)  # a pass over all, but without waiting for the device


def pieces(logits_NV: Tensor) -> list[slice]:
    """Runs of rows of a block small enough that a core keeps one in its cache; larger where launches cost."""
    rows, vocab = logits_NV.shape
    size = _PIECE if logits_NV.device.type == "cpu" else _PIECE_ON_DEVICE
    step = max(1, size // max(1, vocab))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def transformed(logits: Tensor, head: Head, bias: Tensor | None, *, overwrite: bool = False) -> Tensor:
    """z of raw logits, in at least fp32: a new tensor, or with `overwrite` the logits themselves if as wide."""
    z = logits.to(accumulator(logits.dtype), copy=not overwrite)
    if bias is not None:
        z.add_(bias)
    if head.logit_scale != 1.0:
        z.mul_(head.logit_scale)
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    return z.div_(head.temperature) if head.temperature != 1.0 else z


def slope_of(z: Tensor, head: Head) -> Tensor | None:
    """The part of dz/dz0 that differs between elements: 1 - (z * temperature / softcap)^2, None without a softcap."""
    if head.softcap is None:
        return None
    return z.mul(head.temperature / head.softcap).square_().neg_().add_(1)


def implementation(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module with the row functions for such logits: Triton's or a CPU's compiled ones where they serve."""
    if uses_triton(device, dtype):
        from prefkern.kernels import row_softmax

        return row_softmax
    if uses_compiled(device, dtype):
        from prefkern.kernels import row_softmax_cpu

        return row_softmax_cpu
    return sys.modules[__name__]


def whole_head(rows: ModuleType, operands: Operands, head: Head, **want: bool) -> ModuleType | None:
    """The module that does a slice of the vocabulary in one go, products too; None where it takes several steps.

    Args:
        rows: the module of the row functions.
        want: the optional statistics, as keywords of `row_softmax_forward`.
    """
    choose = getattr(rows, "whole_head", None)
    return None if choose is None else choose(operands, head, want)
