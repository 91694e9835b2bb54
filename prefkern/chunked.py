"""The chunked body: library products on blocks of logits that fit a workspace, row work in between.

Forward walks rows whose logits are whole in the workspace where Triton does the row work in one read, and tiles
(tiles.py) elsewhere. Backward walks the vocabulary: with the log-sum-exp known, a tile's gradient is elementwise, and
a slice's dweight is complete after all rows, so no N x V tensor and no fp32 copy of dweight exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from prefkern import rows as torch_rows
from prefkern import tiles
from prefkern.head import Head, RowStats
from prefkern.planner import Plan
from prefkern.products import add_product, columns_for_sums, product, product_into
from prefkern.reference import accumulator

# Labels of a slice are taken less its start; these two values can then not be mistaken for a label.
_ELSEWHERE, _IGNORED = -1, -2


class Gradients(NamedTuple):
    """Of the operands of the head, each in its parameter's dtype; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    low: Tensor | None
    low_weight: Tensor | None


def raw_logits(
    hidden: Tensor, weight: Tensor, low: Tensor | None, low_weight: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """hidden @ weight.T + low @ low_weight.T, in hidden's dtype; in `out` where the library writes there."""
    logits = product(hidden, weight.t(), out)
    return logits if low is None else logits.addmm_(low, low_weight.t())


def forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    head: Head,
    plan: Plan,
    want: dict[str, bool],
    *,
    gradient: int,
    rows: ModuleType,
    low_NR: Tensor | None = None,
    low_weight_VR: Tensor | None = None,
) -> tuple[RowStats, Tensor | None, Tensor | None]:
    """Row statistics; d logp_n / d hidden_n and d logp_n / d low_n of the first `gradient` rows, in hidden's dtype.

    Args:
        gradient: how many leading rows want their gradients, of what `plan` says needs one; 0 for none.
        low_NR, low_weight_VR: second pair of factors of the logits, an adapter's; None for none.
    """
    if rows is torch_rows:
        return tiles.forward(
            hidden_ND, weight_VD, bias_V, labels_N, head, plan, want,
            gradient=gradient, low_NR=low_NR, low_weight_VR=low_weight_VR,
        )  # fmt: skip
    n, vocab = hidden_ND.shape[0], weight_VD.shape[0]
    step = replace(plan, shape=(n, *plan.shape[1:])).rows_per_chunk  # whose N leaves out a reference's rows
    scratch = hidden_ND.new_empty(min(step, n), vocab)
    sides = ((weight_VD, hidden_ND, plan.grad_hidden), (low_weight_VR, low_NR, plan.grad_low[0]))
    units = [x.new_empty((gradient, x.shape[1])) if gradient and wanted else None for _, x, wanted in sides]
    parts = []
    for i in range(0, n, step):
        chunk = slice(i, min(i + step, n))
        low = None if low_NR is None else low_NR[chunk]
        logits = raw_logits(hidden_ND[chunk], weight_VD, low, low_weight_VR, out=scratch[: chunk.stop - i])
        labels = labels_N[chunk]
        stats = rows.row_softmax_forward(logits, labels, head, bias_V=bias_V, **want)
        count = min(gradient, chunk.stop) - i
        if count > 0:
            lse, first = stats.lse[:count], logits[:count]
            one = torch.ones_like(lse)
            rows.row_softmax_backward(first, labels[:count], lse, one, head, bias_V=bias_V, out=first)
            for unit, (w, _, _) in zip(units, sides):
                if unit is not None:
                    torch.mm(first, w, out=unit[i : i + count])
        parts.append(stats)
    if not parts:
        parts = [torch_rows.row_softmax_forward(scratch, labels_N, head, **want)]
    stats = RowStats(*(None if column[0] is None else torch.cat(column) for column in zip(*parts)))
    return stats, *units


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
    needs: tuple[bool, bool, bool, bool, bool],
    rows: ModuleType,
    low_NR: Tensor | None = None,
    low_weight_VR: Tensor | None = None,
) -> Gradients:
    """Gradients of hidden, weight, bias, low and low_weight, as `needs` says."""
    ignored = labels_N == head.ignore_index
    head = replace(head, ignore_index=_IGNORED)

    def gradient(logits: Tensor, block: slice, part: slice) -> None:
        labels = labels_N[block]
        labels = torch.where((labels >= part.start) & (labels < part.stop), labels - part.start, _ELSEWHERE)
        labels.masked_fill_(ignored[block], _IGNORED)
        entropy, grad_entropy = (None if x is None else x[block] for x in (stats.entropy, grad_entropy_N))
        bias = None if bias_V is None else bias_V[part]
        rows.row_softmax_backward(
            logits, labels, stats.lse[block], grad_logps_N[block], head, bias_V=bias, entropy_N=entropy,
            grad_entropy_N=grad_entropy, out=logits,
        )  # fmt: skip

    return walk_vocabulary(hidden_ND, weight_VD, bias_V, plan, gradient, needs, low_NR, low_weight_VR)


def walk_vocabulary(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    plan: Plan,
    gradient: Callable[[Tensor, slice, slice], None],
    needs: tuple[bool, ...],
    low_NR: Tensor | None = None,
    low_weight_VR: Tensor | None = None,
) -> Gradients:
    """Gradients of hidden, weight, bias, low and low_weight (as `needs` says), each in its parameter's dtype.

    Args:
        gradient: called with the raw logits (rows, width) of a tile, without the bias, the rows and the slice of the
            vocabulary; writes dL/dlogits in their place.
    """
    n, vocab = hidden_ND.shape[0], weight_VD.shape[0]
    wide = accumulator(hidden_ND.dtype)
    needs = (*needs, *[False] * (5 - len(needs)))

    def of_rows(x: Tensor | None, needed: bool) -> Tensor | None:
        return x.new_zeros(x.shape, dtype=wide) if needed else None

    height, step = plan.slab
    blocks = [slice(i, min(i + height, n)) for i in range(0, n, height)]
    dhidden, dlow = of_rows(hidden_ND, needs[0]), of_rows(low_NR, needs[3])
    dweight, dlow_weight = (
        _OfVocabulary(x, step, len(blocks)) if needed else None
        for x, needed in ((weight_VD, needs[1]), (low_weight_VR, needs[4]))
    )
    dbias = torch.zeros_like(bias_V, dtype=wide) if needs[2] else None
    right, right_low = (
        {block.start: columns_for_sums(x[block]) for block in blocks} if needed else {}
        for x, needed in ((hidden_ND, needs[1]), (low_NR, needs[4]))
    )
    scratch = hidden_ND.new_empty(min(height, n) * min(step, vocab))
    for i in range(0, vocab, step):
        part = slice(i, min(i + step, vocab))
        for block in blocks:
            hidden, low = hidden_ND[block], None if low_NR is None else low_NR[block]
            low_weight = None if low is None else low_weight_VR[part]
            out = scratch[: hidden.shape[0] * (part.stop - i)].view(hidden.shape[0], part.stop - i)
            dlogits = raw_logits(hidden, weight_VD[part], low, low_weight, out)
            gradient(dlogits, block, part)
            if dhidden is not None:
                add_product(dhidden[block], dlogits, weight_VD[part])
            if dlow is not None:
                add_product(dlow[block], dlogits, low_weight)
            if dweight is not None:
                dweight.add(part, dlogits, right[block.start])
            if dlow_weight is not None:
                dlow_weight.add(part, dlogits, right_low[block.start])
            if dbias is not None:
                dbias[part] += dlogits.sum(0, dtype=wide)
    return Gradients(
        None if dhidden is None else dhidden.to(hidden_ND.dtype),
        None if dweight is None else dweight.total,
        None if dbias is None else dbias.to(bias_V.dtype),
        None if dlow is None else dlow.to(low_NR.dtype),
        None if dlow_weight is None else dlow_weight.total,
    )


class _OfVocabulary:
    """Gradient of a (V, X) operand, slice after slice: each the sum over row blocks, in fp32, rounded once."""

    def __init__(self, operand: Tensor, step: int, blocks: int) -> None:
        make = torch.empty_like if blocks else torch.zeros_like
        self.total = make(operand, memory_format=torch.contiguous_format)
        self.blocks, self.seen, self.wide = blocks, 0, accumulator(operand.dtype)
        narrow = blocks > 1 and operand.dtype != self.wide
        shape = (min(step, operand.shape[0]), operand.shape[1])
        self.scratch = operand.new_empty(shape, dtype=self.wide) if narrow else None

    def add(self, part: slice, dlogits: Tensor, pieces: Sequence[Tensor]) -> None:
        """dlogits.T @ x of the next row block of a slice, x in pieces of its rows; slices one after the other."""
        out, self.seen = self.total[part], (self.seen + 1) % self.blocks
        sums = out if self.scratch is None else self.scratch[: out.shape[0]]
        first = self.blocks == 1 or self.seen == 1
        for rows, x in zip(dlogits.split([len(x) for x in pieces]), pieces):
            if first and sums.dtype == x.dtype:
                product_into(sums, rows.t(), x)
            else:
                add_product(sums.zero_() if first else sums, rows.t(), x)
            first = False
        if self.seen == 0 and sums is not out:
            out.copy_(sums)
