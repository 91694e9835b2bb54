"""Robust DPO: an unbiased estimate of DPO's loss on clean labels from labels flipped at a known rate."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefkern.losses.base import ranged, register
from prefkern.losses.f_divergence import DifferenceLoss


@register("robust")
@dataclass(frozen=True, kw_only=True)
class Robust(DifferenceLoss):
    """DPO that unlearns the share of pairs believed to be labelled the wrong way round.

        x = beta * (a_w - a_l)
        L = ( -(1 - e) log sigma(x) + e log sigma(-x) ) / (1 - 2e) = -log sigma(x) - e/(1 - 2e) x,    mean over pairs

    Its expectation over labels flipped with probability e is DPO's loss on the true labels. Unbounded below for e > 0.

    Fields:
        beta: as in `dpo`.
        label_smoothing: e, the probability that a label is flipped.
        f_divergence, f_alpha: as in DifferenceLoss; the formula above is that of "reverse_kl".
    Degenerates to: `dpo` with label_smoothing=0.
    Source:
        Chowdhury et al. 2024, arXiv:2403.00409, as in TRL's code; the second form is derived.
    """

    link: ClassVar[str] = "logistic"
    needs_reference: ClassVar[bool] = True
    formula: ClassVar[str] = "(-(1 - e) log sigma(x) + e log sigma(-x)) / (1 - 2e), x = beta (a_w - a_l)"
    source: ClassVar[str] = "Chowdhury et al. 2024, arXiv:2403.00409, as in TRL's code"
    confidence: ClassVar[str] = "third party"

    beta: float = ranged(0.1, 0, 100, "0.01 to 0.5 in practice", open_low=True)
    label_smoothing: float = ranged(0.0, 0, 0.5, "0.1 where a tenth of the labels is wrong", open_high=True)

    def value(self, x_G: Tensor) -> Tensor:
        e = self.label_smoothing
        return (-(1 - e) * logsigmoid(x_G) + e * logsigmoid(-x_G)) / (1 - 2 * e)

    def link_params(self) -> tuple[float, ...]:
        e = self.label_smoothing
        return self.beta, -e / (1 - 2 * e), *self.divergence_params()
