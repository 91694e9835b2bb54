"""What losses over lists of responses share: anchored logits, targets made of rewards, temperatures, metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prefkern.losses import groups
from prefkern.losses.base import Batch, Loss, choice, variant
from prefkern.losses.targets import KDE, Distribution, Given, PlackettLuce, RawSoftmax, Softmax
from prefkern.losses.temperatures import BatchGuarded, Entropy, Fixed, SmoothHybrid, Tau


@dataclass(frozen=True, kw_only=True)
class ListLoss(Loss):
    """A loss of any number of responses to each prompt, with a reward each.

        u_i = (log pi(y_i) - log anchor(y_i)) / tau,      p = softmax(u) over the group

    The anchor is the reference. Adding a constant to a group's log-probabilities changes nothing. A group of one
    response has no gradient; groups may have different sizes.

    Fields of every list loss:
        targets: what p should become, made of the group's rewards (the dataset's scores).
        tau: a number, or a schedule; see `temperatures`.
        normalize: "sum" compares log-probabilities of whole responses (the author's first trainer), "mean" per token
            (his later one).
    """

    arity: ClassVar[Literal["pair", "single", "list"]] = "list"
    needs_reference: ClassVar[bool] = True
    target_kind: ClassVar[Literal["score", "label", "preference"] | None] = "score"
    link_targets: ClassVar[bool] = True

    targets: Distribution = variant(
        Softmax(), softmax=Softmax, raw_softmax=RawSoftmax, plackett_luce=PlackettLuce, kde=KDE, given=Given
    )
    tau: float | Tau = variant(
        Fixed(), number=Fixed, fixed=Fixed, smooth_hybrid=SmoothHybrid, entropy=Entropy, batch_guarded=BatchGuarded
    )
    normalize: str = choice("sum", "sum", "mean")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau.needs_probabilities and isinstance(self.targets, PlackettLuce):
            raise ValueError(
                f"{self.name}: tau={self.tau!r} looks at the targets' probabilities, but PlackettLuce is a ranking;"
                " take another tau or other targets"
            )

    @property
    def needs_lengths(self) -> bool:
        return self.normalize == "mean"

    @property
    def needs_first_pass(self) -> bool:
        return self.tau.needs_first_pass

    @property
    def couples_batch(self) -> bool:
        return self.tau.couples_batch

    @property
    def row_outputs(self) -> tuple[str, ...]:
        return self.tau.row_outputs

    def scale(self, batch: Batch) -> Tensor:
        """(R,) 1 / tau, divided by the length with normalize="mean"."""
        tau_R = self.tau.of_prompts(batch, self.targets)
        if isinstance(tau_R, Tensor):
            tau_R = tau_R[batch.index.group_of_segment_S]
        lengths = batch.count_R.clamp(min=1) if self.normalize == "mean" else torch.ones_like(batch.count_R)
        return 1 / (tau_R * lengths)

    def target(self, batch: Batch) -> Tensor:
        """(R,) what the link compares with: probabilities, or ranks."""
        return groups.unpad(self.targets.make(*groups.pad(batch.target_R, batch.index)), batch.index)

    def metrics(self, score_R: Tensor, logp_R: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Means over prompts.

        rewards/best: u of the response with the best reward (the first of several).
        rewards/accuracies: share of prompts whose largest p belongs to a response with the best reward.
        logps/best: log-probability of that response, in nats.
        list/entropy, list/target_entropy: of p and of q, in nats; the latter not for a ranking.
        list/log_ratio: log pi - log anchor, the mean over a prompt's responses: where they were sampled from the
            policy, an estimate of KL(pi || anchor).
        list/tau: temperature.
        """
        score_GK, valid_GK = groups.pad(score_R, batch.index)
        reward_GK = groups.pad(batch.target_R, batch.index)[0].masked_fill(~valid_GK, -torch.inf)
        p_GK = groups.softmax(score_GK, valid_GK)
        best_G1 = reward_GK.argmax(-1, keepdim=True)
        chosen_G1 = reward_GK.gather(1, p_GK.argmax(-1, keepdim=True))
        scale_R = self.scale(batch)
        tau = 1 / (scale_R * batch.count_R.clamp(min=1)) if self.normalize == "mean" else 1 / scale_R
        values = {
            "rewards/best": score_GK.gather(1, best_G1),
            "rewards/accuracies": (chosen_G1 == reward_GK.gather(1, best_G1)).to(score_GK.dtype),
            "logps/best": groups.pad(logp_R, batch.index)[0].gather(1, best_G1),
            "list/entropy": groups.entropy(p_GK),
            "list/log_ratio": groups.mean(*groups.pad(score_R / scale_R, batch.index)),
            "list/tau": groups.mean(*groups.pad(tau, batch.index)),
        }
        if not isinstance(self.targets, PlackettLuce):
            q_GK = groups.pad(self.target(batch), batch.index)[0]
            values["list/target_entropy"] = groups.entropy(q_GK)
        return {name: value.mean() for name, value in values.items()}
