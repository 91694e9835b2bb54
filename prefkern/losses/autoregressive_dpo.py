"""Autoregressive DPO: the sum over segments stands outside the log-sigmoid."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prefkern.granularity import Adaptive, Boundaries, Granularity, Static
from prefkern.layout import Accumulate, Layout
from prefkern.losses.base import Batch, choice, register, variant
from prefkern.losses.dpo import DPO


@register("autoregressive_dpo")
@dataclass(frozen=True, kw_only=True)
class AutoregressiveDPO(DPO):
    """DPO on each pair of corresponding segments, added up.

        L = sum_i -log sigma( beta * S^w(i) - beta * S^l(i) ),      S(i) = sum of d_t over segment i,   mean over pairs

    A segment is compared only while the other side's counterpart is undecided: each saturates on its own, where DPO
    saturates as a whole. At policy = reference L is log 2 a segment, and the gradient is DPO's.

    Fields:
        beta, label_smoothing: as in `dpo`.
        f_divergence, f_alpha: as in `dpo`, of each S(i).
        granularity: Static(k), Adaptive(m), or Boundaries(...); None: one segment a response, which is `dpo`.
        segment_reduction: "sum" over a pair's segments, or "mean".
        accumulate: "segment" compares segments by themselves; "prefix" compares everything up to a segment's end.
    Degenerates to: `dpo` with one segment, Adaptive(1), or Static(k) with k at least the longest response.
    Source:
        arXiv:2602.09533: the objective, static and adaptive families. The mean over pairs is inferred; a log-ratio of 0
        past a response's end, fewer parts for short responses, and "prefix" are our choices.
    """

    formula: ClassVar[str] = "sum_i -log sigma(beta (S_w(i) - S_l(i)))"
    source: ClassVar[str] = "Autoregressive DPO 2026, arXiv:2602.09533"

    granularity: Granularity | None = variant(
        Static(1), optional=True, static=Static, adaptive=Adaptive, boundaries=Boundaries
    )
    segment_reduction: str = choice("sum", "sum", "mean")
    accumulate: Accumulate = choice("segment", "segment", "prefix")

    def segmented(self, layout: Layout) -> Layout:
        """The layout cut by `granularity`; one that is cut already is taken as it is if granularity leaves it open."""
        if isinstance(self.granularity, Boundaries) or self.granularity is not None and not layout.is_cut:
            layout = self.granularity.cut(layout, self.accumulate)
        elif layout.is_cut and self.granularity is not None:
            raise ValueError(
                f"{self.name}: the layout is cut already and granularity={self.granularity}; pass the uncut layout, or"
                " granularity=None to take its segments"
            )
        if layout.is_cut and self.accumulate != layout.accumulate and self.accumulate != "segment":
            raise ValueError(
                f"{self.name}: accumulate={self.accumulate!r}, but the layout was cut with"
                f" accumulate={layout.accumulate!r}; cut it as the loss says"
            )
        return layout

    def group_weight(self, batch: Batch) -> Tensor | None:
        weight = super().group_weight(batch)
        if self.segment_reduction == "sum":
            return weight
        share = 1 / batch.index.parts_of_group_G.double()
        return share if weight is None else weight * share
