"""Identity preference optimization: a squared loss towards a finite gap."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prefkern.losses.base import Batch, choice, ranged, register
from prefkern.losses.f_divergence import DifferenceLoss


@register("ipo")
@dataclass(frozen=True, kw_only=True)
class IPO(DifferenceLoss):
    """The log-ratio gap is pulled to 1 / (2 beta) and no further.

        L = ( a_w - a_l - 1/(2 beta) )^2,    mean over pairs
        a = sum_t d_t                (normalize="sum")
        a = sum_t d_t / |y|          (normalize="mean")

    Fields:
        beta: the smaller, the wider the gap aimed at, 1/(2 beta) nats ("mean": nats a token).
        normalize: "mean" as TRL does, "sum" as the paper and the reference implementation of DPO do.
        f_divergence, f_alpha: as in DifferenceLoss; the formulas above are those of "reverse_kl".
    Source:
        Azar et al. 2023, arXiv:2310.12036, eq. 17 (its tau is beta here); the per-token mean as in TRL's code.
    """

    link: ClassVar[str] = "squared"
    needs_reference: ClassVar[bool] = True
    formula: ClassVar[str] = "(a_w/n_w - a_l/n_l - 1/(2 beta))^2"
    source: ClassVar[str] = "Azar et al. 2023, arXiv:2310.12036, eq. 17; a token as in TRL's code"
    confidence: ClassVar[str] = "third party"

    beta: float = ranged(0.1, 0, 100, "0.01 to 1 in practice", open_low=True)
    normalize: str = choice("mean", "mean", "sum")

    @property
    def per_token(self) -> bool:
        return self.normalize == "mean"

    def margin(self, batch: Batch) -> float:
        return 1 / (2 * self.beta)

    def eager(
        self,
        score_GK: Tensor,
        margin: Tensor | float = 0.0,
        factor_GK: Tensor | None = None,
        valid_GK: Tensor | None = None,
    ) -> Tensor:
        return self.value(self.difference(score_GK, factor_GK) - margin)

    def value(self, x_G: Tensor) -> Tensor:
        return x_G**2

    def link_params(self) -> tuple[float, ...]:
        return 0.0, 0.0, *self.divergence_params()
