"""Scores of another divergence than the reverse KL, for losses of the difference of two scores."""

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from prefkern.losses.base import Batch, PairLoss, choice, ranged

# Beyond this exponent exp goes on as its tangent: squares of it, and its gradients, stay finite in fp32 at |a| = 1e4.
MAX_EXPONENT = 30.0


@dataclass(frozen=True, kw_only=True)
class DifferenceLoss(PairLoss):
    """A pair loss of x = beta * (s_w - s_l) - margin, where s is a function of the log-ratio sum a.

    With D_f(policy || reference) as the penalty the implicit reward is beta * f'(ratio), ratio = exp(a). Each s is 0 at
    a = 0, with slope 1 (js: 1/2):

        reverse_kl   s = a
        forward_kl   s = 1 - exp(-a)
        js           s = log 2 + log sigma(a)
        alpha        s = ( exp((f_alpha - 1) a) - 1 ) / (f_alpha - 1)

    Where a loss divides by lengths, it divides s. Exponents beyond 30 continue as the exponential's tangent, so that
    the gradient of a pair far from the reference is large and finite.

    Fields:
        f_divergence: one of the four.
        f_alpha: of "alpha" only: 0 is forward_kl, 1 is reverse_kl.
    Source:
        Wang et al. 2023, arXiv:2309.16240; the constants as in TRL's code (they matter where s is divided by lengths).
    """

    f_divergence: str = choice("reverse_kl", "reverse_kl", "forward_kl", "js", "alpha")
    f_alpha: float = ranged(0.5, -1, 2, "between 0, which is forward_kl, and 1, which is reverse_kl")

    @property
    def per_token(self) -> bool:
        """Whether scores are divided by lengths."""
        return False

    @property
    def link_targets(self) -> bool:
        """A map that is not linear comes before the division by lengths: the link divides, by a factor per member."""
        return self.divergence_params()[0] != 0

    def scale(self, batch: Batch) -> Tensor | None:
        return 1 / batch.count_R.clamp(min=1) if self.per_token and not self.link_targets else None

    def target(self, batch: Batch) -> Tensor | None:
        if not self.link_targets:
            return super().target(batch)
        return 1 / batch.count_R.clamp(min=1) if self.per_token else torch.ones_like(batch.count_R)

    def mapped(self, score: Tensor, factor: Tensor | None) -> Tensor:
        """s, times the factor."""
        code, exponent = self.divergence_params()
        if code == 0:
            return score
        if code == 1:
            t = exponent * score
            inside = t.clamp(max=MAX_EXPONENT)
            score = (torch.expm1(inside) + math.exp(MAX_EXPONENT) * torch.relu(t - MAX_EXPONENT)) / exponent
        else:
            score = math.log(2) + torch.nn.functional.logsigmoid(score)
        return score if factor is None else score * factor

    def difference(self, score_GK: Tensor, factor_GK: Tensor | None) -> Tensor:
        """(G,) s_w - s_l."""
        mapped = self.mapped(score_GK, factor_GK)
        return mapped[:, 0] - mapped[:, 1]

    def eager(
        self,
        score_GK: Tensor,
        margin: Tensor | float = 0.0,
        factor_GK: Tensor | None = None,
        valid_GK: Tensor | None = None,
    ) -> Tensor:
        return self.value(self.beta * self.difference(score_GK, factor_GK) - margin)

    @abstractmethod
    def value(self, x_G: Tensor) -> Tensor:
        """The definition: (G,) losses of (G,) x."""

    def divergence_params(self) -> tuple[float, float]:
        """p2 and p3 of links of such losses: which map (0 identity, 1 power, 2 js), and the power's exponent."""
        if self.f_divergence == "js":
            return 2.0, 0.0
        exponent = {"reverse_kl": 0.0, "forward_kl": -1.0}.get(self.f_divergence, self.f_alpha - 1.0)
        return (1.0, exponent) if exponent else (0.0, 0.0)

    def metrics(self, score_R: Tensor, logp_R: Tensor, batch: Batch) -> dict[str, Tensor]:
        if self.link_targets:
            score_R = self.mapped(score_R, self.target(batch))
        return super().metrics(score_R, logp_R, batch)
