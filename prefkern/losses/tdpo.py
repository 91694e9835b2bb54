"""Token-level DPO: the KL divergence from the reference, over the whole vocabulary, joins the log-ratios."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prefkern.layout import TailIndex
from prefkern.losses.base import PairLoss, ranged, register, smoothed_logistic


@register("tdpo1")
@dataclass(frozen=True, kw_only=True)
class TDPO1(PairLoss):
    """DPO whose scores hold the divergence that a response's prefixes had from the reference.

        L = -log sigma( beta * (a_w + K_w) - beta * (a_l + K_l) ),    mean over pairs
        K = sum_t KL( pi_ref(. | y_<t) || pi(. | y_<t) ),    a = sum_t d_t

    The gradient flows through a and K of both responses. Metrics: rewards are beta (a + K).

    Fields:
        beta: strength of the pull to the reference, in 1/nats.
    Degenerates to: `dpo` where both responses' divergences are equal.
    Source:
        Zeng et al. 2024, arXiv:2404.11999, and the authors' code.
    """

    link: ClassVar[str] = "logistic"
    needs_reference: ClassVar[bool] = True
    needs_token_kl: ClassVar[bool] = True
    formula: ClassVar[str] = "-log sigma(beta ((a_w + K_w) - (a_l + K_l)))"
    source: ClassVar[str] = "Zeng et al. 2024, arXiv:2404.11999"

    beta: float = ranged(0.1, 0, 100, "0.1", open_low=True)

    def with_token_kl(self, logps_N: Tensor, kl_N: Tensor, index: TailIndex) -> Tensor:
        return logps_N + kl_N

    def eager(self, score_GK: Tensor, margin: Tensor | float = 0.0) -> Tensor:
        return smoothed_logistic(self.beta * (score_GK[:, 0] - score_GK[:, 1]) - margin, 0.0)

    def link_params(self) -> tuple[float, ...]:
        return (self.beta,)


@register("tdpo2")
@dataclass(frozen=True, kw_only=True)
class TDPO2(TDPO1):
    """TDPO whose divergence is weighted, and on the chosen response a constant.

        L = -log sigma( beta * (a_w + alpha sg[K_w]) - beta * (a_l + alpha K_l) ),    mean over pairs

    with a and K as in `tdpo1`. Metrics: rewards are beta (a + alpha K).

    Fields:
        beta: strength of the pull to the reference, in 1/nats.
        alpha: weight of the divergence.
    Degenerates to: `dpo` at alpha = 0.
    Source:
        Zeng et al. 2024, arXiv:2404.11999, and the authors' code.
    """

    formula: ClassVar[str] = "-log sigma(beta ((a_w + alpha sg[K_w]) - (a_l + alpha K_l)))"

    alpha: float = ranged(0.5, 0, 100, "0.5")

    def with_token_kl(self, logps_N: Tensor, kl_N: Tensor, index: TailIndex) -> Tensor:
        lengths = index.response_offsets.diff()
        chosen_R = torch.arange(len(lengths), device=lengths.device) % 2 == 0
        chosen_N = chosen_R.repeat_interleave(lengths, output_size=len(kl_N))
        return logps_N + self.alpha * torch.where(chosen_N, kl_N.detach(), kl_N)
