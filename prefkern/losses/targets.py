"""What a group of responses should look like: descriptions that turn a group's rewards into the targets of a list loss.

Rewards are real numbers, one a response; what is made of them carries no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prefkern.losses import groups
from prefkern.losses.base import check_fields, choice, ranged


@dataclass(frozen=True)
class Distribution:
    """Targets that are probabilities q over a group, met by cross-entropy: -sum_i q_i log p_i."""

    link: ClassVar[str] = "cross_entropy"

    def __post_init__(self) -> None:
        check_fields(self, type(self).__name__)

    def link_params(self) -> tuple[float, ...]:
        """The link's run-time scalars."""
        return ()

    def advantages(self, reward_GK: Tensor, valid_GK: Tensor) -> Tensor:
        """Rewards less their group's mean, 0 at padding."""
        return groups.centred(reward_GK, valid_GK)

    def make(self, reward_GK: Tensor, valid_GK: Tensor) -> Tensor:
        """(G, K) targets of (G, K) rewards; 0 at padding."""
        raise NotImplementedError

    def value(self, score_GK: Tensor, target_GK: Tensor, valid_GK: Tensor) -> Tensor:
        """(G,) losses of anchored logits, differentiable in them: the link's definition."""
        return -(target_GK * groups.log_softmax(score_GK, valid_GK)).sum(-1)


@dataclass(frozen=True)
class Softmax(Distribution):
    """Boltzmann distribution of the advantages.

        A_i = (R_i - mean R) / (std R + eps),    q = softmax(A / beta_r)

    Fields:
        beta_r: temperature; the smaller, the more only the best response counts.
        standardize: divide by the standard deviation. Without it q = softmax(R / beta_r), `RawSoftmax`: the mean drops
            out.
        std: "unbiased" (over K - 1; both of the author's trainers) or "biased" (over K). 0 for a single response.
        eps: keeps groups of equal rewards uniform. 1e-4 as in TRL's advantages, which the author's first trainer takes;
            his later one has 1e-8.
    Source:
        arXiv:2510.18913, Algorithm 1, with beta_r = 0.5; the author's later code takes standardize=False, beta_r = 0.3.
    """

    beta_r: float = ranged(0.5, 0, 1000, "0.3 to 0.8 in the author's settings", open_low=True)
    standardize: bool = True
    std: str = choice("unbiased", "unbiased", "biased")
    eps: float = ranged(1e-4, 0, 1, "1e-4 or 1e-8", open_low=True)

    def advantages(self, reward_GK: Tensor, valid_GK: Tensor) -> Tensor:
        """A, 0 at padding."""
        a_GK = groups.centred(reward_GK, valid_GK)
        if not self.standardize:
            return a_GK
        counted = groups.sizes(valid_GK) - int(self.std == "unbiased")
        return a_GK / ((a_GK.square().sum(-1, keepdim=True) / counted.clamp(min=1)).sqrt() + self.eps)

    def make(self, reward_GK: Tensor, valid_GK: Tensor) -> Tensor:
        return groups.softmax(self.advantages(reward_GK, valid_GK) / self.beta_r, valid_GK)


@dataclass(frozen=True)
class RawSoftmax(Distribution):
    """Boltzmann distribution of the rewards as they are: q = softmax(R / temperature).

    Source:
        The listwise variant with raw rewards that arXiv:2510.18913 names; inferred, its temperature is not known.
    """

    temperature: float = ranged(1.0, 0, 1000, "of the size of the rewards' differences", open_low=True)

    def make(self, reward_GK: Tensor, valid_GK: Tensor) -> Tensor:
        return groups.softmax(reward_GK / self.temperature, valid_GK)


@dataclass(frozen=True)
class KDE(Distribution):
    """Ranks, smoothed by a Gaussian kernel: robust to heavy-tailed rewards, and blind to any rescaling of them.

        F_i = mean_j Phi((R_i - R_j) / h),    q = softmax(log(F / (1 - F)) / temperature)

    Fields:
        bandwidth: h, in units of reward; None: 1.06 std K^(-1/5) of each group (Silverman's rule).
        temperature: of the softmax.
    Source:
        Our reconstruction of the "KDE-based rank smoothing" that arXiv:2510.18913 v1 names; its formula was not read.
    """

    bandwidth: float | None = None
    temperature: float = ranged(1.0, 0, 1000, "about 1", open_low=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        h = self.bandwidth
        if h is not None and (isinstance(h, bool) or not isinstance(h, int | float) or not 0 < h < math.inf):
            raise ValueError(f"KDE: bandwidth={h!r} must be a number above 0, or None for Silverman's rule")

    def make(self, reward_GK: Tensor, valid_GK: Tensor) -> Tensor:
        sizes_G1 = groups.sizes(valid_GK)
        h = self.bandwidth
        if h is None:
            square = groups.centred(reward_GK, valid_GK).square().sum(-1, keepdim=True)
            h = 1.06 * (square / (sizes_G1 - 1).clamp(min=1)).sqrt() * sizes_G1.to(square.dtype) ** -0.2
            h = torch.where(h > 0, h, 1.0)[..., None]  # equal rewards: any width gives ranks of one half
        z_GKK = (reward_GK[:, :, None] - reward_GK[:, None, :]) / h
        both = valid_GK[:, None, :]
        above = torch.where(both, torch.special.ndtr(z_GKK), 0.0).sum(-1) / sizes_G1  # F, at least 1 / (2 K)
        below = torch.where(both, torch.special.ndtr(-z_GKK), 0.0).sum(-1) / sizes_G1  # 1 - F, without cancellation
        odds = torch.where(valid_GK, above, 1.0).log() - torch.where(valid_GK, below, 1.0).log()
        return groups.softmax(odds / self.temperature, valid_GK)


@dataclass(frozen=True)
class Given(Distribution):
    """The dataset's scores are the probabilities q, as they are: not negative, adding up to 1 over a prompt.

    For knowledge distillation and other teachers. Sums other than 1 are not corrected.
    """

    def make(self, reward_GK: Tensor, valid_GK: Tensor) -> Tensor:
        return reward_GK


@dataclass(frozen=True)
class PlackettLuce(Distribution):
    """The ranking of the rewards, met by its Plackett-Luce likelihood (ListMLE) instead of by cross-entropy.

        nll_k = logsumexp(u of ranks >= k) - u of rank k,                                k = 1 .. K - 1
        x_k   = (1 - e) nll_k + e (logsumexp(u of ranks >= k) - mean(u of ranks >= k))
        value = mean over k of x_k + poly (1 - exp(-x_k))

    Equal rewards are ranked as they stand in the group: the first is the better one, always (the author's code leaves
    that open). A single response costs nothing.

    Fields:
        top_k: only the first top_k positions; None or 0: all.
        label_smoothing: e, towards any of those left.
        poly: weight of the first PolyLoss term.
    Source:
        ListMLE: Xia et al. 2008. The options as in the author's code of arXiv:2510.18913, whose defaults are top_k=3,
        label_smoothing=0.1, poly=1; its temperature of the scores is `tau`.
    """

    link: ClassVar[str] = "plackett_luce"

    top_k: int | None = None
    label_smoothing: float = ranged(0.0, 0, 1, "0.05 to 0.2, or 0", open_high=True)
    poly: float = ranged(0.0, 0, 100, "1, or 0")

    def __post_init__(self) -> None:
        super().__post_init__()
        k = self.top_k
        if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 0):
            raise ValueError(f"PlackettLuce: top_k={k!r} must be a number of positions, or None for all")

    def link_params(self) -> tuple[float, ...]:
        return float(self.top_k or 0), self.label_smoothing, self.poly

    def make(self, reward_GK: Tensor, valid_GK: Tensor) -> Tensor:
        """Ranks, 0 for the best."""
        order = reward_GK.masked_fill(~valid_GK, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        return torch.where(valid_GK, order.argsort(-1).to(reward_GK.dtype), 0.0)

    def value(self, score_GK: Tensor, target_GK: Tensor, valid_GK: Tensor) -> Tensor:
        own = torch.eye(score_GK.shape[1], dtype=torch.bool, device=score_GK.device)
        rest_GKK = valid_GK[:, None, :] & (target_GK[:, None, :] >= target_GK[:, :, None]) | own
        lse_GK = score_GK[:, None, :].expand_as(rest_GKK).masked_fill(~rest_GKK, -torch.inf).logsumexp(-1)
        mean_GK = torch.where(rest_GKK, score_GK[:, None, :], 0.0).sum(-1) / rest_GKK.sum(-1)
        e = self.label_smoothing
        x_GK = lse_GK - (1 - e) * score_GK - e * mean_GK
        positions_G1 = groups.sizes(valid_GK) - 1
        positions_G1 = positions_G1.clamp(max=self.top_k) if self.top_k else positions_G1
        costs_GK = torch.where(valid_GK & (target_GK < positions_G1), x_GK + self.poly * -torch.expm1(-x_GK), 0.0)
        return costs_GK.sum(-1) / positions_G1[:, 0].clamp(min=1)
