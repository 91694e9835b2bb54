"""Attention over packed sequences, one sequence at a time: the sum of their squares, not the square of their sum.

Without it, transformers gives torch's attention a dense (T, T) mask over the whole packed batch. Here every sequence
is its own causal call, which needs no mask and may take a fused kernel. Registered with transformers under `NAME`;
outside a packed forward it is transformers' "sdpa" to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "prefkern_packed"
_packing: ContextVar[bool] = ContextVar("packing", default=False)


@contextlib.contextmanager
def no_mask() -> Iterator[None]:
    """Within it no mask is built: the attention itself keeps sequences apart."""
    token = _packing.set(True)
    try:
        yield
    finally:
        _packing.reset(token)


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, T, head dimension)
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_lengths: Sequence[int] | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Causal attention within each of the packed sequences; plain sdpa where no lengths are given.

    The lengths come as a keyword through the decoder's layers, so that recomputation under gradient checkpointing
    sees them too. A sliding window is honoured where the model passes it on, as for flash attention.
    """
    if sequence_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.get("sliding_window")
    pieces = zip(*(states.split(list(sequence_lengths), dim=2) for states in (query, key, value)))
    outputs = [
        sdpa_attention_forward(module, q, k, v, _band(q.shape[2], window, q.device), **kwargs)[0] for q, k, v in pieces
    ]
    return torch.cat(outputs, dim=1), None  # (1, T, heads, head dimension)


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """A causal mask of the last `window` positions; None where the window reaches over the whole sequence."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return ((distance >= 0) & (distance < window))[None, None]


def packed_mask(*args, **kwargs) -> Tensor | None:
    """The mask of "sdpa", or none within `no_mask`."""
    return None if _packing.get() else sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, packed_mask)
