"""What happens between `hidden @ weight.T` and the softmax, and what one pass over the rows returns."""

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from prefkern.products import product

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Head:
    """The elementwise map from raw logits to the logits that enter the softmax.

        z0 = hidden @ weight.T + bias
        z  = cap(logit_scale * z0) / temperature,      cap(x) = softcap * tanh(x / softcap), or x

    Fields:
        softcap: positive, or None for no cap (Gemma-2: 30).
        logit_scale: multiplies the raw logits (Cohere), 1.0 for none.
        temperature: positive, divides the capped logits.
        ignore_index: label of a row that takes no part: its outputs and gradients are exactly 0.
    Raises:
        ValueError: softcap or temperature not positive and finite, logit_scale not finite.
    """

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    ignore_index: int = IGNORE_INDEX

    def __post_init__(self) -> None:
        inf = float("inf")
        if self.softcap is not None and not 0 < self.softcap < inf:
            raise ValueError(f"softcap={self.softcap!r} must be positive and finite, or None")
        if not 0 < self.temperature < inf:
            raise ValueError(f"temperature={self.temperature!r} must be positive and finite")
        if not -inf < self.logit_scale < inf:
            raise ValueError(f"logit_scale={self.logit_scale!r} must be finite")


class LoRA(NamedTuple):
    """A low-rank adapter on the head: z0 = hidden @ weight.T + scale * (hidden @ a.T) @ b.T + bias.

    Fields:
        a: (r, D), b: (V, r), any floating dtype: both enter the products in hidden's. Gradients flow to both.
        scale: of the adapter's share (lora_alpha / r, or lora_alpha / sqrt(r) of rank-stabilised ones).
        hidden: what a sees in place of the head's hidden states, of their shape: those after the adapter's dropout.
            None: the same.
    Source: Hu et al. 2021, arXiv:2106.09685.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    hidden: Tensor | None = None

    def factors(self, hidden_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
        """(N, r) and (V, r) in hidden's dtype, whose product is the adapter's share of the logits.

        Raises:
            ValueError: shapes or devices do not go with the head's.
        """
        (vocab, dim), rank = weight_VD.shape, self.a.shape[0]
        x = hidden_ND if self.hidden is None else self.hidden.reshape(-1, self.hidden.shape[-1])
        if self.a.shape != (rank, dim) or self.b.shape != (vocab, rank) or x.shape != hidden_ND.shape or rank == 0:
            raise ValueError(
                f"lora: a {tuple(self.a.shape)} must be (r, {dim}), b {tuple(self.b.shape)} ({vocab}, r) with r > 0,"
                f" and its hidden {tuple(x.shape)} as the head's {tuple(hidden_ND.shape)}"
            )
        if {self.a.device, self.b.device, x.device} != {weight_VD.device}:
            raise ValueError(f"lora is on {self.a.device} and {self.b.device}, but the head on {weight_VD.device}")
        low_NR = F.linear(x.to(self.a.dtype), self.a) * self.scale
        return low_NR.to(hidden_ND.dtype), self.b.to(hidden_ND.dtype)


class Operands(NamedTuple):
    """What raw logits are made of: hidden @ weight.T + low @ low_weight.T, and a bias that whoever reads them adds."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    low: Tensor | None = None  # (N, R), of an adapter
    low_weight: Tensor | None = None  # (V, R)

    def logits(self, rows: slice, part: slice = slice(None), scratch: Tensor | None = None) -> Tensor:
        """(rows, part) of the raw logits without the bias, in hidden's dtype.

        Args:
            scratch: memory of at least as many elements, 1-D and of hidden's dtype, that may be used for them.
        """
        hidden, weight = self.hidden[rows], self.weight[part]
        shape = hidden.shape[0], weight.shape[0]
        out = None if scratch is None else scratch[: shape[0] * shape[1]].view(shape)
        logits = product(hidden, weight.t(), out)
        return logits if self.low is None else logits.addmm_(self.low[rows], self.low_weight[part].t())


class RowStats(NamedTuple):
    """Per-row results of one pass over the vocabulary; all (N,), all fp32 but is_top1 (bool).

    `logps` and `lse` are always there, the others only when asked for. Ignored rows hold 0
    (False in is_top1). `lse` and `mean_logit` speak of the transformed logits z; `entropy` is
    `lse - sum_v p_v z_v`, in nats; `is_top1` says that no logit is greater than the label's; `log_collision` is
    `log sum_v p_v^2`, in nats.
    """

    logps: Tensor
    lse: Tensor
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    mean_logit: Tensor | None = None
    log_collision: Tensor | None = None
