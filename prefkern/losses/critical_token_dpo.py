"""DPO with a weight for every token: critical-token DPO, whole, by token, or by segment."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prefkern.granularity import Adaptive, Boundaries, Granularity, Static
from prefkern.layout import Layout
from prefkern.losses.autoregressive_dpo import AutoregressiveDPO
from prefkern.losses.base import choice, register, variant


@register("critical_token_dpo")
@dataclass(frozen=True, kw_only=True)
class CriticalTokenDPO(AutoregressiveDPO):
    """DPO that blames the tokens of the rejected response for as much as they are critical.

        L = sum_i -log sigma( beta * sum_{t in segment i} c_t d^w_t - beta * sum_{t in segment i} s_t d^l_t )

    s_t is high where a token decides that a response goes wrong, see `prefkern.critical_token_scores`; c_t is 1 unless
    the data says otherwise. Both are the call's `token_weights`, constants.

    Fields:
        aggregate:
            "sequence": the mean over pairs of L by `granularity`; None, one segment a response, is the whole-response
                form, and the others are the segment-wise ones.
            "token": every token is a segment, and the mean is over compared positions, all of the batch alike.
        width: of aggregate="token": divides by `width` positions a pair in place of those compared. The released code
            averages over the padded width L of prompt and response; with width=L the gradient is that one's, and the
            loss is lower by the constant log 2 for every share of padding and prompt among the positions.
        beta, label_smoothing: as in `autoregressive_dpo`.
        granularity, segment_reduction, accumulate: as in `autoregressive_dpo`; not with aggregate="token".
    Degenerates to: `autoregressive_dpo` with weights of 1.
    Source:
        Lin et al. 2024, arXiv:2411.19943: "token" with width, and scores, as in the authors' code; the whole-response
        form as summarised by third parties; segments in between derived (autoregressive DPO of weighted log-ratios).
    """

    needs_token_weights: ClassVar[bool] = True
    formula: ClassVar[str] = "sum_i -log sigma(beta (sum c_t d^w_t - sum s_t d^l_t))"
    source: ClassVar[str] = "Lin et al. 2024, arXiv:2411.19943"
    confidence: ClassVar[str] = "third party"

    granularity: Granularity | None = variant(
        None, optional=True, static=Static, adaptive=Adaptive, boundaries=Boundaries
    )
    aggregate: str = choice("sequence", "sequence", "token")
    width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = isinstance(self.width, int) and not isinstance(self.width, bool) and self.width > 0
        if self.width is not None and not whole:
            raise ValueError(f"{self.name}: width={self.width!r} must be a positive whole number, or None")
        if self.aggregate == "sequence":
            if self.width is not None:
                raise ValueError(f"{self.name}: width={self.width} belongs to aggregate='token'; leave it out")
            return
        for name, default in (("granularity", None), ("segment_reduction", "sum"), ("accumulate", "segment")):
            value = getattr(self, name)
            if value != default:
                raise ValueError(
                    f"{self.name}: {name}={value!r} belongs to aggregate='sequence'; with 'token' leave it out"
                )

    def segmented(self, layout: Layout) -> Layout:
        if self.aggregate == "sequence":
            return super().segmented(layout)
        if layout.is_cut:
            raise ValueError(
                f"{self.name}: aggregate='token' compares tokens, but the layout is cut; pass the uncut one"
            )
        return layout.static(1)

    def normalizer(self, layout: Layout, count_R: Tensor) -> float | Tensor:
        """Prompts; with aggregate="token" compared positions, or `width` a prompt."""
        if self.aggregate == "sequence":
            return super().normalizer(layout, count_R)
        if self.width is not None:
            return float(max(1, layout.num_prompts) * self.width)
        return count_R.view(-1, 2).amax(1).sum().clamp(min=1)
