"""APO-down: anchored preference optimization for data worse than the model."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prefkern.losses.base import PairLoss, ranged, register


@register("apo_down")
@dataclass(frozen=True, kw_only=True)
class APODown(PairLoss):
    """The gap between the responses grows while the chosen one's own reward goes down.

        L = sigma(beta a_w) + 1 - sigma(beta (a_w - a_l)),    mean over pairs

    For data whose chosen responses are worse than what the model writes; `apo_zero` where they are better.

    Fields:
        beta: as in `dpo`.
    Source:
        D'Oosterlinck et al. 2024, arXiv:2408.06266, as in TRL's code. Not alpha-divergence preference optimization,
        which is also called APO.
    """

    link: ClassVar[str] = "sigmoid_each"
    needs_reference: ClassVar[bool] = True
    formula: ClassVar[str] = "sigma(beta a_w) + 1 - sigma(beta (a_w - a_l))"
    source: ClassVar[str] = "D'Oosterlinck et al. 2024, arXiv:2408.06266, as in TRL's code"
    confidence: ClassVar[str] = "third party"

    beta: float = ranged(0.1, 0, 100, "0.01 to 0.5 in practice", open_low=True)

    def eager(self, score_GK: Tensor, margin: Tensor | float = 0.0) -> Tensor:
        chosen, rejected = (self.beta * score_GK).unbind(1)
        return chosen.sigmoid() + (rejected - chosen).sigmoid()

    def link_params(self) -> tuple[float, ...]:
        return self.beta, 1.0, -1.0
