"""AOT on pairs: the policy's gaps between chosen and rejected shall dominate the reference's, as distributions."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prefkern.losses.base import Batch, PairLoss, ranged, register, smoothed_logistic
from prefkern.losses.statistics import pairs_that_count


@register("aot")
@dataclass(frozen=True, kw_only=True)
class AOT(PairLoss):
    """DPO in which a gap meets the reference's gap of the same rank, not that of the same pair.

        y = log pi(y_w) - log pi(y_l),  r = the reference's
        x = beta * (y sorted - r sorted)
        L = -(1 - e) log sigma(x) - e log sigma(-x),    mean over ranks

    Both are sorted over the pairs of one call on one device: bigger batches compare finer. Ties keep the batch's order;
    pairs in which no token counts take no rank. No gradient flows through the order.

    Fields:
        beta: as in `dpo`.
        label_smoothing: e, the share of pairs believed to be labelled the wrong way round.
    Degenerates to: `dpo` with one pair a batch, or where both models rank the pairs' gaps alike.
    Source:
        Melnyk et al. 2024, arXiv:2406.05882, as in TRL's code.
    """

    link: ClassVar[str] = "logistic"
    needs_reference: ClassVar[bool] = True
    needs_first_pass: ClassVar[bool] = True
    couples_batch: ClassVar[bool] = True
    formula: ClassVar[str] = "-log sigma(beta (sort(logp_w - logp_l) - sort(ref_w - ref_l)))"
    source: ClassVar[str] = "Melnyk et al. 2024, arXiv:2406.05882, as in TRL's code"
    confidence: ClassVar[str] = "third party"

    beta: float = ranged(0.1, 0, 100, "0.01 to 0.5 in practice", open_low=True)
    label_smoothing: float = ranged(0.0, 0, 0.5, "0 for clean labels", open_high=True)

    def margin(self, batch: Batch) -> Tensor:
        """beta * (reference's gap of the same rank - reference's gap of the same pair)."""
        policy, ref = (chosen - rejected for chosen, rejected in map(batch.pairs, (batch.logp_R, batch.ref_R)))
        counted = pairs_that_count(batch)
        other = ref[ranked(ref, counted)]
        return self.beta * (torch.empty_like(ref).index_copy(0, ranked(policy, counted), other) - ref)

    def eager(self, score_GK: Tensor, margin: Tensor | float = 0.0) -> Tensor:
        return smoothed_logistic(self.beta * (score_GK[:, 0] - score_GK[:, 1]) - margin, self.label_smoothing)

    def link_params(self) -> tuple[float, ...]:
        return self.beta, self.label_smoothing


def ranked(values_P: Tensor, counted_P: Tensor) -> Tensor:
    """(P,) numbers of the pairs by ascending value, ties in order, pairs that do not count at the end."""
    return torch.where(counted_P, values_P, torch.inf).argsort(stable=True)
