"""Alpha-divergence preference optimization: between covering the targets' modes and seeking one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from prefkern.losses import groups
from prefkern.losses.alphas import EffectiveSampleSize, FixedAlpha, RewardConfidenceGuarded
from prefkern.losses.base import Batch, ranged, register, variant
from prefkern.losses.listwise import ListLoss
from prefkern.losses.targets import KDE, Distribution, Given, RawSoftmax, Softmax


@register("alpha_divergence")
@dataclass(frozen=True, kw_only=True)
class AlphaDivergence(ListLoss):
    """The alpha-divergence of the group's anchored softmax from a target distribution.

        u_i = (log pi(y_i) - log anchor(y_i)) / tau,      p = softmax(u)
        L   = (1 - sum_i q_i^a p_i^(1-a)) / (a (1 - a)),    mean over prompts
        dL/du_j = (p_j sum_i m_i - m_j) / a,    m_i = q_i^a p_i^(1-a)

    a -> 1 is KL(q || p), a -> 0 KL(p || q), both taken in closed form; a = 1/2 is 4 (1 - sum_i sqrt(q_i p_i)). The
    author's code has -(1/a) sum_i sg[m_i] log p_i in its place: another value, the same gradient; it is a metric here.
    At policy = anchor the gradient is ((1/K) sum m - m_j) / (a tau), not 0. The author's code switches to another loss
    near that point; this one does not.

    Fields:
        alpha: a, a number in [0, 1] or a schedule; see `alphas`.
        targets: as in `anchored_listwise`, but no ranking; they have to add up to 1.
        smallest_target: a q_i below it counts as this much, so that KL(p || q) stays finite. The author's code adds
            1e-10 to q and to p.
        tau, normalize: as in every list loss.
    The author's settings: normalize "mean", targets Softmax(beta_r=0.3, standardize=False), tau BatchGuarded().
    Degenerates to: `anchored_listwise` less H(q) at a = 1.
    Source:
        arXiv:2512.22953; the divergence is inferred from its gradient, which is read in the author's code.
    """

    link: ClassVar[str] = "alpha_divergence"
    formula: ClassVar[str] = "(1 - sum_i q_i^a p_i^(1-a)) / (a (1 - a)), p = softmax((logp - logp_anchor) / tau)"
    source: ClassVar[str] = "Alpha-divergence PO 2025, arXiv:2512.22953"
    confidence: ClassVar[str] = "authors' code"

    targets: Distribution = variant(Softmax(), softmax=Softmax, raw_softmax=RawSoftmax, kde=KDE, given=Given)
    alpha: float | FixedAlpha | RewardConfidenceGuarded | EffectiveSampleSize = variant(
        FixedAlpha(),
        number=FixedAlpha,
        fixed=FixedAlpha,
        reward_confidence_guarded=RewardConfidenceGuarded,
        effective_sample_size=EffectiveSampleSize,
    )
    smallest_target: float = ranged(1e-10, 1e-37, 1e-3, "1e-10")

    @property
    def needs_first_pass(self) -> bool:
        return self.tau.needs_first_pass or self.alpha.needs_first_pass

    @property
    def couples_batch(self) -> bool:
        return self.tau.couples_batch or self.alpha.couples_batch

    def new_state(self) -> nn.Module | None:
        return self.alpha.new_state()

    def margin(self, batch: Batch) -> float | Tensor:
        """a, a number or (G,)."""
        alpha = self.alpha.of_batch(batch, self, update=True)
        return alpha.expand(batch.layout.num_groups) if isinstance(alpha, Tensor) else alpha

    def log_distributions(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(G, K) log p and log q of the first pass, and which of them are members."""
        u_GK, valid_GK = groups.pad(batch.ratio_R * self.scale(batch), batch.index)
        q_GK, _ = groups.pad(self.target(batch), batch.index)
        return groups.log_softmax(u_GK, valid_GK), self._log_targets(q_GK, valid_GK), valid_GK

    def eager(
        self,
        score_GK: Tensor,
        margin: Tensor | float = 0.0,
        target_GK: Tensor | None = None,
        valid_GK: Tensor | None = None,
    ) -> Tensor:
        log_p, log_q = groups.log_softmax(score_GK, valid_GK), self._log_targets(target_GK, valid_GK)
        a = _on_device(margin, score_GK).view(-1, 1)
        near_q = a >= 0.5
        c = torch.where(near_q, 1 - a, a)
        # 1 - sum m is -sum(m - p) and -sum(m - q): of the two, that which is exact where m comes near.
        base, other = torch.where(near_q, log_q, log_p), torch.where(near_q, log_p, log_q)
        return -(_tilt(base, other, c) / (1 - c)).sum(-1)

    def link_params(self) -> tuple[float, ...]:
        return (self.smallest_target,)

    def metrics(self, score_R: Tensor, logp_R: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Those of every list loss, and

        list/alpha: a; list/divergence: L; list/surrogate: -(1/a) sum_i m_i log p_i, with m_i - p_i for m_i at a = 0.
        """
        (score_GK, valid_GK), q_GK = groups.pad(score_R, batch.index), groups.pad(self.target(batch), batch.index)[0]
        log_p, log_q = groups.log_softmax(score_GK, valid_GK), self._log_targets(q_GK, valid_GK)
        a = _on_device(self.alpha.of_batch(batch, self, update=False), score_GK)
        m_over_a = torch.exp(a * log_q + (1 - a) * log_p) / a
        surrogate = -(torch.where(a == 0, _tilt(log_p, log_q, a), m_over_a) * log_p).sum(-1)
        mine = {
            "list/alpha": a,
            "list/divergence": self.eager(score_GK, a, q_GK, valid_GK).mean(),
            "list/surrogate": surrogate.mean(),
        }
        return {**super().metrics(score_R, logp_R, batch), **mine}

    def _log_targets(self, q_GK: Tensor, valid_GK: Tensor) -> Tensor:
        return torch.where(valid_GK, q_GK.clamp(min=self.smallest_target).log(), 0.0)


def _on_device(a: float | Tensor, like: Tensor) -> Tensor:
    """A number as a tensor without a copy from the host, which would wait for the device."""
    return a.to(like) if isinstance(a, Tensor) else torch.full((), a, dtype=like.dtype, device=like.device)


def _tilt(log_base: Tensor, log_other: Tensor, c: Tensor) -> Tensor:
    """(base^(1-c) other^c - base) / c, and base log(other / base) at c = 0, without cancellation or overflow."""
    difference = log_other - log_base
    x = c * difference
    near = x.abs() < 1
    small = torch.where(near & (x != 0), x, 1.0)
    ratio = torch.where(near & (x != 0), torch.expm1(small) / small, 1.0)
    far = (torch.exp((1 - c) * log_base + c * log_other) - log_base.exp()) / torch.where(near, 1.0, c)
    return torch.where(near, log_base.exp() * difference * ratio, far)
