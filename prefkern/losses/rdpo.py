"""R-DPO: DPO with a charge on length."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prefkern.losses.base import Batch, choice, ranged, register
from prefkern.losses.dpo import DPO


@register("rdpo")
@dataclass(frozen=True, kw_only=True)
class RDPO(DPO):
    """DPO whose reward also pays, or charges, alpha a token.

        L = -log sigma( beta * (a_w - a_l) + alpha * (|y_w| - |y_l|) )    (sign="+"; "-" subtracts),    mean over pairs

    With "+" a pair whose chosen response is the longer one counts as decided already and pulls less: what the policy
    learns is not that longer is better. It is the loss of a policy that maximises reward - alpha * length.

    Fields:
        beta, label_smoothing, f_divergence, f_alpha: as in `dpo`.
        alpha: reward a token of difference in length.
        sign: "+" follows from that objective; "-" is what the paper's table of losses prints.
    Degenerates to: `dpo` with alpha=0.
    Source:
        Park et al. 2024, arXiv:2403.19159; "+" derived, and as summarised by third parties.
    """

    needs_lengths: ClassVar[bool] = True
    formula: ClassVar[str] = "-log sigma(beta (a_w - a_l) + alpha (n_w - n_l))"
    source: ClassVar[str] = "Park et al. 2024, arXiv:2403.19159"
    confidence: ClassVar[str] = "derived"

    alpha: float = ranged(0.01, 0, 100, "0.005 to 0.1, small against beta")
    sign: str = choice("+", "+", "-")

    def margin(self, batch: Batch) -> Tensor:
        chosen, rejected = batch.pairs(batch.count_R)
        reward = self.alpha * (chosen - rejected)
        return -reward if self.sign == "+" else reward
