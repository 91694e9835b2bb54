"""Temperatures of list losses: how strongly the group's log-ratios count, fixed or by what the batch looks like.

A larger temperature means a smaller gradient (1 / tau), but an optimum farther from the anchor: there
log pi = log anchor + tau log q + c. No gradient flows through a temperature.

What a schedule calls the batch is what one call sees: with gradient accumulation one micro-batch, with several ranks
one rank's share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prefkern import reference
from prefkern.losses import groups
from prefkern.losses.base import Batch, check_fields, choice, ranged
from prefkern.losses.targets import Distribution


@dataclass(frozen=True)
class Temperature:
    """What every temperature offers. Class variables may be properties."""

    row_outputs: ClassVar[tuple[str, ...]] = ()  # see Loss
    needs_first_pass: ClassVar[bool] = False
    couples_batch: ClassVar[bool] = False
    needs_probabilities: ClassVar[bool] = False  # whether it looks at q, which a ranking has not

    def __post_init__(self) -> None:
        check_fields(self, type(self).__name__)
        low, high = getattr(self, "tau_min", 0.0), getattr(self, "tau_max", math.inf)
        if low > high:
            raise ValueError(f"{type(self).__name__}: tau_min={low!r} must not be above tau_max={high!r}")

    def of_prompts(self, batch: Batch, targets: Distribution) -> float | Tensor:
        """A number, or (G,)."""
        raise NotImplementedError


def _tau(default: float):
    return ranged(default, 0, 1000, "0.3 to 1 in the author's settings", open_low=True)


def _bound(default: float):
    return ranged(default, 0, 1000, "0.05 to 0.3 below, 1.5 to 5 above", open_low=True)


def _strength(default: float):
    return ranged(default, 0, 100, "0.2 to 1")


@dataclass(frozen=True)
class Fixed(Temperature):
    """The same temperature for every prompt."""

    tau: float = _tau(1.0)

    def of_prompts(self, batch: Batch, targets: Distribution) -> float:
        return self.tau


@dataclass(frozen=True)
class SmoothHybrid(Temperature):
    """Hotter where the policy is unsure, and where it is sure of a prompt that it does badly on.

        tau(x) = clamp( tau (1 + a H + b (1 - H) (1 - R)), tau_min, tau_max )
        H      = mean over the group of each response's mean token entropy / log V, in [0, 1]
        R      = the group's mean reward, from 0 (the batch's lowest) to 1 (its highest); 1/2 where all are equal

    Fields:
        tau, a, b, tau_min, tau_max: as above. The defaults are those of the author's first trainer; his later one has
            tau = 0.8, b = 0.5, tau_min = 0.05.
        entropy: "exact", of the whole next-token distribution (first trainer), or "sampled", minus the log-probability
            of the response's tokens (later one).
    Source:
        arXiv:2510.18913, "Smooth Hybrid"; details as in the author's code.
    """

    couples_batch: ClassVar[bool] = True

    tau: float = _tau(1.0)
    a: float = _strength(0.5)
    b: float = _strength(1.0)
    tau_min: float = _bound(0.1)
    tau_max: float = _bound(5.0)
    entropy: str = choice("exact", "exact", "sampled")

    @property
    def row_outputs(self) -> tuple[str, ...]:
        return ("entropy",) if self.entropy == "exact" else ()

    @property
    def needs_first_pass(self) -> bool:
        return self.entropy == "sampled"

    def of_prompts(self, batch: Batch, targets: Distribution) -> Tensor:
        nats_N = batch.stats["entropy"] if self.entropy == "exact" else -batch.logps_N
        nats_GK, valid_GK = groups.pad(batch.token_means(nats_N), batch.index)
        h_G = (groups.mean(nats_GK, valid_GK)[:, 0] / groups.log_vocabulary(batch, "SmoothHybrid")).clamp(0, 1)
        reward_G = groups.mean(*groups.pad(batch.target_R, batch.index))[:, 0]
        r_G = groups.within_range(reward_G, 1e-6, constant=0.5)
        return (self.tau * (1 + self.a * h_G + self.b * (1 - h_G) * (1 - r_G))).clamp(self.tau_min, self.tau_max)


@dataclass(frozen=True)
class Entropy(Temperature):
    """By how undecided the targets are.

        form="falling"    tau(x) = max( tau_min, tau (1 - a H / log K) )          colder for flat targets
        form="rising"     tau(x) = max( tau_min, tau (1 - a (1 - H / log K)) )    colder for peaked targets

    H is the entropy of q over the K responses; H / log K counts as 0 for a single one.

    Source:
        The author's code of arXiv:2510.18913: "falling" first, "rising" a few days later; a = 1 and tau_min = 0.1 are
        the paper's settings.
    """

    needs_probabilities: ClassVar[bool] = True

    form: str = choice("falling", "falling", "rising")
    tau: float = _tau(1.0)
    a: float = _strength(1.0)
    tau_min: float = _bound(0.1)

    def of_prompts(self, batch: Batch, targets: Distribution) -> Tensor:
        reward_GK, valid_GK = groups.pad(batch.target_R, batch.index)
        sizes_G = groups.sizes(valid_GK)[:, 0].to(reward_GK.dtype)
        most_G = torch.where(sizes_G > 1, sizes_G.log(), 1.0)
        flat_G = groups.entropy(targets.make(reward_GK, valid_GK)) / most_G
        return (self.tau * (1 - self.a * (flat_G if self.form == "falling" else 1 - flat_G))).clamp(min=self.tau_min)


@dataclass(frozen=True)
class BatchGuarded(Temperature):
    """One temperature a batch: hotter for an unsure anchor, colder for a sure policy with skewed advantages.

        tau = clamp( tau (1 + a H - b c s), tau_min, tau_max )
        H   = mean over responses of -log anchor(y) / (|y| log V), in [0, 1]
        c   = 1 - mean over responses of -log pi(y) / (|y| log V), in [0, 1]
        s   = 2 mean((A - min A) / (max A - min A)) - 1    over the batch's advantages; -1 where all are equal

    As A has mean 0 in every group, s tells how skewed the batch is, not whether rewards rise.

    Source:
        The author's code in the time of arXiv:2512.22953.
    """

    needs_first_pass: ClassVar[bool] = True
    couples_batch: ClassVar[bool] = True

    tau: float = _tau(0.5)
    a: float = _strength(0.2)
    b: float = _strength(0.5)
    tau_min: float = _bound(0.2)
    tau_max: float = _bound(1.5)

    def of_prompts(self, batch: Batch, targets: Distribution) -> Tensor:
        log_v = groups.log_vocabulary(batch, "BatchGuarded")
        weights_N = batch.weights_N
        weight_R = batch.count_R if weights_N is None else reference.span_sums(weights_N, batch.index.response_offsets)
        unsure = groups.surprise(batch.ref_R / torch.where(weight_R == 0, 1.0, weight_R), log_v)
        sure = 1 - groups.surprise(batch.token_means(batch.logps_N), log_v)
        tau = self.tau * (1 + self.a * unsure - self.b * sure * advantage_skew(batch, targets))
        return tau.clamp(self.tau_min, self.tau_max).expand(batch.layout.num_groups)


def advantage_skew(batch: Batch, targets: Distribution) -> Tensor:
    """2 mean((A - min A) / (max A - min A)) - 1 over the batch's responses, in [-1, 1]; -1 where all are equal."""
    reward_GK, valid_GK = groups.pad(batch.target_R, batch.index)
    advantage_R = groups.unpad(targets.advantages(reward_GK, valid_GK), batch.index)
    return 2 * groups.within_range(advantage_R, 1e-6).mean() - 1


Tau = Fixed | SmoothHybrid | Entropy | BatchGuarded
