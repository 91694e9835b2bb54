"""Hinge loss of implicit rewards."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prefkern.losses.base import ranged, register
from prefkern.losses.f_divergence import DifferenceLoss


@register("hinge")
@dataclass(frozen=True, kw_only=True)
class Hinge(DifferenceLoss):
    """Pairs whose reward margin has reached 1 cost nothing and pull no more.

        L = max(0, 1 - beta * (a_w - a_l)),    mean over pairs

    Fields:
        beta: the margin aimed at is 1/beta nats.
        f_divergence, f_alpha: as in DifferenceLoss; the formula above is that of "reverse_kl".
    Source:
        As in TRL's code; SLiC (Zhao et al. 2023, arXiv:2305.10425) and RSO (Liu et al. 2023, arXiv:2309.06657).
    """

    link: ClassVar[str] = "hinge"
    needs_reference: ClassVar[bool] = True
    formula: ClassVar[str] = "max(0, 1 - beta (a_w - a_l))"
    source: ClassVar[str] = "Liu et al. 2023, arXiv:2309.06657, as in TRL's code"
    confidence: ClassVar[str] = "third party"

    beta: float = ranged(0.1, 0, 100, "0.01 to 0.5 in practice", open_low=True)

    def value(self, x_G: Tensor) -> Tensor:
        return torch.relu(1 - x_G)

    def link_params(self) -> tuple[float, ...]:
        return self.beta, 0.0, *self.divergence_params()
