"""ORPO: odds-ratio preference optimization, supervised fine-tuning with a penalty and without a reference."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefkern.losses.base import Batch, PairLoss, ranged, register

# Log-odds have a pole at p = 1. Nearer to it than fp32 log-probabilities can tell, they go on as their tangent there.
MAX_MEAN_LOGP = -1e-6


@register("orpo")
@dataclass(frozen=True, kw_only=True)
class ORPO(PairLoss):
    """Likelihood of the chosen response, and the log-sigmoid of the ratio of both responses' odds.

        p = exp(log pi(y) / |y|),    o = log( p / (1 - p) )
        L = nll_weight * NLL(y_w) - beta * log sigma(o_w - o_l)

    The second term is a mean over pairs; NLL is the mean over the batch's chosen tokens. An empty response has p = 1.
    At p = 1 the odds are infinite: for log p above -1e-6, o continues as its tangent, so that values and gradients are
    finite and a rejected response with p = 1 is still pushed down. TRL leaves the pole and returns NaN there.

    Fields:
        beta: weight of the second term, the paper's lambda.
        nll_weight: weight of the likelihood, over response tokens alone; TRL's runs over prompt and response.
    Source:
        Hong et al. 2024, arXiv:2403.07691, as in TRL's code; the tangent is our choice.
    """

    link: ClassVar[str] = "odds_ratio"
    link_targets: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    needs_lengths: ClassVar[bool] = True
    formula: ClassVar[str] = "nll_weight NLL_w - beta log sigma(o_w - o_l), o = log-odds of exp(logp/n)"
    source: ClassVar[str] = "Hong et al. 2024, arXiv:2403.07691, as in TRL's code"
    confidence: ClassVar[str] = "third party"

    beta: float = ranged(0.1, 0, 100, "0.1 to 1 in practice", open_low=True)
    nll_weight: float = ranged(1.0, 0, 1000, "1")

    def scale(self, batch: Batch) -> Tensor:
        return 1 / batch.count_R.clamp(min=1)

    def target(self, batch: Batch) -> Tensor:
        """Coefficients of the log-odds: ones."""
        return torch.ones_like(batch.count_R)

    def eager(
        self,
        score_GK: Tensor,
        margin: Tensor | float = 0.0,
        coefficient_GK: Tensor | None = None,
        valid_GK: Tensor | None = None,
    ) -> Tensor:
        odds = log_odds(score_GK)
        odds = odds if coefficient_GK is None else odds * coefficient_GK
        return -self.beta * logsigmoid(odds[:, 0] - odds[:, 1] - margin)

    def link_params(self) -> tuple[float, ...]:
        return (self.beta,)


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(logp), its tangent where logp > MAX_MEAN_LOGP."""
    inside = logp.clamp(max=MAX_MEAN_LOGP)
    return inside - log1mexp(inside) - torch.relu(logp - MAX_MEAN_LOGP) / math.expm1(MAX_MEAN_LOGP)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, by whichever of expm1 and log1p does not cancel."""
    near = x > -math.log(2)  # neither branch may see the other's arguments: a NaN there would reach the gradient
    close, far = x.where(near, -1.0), x.where(~near, -1.0)
    return torch.where(near, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))
