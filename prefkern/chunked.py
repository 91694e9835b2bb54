"""The chunked body: library products on blocks of logits that fit a workspace, row work in between.

Forward walks rows: a block's logits give the row statistics and, where only hidden needs a gradient, its gradient
too. Backward walks the vocabulary: with the log-sum-exp known, a slice's gradient is elementwise, and one product
gives that slice of dweight complete, so no N x V tensor and no fp32 copy of dweight exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from prefkern import rows as torch_rows
from prefkern.head import Head, RowStats
from prefkern.planner import Plan
from prefkern.products import add_product
from prefkern.reference import accumulator

# Labels of a slice are taken less its start; these two values can then not be mistaken for a label.
_ELSEWHERE, _IGNORED = -1, -2


def forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    head: Head,
    plan: Plan,
    want: dict[str, bool],
    *,
    gradient: bool,
    rows: ModuleType,
) -> tuple[RowStats, Tensor | None]:
    """Row statistics, and d logp_n / d hidden_n (N, D) in hidden's dtype if `gradient`."""
    n, vocab = hidden_ND.shape[0], weight_VD.shape[0]
    step = plan.rows_per_chunk
    scratch = hidden_ND.new_empty(min(step, n), vocab)
    unit_ND = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format) if gradient else None
    parts = []
    for i in range(0, n, step):
        chunk = slice(i, min(i + step, n))
        logits = torch.mm(hidden_ND[chunk], weight_VD.t(), out=scratch[: chunk.stop - i])
        labels = labels_N[chunk]
        if not gradient:
            parts.append(rows.row_softmax_forward(logits, labels, head, bias_V=bias_V, **want))
        elif rows is torch_rows:  # leaves p - onehot; sign and scale are applied to the product, which is smaller
            parts.append(rows.row_softmax_forward(logits, labels, head, bias_V=bias_V, gradient=True, **want))
            unit = torch.mm(logits, weight_VD, out=unit_ND[chunk]).mul_(-head.logit_scale / head.temperature)
            unit.masked_fill_((labels == head.ignore_index)[:, None], 0.0)
        else:
            stats = rows.row_softmax_forward(logits, labels, head, bias_V=bias_V, **want)
            one = torch.ones_like(stats.lse)
            rows.row_softmax_backward(logits, labels, stats.lse, one, head, bias_V=bias_V, out=logits)
            torch.mm(logits, weight_VD, out=unit_ND[chunk])
            parts.append(stats)
    if not parts:
        parts = [torch_rows.row_softmax_forward(scratch, labels_N, head, **want)]
    return RowStats(*(None if column[0] is None else torch.cat(column) for column in zip(*parts))), unit_ND


def backward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    head: Head,
    plan: Plan,
    stats: RowStats,
    grad_logps_N: Tensor,
    grad_entropy_N: Tensor | None,
    *,
    needs: tuple[bool, bool, bool],
    rows: ModuleType,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias (as `needs` says), each in its parameter's dtype."""
    ignored = labels_N == head.ignore_index
    head = replace(head, ignore_index=_IGNORED)

    def gradient(logits: Tensor, part: slice) -> None:
        labels = torch.where((labels_N >= part.start) & (labels_N < part.stop), labels_N - part.start, _ELSEWHERE)
        labels.masked_fill_(ignored, _IGNORED)
        rows.row_softmax_backward(
            logits, labels, stats.lse, grad_logps_N, head, bias_V=None if bias_V is None else bias_V[part],
            entropy_N=stats.entropy, grad_entropy_N=grad_entropy_N, out=logits,
        )  # fmt: skip

    return walk_vocabulary(hidden_ND, weight_VD, bias_V, plan, gradient, needs)


def walk_vocabulary(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    plan: Plan,
    gradient: Callable[[Tensor, slice], None],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias (as `needs` says), each in its parameter's dtype.

    Args:
        gradient: called with the raw logits (N, width) of a slice of the vocabulary, without the bias, and the slice;
            writes dL/dlogits in their place.
    """
    n, vocab = hidden_ND.shape[0], weight_VD.shape[0]
    wide = accumulator(hidden_ND.dtype)
    dhidden = hidden_ND.new_zeros(hidden_ND.shape, dtype=wide) if needs[0] else None
    dweight = torch.empty_like(weight_VD, memory_format=torch.contiguous_format) if needs[1] else None
    dbias = torch.empty_like(bias_V, memory_format=torch.contiguous_format) if needs[2] else None
    step = plan.vocab_per_slice
    scratch = hidden_ND.new_empty(n * min(step, vocab))
    for i in range(0, vocab, step):
        part = slice(i, min(i + step, vocab))
        width = part.stop - i
        weight = weight_VD[part]
        dlogits = torch.mm(hidden_ND, weight.t(), out=scratch[: n * width].view(n, width))
        gradient(dlogits, part)
        if needs[0]:
            add_product(dhidden, dlogits, weight)
        if needs[1]:
            torch.mm(dlogits.t(), hidden_ND, out=dweight[part])
        if needs[2]:
            dbias[part] = dlogits.sum(0, dtype=wide)
    return None if dhidden is None else dhidden.to(hidden_ND.dtype), dweight, dbias
