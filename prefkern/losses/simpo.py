"""Simple preference optimization: length-normalised log-probabilities and a target margin, no reference."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prefkern.losses.base import Batch, PairLoss, ranged, register, smoothed_logistic


@register("simpo")
@dataclass(frozen=True, kw_only=True)
class SimPO(PairLoss):
    """The chosen response's mean log-probability shall exceed the rejected one's by a margin.

        L = -log sigma( beta/|y_w| log pi(y_w) - beta/|y_l| log pi(y_l) - gamma ),    mean over pairs

    Fields:
        beta: scale of the mean log-probabilities.
        gamma: target margin, in units of reward (so gamma / beta nats a token).
    An empty response counts as one of length 1 and log-probability 0.
    Source:
        Meng et al. 2024, arXiv:2405.14734, eq. 5.
    """

    link: ClassVar[str] = "logistic"
    needs_reference: ClassVar[bool] = False
    needs_lengths: ClassVar[bool] = True
    formula: ClassVar[str] = "-log sigma(beta (logp_w/n_w - logp_l/n_l) - gamma)"
    source: ClassVar[str] = "Meng et al. 2024, arXiv:2405.14734, eq. 5"

    beta: float = ranged(2.0, 0, 1000, "2.0 to 10 in the authors' settings", open_low=True)
    gamma: float = ranged(1.0, 0, 1000, "0.3 to 1.6 in the authors' settings")

    def scale(self, batch: Batch) -> Tensor:
        return 1 / batch.count_R.clamp(min=1)

    def margin(self, batch: Batch) -> float:
        return self.gamma

    def eager(self, score_GK: Tensor, margin: Tensor | float = 0.0) -> Tensor:
        return smoothed_logistic(self.beta * (score_GK[:, 0] - score_GK[:, 1]) - margin, 0.0)

    def link_params(self) -> tuple[float, ...]:
        return self.beta, 0.0
