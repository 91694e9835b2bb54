"""Trained head, loss local to groups: logits once, and both products while they are there.

Of a chunk of whole groups, as many as fit the workspace:

    z = hidden @ weight.T;   logp, lse = rows of z;   g = dL/dlogp, which nothing outside the chunk can change
    dz = g (onehot - p), in the place of z;   dhidden = dz @ weight;   dweight += dz.T @ hidden

6NDV in all, 4NDV where of the head only a bias or an adapter trains. dweight is an fp32 sum where there are several
chunks. All gradients are made with the value, so backward only multiplies them by what comes from above.
Source: derived; gradients made in forward as in Hsu et al. 2024, arXiv:2410.10989.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from prefkern.chunked import Gradients
from prefkern.gradients import first_order_only, graph_is_kept, scaled
from prefkern.head import Head, Operands, RowStats
from prefkern.planner import Plan
from prefkern.products import add_product, product, product_into
from prefkern.reference import accumulator


@torch.no_grad()
def walk(
    operands: Operands,
    labels_N: Tensor,
    head: Head,
    plan: Plan,
    want: dict[str, bool],
    rows: ModuleType,
    chunks: Sequence[slice],
    upstream: Callable[[int, RowStats], Tensor],
) -> tuple[RowStats, Gradients]:
    """Row statistics, and the gradients of the operands that require one.

    Args:
        labels_N, head, want, rows: as in `chunked.forward`.
        chunks: runs of rows that cover all of them, none longer than plan.rows_per_chunk.
        upstream: called with the number of a chunk and its statistics; returns dL/dlogp of its rows.
    """
    hidden, weight, bias, low, low_weight = operands
    needs = Gradients(*(x is not None and x.requires_grad for x in operands))
    dhidden, dlow = (
        x.new_empty(x.shape) if needed else None for x, needed in ((hidden, needs.hidden), (low, needs.low))
    )
    dweight, dlow_weight = (
        _OverChunks(x, len(chunks), plan.workspace_bytes) if needed else None
        for x, needed in ((weight, needs.weight), (low_weight, needs.low_weight))
    )
    dbias = torch.zeros_like(bias, dtype=accumulator(hidden.dtype)) if needs.bias else None
    scratch = hidden.new_empty(max(chunk.stop - chunk.start for chunk in chunks) * weight.shape[0])
    parts = []
    for number, chunk in enumerate(chunks):
        labels, own, own_low = labels_N[chunk], hidden[chunk], None if low is None else low[chunk]
        logits = operands.logits(chunk, scratch=scratch)
        stats = rows.row_softmax_forward(logits, labels, head, bias_V=bias, **want)
        g = upstream(number, stats)
        dlogits = rows.row_softmax_backward(logits, labels, stats.lse, g, head, bias_V=bias, out=logits)
        if dhidden is not None:
            product_into(dhidden[chunk], dlogits, weight)
        if dlow is not None:
            product_into(dlow[chunk], dlogits, low_weight)
        if dweight is not None:
            dweight.add(dlogits, own)
        if dlow_weight is not None:
            dlow_weight.add(dlogits, own_low)
        if dbias is not None:
            dbias += dlogits.sum(0, dtype=dbias.dtype)
        parts.append(stats)
        del logits, dlogits  # a library that allocates its result shall find this one's place free
    stats = RowStats(*(None if column[0] is None else torch.cat(column) for column in zip(*parts)))
    return stats, Gradients(
        dhidden,
        None if dweight is None else dweight.total.to(weight.dtype),
        None if dbias is None else dbias.to(bias.dtype),
        dlow,
        None if dlow_weight is None else dlow_weight.total.to(low_weight.dtype),
    )


class _OverChunks:
    """Gradient of a (V, X) operand: of one chunk as the library makes it, of several their sum in fp32."""

    def __init__(self, operand: Tensor, chunks: int, workspace_bytes: int) -> None:
        wide, (vocab, width) = accumulator(operand.dtype), operand.shape
        self.total = operand.new_zeros(operand.shape, dtype=wide) if chunks > 1 else None
        # Where the library cannot add to an fp32 sum, its product is a tensor of its own.
        self.step = max(1, min(vocab, workspace_bytes // (width * wide.itemsize)))

    def add(self, dlogits: Tensor, x: Tensor) -> None:
        """dlogits.T @ x of the next chunk."""
        if self.total is None:
            self.total = product(dlogits.t(), x)
            return
        vocab = dlogits.shape[1]
        for i in range(0, vocab, self.step):
            part = slice(i, min(i + self.step, vocab))
            piece = dlogits[:, part]
            if piece.device.type == "cpu":  # oneDNN takes dense matrices only; next to the product the copy is nothing
                piece = piece.contiguous()
            add_product(self.total[part], piece.t(), x)


@dataclass(frozen=True)
class Known:
    """A value and its gradients, made together."""

    value: Tensor  # 0-dim
    gradients: Gradients


class Differentiated(torch.autograd.Function):
    """A value that comes with its gradients: backward scales them."""

    @staticmethod
    def forward(ctx, known: Known, *operands):
        ctx.save_for_backward(*known.gradients, *operands)
        return known.value

    @staticmethod
    def backward(ctx, grad_value):
        gradients, operands = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        last = not graph_is_kept()
        if last and grad_value.device.type == "cpu" and grad_value.item() == 1.0:  # on a GPU reading it would wait
            return None, *gradients
        with torch.no_grad():
            grads = tuple(None if g is None else scaled(g, grad_value, in_place=last) for g in gradients)
        return None, *first_order_only(grads, operands)
