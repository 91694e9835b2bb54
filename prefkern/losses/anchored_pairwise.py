"""Anchored DPO over pairs: DPO with a probability as its label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from prefkern.losses.base import Batch, PairLoss, ranged, register


@register("anchored_pairwise")
@dataclass(frozen=True, kw_only=True)
class AnchoredPairwise(PairLoss):
    """How much likelier the first response is than the second shall be what a teacher says.

        z = beta * (sum_t d^1_t - sum_t d^2_t),      d_t = log pi(y_t) - log pi_ref(y_t)
        L = log(1 + e^z) - q z = -q log sigma(z) - (1 - q) log sigma(-z),    mean over pairs;      dL/dz = sigma(z) - q

    q is the target of a pair's first response, the probability that it is preferred; the second's, 1 - q, is implied
    and not read. "Chosen" in the metrics is the first response; rewards/accuracies is how often the rewards' order is
    that of a preference drawn with probability q.

    Fields:
        beta: strength of the pull to the reference, in 1/nats.
    Degenerates to: `dpo` at q = 1, and with label smoothing e at q = 1 - e; `anchored_listwise` with two responses and
    tau = 1/beta is the same loss.
    Source:
        arXiv:2510.18913 v1, as summarised by third parties.
    """

    link: ClassVar[str] = "soft_logistic"
    needs_reference: ClassVar[bool] = True
    formula: ClassVar[str] = "-q log sigma(z) - (1 - q) log sigma(-z), z = beta (a_1 - a_2)"
    source: ClassVar[str] = "Anchored DPO 2025, arXiv:2510.18913 v1"
    confidence: ClassVar[str] = "third party"
    target_kind: ClassVar[Literal["score", "label", "preference"] | None] = "preference"
    link_targets: ClassVar[bool] = True

    beta: float = ranged(0.1, 0, 100, "0.01 to 0.5 in practice", open_low=True)

    def eager(
        self,
        score_GK: Tensor,
        margin: Tensor | float = 0.0,
        target_GK: Tensor | None = None,
        valid_GK: Tensor | None = None,
    ) -> Tensor:
        z_G = self.beta * (score_GK[:, 0] - score_GK[:, 1]) - margin
        return (1 - target_GK[:, 0]) * z_G - F.logsigmoid(z_G)

    def link_params(self) -> tuple[float, ...]:
        return (self.beta,)

    def metrics(self, score_R: Tensor, logp_R: Tensor, batch: Batch) -> dict[str, Tensor]:
        """As in every pair loss, but rewards/accuracies is expected over labels drawn from the targets."""
        first, second = batch.pairs(score_R)
        q, _ = batch.pairs(batch.target_R)
        right = q * (first > second) + (1 - q) * (second > first)
        return {**super().metrics(score_R, logp_R, batch), "rewards/accuracies": right.mean()}
