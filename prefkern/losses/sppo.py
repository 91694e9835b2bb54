"""SPPO with hard labels: self-play preference optimization as two regressions."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prefkern.losses.base import PairLoss, ranged, register


@register("sppo")
@dataclass(frozen=True, kw_only=True)
class SPPO(PairLoss):
    """Each response's log-ratio is pulled to a fixed value, the chosen one's up and the rejected one's down.

        L = (a_w - 1/(2 beta))^2 + (a_l + 1/(2 beta))^2,    mean over pairs

    The chosen response is taken to win with probability 1 ("sppo_hard").

    Fields:
        beta: the smaller, the further the log-ratios are driven, +-1/(2 beta) nats.
    Source:
        Wu et al. 2024, arXiv:2405.00675, as in TRL's code ("sppo_hard").
    """

    link: ClassVar[str] = "squared_each"
    needs_reference: ClassVar[bool] = True
    formula: ClassVar[str] = "(a_w - 1/(2 beta))^2 + (a_l + 1/(2 beta))^2"
    source: ClassVar[str] = "Wu et al. 2024, arXiv:2405.00675, as in TRL's code"
    confidence: ClassVar[str] = "third party"

    beta: float = ranged(0.1, 0, 100, "0.01 to 1 in practice", open_low=True)

    def eager(self, score_GK: Tensor, margin: Tensor | float = 0.0) -> Tensor:
        goal = 1 / (2 * self.beta)
        return (score_GK[:, 0] - goal) ** 2 + (score_GK[:, 1] + goal) ** 2

    def link_params(self) -> tuple[float, ...]:
        return (1 / (2 * self.beta),)
