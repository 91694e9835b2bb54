"""Row statistics of a block of logits and their gradient, in plain torch: the twin of kernels/row_softmax.py.

Forward:   logp = z_y - lse,  lse = m + log sum_v exp(z_v - m)
Backward:  dz = g (onehot - p) - e p (log p + entropy),  then times dz/dz0 of the head's transform

The block is walked in pieces of a few rows that stay in a core's cache, with the exponential taken in place, so
that memory sees each logit once. Arithmetic is fp32 (float64 for float64).
"""

import sys
from types import ModuleType

import torch
from torch import Tensor

from prefkern.head import Head, RowStats
from prefkern.planner import uses_triton
from prefkern.reference import accumulator

# Elements of one piece: 2 MiB in fp32, about one core's second-level cache.
_PIECE = 1 << 19
_PIECE_ON_DEVICE = 1 << 23  # 32 MiB, a few hundred launches a gigabyte of logits


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
    gradient: bool = False,
) -> RowStats:
    """Row statistics of raw logits.

    Args:
        logits_NV: (N, V) raw logits, any floating dtype; overwritten when `gradient` is true.
        labels_N: (N,) int64 in [0, V), or head.ignore_index. Another value gives a NaN log-probability.
        head: the transform between raw logits and softmax.
        bias_V: (V,), added to the raw logits.
        gradient: leave (p - onehot), times the softcap's slope, in the place of the logits. d logp_n / d logits_n is
            that times -logit_scale / temperature, and 0 where ignored: factors that are cheaper to apply later.
    Returns:
        RowStats, fp32.
    """
    rows, vocab = logits_NV.shape
    dtype = accumulator(logits_NV.dtype)

    def fresh(wanted: bool, kind: torch.dtype = dtype) -> Tensor | None:
        return logits_NV.new_empty(rows, dtype=kind) if wanted else None

    top1 = fresh(want_top1, torch.bool)
    stats = RowStats(fresh(True), fresh(True), fresh(want_entropy), top1, fresh(want_mean), fresh(want_collision))
    for piece in pieces(logits_NV):
        _forward_piece(
            logits_NV[piece], labels_N[piece], head, bias_V, gradient, [s if s is None else s[piece] for s in stats]
        )
    valid = labels_N != head.ignore_index
    for s in stats:
        if s is not None:
            s.masked_fill_(~valid, 0)
    stats.logps.masked_fill_(valid & ((labels_N < 0) | (labels_N >= vocab)), torch.nan)
    return stats


def _forward_piece(logits: Tensor, labels: Tensor, head: Head, bias: Tensor | None, gradient: bool, out: list) -> None:
    logps, lse, entropy, is_top1, mean_logit, log_collision = out
    z = transformed(logits, head, bias)
    label = labels.clamp(0, z.shape[1] - 1)[:, None]
    z_label, top = z.gather(1, label), z.amax(1, keepdim=True)
    if is_top1 is not None:
        torch.ge(z_label, top, out=is_top1[:, None])
    if mean_logit is not None:
        torch.mean(z, 1, out=mean_logit)
    p = z.softmax(1)
    log_total = p.amax(1, keepdim=True).log_().neg_()  # the largest p is 1 / sum exp(z - top), and never underflows
    torch.add(top, log_total, out=lse[:, None])
    torch.sub(z_label - top, log_total, out=logps[:, None])
    if log_collision is not None:
        # The sum of p is 1 but for the normaliser's rounding, which the second term takes back.
        torch.sub(p.square().sum(1).log_(), p.sum(1).log_(), alpha=2, out=log_collision)
    slope = slope_of(z, head) if gradient else None
    if entropy is not None:
        torch.sub(log_total[:, 0], z.sub_(top).clamp_(min=-1e30).mul_(p).sum(1), out=entropy)
    if gradient:
        p.scatter_add_(1, label, -torch.ones_like(z_label))
        logits.copy_(p if slope is None else p.mul_(slope))


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
    """The module with the row functions for logits of this device and dtype: Triton's if it serves, else this one."""
    if uses_triton(device, dtype):
        from prefkern.kernels import row_softmax

        return row_softmax
    return sys.modules[__name__]
