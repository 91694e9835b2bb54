"""KTO: responses judged one by one, against a baseline that the whole batch shares."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prefkern.losses.base import Batch, Loss, choice, ranged, register
from prefkern.losses.statistics import global_mean


@register("kto")
@dataclass(frozen=True, kw_only=True)
class KTO(Loss):
    """A desirable response shall have a log-ratio above a baseline, an undesirable one below it.

        L = lambda_d * (1 - sigma(beta (a - kl)))      desirable
        L = lambda_u * (1 - sigma(beta (kl - a)))      undesirable,    mean over responses

    kl is max(0, mean log-ratio of prompts with other prompts' responses), over all ranks, without gradient: an estimate
    of how far the policy is from the reference in general.

    Fields:
        beta: as in `dpo`.
        desirable_weight, undesirable_weight: the lambdas; with n_d desirable and n_u undesirable responses,
            lambda_d n_d / (lambda_u n_u) is commonly kept between 1 and 4/3.
        baseline: "mismatched" is kl as above, and wants batches of several rows (of one, kl is that row's own
            log-ratio); "zero" needs no mismatched responses (TRL's apo_zero_unpaired).
    Metrics: rewards/chosen and rewards/rejected are means of beta * a over the call's desirable and undesirable
    responses, 0 where it has none of the kind; rewards/desirable is the share of the former. To average the means over
    calls, weight them by that share and its complement. kl is as above, in nats.
    Source:
        Ethayarajh et al. 2024, arXiv:2402.01306, as in TRL's code.
    """

    link: ClassVar[str] = "prospect"
    arity: ClassVar[Literal["pair", "single", "list"]] = "single"
    needs_reference: ClassVar[bool] = True
    target_kind: ClassVar[Literal["score", "label", "preference"] | None] = "label"
    link_targets: ClassVar[bool] = True
    formula: ClassVar[str] = "1 - sigma(+-beta (a - kl)), + desirable, - undesirable"
    source: ClassVar[str] = "Ethayarajh et al. 2024, arXiv:2402.01306, as in TRL's code"
    confidence: ClassVar[str] = "third party"

    beta: float = ranged(0.1, 0, 100, "0.01 to 0.5 in practice", open_low=True)
    desirable_weight: float = ranged(1.0, 0, 1000, "1 where both kinds are as frequent")
    undesirable_weight: float = ranged(1.0, 0, 1000, "1 where both kinds are as frequent")
    baseline: str = choice("mismatched", "mismatched", "zero")

    @property
    def needs_mismatched(self) -> bool:
        return self.baseline == "mismatched"

    @property
    def couples_batch(self) -> bool:
        return self.baseline == "mismatched"

    def margin(self, batch: Batch) -> float | Tensor:
        """beta * kl."""
        if self.baseline == "zero":
            return 0.0
        return (self.beta * self._kl(batch)).expand(batch.layout.num_groups)

    def _kl(self, batch: Batch) -> Tensor:
        return global_mean(batch.mismatched_R)[0].clamp(min=0)

    def group_weight(self, batch: Batch) -> Tensor:
        desirable = batch.target_R > 0.5
        return torch.where(desirable, self.desirable_weight, self.undesirable_weight).to(batch.count_R.dtype)

    def eager(
        self,
        score_GK: Tensor,
        margin: Tensor | float = 0.0,
        label_GK: Tensor | None = None,
        valid_GK: Tensor | None = None,
    ) -> Tensor:
        x = self.beta * score_GK[:, 0] - margin
        return torch.where(label_GK[:, 0] > 0.5, -x, x).sigmoid()

    def link_params(self) -> tuple[float, ...]:
        return (self.beta,)

    def metrics(self, score_R: Tensor, logp_R: Tensor, batch: Batch) -> dict[str, Tensor]:
        """rewards/chosen, rewards/rejected, rewards/margins, logps/chosen, logps/rejected, rewards/desirable, kl."""
        desirable = (batch.target_R > 0.5).to(score_R)

        def means(values_R: Tensor) -> tuple[Tensor, ...]:
            return tuple((values_R * kind).sum() / kind.sum().clamp(min=1) for kind in (desirable, 1 - desirable))

        chosen, rejected = means(self.beta * score_R)
        logp_chosen, logp_rejected = means(logp_R)
        metrics = {
            "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected,
            "rewards/desirable": desirable.mean(), "logps/chosen": logp_chosen, "logps/rejected": logp_rejected,
        }  # fmt: skip
        return metrics if self.baseline == "zero" else {**metrics, "kl": self._kl(batch)}

    def metric_shares(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        desirable = metrics["rewards/desirable"]
        shares = {"chosen": desirable, "rejected": 1 - desirable}
        return {f"{what}/{kind}": share for what in ("rewards", "logps") for kind, share in shares.items()}
