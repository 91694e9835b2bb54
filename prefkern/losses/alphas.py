"""Alphas of the alpha-divergence: fixed, or by what the batch looks like. 1 covers the targets' modes, 0 seeks one.

No gradient flows through an alpha. What a schedule calls the batch is what one call sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from prefkern.losses import groups
from prefkern.losses.base import Batch, check_fields, ranged
from prefkern.losses.temperatures import advantage_skew

if TYPE_CHECKING:
    from prefkern.losses.alpha_divergence import AlphaDivergence


@dataclass(frozen=True)
class Alpha:
    """What every alpha offers."""

    needs_first_pass: ClassVar[bool] = False
    couples_batch: ClassVar[bool] = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_fields(self, name)
        low, high = getattr(self, "alpha_min", 0.0), getattr(self, "alpha_max", 1.0)
        if low > high:
            raise ValueError(f"{name}: alpha_min={low!r} must not be above alpha_max={high!r}")

    def new_state(self) -> nn.Module | None:
        """Running statistics; None: there are none."""
        return None

    def of_batch(self, batch: Batch, loss: AlphaDivergence, update: bool) -> float | Tensor:
        """A number or a 0-dim tensor; `update` moves the running statistics first, if they are in training mode."""
        raise NotImplementedError


def _alpha(default: float):
    return ranged(default, 0, 1, "0.35 to 0.9 in the author's settings")


@dataclass(frozen=True)
class FixedAlpha(Alpha):
    """The same alpha throughout. 1 is KL(q || p), `anchored_listwise`; 0 is KL(p || q); 1/2 the Hellinger distance."""

    alpha: float = _alpha(0.6)

    def of_batch(self, batch: Batch, loss: AlphaDivergence, update: bool) -> float:
        return float(self.alpha)


@dataclass(frozen=True)
class RewardConfidenceGuarded(Alpha):
    """Towards alpha_min only where the policy is sure and the batch's advantages lean to the good side.

        alpha = alpha_max - (alpha_max - alpha_min) c s
        c     = 1 - mean over responses of -log pi(y) / (|y| log V), in [0, 1]
        s     = max(0, 2 mean((A - min A) / (max A - min A)) - 1)    over the batch's advantages

    As A has mean 0 in every group, s tells how skewed the batch is, not whether rewards rise.

    Source:
        The author's code in the time of arXiv:2512.22953; that it is the paper's formula is inferred.
    """

    needs_first_pass: ClassVar[bool] = True
    couples_batch: ClassVar[bool] = True

    alpha_max: float = _alpha(0.9)
    alpha_min: float = _alpha(0.35)

    def of_batch(self, batch: Batch, loss: AlphaDivergence, update: bool) -> Tensor:
        log_v = groups.log_vocabulary(batch, "RewardConfidenceGuarded")
        sure = 1 - groups.surprise(batch.token_means(batch.logps_N), log_v)
        skew = advantage_skew(batch, loss.targets).clamp(min=0)
        return self.alpha_max - (self.alpha_max - self.alpha_min) * sure * skew


@dataclass(frozen=True)
class EffectiveSampleSize(Alpha):
    """The alpha at which half of the group's responses count, followed slowly.

        w_k  = softmax_i( a_k log q_i + (1 - a_k) log p_i ),    a_k = 11 values from alpha_min to alpha_max
        best = the a_k whose mean over prompts of 1 / sum_i w_k^2 is nearest to share * K
        alpha <- alpha + clamp((1 - decay) (best - alpha), -max_step, max_step),    kept in [0.001, 0.999]

    alpha stays at alpha_max for the first `warm_up` calls in training mode and moves with every later one; in
    evaluation it stands still. Without a state (`new_state`), it is `best` of the call. Where torch.distributed runs,
    the mean is over all ranks' prompts (each rank has to make the same calls); K is the mean group size.

    Source:
        The author's code for a while after arXiv:2512.22953, not in the paper. The order of the steps within warm-up,
        averaging before choosing, and groups of several sizes are our choices.
    """

    needs_first_pass: ClassVar[bool] = True
    couples_batch: ClassVar[bool] = True

    alpha_max: float = _alpha(0.9)
    alpha_min: float = _alpha(0.35)
    share: float = ranged(0.5, 0, 1, "0.5", open_low=True)
    decay: float = ranged(0.9, 0, 1, "0.9", open_high=True)
    max_step: float = ranged(0.05, 0, 1, "0.05", open_low=True)
    warm_up: int = ranged(10, 0, 1e9, "10 calls")

    def new_state(self) -> nn.Module:
        return AlphaState(self.alpha_max)

    def of_batch(self, batch: Batch, loss: AlphaDivergence, update: bool) -> Tensor:
        state = batch.state
        if state is None:
            return self.best(*loss.log_distributions(batch)).clamp(1e-3, 1 - 1e-3)
        if update and state.training:
            best = self.best(*loss.log_distributions(batch)).to(state.alpha.dtype)
            step = ((1 - self.decay) * (best - state.alpha)).clamp(-self.max_step, self.max_step)
            moved = (state.alpha + step).clamp(1e-3, 1 - 1e-3)
            state.alpha.copy_(torch.where(state.calls < self.warm_up, state.alpha, moved))
            state.calls.add_(1)
        return state.alpha.to(batch.count_R.dtype, copy=True)  # the next call moves the buffer

    def best(self, log_p_GK: Tensor, log_q_GK: Tensor, valid_GK: Tensor) -> Tensor:
        """0-dim; the candidate whose effective sample size is nearest to share * K."""
        candidates = torch.linspace(self.alpha_min, self.alpha_max, 11, dtype=log_p_GK.dtype, device=log_p_GK.device)
        a = candidates[:, None, None]
        w = groups.softmax(a * log_q_GK + (1 - a) * log_p_GK, valid_GK.expand(11, *valid_GK.shape))
        ess = 1 / w.square().sum(-1)
        sums = torch.cat([ess.sum(-1), valid_GK.sum().to(ess).view(1)])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)  # of both, so that their common divisor, the prompts, drops out
        return candidates.take((sums[:11] - self.share * sums[11]).abs().argmin())


class AlphaState(nn.Module):
    """Where a followed alpha stands, and how often it was called in training mode."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.register_buffer("calls", torch.tensor(0))
