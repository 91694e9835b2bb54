"""The chunked body: library products on blocks of logits that fit a workspace, row work in between.

Forward walks rows whose logits are whole in the workspace where Triton does the row work in one read, and tiles
(tiles.py) elsewhere. Backward walks the vocabulary: with the log-sum-exp known, a tile's gradient is elementwise, and
a slice's dweight is complete after all rows, so no N x V tensor and no fp32 copy of dweight exists. Until then its
memory holds the logits of as many rows as it can (kept_logits.py), which are then not computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from prefkern import rows as torch_rows
from prefkern import tiles
from prefkern.gradients import stands_for_many
from prefkern.head import Head, Operands, RowStats
from prefkern.kept_logits import KeptLogits, memory_like
from prefkern.planner import Plan
from prefkern.products import add_product, product_into
from prefkern.reference import accumulator

if TYPE_CHECKING:
    from prefkern.kernels import lm_head_cpu

# Labels of a slice are taken less its start; these two values can then not be mistaken for a label.
_ELSEWHERE, _IGNORED = -1, -2


class Gradients(NamedTuple):
    """Of the operands of the head, each in its parameter's dtype; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    low: Tensor | None
    low_weight: Tensor | None


def forward(
    operands: Operands,
    labels_N: Tensor,
    head: Head,
    plan: Plan,
    want: dict[str, bool],
    *,
    gradient: int,
    rows: ModuleType,
    kept: KeptLogits | None = None,
) -> tuple[RowStats, Tensor | None, Tensor | None]:
    """Row statistics; d logp_n / d hidden_n and d logp_n / d low_n of the first `gradient` rows, in hidden's dtype.

    Args:
        gradient: how many leading rows want their gradients, of what `plan` says needs one; 0 for none.
        rows: the module of the row functions.
        kept: where the raw logits of leading rows are left for backward; None: nowhere.
    """
    if hasattr(rows, "fold"):
        return tiles.forward(operands, labels_N, head, plan, want, gradient=gradient, rows=rows, kept=kept)
    hidden, weight, bias, low, low_weight = operands
    n, vocab = hidden.shape[0], weight.shape[0]
    step = replace(plan, shape=(n, *plan.shape[1:])).rows_per_chunk  # whose N leaves out a reference's rows
    scratch = hidden.new_empty(min(step, n) * vocab)
    sides = ((weight, hidden, plan.grad_hidden), (low_weight, low, plan.grad_low[0]))
    units = [x.new_empty((gradient, x.shape[1])) if gradient and wanted else None for _, x, wanted in sides]
    parts = []
    for i in range(0, n, step):
        chunk = slice(i, min(i + step, n))
        logits, labels = operands.logits(chunk, scratch=scratch), labels_N[chunk]
        if kept is not None:
            kept.store(logits, i, slice(0, vocab))
        stats = rows.row_softmax_forward(logits, labels, head, bias_V=bias, **want)
        count = min(gradient, chunk.stop) - i
        if count > 0:
            lse, first = stats.lse[:count], logits[:count]
            one = torch.ones_like(lse)
            rows.row_softmax_backward(first, labels[:count], lse, one, head, bias_V=bias, out=first)
            for unit, (w, _, _) in zip(units, sides):
                if unit is not None:
                    torch.mm(first, w, out=unit[i : i + count])
        parts.append(stats)
    if not parts:
        parts = [torch_rows.row_softmax_forward(scratch.view(0, vocab), labels_N, head, **want)]
    stats = RowStats(*(None if column[0] is None else torch.cat(column) for column in zip(*parts)))
    return stats, *units


def backward(
    operands: Operands,
    labels_N: Tensor,
    head: Head,
    plan: Plan,
    stats: RowStats,
    grad_logps_N: Tensor,
    grad_entropy_N: Tensor | None,
    *,
    needs: tuple[bool, bool, bool, bool, bool],
    rows: ModuleType,
    kept: KeptLogits | None = None,
) -> Gradients:
    """Gradients of the operands that `needs` says; kept: what forward left, written over if weight is one of them."""
    ignored = labels_N == head.ignore_index
    whole, slices = torch_rows.whole_head(rows, operands, head), None
    if whole is not None and not stands_for_many(grad_logps_N, grad_entropy_N):
        slices = whole.Gradient.of(operands, labels_N, head, stats, grad_logps_N, grad_entropy_N)
    head = replace(head, ignore_index=_IGNORED)

    def gradient(logits: Tensor, block: slice, part: slice, out: Tensor) -> None:
        labels = labels_N[block]
        labels = torch.where((labels >= part.start) & (labels < part.stop), labels - part.start, _ELSEWHERE)
        labels.masked_fill_(ignored[block], _IGNORED)
        entropy, grad_entropy = (None if x is None else x[block] for x in (stats.entropy, grad_entropy_N))
        bias = None if operands.bias is None else operands.bias[part]
        rows.row_softmax_backward(
            logits, labels, stats.lse[block], grad_logps_N[block], head, bias_V=bias, entropy_N=entropy,
            grad_entropy_N=grad_entropy, out=out,
        )  # fmt: skip

    return walk_vocabulary(operands, plan, gradient, needs, kept, slices)


def walk_vocabulary(
    operands: Operands,
    plan: Plan,
    gradient: Callable[[Tensor, slice, slice, Tensor], None],
    needs: tuple[bool, ...],
    kept: KeptLogits | None = None,
    slices: lm_head_cpu.Gradient | None = None,
) -> Gradients:
    """Gradients of the operands (as `needs` says), each in its parameter's dtype.

    Args:
        gradient: called with the raw logits (rows, width) of a tile, without the bias, the rows, the slice of the
            vocabulary, and where to write dL/dlogits: in their place, or elsewhere.
        kept: logits of leading rows; if weight needs a gradient, they are gone afterwards.
        slices: what does all of it for the tiles that it takes, where there is neither bias nor adapter.
    """
    hidden, weight, bias, low, low_weight = operands
    (n, _), vocab, wide = hidden.shape, weight.shape[0], accumulator(hidden.dtype)

    def of_rows(x: Tensor | None, needed: bool) -> Tensor | None:
        return x.new_zeros(x.shape, dtype=wide) if needed else None

    height, step = plan.slab
    blocks = [slice(i, min(i + height, n)) for i in range(0, n, height)]
    dhidden, dlow = of_rows(hidden, needs[0]), of_rows(low, needs[3])
    dweight = _OfVocabulary(weight, step, len(blocks), kept) if needs[1] else None
    dlow_weight = _OfVocabulary(low_weight, step, len(blocks)) if needs[4] else None
    dbias = torch.zeros_like(bias, dtype=wide) if needs[2] else None
    scratch = hidden.new_empty(min(height, n) * min(step, vocab))
    for i in range(0, vocab, step):
        part = slice(i, min(i + step, vocab))
        for block in blocks:
            if slices is not None and slices.takes(part):
                logits = _logits_of_tile(operands, block, part, kept, scratch)
                out = None if dweight is None else dweight.room(part)
                slices.add(logits, block, part, None if dhidden is None else dhidden[block], out)
                if dweight is not None:
                    dweight.close(part)
                continue
            dlogits = _of_tile(operands, block, part, gradient, kept, scratch)
            if dhidden is not None:
                add_product(dhidden[block], dlogits, weight[part])
            if dlow is not None:
                add_product(dlow[block], dlogits, low_weight[part])
            if dweight is not None:
                dweight.add(part, dlogits, hidden[block])
            if dlow_weight is not None:
                dlow_weight.add(part, dlogits, low[block])
            if dbias is not None:
                dbias[part] += dlogits.sum(0, dtype=wide)
    return Gradients(
        None if dhidden is None else dhidden.to(hidden.dtype),
        None if dweight is None else dweight.total,
        None if dbias is None else dbias.to(bias.dtype),
        None if dlow is None else dlow.to(low.dtype),
        None if dlow_weight is None else dlow_weight.total,
    )


def _logits_of_tile(operands: Operands, block: slice, part: slice, kept: KeptLogits | None, scratch: Tensor) -> Tensor:
    """Raw logits of a tile: those that were kept, and the others computed again."""
    if kept is None or kept.rows <= block.start:
        return operands.logits(block, part, scratch)
    if block.stop <= kept.rows:
        return kept.slice(part)[block]
    shape = block.stop - block.start, part.stop - part.start
    logits, known = scratch[: shape[0] * shape[1]].view(shape), kept.rows - block.start
    logits[:known] = kept.slice(part)[block.start :]
    rest = operands.logits(slice(kept.rows, block.stop), part, logits[known:].view(-1))
    if rest.data_ptr() != logits[known:].data_ptr():
        logits[known:] = rest
    return logits


def _of_tile(
    operands: Operands,
    block: slice,
    part: slice,
    gradient: Callable[[Tensor, slice, slice, Tensor], None],
    kept: KeptLogits | None,
    scratch: Tensor,
) -> Tensor:
    """dL/dlogits of a tile: in the place of its logits, unless that will be dweight's."""
    logits = dlogits = _logits_of_tile(operands, block, part, kept, scratch)
    if kept is not None and block.stop <= kept.rows:
        dlogits = scratch[: logits.numel()].view(logits.shape)
    gradient(logits, block, part, dlogits)
    return dlogits


class _OfVocabulary:
    """Gradient of a (V, X) operand, slice after slice: each the sum over row blocks, in fp32, rounded once."""

    def __init__(self, operand: Tensor, step: int, blocks: int, kept: KeptLogits | None = None) -> None:
        self.total = memory_like(operand) if kept is None else kept.memory
        if blocks == 0:
            self.total.zero_()
        self.blocks, self.seen, wide = blocks, 0, accumulator(operand.dtype)
        # A sum over blocks has memory of its own where it is wider, or while later blocks' logits are in its place.
        apart = blocks > 1 and (operand.dtype != wide or kept is not None)
        shape = (min(step, operand.shape[0]), operand.shape[1])
        self.scratch = operand.new_empty(shape, dtype=wide) if apart else None

    def room(self, part: slice) -> Tensor:
        """Where the next row block's share of a slice goes: written over if there is one block, else added to."""
        out, self.seen = self.total[part], (self.seen + 1) % self.blocks
        if self.blocks == 1:
            return out
        sums = out if self.scratch is None else self.scratch[: out.shape[0]]
        return sums.zero_() if self.seen == 1 else sums

    def close(self, part: slice) -> None:
        """To be called when it is there."""
        if self.seen == 0 and self.scratch is not None:
            self.total[part] = self.scratch[: part.stop - part.start]

    def add(self, part: slice, dlogits: Tensor, x: Tensor) -> None:
        """dlogits.T @ x of the next row block of a slice; slices one after the other."""
        (product_into if self.blocks == 1 else add_product)(self.room(part), dlogits.t(), x)
        self.close(part)
