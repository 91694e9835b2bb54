"""Direct preference optimization."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prefkern.losses.base import ranged, register, smoothed_logistic
from prefkern.losses.f_divergence import DifferenceLoss


@register("dpo")
@dataclass(frozen=True, kw_only=True)
class DPO(DifferenceLoss):
    """A classifier of which response is preferred, its logit the difference of implicit rewards.

        x = beta * (sum_t d^w_t - sum_t d^l_t),      d_t = log pi(y_t) - log pi_ref(y_t)
        L = -(1 - e) log sigma(x) - e log sigma(-x),    mean over pairs

    Fields:
        beta: strength of the pull to the reference, in 1/nats.
        label_smoothing: e, the share of pairs believed to be labelled the wrong way round; 0 is plain DPO.
        f_divergence, f_alpha: as in DifferenceLoss; the formula above is that of "reverse_kl".
    Degenerates to: `autoregressive_dpo` with one segment.
    Source:
        Rafailov et al. 2023, arXiv:2305.18290, eq. 7; label smoothing as in the authors' code. TRL's "sigmoid" had it
        in 0.24; in 1.16 it takes label_smoothing without using it.
    """

    link: ClassVar[str] = "logistic"
    needs_reference: ClassVar[bool] = True
    formula: ClassVar[str] = "-log sigma(beta (a_w - a_l))"
    source: ClassVar[str] = "Rafailov et al. 2023, arXiv:2305.18290, eq. 7"

    beta: float = ranged(0.1, 0, 100, "0.01 to 0.5 in practice", open_low=True)
    label_smoothing: float = ranged(0.0, 0, 0.5, "0 for clean labels", open_high=True)

    def value(self, x_G: Tensor) -> Tensor:
        return smoothed_logistic(x_G, self.label_smoothing)

    def link_params(self) -> tuple[float, ...]:
        return self.beta, self.label_smoothing, *self.divergence_params()
