"""Negative log-likelihood: supervised fine-tuning through the same core."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from prefkern.layout import Layout
from prefkern.losses.base import Batch, Loss, register


@register("nll")
@dataclass(frozen=True, kw_only=True)
class NLL(Loss):
    """Cross-entropy of the response tokens; of pairs and lists, of the first (chosen) response.

        L = - sum_t log pi(y_t) / (number of counted tokens of those responses in the batch)

    Source:
        Maximum likelihood; the mean is over tokens, not over sequences.
    """

    link: ClassVar[str] = "negative"
    arity: ClassVar[Literal["pair", "single", "list"]] = "single"
    needs_reference: ClassVar[bool] = False
    formula: ClassVar[str] = "-logp, mean over tokens"
    source: ClassVar[str] = "maximum likelihood"

    def check_layout(self, layout: Layout) -> None:
        """Any number of responses a prompt: it reads the first."""

    def segmented(self, layout: Layout) -> Layout:
        """The uncut layout: however responses are cut for the losses beside it, it reads them whole."""
        return layout.uncut

    def eager(self, score_GK: Tensor, margin: Tensor | float = 0.0) -> Tensor:
        return -score_GK[:, 0]

    def link_params(self) -> tuple[float, ...]:
        return ()

    def normalizer(self, layout: Layout, count_R: Tensor) -> Tensor:
        first = layout.index(count_R.device).group_offsets[:-1]  # a group's first member: the first response
        return count_R[first].sum().clamp(min=1)

    def metrics(self, score_R: Tensor, logp_R: Tensor, batch: Batch) -> dict[str, Tensor]:
        """logps/response: mean log-probability of a response, in nats."""
        return {"logps/response": logp_R.mean()}
