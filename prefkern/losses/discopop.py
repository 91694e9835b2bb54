"""DiscoPOP: a loss found by a language model's search over programs."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefkern.losses.base import ranged, register
from prefkern.losses.f_divergence import DifferenceLoss


@register("discopop")
@dataclass(frozen=True, kw_only=True)
class DiscoPOP(DifferenceLoss):
    """Logistic where the pair is ordered wrongly, exponential where it is ordered rightly, blended by a sigmoid.

        x = beta * (a_w - a_l),    m = sigma(x / tau)
        L = -log sigma(x) (1 - m) + exp(-x) m,    mean over pairs

    Not convex: it has a bump of width tau around 0.

    Fields:
        beta: as in `dpo`.
        tau: width of the blend; above 1 the exponential would win over m and the loss overflow at very wrong pairs.
        f_divergence, f_alpha: as in DifferenceLoss; the formula above is that of "reverse_kl".
    Source:
        Lu et al. 2024, arXiv:2406.08414 (log-ratio modulated loss), as in TRL's code.
    """

    link: ClassVar[str] = "discovered"
    needs_reference: ClassVar[bool] = True
    formula: ClassVar[str] = "-log sigma(x) (1 - m) + exp(-x) m, m = sigma(x/tau), x = beta (a_w - a_l)"
    source: ClassVar[str] = "Lu et al. 2024, arXiv:2406.08414, as in TRL's code"
    confidence: ClassVar[str] = "third party"

    beta: float = ranged(0.1, 0, 100, "0.01 to 0.5 in practice", open_low=True)
    tau: float = ranged(0.05, 0, 1, "0.05", open_low=True)

    def value(self, x_G: Tensor) -> Tensor:
        z = x_G / self.tau
        return -logsigmoid(x_G) * (-z).sigmoid() + (logsigmoid(z) - x_G).exp()  # exp(-x) alone overflows

    def link_params(self) -> tuple[float, ...]:
        return self.beta, self.tau, *self.divergence_params()
