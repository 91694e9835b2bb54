"""Forward of the chunked body by tiles: some rows, some of the vocabulary, a softmax of each tile's own.

A row of logits is never whole in memory, so a tile can be as wide as the products like and yet stay in a CPU's cache.
With top_t and sum_t of a tile's rows and the running ones top, sum:

    top' = max(top, top_t);   sum' = sum exp(top - top') + sum_t exp(top_t - top')

and where only hidden needs a gradient, its sums over the vocabulary, in fp32, follow suit:

    acc' = acc exp(top - top') + (e_t @ weight_t) exp(top_t - top'),    e_t = exp(z - top_t), 0 at the label
    u    = (1 - p_y) weight[y] - acc / sum

The label's own share is left out and 1 - p_y taken from logp by expm1: where p_y is nearly 1, both would cancel. Where
compiled code does a tile in one go (`rows.whole_head`), top is not the maximum but a reference near the log-sum-exp;
all of this holds for it too.
Source: Milakov & Gimelshein 2018, arXiv:1805.02867 (online normaliser); the rest is derived.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from prefkern.head import Head, Operands, RowStats
from prefkern.kept_logits import KeptLogits
from prefkern.planner import Plan
from prefkern.products import blend_product
from prefkern.reference import accumulator
from prefkern.rows import RowSums, logp, slope_of, statistics, whole_head


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
    """Row statistics, and d logp_n / d hidden_n and d low_n of the first `gradient` rows, in hidden's dtype.

    Args:
        operands, labels_N, head, gradient, kept: as in `chunked.forward`.
        want: the optional statistics, as keywords of `rows.row_softmax_forward`.
        rows: the module of the row functions, one that has `fold`.
    """
    hidden, vocab = operands.hidden, operands.weight.shape[0]
    n, wide = hidden.shape[0], accumulator(hidden.dtype)
    units = [None, None]
    if gradient:
        wanted = ((hidden, plan.grad_hidden), (operands.low, plan.grad_low[0]))
        units = [x.new_empty((gradient, x.shape[1])) if wants else None for x, wants in wanted]
    height, width = replace(plan, shape=(n, *plan.shape[1:])).tile  # whose N leaves out a reference's rows
    width = min(width, max(1, vocab), vocab if kept is None else kept.step)
    summed = {flag: wanted for flag, wanted in want.items() if flag != "want_top1"}
    want_top1 = want.get("want_top1", False)
    whole = whole_head(rows, operands, head, **want)
    walk = _Walk(operands, head, rows, summed, width, min(height, n) * width, kept, whole)
    sums = _nothing_seen(n, summed, wide, hidden.device)
    top = torch.full_like(sums.top, -torch.inf) if want_top1 else None
    # Compiled code wants blocks of which all rows are kept, or none.
    split = 0 if kept is None or whole is None else min(n, kept.rows)
    for block in (*_slices(0, split, height), *_slices(split, n, height)):
        own = RowSums(*(None if x is None else x[block] for x in sums))
        own_top = None if top is None else top[block]
        walk.block(block, labels_N[block], own, own_top, units if block.start < gradient else (None, None))
    if top is not None:
        _refer_to(sums, top)
    return statistics(sums, labels_N, vocab, head, want_top1=want_top1), *units


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, stop)) for i in range(start, stop, step))


def _nothing_seen(n: int, want: dict[str, bool], wide: torch.dtype, device: torch.device) -> RowSums:
    """Sums of 0 and a maximum of -inf."""

    def zeros(wanted: bool) -> Tensor | None:
        return torch.zeros(n, dtype=wide, device=device) if wanted else None

    flags = (want.get(f"want_{name}", False) for name in ("entropy", "mean", "collision"))
    top = torch.full((n,), -torch.inf, dtype=wide, device=device)
    return RowSums(top, zeros(True), zeros(True), *map(zeros, flags))


@dataclass(frozen=True)
class _Walk:
    """Over the vocabulary, tile after tile, for a block of rows."""

    operands: Operands
    head: Head
    rows: ModuleType
    want: dict[str, bool]
    width: int
    size: int  # of a tile, the largest
    kept: KeptLogits | None
    whole: ModuleType | None  # what folds a slice in one go, where it serves

    def block(
        self, block: slice, labels: Tensor, sums: RowSums, top: Tensor | None, units: Sequence[Tensor | None]
    ) -> None:
        """Sums of a block of rows, their largest z, and the gradients of hidden and low of those that `units` has."""
        _, weight, bias, _, low_weight = self.operands
        vocab = weight.shape[0]
        pairs = [(unit[block], w) for unit, w in zip(units, (weight, low_weight)) if unit is not None]
        count = pairs[0][0].shape[0] if pairs else 0
        accs = [torch.zeros(unit.shape, dtype=sums.sum.dtype, device=unit.device) for unit, _ in pairs]
        keeps = self.kept is not None and block.start < self.kept.rows
        packed = None
        if self.whole is not None and (not keeps or (block.stop <= self.kept.rows and self.width == self.kept.step)):
            packed = self.whole.Rows.of(self.operands.hidden[block], labels, self.head)
        done = 0
        while done < vocab:
            if packed is not None:
                acc, unit = (accs[0], pairs[0][0]) if accs else (None, None)
                done = packed.fold(
                    weight, done, self.width, sums, top, logits=self.kept.memory if keeps else None,
                    rows_before=block.start, acc=acc, unit=unit,
                )  # fmt: skip
                if done == vocab:
                    return
            part = slice(done, min(done + self.width, vocab))
            done, room = part.stop, self.kept.room(block, part) if keeps else None
            tile, is_kept = self._tile(block, part, room)
            own = self.rows.fold(
                tile, labels - part.start, self.head, bias_V=None if bias is None else bias[part], **self.want,
                gradient=count, overwrite=not is_kept,
            )  # fmt: skip
            if top is not None:
                torch.maximum(top, own.top, out=top)
            decay, gain = _merge(own, sums)
            if packed is not None and (~sums.sum.isfinite() & (labels != self.head.ignore_index)).any():
                packed = None  # nor will it take the slices that follow
            for acc, (_, w) in zip(accs, pairs):
                blend_product(acc, decay[:count], tile[:count], w[part], gain[:count])
        first = RowSums(*(None if x is None else x[:count] for x in sums))
        for acc, (unit, w) in zip(accs, pairs):
            self._finish(acc, w, labels[:count], first, unit)

    @functools.cached_property
    def scratch(self) -> Tensor:
        return self.operands.hidden.new_empty(self.size)

    def _tile(self, block: slice, part: slice, room: Tensor | None) -> tuple[Tensor, bool]:
        """Raw logits, and whether they lie where backward will look for them: in `room`."""
        tile = self.operands.logits(block, part, self.scratch if room is None else room.view(-1))
        if room is None:
            if self.kept is not None:
                self.kept.store(tile, block.start, part)
            return tile, False
        if tile.data_ptr() != room.data_ptr():
            room.copy_(tile)
        return room, True

    def _finish(self, acc: Tensor, weight: Tensor, labels: Tensor, sums: RowSums, unit: Tensor) -> None:
        """u of a block of rows, from the sums over the vocabulary without the label."""
        own = weight[labels.clamp(0, weight.shape[0] - 1)].to(acc.dtype)
        rest = -torch.expm1(logp(sums))
        if self.head.softcap is not None:
            rest = rest * slope_of(sums.label, self.head)
        scale = self.head.logit_scale / self.head.temperature
        acc.div_(-sums.sum[:, None]).addcmul_(own, rest[:, None])
        unit.copy_(acc.mul_(scale) if scale != 1.0 else acc)
        unit.masked_fill_((labels == self.head.ignore_index)[:, None], 0.0)


def _refer_to(sums: RowSums, top: Tensor) -> None:
    """The same sums, of exp(z - top) where they were of another reference."""
    shift = (sums.top - top).masked_fill_(top.isneginf(), 0.0)
    factor = shift.exp()
    if sums.dot is not None:
        sums.dot.addcmul_(sums.sum, shift).mul_(factor)
    sums.sum.mul_(factor)
    sums.top.copy_(top)


def _merge(tile: RowSums, mine: RowSums) -> tuple[Tensor, Tensor]:
    """Add a tile's sums to the running ones; factors (rows,) of what was summed before, and of the tile's."""
    top = torch.maximum(mine.top, tile.top)
    finite = top.masked_fill(top.isneginf(), 0.0)  # a row of -inf so far: exp(-inf), not NaN
    decay, gain = (mine.top - finite).exp_(), (tile.top - finite).exp_()
    if mine.dot is not None:
        # Sums of exp(z - top') (z - top'): each side's own, shifted to the new maximum.
        def shifted(sums: RowSums) -> Tensor:
            return sums.dot + (sums.top - finite).masked_fill_(sums.top.isneginf(), 0.0) * sums.sum

        mine.dot.copy_(shifted(mine).mul_(decay).addcmul_(shifted(tile), gain))
    if mine.square is not None:
        mine.square.mul_(decay.square()).addcmul_(tile.square, gain.square())
    if mine.total is not None:
        mine.total.add_(tile.total)
    mine.sum.mul_(decay).addcmul_(tile.sum, gain)
    mine.label.add_(tile.label)
    mine.top.copy_(top)
    return decay, gain
