"""Anchored DPO over lists: cross-entropy of the group's anchored softmax against a target distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prefkern.losses.base import register
from prefkern.losses.listwise import ListLoss


@register("anchored_listwise")
@dataclass(frozen=True, kw_only=True)
class AnchoredListwise(ListLoss):
    """Responses shall share their group's probability, relative to the anchor, as the targets say.

        u_i = (log pi(y_i) - log anchor(y_i)) / tau,      p = softmax(u)
        L   = - sum_i q_i log p_i = KL(q || p) + H(q),    mean over prompts;      dL/dlog pi(y_i) = (p_i - q_i) / tau

    At the optimum log pi = log anchor + tau log q + c. The Hessian in the log-probabilities is
    (diag p - p p^T) / tau^2. Where all rewards are equal q is uniform: the loss then pulls back to the anchor.

    Fields:
        targets: Softmax, RawSoftmax, KDE or Given make q of the rewards; PlackettLuce takes the ranking instead, and
            its likelihood in place of the cross-entropy.
        tau, normalize: as in every list loss.
    The author's later code also clips log-ratios to 5 and u to 10 and has a z-loss; these are not part of the loss.
    Degenerates to: `anchored_pairwise` with two responses, targets=Given() and tau = 1/beta; `dpo` if q = (1, 0).
    Source:
        Anchored DPO 2025, arXiv:2510.18913, eq. of the objective; the targets' and temperatures' own docstrings say how
        sure they are.
    """

    formula: ClassVar[str] = "-sum_i q_i log softmax_i((logp - logp_anchor) / tau)"
    source: ClassVar[str] = "Anchored DPO 2025, arXiv:2510.18913"

    @property
    def link(self) -> str:
        return self.targets.link

    def eager(
        self,
        score_GK: Tensor,
        margin: Tensor | float = 0.0,
        target_GK: Tensor | None = None,
        valid_GK: Tensor | None = None,
    ) -> Tensor:
        return self.targets.value(score_GK, target_GK, valid_GK)

    def link_params(self) -> tuple[float, ...]:
        return self.targets.link_params()
