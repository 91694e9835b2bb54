"""BCO on pairs: each response against a threshold, as a binary classifier would."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from prefkern.losses.base import Batch, PairLoss, choice, ranged, register
from prefkern.losses.statistics import RunningAverage, global_mean, pairs_that_count, running


@register("bco")
@dataclass(frozen=True, kw_only=True)
class BCO(PairLoss):
    """Chosen responses shall have a reward above a threshold, rejected ones below it.

        r = beta * a
        L = -log sigma(r_w - delta) - log sigma(-(r_l - delta)),    mean over pairs

    Fields:
        beta: as in `dpo`.
        shift: "none": delta = 0, as TRL 1.16 does. "running_mean": delta is the mean, over the batches seen in training
            and this one, of a batch's mean reward over both kinds of responses, without gradient, as TRL 0.24 does; a
            batch is what one call sees on all ranks. In evaluation delta stays what training left (before any: the
            batch's own mean reward).
    Source:
        Jung et al. 2024, arXiv:2404.04656, as in TRL's code ("bco_pair").
    """

    link: ClassVar[str] = "logistic_each"
    needs_reference: ClassVar[bool] = True
    formula: ClassVar[str] = "-log sigma(beta a_w - delta) - log sigma(-(beta a_l - delta))"
    source: ClassVar[str] = "Jung et al. 2024, arXiv:2404.04656, as in TRL's code"
    confidence: ClassVar[str] = "third party"

    beta: float = ranged(0.1, 0, 100, "0.01 to 0.5 in practice", open_low=True)
    shift: str = choice("none", "none", "running_mean")

    @property
    def needs_first_pass(self) -> bool:
        return self.shift != "none" or super().needs_first_pass

    @property
    def couples_batch(self) -> bool:
        return self.shift != "none"

    def new_state(self) -> nn.Module | None:
        return RunningAverage() if self.shift != "none" else None

    def margin(self, batch: Batch) -> float | Tensor:
        if self.shift == "none":
            return 0.0
        counted_R = pairs_that_count(batch).repeat_interleave(2)
        mean, count = global_mean(self.beta * batch.ratio_R, counted_R)
        delta, _ = running(batch.state, mean[None], (count > 0).to(mean))  # every batch with a pair counts the same
        return delta.expand(batch.layout.num_groups)

    def eager(self, score_GK: Tensor, margin: Tensor | float = 0.0) -> Tensor:
        chosen, rejected = (self.beta * score_GK).unbind(1)
        return -logsigmoid(chosen - margin) - logsigmoid(-(rejected - margin))

    def link_params(self) -> tuple[float, ...]:
        return self.beta, 0.0, 1.0
