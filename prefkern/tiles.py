"""Forward of the chunked body by tiles: some rows, some of the vocabulary, a softmax of each tile's own.

A row of logits is never whole in memory, so a tile can be as wide as the products like and yet stay in a CPU's cache.
With top_t and sum_t of a tile's rows and the running ones top, sum:

    top' = max(top, top_t);   sum' = sum exp(top - top') + sum_t exp(top_t - top')

and where only hidden needs a gradient, its sums over the vocabulary, in fp32, follow suit:

    acc' = acc exp(top - top') + (p_t @ weight_t) sum_t exp(top_t - top'),    p_t = softmax of the tile, 0 at the label
    u    = (1 - p_y) weight[y] - acc / sum

The label's own p is left out and 1 - p_y taken from logp by expm1: where p_y is nearly 1, both would cancel.
Source: Milakov & Gimelshein 2018, arXiv:1805.02867 (online normaliser); the rest is derived.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prefkern.head import Head, Operands, RowStats
from prefkern.kept_logits import KeptLogits
from prefkern.planner import Plan
from prefkern.products import product
from prefkern.reference import accumulator
from prefkern.rows import pieces, slope_of, transformed


def forward(
    operands: Operands,
    labels_N: Tensor,
    head: Head,
    plan: Plan,
    want: dict[str, bool],
    *,
    gradient: int,
    kept: KeptLogits | None = None,
) -> tuple[RowStats, Tensor | None, Tensor | None]:
    """Row statistics, and d logp_n / d hidden_n and d low_n of the first `gradient` rows, in hidden's dtype.

    Args:
        operands, labels_N, head, gradient, kept: as in `chunked.forward`.
        want: the optional statistics, as keywords of `rows.row_softmax_forward`.
    """
    hidden, vocab = operands.hidden, operands.weight.shape[0]
    n, wide = hidden.shape[0], accumulator(hidden.dtype)
    sums = _Sums.fresh(n, vocab, head, want, wide, hidden.device)
    units = [None, None]
    if gradient:
        wanted = ((hidden, plan.grad_hidden), (operands.low, plan.grad_low[0]))
        units = [x.new_empty((gradient, x.shape[1])) if wants else None for x, wants in wanted]
    rows, width = replace(plan, shape=(n, *plan.shape[1:])).tile  # whose N leaves out a reference's rows
    width = min(width, max(1, vocab))
    scratch = hidden.new_empty(min(rows, n) * width)
    for block in _slices(0, n, rows):
        wanted = units if block.start < gradient else (None, None)
        sums.walk(block, operands, labels_N, width, scratch, wanted, kept)
    return sums.stats(labels_N), units[0], units[1]


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, stop)) for i in range(start, stop, step))


class _Sums:
    """What is known of every row so far: its running maximum and sums over the vocabulary entries seen."""

    def __init__(self, head: Head, vocab: int, **columns: Tensor | None) -> None:
        self.head, self.vocab, self.columns = head, vocab, columns

    @classmethod
    def fresh(
        cls, n: int, vocab: int, head: Head, want: dict[str, bool], wide: torch.dtype, device: torch.device
    ) -> _Sums:
        """Nothing seen: sums of 0 and a maximum of -inf."""

        def zeros(wanted: bool) -> Tensor | None:
            return torch.zeros(n, dtype=wide, device=device) if wanted else None

        return cls(
            head, vocab,
            top=torch.full((n,), -torch.inf, dtype=wide, device=device), sum=zeros(True), label=zeros(True),
            dot=zeros(want.get("want_entropy", False)), total=zeros(want.get("want_mean", False)),
            square=zeros(want.get("want_collision", False)), top1=zeros(want.get("want_top1", False)),
        )  # fmt: skip

    def walk(
        self,
        block: slice,
        operands: Operands,
        labels_N: Tensor,
        width: int,
        scratch: Tensor,
        units: Sequence[Tensor | None],
        kept: KeptLogits | None,
    ) -> None:
        """All of the vocabulary for a block of rows; gradients of hidden and low of those that `units` has."""
        labels, bias = labels_N[block], operands.bias
        mine = {name: None if x is None else x[block] for name, x in self.columns.items()}
        pairs = [(unit[block], w) for unit, w in zip(units, (operands.weight, operands.low_weight)) if unit is not None]
        count = pairs[0][0].shape[0] if pairs else 0
        accs = [torch.zeros(unit.shape, dtype=mine["sum"].dtype, device=unit.device) for unit, _ in pairs]
        for part in _slices(0, self.vocab, width):
            tile = operands.logits(block, part, scratch)
            if kept is not None:
                kept.store(tile, block.start, part)
            own_bias = None if bias is None else bias[part]
            decay, gain = self._fold(tile, labels - part.start, own_bias, mine, count)
            for acc, (_, w) in zip(accs, pairs):
                acc.mul_(decay[:count, None]).addcmul_(product(tile[:count], w[part]), gain[:count, None])
        mine = {name: None if x is None else x[:count] for name, x in mine.items()}
        for acc, (unit, w) in zip(accs, pairs):
            self._finish(acc, w, labels[:count], mine, unit)

    def _fold(
        self, tile: Tensor, labels: Tensor, bias: Tensor | None, mine: dict[str, Tensor | None], count: int
    ) -> tuple[Tensor, Tensor]:
        """Add a tile to the sums, and leave the softmax of its first `count` rows, without the label's, in their place.

        Returns:
            Factors (rows,) of what was summed before, and of sums of this tile's softmax.
        """
        rows, width = tile.shape
        top, peak = (mine["sum"].new_empty(rows) for _ in range(2))
        own = {name: None if mine[name] is None else top.new_empty(rows) for name in ("dot", "total", "square")}
        inside = (labels >= 0) & (labels < width)
        column = labels.clamp(0, width - 1)[:, None]
        for piece in pieces(tile):
            gradient = piece.start < count
            z = transformed(tile[piece], self.head, bias, overwrite=True)
            torch.amax(z, 1, out=top[piece])
            hit = inside[piece, None]
            mine["label"][piece] += torch.where(hit, z.gather(1, column[piece]), 0.0)[:, 0]
            if own["total"] is not None:
                torch.sum(z, 1, out=own["total"][piece])
            slope = slope_of(z, self.head) if gradient else None
            p = torch.softmax(z, 1)
            torch.amax(p, 1, out=peak[piece])
            if own["square"] is not None:
                torch.sum(p.square(), 1, out=own["square"][piece])
            if own["dot"] is not None:
                own["dot"][piece] = _expected(z.sub_(top[piece, None]), p)
            if gradient:
                p = p if slope is None else p.mul_(slope)
                tile[piece] = p.scatter_(1, column[piece], torch.where(hit, 0.0, p.gather(1, column[piece])))
        empty = top.isneginf()  # a tile of excluded entries alone: its softmax is NaN, its share nothing
        if count and (tile.device.type != "cpu" or empty.any()):
            tile.masked_fill_(empty[:, None], 0.0)
        return self._merge(top, peak, own, mine)

    def _merge(
        self, top: Tensor, peak: Tensor, own: dict[str, Tensor | None], mine: dict[str, Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        tile_sum = peak.reciprocal()  # the largest p is 1 / sum exp(z - top), and never underflows
        new_top = torch.maximum(mine["top"], top)
        # A row of -inf so far: exp(-inf), not NaN.
        finite = new_top.masked_fill(new_top.isneginf(), 0.0)
        decay, gain = (mine["top"] - finite).exp_(), (top - finite).exp_().mul_(tile_sum)
        empty = top.isneginf()
        gain.masked_fill_(empty, 0.0)
        if mine["dot"] is not None:
            # Sums of exp(z - top') (z - top'): each side's own, shifted to the new maximum.
            def shift(x: Tensor) -> Tensor:
                return (x - finite).masked_fill_(x.isneginf(), 0.0)

            before = (mine["dot"] + shift(mine["top"]) * mine["sum"]).mul_(decay)
            after = (own["dot"] + shift(top)).mul_(gain).masked_fill_(empty, 0.0)
            mine["dot"].copy_(before).add_(after)
        if mine["square"] is not None:
            mine["square"].mul_(decay.square()).add_((own["square"] * gain.square()).masked_fill_(empty, 0.0))
        if mine["total"] is not None:
            mine["total"].add_(own["total"])
        mine["sum"].mul_(decay).add_(gain)
        mine["top"].copy_(new_top)
        return decay, gain

    def _finish(self, acc: Tensor, weight: Tensor, labels: Tensor, mine: dict, unit: Tensor) -> None:
        """u of a block of rows, from the sums over the vocabulary without the label."""
        own = weight[labels.clamp(0, self.vocab - 1)].to(acc.dtype)
        logp = _logp(mine)
        rest = -torch.expm1(logp)
        if self.head.softcap is not None:
            rest = rest * slope_of(mine["label"], self.head)
        scale = self.head.logit_scale / self.head.temperature
        acc.div_(-mine["sum"][:, None]).addcmul_(own, rest[:, None])
        unit.copy_(acc.mul_(scale) if scale != 1.0 else acc)
        unit.masked_fill_((labels == self.head.ignore_index)[:, None], 0.0)

    def stats(self, labels_N: Tensor) -> RowStats:
        """Row statistics, once all of the vocabulary was seen."""
        c, log_sum = self.columns, self.columns["sum"].log()
        top1 = None if c["top1"] is None else c["label"] >= c["top"]
        entropy = None if c["dot"] is None else log_sum - c["dot"] / c["sum"]
        mean = None if c["total"] is None else c["total"] / self.vocab
        collision = None if c["square"] is None else c["square"].log() - 2 * log_sum
        valid = labels_N != self.head.ignore_index
        wrong = valid & ((labels_N < 0) | (labels_N >= self.vocab))
        logp = _logp(c).masked_fill_(wrong, torch.nan)
        every = (logp, c["top"] + log_sum, entropy, top1, mean, collision)
        return RowStats(*(None if x is None else x.masked_fill(~valid, 0) for x in every))


def _logp(mine: dict[str, Tensor]) -> Tensor:
    # (z - top) first: both are large when logits are, their difference is not.
    return (mine["label"] - mine["top"]) - mine["sum"].log()


def _expected(z: Tensor, p: Tensor) -> Tensor:
    """(rows,) sums of p z; an excluded entry, p = 0 and z = -inf, adds 0. Writes over z."""
    if z.device.type == "cpu":
        dot = torch.bmm(p[:, None, :], z[:, :, None])[:, 0, 0]
        if dot.isfinite().all():
            return dot
    return z.clamp_(min=-1e30).mul_(p).sum(1)
