"""AlphaDPO: SimPO whose margin follows, pair by pair, how far the policy has moved from the reference."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from prefkern.losses.base import Batch, PairLoss, choice, ranged, register, smoothed_logistic
from prefkern.losses.statistics import RunningAverage, global_moments, pairs_that_count, running


@register("alphadpo")
@dataclass(frozen=True, kw_only=True)
class AlphaDPO(PairLoss):
    """SimPO with a margin that is larger where the policy already prefers the chosen response more than others do.

        l = log pi(y) / |y|,  r = log pi_ref(y) / |y|
        g = (l_w - l_l) - (r_w - r_l),    Z = (g - mean) / std
        x = beta * (l_w - l_l - gamma - alpha Z)           (convention="code")
        x = beta * (l_w - l_l) - gamma - alpha Z           (convention="paper")
        L = -(1 - e) log sigma(x) - e log sigma(-x),    mean over pairs

    No gradient flows through Z. Rewards in the metrics are beta l - beta alpha (l - r), as the authors log them
    ("paper": beta l - alpha (l - r)).

    Fields:
        beta: scale of the scores.
        gamma: target margin; in nats a token ("code", where the authors call it gamma_beta_ratio), or in units of
            reward ("paper"): gamma_paper = beta * gamma_code.
        alpha: how much the margin follows Z; alpha_paper = beta * alpha_code. The paper's tables give the code's.
        convention: whether beta multiplies the margin.
        normalize: "mean" divides log-probabilities of both models by lengths; "sum" does not; "mixed" divides in the
            scores but not in g, as the paper prints it.
        stats: what mean and std of g are.
            "ema": exponential moving averages of the batches' own, with bias correction, this batch included.
            "ema_uncorrected": the same, starting at 0, as the authors' code has it: its first Z is about ten times
                too large.
            "batch": this batch's alone.
            "fixed": the fields mean and std.
        decay: of the moving averages.
        mean, std: for stats="fixed", in units of g.
        eps: least std that is divided by, so that Z is 0 and not undefined where the policy is the reference.
        label_smoothing: e, the share of pairs believed to be labelled the wrong way round.
    The batch is one call's pairs on all ranks; std is the unbiased one, unknown of a single pair: until two pairs meet
    in a batch, Z is 0. Moving averages live in the state: without one, those of a first call. Evaluation leaves them as
    they are (the authors' code moves them there too).
    Degenerates to: `simpo` with gamma_simpo = beta * gamma ("paper": gamma) at alpha = 0.
    Source:
        Wu et al. 2024, arXiv:2410.10148, eq. 13, and the authors' code, from which it differs as said; bias correction,
        eps and frozen statistics in evaluation are our choices.
    """

    link: ClassVar[str] = "logistic"
    needs_reference: ClassVar[bool] = True
    needs_lengths: ClassVar[bool] = True
    needs_first_pass: ClassVar[bool] = True
    formula: ClassVar[str] = (
        "-log sigma(beta (logp_w/n_w - logp_l/n_l - gamma - alpha Z)), Z = zscore(a_w/n_w - a_l/n_l)"
    )
    source: ClassVar[str] = "AlphaDPO 2024, arXiv:2410.10148, and the authors' code"
    confidence: ClassVar[str] = "authors' code"

    beta: float = ranged(2.0, 0, 1000, "2.5 or 10 in the authors' settings", open_low=True)
    gamma: float = ranged(0.25, 0, 1000, "0.15 to 0.6 in the authors' settings")
    alpha: float = ranged(0.08, 0, 1000, "0.05 to 0.2 in the authors' settings")
    convention: str = choice("code", "code", "paper")
    normalize: str = choice("mean", "mean", "sum", "mixed")
    stats: str = choice("ema", "ema", "ema_uncorrected", "batch", "fixed")
    decay: float = ranged(0.9, 0, 1, "0.9", open_high=True)
    mean: float = ranged(0.0, -1e6, 1e6, "of the training set")
    std: float = ranged(1.0, 0, 1e6, "of the training set", open_low=True)
    eps: float = ranged(1e-6, 0, 1, "well below any deviation that means something", open_low=True)
    label_smoothing: float = ranged(0.0, 0, 0.5, "0 for clean labels", open_high=True)

    @property
    def couples_batch(self) -> bool:
        return self.stats != "fixed"

    def new_state(self) -> nn.Module | None:
        return RunningAverage(2) if self.stats.startswith("ema") else None

    def scale(self, batch: Batch) -> Tensor | None:
        return None if self.normalize == "sum" else 1 / batch.count_R.clamp(min=1)

    def margin(self, batch: Batch) -> Tensor:
        """The margin, and the reference's share of the scores, which are log-ratios, taken out again."""
        ref_R = batch.ref_R if self.normalize == "sum" else batch.ref_R * self.scale(batch)
        ref_chosen, ref_rejected = batch.pairs(ref_R)
        target = self.gamma + self.alpha * self._standardized(batch)
        return self._outer * target - self.beta * (ref_chosen - ref_rejected)

    @property
    def _outer(self) -> float:
        return self.beta if self.convention == "code" else 1.0

    def _standardized(self, batch: Batch) -> Tensor:
        """(P,) Z."""
        scaled = self.normalize == "mean"
        chosen, rejected = batch.pairs(batch.ratio_R * self.scale(batch) if scaled else batch.ratio_R)
        g = chosen - rejected
        if self.stats == "fixed":
            return (g - self.mean) / max(self.std, self.eps)
        mean, std, count = global_moments(g, pairs_that_count(batch))
        moments, weight = torch.stack([mean, std]), torch.stack([count > 0, count > 1]).to(mean)  # 0: nothing known
        if self.stats != "batch":
            amount = (1 - self.decay) * weight
            moments, weight = running(batch.state, moments, amount, 1 - amount)
            moments = moments * weight if self.stats == "ema_uncorrected" else moments
        mean, std = moments
        return torch.where(weight[1] > 0, (g - mean) / std.clamp(min=self.eps), 0.0)

    def eager(self, score_GK: Tensor, margin: Tensor | float = 0.0) -> Tensor:
        return smoothed_logistic(self.beta * (score_GK[:, 0] - score_GK[:, 1]) - margin, self.label_smoothing)

    def link_params(self) -> tuple[float, ...]:
        return self.beta, self.label_smoothing

    def metrics(self, score_R: Tensor, logp_R: Tensor, batch: Batch) -> dict[str, Tensor]:
        policy_R = batch.logp_R if self.normalize == "sum" else batch.logp_R * self.scale(batch)
        return super().metrics(policy_R - self.alpha * self._outer / self.beta * score_R, logp_R, batch)
