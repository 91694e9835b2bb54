"""AdaDPO: a pair loss whose chosen response is scaled so that both responses pull equally hard."""

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from prefkern.losses.alphadpo import AlphaDPO
from prefkern.losses.base import Addend, Batch, Loss, PairLoss, choice, get, ranged, register
from prefkern.losses.dpo import DPO
from prefkern.losses.orpo import MAX_MEAN_LOGP, ORPO, log1mexp

MAX_LOG_COEFFICIENT = 60.0  # what stands for no limit at all: its products with scores of 1e4 are finite in fp32


def _of_inner(name: str) -> property:
    return property(lambda self: getattr(self.inner, name))


@register("adadpo")
@dataclass(frozen=True, kw_only=True)
class AdaDPO(PairLoss):
    """DPO with a stronger beta for the chosen response the likelier that one has become.

        L = -log sigma( beta_w a_w - beta a_l ),    beta_w = beta c,    mean over pairs
        c = min( k ratio, clip ),  without gradient
        ratio = exp( q_w - q_l ),  q = log pi(y)                        space="policy"
                                   q = log pi(y) - log pi_ref(y)        space="reference"
        both divided by |y|                                             length_normalized (Stable AdaDPO)

    DPO's gradients with respect to the probabilities of both responses are as 1/p_w to 1/p_l: the likelier response
    moves less. With k=1, without limit and without length normalisation, they are equal with c: those with respect to
    p = pi(y) in policy space, to p = pi(y)/pi_ref(y) in reference space. With length normalisation p is the geometric
    mean over the response's tokens, and equality is up to |y_w| / |y_l|. Gradients with respect to log-probabilities,
    which is what reaches the logits, are as c to 1. `diagnostics=True` of the loss functions measures all of these.

    Fields:
        beta: of the base; None: as the base has it (0.1 for dpo).
        base: the loss whose chosen score c multiplies: a pair loss or its name, such as dpo, simpo, rdpo, ipo, cpo,
            orpo. Only dpo is in the source as written above; all others are derived. Other terms (margins, likelihoods)
            stay as they are. For orpo c multiplies the log-odds o_w, and q = log(p (1 - p)) of its p per token, for
            then the gradients with respect to p are equal; without length normalisation log p becomes log pi(y) there.
        space: "auto" is "reference" where the base compares with one, and "policy" elsewhere.
        length_normalized: the margin itself keeps whatever the base sums or divides.
        clip: upper limit of c; inf: none but e^60. There is no lower limit.
        k: 1 balances the gradients, above 1 the chosen response's is the larger one.
        nll_weight, ld_alpha, wpo: as in every pair loss, on top of the base's own.
    Metrics: rewards are the base's, the chosen one with beta_w; adadpo/coefficient is the mean of c, adadpo/clipped the
    share of pairs at the limit.
    Degenerates to: the base where c = 1: in reference space at policy = reference, exactly.
    Source:
        arXiv:2605.28440, as summarised by third parties, and a third party's trainer.
    """

    needs_first_pass: ClassVar[bool] = True
    formula: ClassVar[str] = "-log sigma(beta (c a_w - a_l)), c = min(exp(a_w/n_w - a_l/n_l), 2)"
    source: ClassVar[str] = "AdaDPO 2026, arXiv:2605.28440"
    confidence: ClassVar[str] = "third party"

    beta: float | None = None
    base: Loss = field(default=DPO())
    space: str = choice("auto", "auto", "reference", "policy")
    length_normalized: bool = True
    clip: float = ranged(2.0, 0, math.inf, "1.5 to 2.5; worse from 5 on", open_low=True)
    k: float = ranged(1.0, 0, 1000, "1, which balances the gradients", open_low=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.base, str):
            object.__setattr__(self, "base", get(self.base))
        if not isinstance(self.base, PairLoss) or isinstance(self.base, AdaDPO):
            raise ValueError(f"{self.name}: base={self.base!r} must be another pair loss, or the name of one")
        if self.base.link_targets and not isinstance(self.base, ORPO):
            raise ValueError(
                f"{self.name}: base={self.base!r} hands targets of its own to its link, where the coefficient would go;"
                " use another base, or f_divergence='reverse_kl'"
            )
        if isinstance(self.base, AlphaDPO):
            raise ValueError(
                f"{self.name}: base={self.base.name!r} takes the reference out of its scores again by its margin, which"
                " a coefficient on one of them would prevent; use simpo"
            )
        if self.space == "reference" and not self.base.needs_reference:
            raise ValueError(f"{self.name}: space='reference', but {self.base.name} has no reference; use 'policy'")
        self.inner  # noqa: B018 - its own check of beta and nll_weight, now and not in the first step

    @cached_property
    def inner(self) -> PairLoss:
        """The base with this loss's fields: what the loss is at c = 1."""
        given = {"beta": self.beta, "ld_alpha": self.ld_alpha, "wpo": self.wpo or None}
        given = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(self.base, nll_weight=self.base.nll_weight + self.nll_weight, **given)

    def coefficient(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(P,) c, and whether it is at its limit."""
        chosen, rejected = batch.pairs(self._log_ratios(batch))
        log_c, limit = chosen - rejected + math.log(self.k), min(math.log(self.clip), MAX_LOG_COEFFICIENT)
        return log_c.clamp(max=limit).exp(), log_c > limit

    def _log_ratios(self, batch: Batch) -> Tensor:
        """(R,) q."""
        count_R = batch.count_R.clamp(min=1)
        relative = self.base.needs_reference and self.space != "policy"
        q_R = batch.ratio_R if relative else batch.logp_R
        q_R = q_R / count_R if self.length_normalized else q_R
        if isinstance(self.base, ORPO):
            q_R = q_R + log1mexp((batch.logp_R / count_R).clamp(max=MAX_MEAN_LOGP))
        return q_R

    def _times_coefficient(self, batch: Batch, values_R: Tensor | None) -> Tensor:
        chosen, _ = self.coefficient(batch)
        c_R = torch.stack([chosen, torch.ones_like(chosen)], 1).flatten()
        return c_R if values_R is None else c_R * values_R

    def scale(self, batch: Batch) -> Tensor | None:
        scale_R = self.inner.scale(batch)
        return scale_R if self.link_targets else self._times_coefficient(batch, scale_R)

    def target(self, batch: Batch) -> Tensor | None:
        target_R = self.inner.target(batch)
        return self._times_coefficient(batch, target_R) if self.link_targets else target_R

    def metrics(self, score_R: Tensor, logp_R: Tensor, batch: Batch) -> dict[str, Tensor]:
        c, clipped = self.coefficient(batch)
        own = {"adadpo/coefficient": c.mean(), "adadpo/clipped": clipped.to(c).mean()}
        return {**self.inner.metrics(score_R, logp_R, batch), **own}

    def uncorrected(self) -> Loss:
        return self.inner

    # All else is the base's.
    arity = _of_inner("arity")
    link = _of_inner("link")
    link_targets = _of_inner("link_targets")
    link_params = _of_inner("link_params")
    eager = _of_inner("eager")
    needs_reference = _of_inner("needs_reference")
    needs_token_weights = _of_inner("needs_token_weights")
    needs_token_kl = _of_inner("needs_token_kl")
    needs_mismatched = _of_inner("needs_mismatched")
    target_kind = _of_inner("target_kind")
    couples_batch = _of_inner("couples_batch")
    row_outputs = _of_inner("row_outputs")
    segmented = _of_inner("segmented")
    margin = _of_inner("margin")
    group_weight = _of_inner("group_weight")
    token_factor = _of_inner("token_factor")
    regroup = _of_inner("regroup")
    with_token_kl = _of_inner("with_token_kl")
    normalizer = _of_inner("normalizer")
    new_state = _of_inner("new_state")

    @property
    def needs_lengths(self) -> bool:
        return self.length_normalized or self.inner.needs_lengths

    def addends(self, state: nn.Module | None = None) -> tuple[Addend, ...]:
        parts = self.inner.addends(state)
        return tuple(part._replace(loss=self) if part.loss is self.inner else part for part in parts)
