"""DPO of length-normalised scores."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prefkern.losses.base import ranged, register, smoothed_logistic
from prefkern.losses.f_divergence import DifferenceLoss


@register("sigmoid_norm")
@dataclass(frozen=True, kw_only=True)
class SigmoidNorm(DifferenceLoss):
    """DPO that compares log-ratios a token, so that a long response does not count for more than a short one.

        L = -log sigma( beta * (a_w / |y_w| - a_l / |y_l|) ),    mean over pairs

    Fields:
        beta: in tokens/nat; sensible values are larger than DPO's by about the length of a response.
        f_divergence, f_alpha: as in DifferenceLoss; the formula above is that of "reverse_kl".
    Degenerates to: `dpo` with beta/n where both responses have n tokens ("reverse_kl").
    Source:
        As in TRL's code.
    """

    link: ClassVar[str] = "logistic"
    needs_reference: ClassVar[bool] = True
    needs_lengths: ClassVar[bool] = True
    formula: ClassVar[str] = "-log sigma(beta (a_w/n_w - a_l/n_l))"
    source: ClassVar[str] = "TRL's code"
    confidence: ClassVar[str] = "third party"

    beta: float = ranged(0.1, 0, 1000, "2 to 10; TRL's default is 0.1", open_low=True)

    @property
    def per_token(self) -> bool:
        return True

    def value(self, x_G: Tensor) -> Tensor:
        return smoothed_logistic(x_G, 0.0)

    def link_params(self) -> tuple[float, ...]:
        return self.beta, 0.0, *self.divergence_params()
