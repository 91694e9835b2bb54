"""AOT without pairs: the chosen responses' rewards shall dominate the rejected ones', as distributions."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prefkern.layout import TailIndex
from prefkern.losses.aot import AOT, ranked
from prefkern.losses.base import Batch, register
from prefkern.losses.statistics import pairs_that_count


@register("aot_unpaired")
@dataclass(frozen=True, kw_only=True)
class AOTUnpaired(AOT):
    """DPO between the chosen and the rejected response of the same rank, whichever prompts they answer.

        x = beta * (a_w sorted - a_l sorted),    a = sum_t d_t
        L = -(1 - e) log sigma(x) - e log sigma(-x),    mean over ranks

    As in `aot`, sorting is over one call on one device, ties keep the batch's order, pairs in which no token counts
    take no rank, and no gradient flows through the order. Scores come out rank by rank; metrics compare the data's
    pairs, which are needed only for there to be as many chosen as rejected responses.

    Fields:
        beta, label_smoothing: as in `aot`.
    Degenerates to: `dpo` with one pair a batch.
    Source:
        Melnyk et al. 2024, arXiv:2406.05882, as in TRL's code (called aot_pair before 1.0).
    """

    formula: ClassVar[str] = "-log sigma(beta (sort(a_w) - sort(a_l)))"

    def margin(self, batch: Batch) -> float:
        return 0.0

    def _order(self, batch: Batch) -> Tensor:
        """(R,) responses in the order of their ranks: chosen, rejected, chosen, ..."""
        counted = pairs_that_count(batch)
        chosen, rejected = (ranked(values, counted) for values in batch.pairs(batch.ratio_R))
        return torch.stack([2 * chosen, 2 * rejected + 1], 1).flatten()

    def regroup(self, batch: Batch) -> TailIndex:
        return batch.index.reordered(self._order(batch))

    def group_weight(self, batch: Batch) -> Tensor | None:
        if not self.wpo:
            return None
        certainty_R = batch.token_means(batch.logps_N - batch.stats["log_collision"])
        return certainty_R[self._order(batch)].view(-1, 2).sum(1).exp()
