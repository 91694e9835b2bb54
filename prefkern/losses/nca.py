"""NCA on pairs: noise-contrastive alignment of each response's own reward."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefkern.losses.base import PairLoss, ranged, register


@register("nca")
@dataclass(frozen=True, kw_only=True)
class NCA(PairLoss):
    """The chosen response shall look unlike noise; either response also counts, by half, as noise: rewards stay near 0.

        r = beta * a
        L = -log sigma(r_w) - 1/2 log sigma(-r_w) - 1/2 log sigma(-r_l),    mean over pairs

    Unlike DPO it looks at absolute rewards, and keeps the chosen response's from falling.

    Fields:
        beta: as in `dpo`.
    Source:
        Chen et al. 2024, arXiv:2402.05369, as in TRL's code ("nca_pair").
    """

    link: ClassVar[str] = "logistic_each"
    needs_reference: ClassVar[bool] = True
    formula: ClassVar[str] = "-log sigma(beta a_w) - (log sigma(-beta a_w) + log sigma(-beta a_l)) / 2"
    source: ClassVar[str] = "Chen et al. 2024, arXiv:2402.05369, as in TRL's code"
    confidence: ClassVar[str] = "third party"

    beta: float = ranged(0.1, 0, 100, "0.01 to 0.5 in practice", open_low=True)

    def eager(self, score_GK: Tensor, margin: Tensor | float = 0.0) -> Tensor:
        chosen, rejected = self.beta * score_GK[:, 0] - margin, self.beta * score_GK[:, 1] - margin
        return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)

    def link_params(self) -> tuple[float, ...]:
        return self.beta, 0.5, 0.5
