"""What every registered loss must satisfy; a new loss is checked by registering it.

Each check takes a loss and raises AssertionError with the loss and the broken property. They use the public functions
and random data of their own, and need neither a GPU nor Triton (but `link_matches_eager`, which needs Triton to run).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from prefkern.granularity import Adaptive, Static
from prefkern.layout import Layout
from prefkern.losses.base import Loss, loss_class
from prefkern.preference import PreferenceOutput, preference_loss

_CHOSEN, _REJECTED, _SINGLE = (5, 1, 8, 3), (2, 4, 8, 6), (5, 2, 9)


def instances(name: str) -> Iterator[Loss]:
    """The loss with its defaults, then with each choice of each option tried once."""
    cls = loss_class(name)
    yield cls()
    for f in dataclasses.fields(cls):
        tried: tuple = f.metadata.get("choices", ())
        if f.name == "granularity":
            tried = (None, Static(3), Adaptive(2), Adaptive(3, rule="B"))
        elif f.name == "label_smoothing":
            tried = (0.1,)
        for value in tried:
            if value != f.default:
                yield cls(**{f.name: value})


def layout_for(loss: Loss) -> Layout:
    """A small layout of the loss's arity with responses of different lengths."""
    return Layout.pairs(_CHOSEN, _REJECTED) if loss.arity == "pair" else Layout.sequences(_SINGLE)


def _data(
    loss: Loss, layout: Layout, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    logps = -torch.rand(layout.num_tokens, dtype=dtype, generator=generator) * 3
    ref = -torch.rand(layout.num_tokens, dtype=dtype, generator=generator) * 3
    return logps, ref if loss.needs_reference else None


def _run(loss: Loss, layout: Layout, logps: Tensor, ref: Tensor | None, **options) -> PreferenceOutput:
    return preference_loss(logps, layout, loss, ref_logps=ref, impl="eager", **options)


def gradient_is_right(loss: Loss) -> None:
    """The eager definition passes torch's numerical gradient check in float64."""
    layout = layout_for(loss)
    logps, ref = _data(loss, layout)
    assert torch.autograd.gradcheck(lambda x: _run(loss, layout, x, ref).loss, logps.requires_grad_()), loss


def finite_at_extremes(loss: Loss) -> None:
    """Scores of +-1e4 give a finite loss and a finite gradient in fp32."""
    members = 2 if loss.arity == "pair" else 1
    for sign in (1.0, -1.0):
        score_GK = torch.full((1, members), sign * 1e4)
        score_GK[:, 1:] *= -1
        score_GK.requires_grad_()
        value = loss.eager(score_GK, loss.margin(None, layout_for(loss))).sum()
        (grad,) = torch.autograd.grad(value, score_GK)
        assert value.isfinite() and grad.isfinite().all(), f"{loss}: {value} {grad} at {sign * 1e4}"


def batch_order_does_not_matter(loss: Loss) -> None:
    """Permuting the prompts permutes the gradient and leaves the loss."""
    layout = layout_for(loss)
    logps, ref = _data(loss, layout)
    blocks, permuted = _reversed_prompts(layout)
    whole, grad = _loss_and_gradient(loss, layout, logps, ref)
    other, other_grad = _loss_and_gradient(loss, permuted, logps[blocks], None if ref is None else ref[blocks])
    torch.testing.assert_close(other, whole)
    torch.testing.assert_close(other_grad, grad[blocks])


def micro_batches_add_up(loss: Loss) -> None:
    """Prompt by prompt with the whole batch's normalizer, losses and gradients add up to the whole batch's."""
    layout = layout_for(loss)
    logps, ref = _data(loss, layout)
    whole, grad = _loss_and_gradient(loss, layout, logps, ref)
    normalizer = loss.normalizer(layout, torch.tensor(float(layout.num_tokens)))
    total, parts, row, response = 0.0, [], 0, 0
    for size in layout.group_sizes:
        lengths = layout.lengths[response : response + size]
        rows = slice(row, row + sum(lengths))
        one = Layout.groups(lengths, [size])
        value, g = _loss_and_gradient(loss, one, logps[rows], None if ref is None else ref[rows], normalizer=normalizer)
        total, row, response = total + value, rows.stop, response + size
        parts.append(g)
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.cat(parts), grad)


def masking_equals_deleting(loss: Loss) -> None:
    """Masked tokens at a response's end change nothing, even infinite ones, and get a gradient of exactly 0.

    Not for losses that cut at positions counted from the response's length: there a masked token still takes a place.
    """
    layout = layout_for(loss)
    if loss.segmented(layout).num_groups != layout.num_groups:
        return
    logps, ref = _data(loss, layout)
    longer = Layout.groups([n + 2 for n in layout.lengths], layout.group_sizes)
    mask = torch.cat([torch.arange(n + 2) < n for n in layout.lengths])
    padded = torch.full((longer.num_tokens,), -torch.inf, dtype=logps.dtype)
    padded[mask] = logps
    padded_ref = None
    if ref is not None:
        padded_ref = torch.full_like(padded, -torch.inf)
        padded_ref[mask] = ref
    whole, grad = _loss_and_gradient(loss, layout, logps, ref)
    other, other_grad = _loss_and_gradient(loss, longer, padded, padded_ref, mask=mask)
    torch.testing.assert_close(other, whole)
    torch.testing.assert_close(other_grad[mask], grad)
    assert (other_grad[~mask] == 0).all(), f"{loss}: masked tokens got a gradient"


def data_gets_no_gradient(loss: Loss) -> None:
    """Reference log-probs and token weights are constants."""
    layout = layout_for(loss)
    logps, ref = _data(loss, layout)
    weights = torch.rand(layout.num_tokens, dtype=logps.dtype).requires_grad_()
    data = [weights] if ref is None else [weights, ref.requires_grad_()]
    out = _run(loss, layout, logps.requires_grad_(), ref, token_weights=weights)
    grads = torch.autograd.grad(out.loss, data, allow_unused=True)
    assert all(g is None for g in grads), f"{loss}: data got a gradient"
    assert not any(m.requires_grad for m in out.metrics.values()), f"{loss}: a metric carries a graph"


def one_step_lowers_the_loss(loss: Loss) -> None:
    """A small step against the gradient makes the loss smaller."""
    layout = layout_for(loss)
    logps, ref = _data(loss, layout)
    before, grad = _loss_and_gradient(loss, layout, logps, ref)
    assert grad.norm() > 0, f"{loss}: no gradient"
    after = _run(loss, layout, logps - 1e-4 * grad, ref).loss
    assert after < before, f"{loss}: {before} -> {after}"


def constant_shift_cancels(loss: Loss) -> None:
    """A pair loss depends on score differences alone."""
    if loss.arity != "pair":
        return
    score_GK = torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss.eager(score_GK + 3.7, 0.2), loss.eager(score_GK, 0.2))


def link_matches_eager(loss: Loss, device: str = "cpu") -> None:
    """The Triton tail with this loss's link gives the eager loss and gradient within fp32 rounding."""
    layout = layout_for(loss)
    logps, ref = (None if t is None else t.to(device) for t in _data(loss, layout, torch.float32))
    eager = _loss_and_gradient(loss, layout, logps, ref, impl="eager")
    kernel = _loss_and_gradient(loss, layout, logps, ref, impl="triton")
    for got, want in zip(kernel, eager):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


ALL: tuple[Callable[[Loss], None], ...] = (
    gradient_is_right, finite_at_extremes, batch_order_does_not_matter, micro_batches_add_up, masking_equals_deleting,
    data_gets_no_gradient, one_step_lowers_the_loss, constant_shift_cancels,
)  # fmt: skip


def _loss_and_gradient(
    loss: Loss, layout: Layout, logps: Tensor, ref: Tensor | None, impl: str = "eager", **options
) -> tuple[Tensor, Tensor]:
    logps = logps.detach().clone().requires_grad_()
    out = preference_loss(logps, layout, loss, ref_logps=ref, impl=impl, **options)
    (grad,) = torch.autograd.grad(out.loss, logps)
    return out.loss.detach(), grad


def _reversed_prompts(layout: Layout) -> tuple[Tensor, Layout]:
    """Row indices and layout with the prompts in reverse order."""
    rows, lengths, row, response = [], [], 0, 0
    for size in layout.group_sizes:
        mine = layout.lengths[response : response + size]
        rows.insert(0, torch.arange(row, row + sum(mine)))
        lengths.insert(0, mine)
        row, response = row + sum(mine), response + size
    return torch.cat(rows), Layout.groups([n for mine in lengths for n in mine], layout.group_sizes[::-1])
