"""CPO: contrastive preference optimization, DPO without a reference."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prefkern.losses.base import PairLoss, ranged, register, smoothed_logistic


@register("cpo")
@dataclass(frozen=True, kw_only=True)
class CPO(PairLoss):
    """DPO under a uniform reference, kept in place by the chosen response's likelihood.

        x = beta * (log pi(y_w) - log pi(y_l))
        L = -(1 - e) log sigma(x) - e log sigma(-x) + nll_weight * NLL(y_w)

    The first terms are means over pairs; NLL is the mean over the batch's chosen tokens.

    Fields:
        beta: scale of the log-probabilities.
        label_smoothing: e, the share of pairs believed to be labelled the wrong way round.
        nll_weight: weight of the likelihood; TRL calls it cpo_alpha.
    Degenerates to: `dpo` with a reference that gives both responses the same probability, at nll_weight=0.
    Source:
        Xu et al. 2024, arXiv:2401.08417, as in TRL's code (loss_type "sigmoid").
    """

    link: ClassVar[str] = "logistic"
    needs_reference: ClassVar[bool] = False
    formula: ClassVar[str] = "-log sigma(beta (logp_w - logp_l)) + nll_weight NLL_w"
    source: ClassVar[str] = "Xu et al. 2024, arXiv:2401.08417, as in TRL's code"
    confidence: ClassVar[str] = "third party"

    beta: float = ranged(0.1, 0, 100, "0.01 to 0.5 in practice", open_low=True)
    label_smoothing: float = ranged(0.0, 0, 0.5, "0 for clean labels", open_high=True)
    nll_weight: float = ranged(1.0, 0, 1000, "1")

    def eager(self, score_GK: Tensor, margin: Tensor | float = 0.0) -> Tensor:
        return smoothed_logistic(self.beta * (score_GK[:, 0] - score_GK[:, 1]) - margin, self.label_smoothing)

    def link_params(self) -> tuple[float, ...]:
        return self.beta, self.label_smoothing
