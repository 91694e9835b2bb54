"""Negative log-likelihood: supervised fine-tuning through the same core."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from prefkern.layout import Layout
from prefkern.losses.base import Loss, register


@register("nll")
@dataclass(frozen=True, kw_only=True)
class NLL(Loss):
    """Cross-entropy of the response tokens.

        L = - sum_t log pi(y_t) / (number of counted response tokens of the batch)

    Source:
        Maximum likelihood; the mean is over tokens, not over sequences.
    """

    link: ClassVar[str] = "negative"
    arity: ClassVar[Literal["pair", "single"]] = "single"
    needs_reference: ClassVar[bool] = False
    formula: ClassVar[str] = "-logp, mean over tokens"
    source: ClassVar[str] = "maximum likelihood"

    def eager(self, score_GK: Tensor, margin: Tensor | float = 0.0) -> Tensor:
        return -score_GK[:, 0]

    def link_params(self) -> tuple[float, ...]:
        return ()

    def normalizer(self, layout: Layout, count: Tensor) -> Tensor:
        return count.clamp(min=1)

    def metrics(self, ratio_R: Tensor, logp_R: Tensor) -> dict[str, Tensor]:
        """logps/response: mean log-probability of a response, in nats."""
        return {"logps/response": logp_R.mean()}
