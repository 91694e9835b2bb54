"""What the backward passes share: gradients that forward made, scaled; and the refusal of second derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

_PIECE = 1 << 23  # elements scaled at a time where that takes an fp32 copy; on a CPU fewer, in its cache
_PIECE_ON_CPU = 1 << 19


def graph_is_kept() -> bool:
    """Whether the running backward may be asked again (retain_graph); True where torch does not say."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()


def scaled(gradient: Tensor, factor: Tensor, in_place: bool) -> Tensor:
    """factor * gradient, rounded once.

    Args:
        gradient: (N, ...), any floating dtype.
        factor: 0-dim, or (N,): one for each row.
        in_place: write over the gradient.
    """
    if stands_for_many(factor):
        own = factor.expand(1) if factor.ndim == 0 else factor[(..., *[None] * (gradient.ndim - 1))]
        return (gradient * own).to(gradient.dtype)
    out = gradient if in_place else torch.empty_like(gradient)
    # A 0-dim factor would be rounded to the gradient's dtype first; one of a dimension widens the gradient.
    ones = [1] * (gradient.ndim - 1)
    factors = factor.view(-1, *ones).expand(len(gradient), *ones)
    if factor.dtype == gradient.dtype:
        return torch.mul(gradient, factors, out=out)
    size = _PIECE if gradient.device.type != "cpu" else _PIECE_ON_CPU
    rows = max(1, size // max(1, gradient[:1].numel()))
    for piece, to, own in zip(gradient.split(rows), out.split(rows), factors.split(rows)):
        to.copy_(piece * own)
    return out


def stands_for_many(*gradients: Tensor | None) -> bool:
    """Whether one is upstream gradients of autograd.grad(is_grads_batched=True): of no one of them is memory reused."""
    functorch = torch._C._functorch
    tests = [getattr(functorch, name, lambda _: False) for name in ("is_batchedtensor", "is_legacy_batchedtensor")]
    return any(test(x) for x in gradients if x is not None for test in tests)


class _FirstOrderOnly(torch.autograd.Function):
    """Identity on a gradient; its own backward says that there is no second derivative."""

    @staticmethod
    def forward(ctx, grad, *inputs):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("prefkern's kernels have no second derivative; use impl='eager' for it")


def first_order_only(grads: tuple, inputs: tuple) -> tuple:
    """The gradients, under create_graph tied to their inputs: a double backward raises instead of losing terms."""
    if not torch.is_grad_enabled():
        return grads
    return tuple(None if g is None else _FirstOrderOnly.apply(g, *[t for t in inputs if t is not None]) for g in grads)
