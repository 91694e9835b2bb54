"""EXO on pairs: the policy's preference is matched to a smoothed label by the reverse KL divergence."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefkern.losses.base import ranged, register
from prefkern.losses.f_divergence import DifferenceLoss


@register("exo")
@dataclass(frozen=True, kw_only=True)
class EXO(DifferenceLoss):
    """KL from the policy's probability of preferring the chosen response to the label's, in the mode-seeking direction.

        x = beta * (a_w - a_l),    q = sigma(x)
        L = q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e),    mean over pairs

    It is 0 at x = log((1 - e) / e), and its gradient flows through q as well as through log q. Label-smoothed DPO is
    the same divergence with its arguments exchanged, plus the label's entropy.

    Fields:
        beta: as in `dpo`.
        label_smoothing: e > 0, probability that the label is wrong; at 0 the divergence would be infinite.
        f_divergence, f_alpha: as in DifferenceLoss; the formula above is that of "reverse_kl".
    Source:
        Ji et al. 2024, arXiv:2402.00856 (EXO-pref), as in TRL's code ("exo_pair").
    """

    link: ClassVar[str] = "reverse_cross"
    needs_reference: ClassVar[bool] = True
    formula: ClassVar[str] = "KL(sigma(beta (a_w - a_l)) || 1 - e)"
    source: ClassVar[str] = "Ji et al. 2024, arXiv:2402.00856, as in TRL's code"
    confidence: ClassVar[str] = "third party"

    beta: float = ranged(0.1, 0, 100, "0.01 to 0.5 in practice", open_low=True)
    label_smoothing: float = ranged(1e-3, 0, 0.5, "1e-3; above 0", open_low=True, open_high=True)

    def value(self, x_G: Tensor) -> Tensor:
        e = self.label_smoothing
        log_q, log_r = logsigmoid(x_G), logsigmoid(-x_G)
        return x_G.sigmoid() * (log_q - math.log1p(-e)) + (-x_G).sigmoid() * (log_r - math.log(e))

    def link_params(self) -> tuple[float, ...]:
        e = self.label_smoothing
        return self.beta, math.log(e), *self.divergence_params(), math.log1p(-e)
