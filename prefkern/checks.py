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
from prefkern.losses.base import Loss, PairLoss, loss_class
from prefkern.preference import preference_loss
from prefkern.preference_tail import Given, PreferenceOutput, eager_tail, finish, prepare, share, with_token_kl

_CHOSEN, _REJECTED, _SINGLE = (5, 1, 8, 3), (2, 4, 8, 6), (5, 2, 9, 4)
_LISTS, _GROUPS = (5, 1, 8, 3, 2, 4, 6, 7, 3), (3, 1, 5)


def instances(name: str) -> Iterator[Loss]:
    """The loss with its defaults, then with each choice and kind of each option tried once.

    Of pair losses, also with all that every pair loss takes.
    """
    cls = loss_class(name)
    yield cls()
    if issubclass(cls, PairLoss):
        yield cls(ld_alpha=0.3, wpo=True, nll_weight=0.5)
    for f in dataclasses.fields(cls):
        tried: tuple = f.metadata.get("choices", ())
        if f.name == "granularity":
            tried = (None, Static(3), Adaptive(2), Adaptive(3, rule="B"))
        elif "kinds" in f.metadata:
            tried = tuple(kind() for kind in f.metadata["kinds"].values()) + (None,) * f.metadata["optional"]
        elif f.name == "label_smoothing":
            tried = (0.1,)
        for value in tried:
            if value != f.default:
                yield cls(**{f.name: value})


def layout_for(loss: Loss) -> Layout:
    """A small layout of the loss's arity with responses of different lengths."""
    if loss.arity == "pair":
        return Layout.pairs(_CHOSEN, _REJECTED)
    return Layout.sequences(_SINGLE) if loss.arity == "single" else Layout.groups(_LISTS, _GROUPS)


@dataclasses.dataclass(frozen=True)
class Example:
    """A small batch with everything that a loss may ask for, and nothing that it refuses."""

    layout: Layout
    logps: Tensor
    ref_logps: Tensor | None = None
    targets: Tensor | None = None
    mismatched: Tensor | None = None
    token_weights: Tensor | None = None
    token_kl: Tensor | None = None
    stats: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def take(self, layout: Layout, rows_N: Tensor, responses_R: Tensor) -> Example:
        """The same batch with other rows and responses."""

        def rows(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[rows_N]

        return Example(
            layout,
            self.logps[rows_N],
            rows(self.ref_logps),
            None if self.targets is None else self.targets[responses_R],
            self.mismatched,
            rows(self.token_weights),
            rows(self.token_kl),
            {name: t[rows_N] for name, t in self.stats.items()},
        )

    @property
    def options(self) -> dict[str, Tensor | dict | int | None]:
        """Keywords of `preference_loss`."""
        names = ("ref_logps", "targets", "mismatched", "token_weights", "token_kl", "stats")
        return {name: getattr(self, name) for name in names} | {"vocab_size": 64}


def example(
    loss: Loss, layout: Layout | None = None, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
) -> Example:
    """A random batch for a loss; log-probabilities in [-3, 0], log-ratios in [-3, 3]."""
    layout = layout or layout_for(loss)
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> Tensor:
        return torch.rand(n, dtype=dtype, generator=generator)

    n, r = layout.num_tokens, layout.num_responses
    logps, ref, weights, kl = -3 * draw(n), -3 * draw(n), draw(n) + 0.5, draw(n)
    stats = {"entropy": 3 * draw(n), "log_collision": -draw(n)}
    targets = _targets(loss, layout, draw(r))
    made = Example(
        layout,
        logps,
        ref if loss.needs_reference else None,
        targets,
        draw(3) - 0.3 if loss.needs_mismatched else None,
        weights if loss.needs_token_weights else None,
        kl if loss.needs_token_kl else None,
        {name: stats[name] for name in loss.row_outputs},
    )
    moved = {
        f.name: v.to(device) if isinstance(v := getattr(made, f.name), Tensor) else v for f in dataclasses.fields(made)
    }
    return Example(**{**moved, "stats": {name: t.to(device) for name, t in made.stats.items()}})


def _targets(loss: Loss, layout: Layout, draw_R: Tensor) -> Tensor | None:
    if loss.target_kind == "label":
        return (torch.arange(layout.num_responses) % 2 == 0).to(draw_R)
    if loss.target_kind == "preference":
        return torch.stack([draw_R[::2], 1 - draw_R[::2]], 1).flatten()
    if loss.target_kind == "score":  # positive, and adding up to 1 in each group, so that they may be probabilities
        groups = draw_R.split(list(layout.group_sizes))
        return torch.cat([group / group.sum() for group in groups])
    return None


def _run(loss: Loss, batch: Example, logps: Tensor | None = None, impl: str = "eager", **options) -> PreferenceOutput:
    x = batch.logps if logps is None else logps
    return preference_loss(x, batch.layout, loss, impl=impl, **{**batch.options, **options})


def gradient_is_right(loss: Loss) -> None:
    """The eager loss passes torch's numerical gradient check in float64, its constants held where they are.

    Where constants depend on the log-probabilities (`needs_first_pass`) a numerical derivative would see them move:
    then the gradient is compared with that of `eager` under constants made once.
    """
    batch = example(loss)
    if loss.needs_first_pass:
        frozen = _Frozen(loss, batch)
        x = batch.logps.clone().requires_grad_()
        assert torch.autograd.gradcheck(frozen, x), loss
        (want,) = torch.autograd.grad(frozen(x), x)
        torch.testing.assert_close(_loss_and_gradient(loss, batch)[1], want)
        return
    assert torch.autograd.gradcheck(lambda x: _run(loss, batch, x).loss, batch.logps.requires_grad_()), loss


class _Frozen:
    """The loss as a function of log-probabilities with the constants of one batch."""

    def __init__(self, loss: Loss, batch: Example) -> None:
        given = Given(
            batch.ref_logps, batch.token_weights, None, batch.targets, batch.mismatched, batch.stats, batch.token_kl, 64
        )
        self.tails = []
        for weight, part, _ in loss.addends():
            own, device = share(given, part), batch.logps.device
            tail = prepare(part.segmented(batch.layout), part, device, torch.float64, own, None, batch.logps)
            self.tails.append((weight, tail, own.token_kl_N))

    def __call__(self, logps: Tensor) -> Tensor:
        def one(tail, kl_N: Tensor | None) -> Tensor:
            x = with_token_kl(logps, kl_N, tail)
            return finish(eager_tail(x, tail)[0], None, logps.detach(), tail, None, {}).loss

        return sum(weight * one(tail, kl_N) for weight, tail, kl_N in self.tails)


def finite_at_extremes(loss: Loss) -> None:
    """Scores of +-1e4 give a finite loss and a finite gradient in fp32."""
    layout = {"pair": Layout.pairs([2], [2]), "single": Layout.sequences([2, 2])}.get(loss.arity)
    batch = example(loss, layout or Layout.groups([2, 2, 2], [3]), torch.float32)
    for sign in (1.0, -1.0):
        logps = torch.full_like(batch.logps, -1e4)
        logps[:2] = 0.0 if sign > 0 else -2e4
        value, grad = _loss_and_gradient(loss, dataclasses.replace(batch, logps=logps))
        assert value.isfinite() and grad.isfinite().all(), f"{loss}: {value} {grad} at {sign * 1e4}"


def batch_order_does_not_matter(loss: Loss) -> None:
    """Permuting the prompts permutes the gradient and leaves the loss."""
    batch = example(loss)
    layout, rows, responses = _reversed_prompts(batch.layout)
    whole, grad = _loss_and_gradient(loss, batch)
    other, other_grad = _loss_and_gradient(loss, batch.take(layout, rows, responses))
    torch.testing.assert_close(other, whole)
    torch.testing.assert_close(other_grad, grad[rows])


def micro_batches_add_up(loss: Loss) -> None:
    """Prompt by prompt with the whole batch's normalizer, losses and gradients add up to the whole batch's.

    Not for losses that couple the batch.
    """
    if loss.couples_batch:
        return
    batch = example(loss)
    whole, grad = _loss_and_gradient(loss, batch)
    normalizer = loss.normalizers(batch.layout, torch.tensor(batch.layout.lengths, dtype=torch.float64))
    total, parts, row, response = 0.0, [], 0, 0
    for size in batch.layout.group_sizes:
        lengths = batch.layout.lengths[response : response + size]
        rows, responses = torch.arange(row, row + sum(lengths)), torch.arange(response, response + size)
        one = batch.take(Layout.groups(lengths, [size]), rows, responses)
        value, g = _loss_and_gradient(loss, one, normalizer=normalizer)
        total, row, response = total + value, row + sum(lengths), response + size
        parts.append(g)
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.cat(parts), grad)


def masking_equals_deleting(loss: Loss) -> None:
    """Masked tokens at a response's end change nothing, even infinite ones, and get a gradient of exactly 0.

    Not for losses that cut at positions counted from the response's length: there a masked token still takes a place.
    """
    batch = example(loss)
    layout = batch.layout
    if loss.segmented(layout).num_groups != layout.num_groups:
        return
    longer = Layout.groups([n + 2 for n in layout.lengths], layout.group_sizes)
    mask = torch.cat([torch.arange(n + 2) < n for n in layout.lengths])

    def pad(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        padded = torch.full((longer.num_tokens,), -torch.inf, dtype=t.dtype)
        padded[mask] = t
        return padded

    weights = None if batch.token_weights is None else pad(batch.token_weights).masked_fill(~mask, 1.0)
    padded = dataclasses.replace(
        batch, layout=longer, logps=pad(batch.logps), ref_logps=pad(batch.ref_logps), token_kl=pad(batch.token_kl),
        token_weights=weights, stats={name: pad(t) for name, t in batch.stats.items()},
    )  # fmt: skip
    whole, grad = _loss_and_gradient(loss, batch)
    other, other_grad = _loss_and_gradient(loss, padded, mask=mask)
    torch.testing.assert_close(other, whole)
    torch.testing.assert_close(other_grad[mask], grad)
    assert (other_grad[~mask] == 0).all(), f"{loss}: masked tokens got a gradient"


def data_gets_no_gradient(loss: Loss) -> None:
    """Reference log-probs, token weights, targets and row statistics are constants."""
    batch = example(loss)
    weights = torch.rand(batch.layout.num_tokens, dtype=batch.logps.dtype)
    batch = dataclasses.replace(batch, token_weights=weights)
    given = [batch.ref_logps, batch.token_weights, batch.targets, batch.mismatched, *batch.stats.values()]
    data = [t.requires_grad_() for t in given if t is not None]
    out = _run(loss, batch, batch.logps.requires_grad_())
    grads = torch.autograd.grad(out.loss, data, allow_unused=True)
    assert all(g is None for g in grads), f"{loss}: data got a gradient"
    assert not any(m.requires_grad for m in out.metrics.values()), f"{loss}: a metric carries a graph"


def one_step_lowers_the_loss(loss: Loss) -> None:
    """A small step against the gradient makes the loss smaller, its constants held where they are."""
    batch = example(loss)
    before, grad = _loss_and_gradient(loss, batch)
    assert grad.norm() > 0, f"{loss}: no gradient"
    stepped = batch.logps - 1e-4 * grad
    after = _Frozen(loss, batch)(stepped) if loss.needs_first_pass else _run(loss, batch, stepped).loss
    assert after < before, f"{loss}: {before} -> {after}"


def link_matches_eager(loss: Loss, device: str = "cpu") -> None:
    """The Triton tail with this loss's link gives the eager loss and gradient within fp32 rounding."""
    batch = example(loss, dtype=torch.float32, device=device)
    eager, kernel = (_loss_and_gradient(loss, batch, impl=impl) for impl in ("eager", "triton"))
    for got, want in zip(kernel, eager):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


ALL: tuple[Callable[[Loss], None], ...] = (
    gradient_is_right, finite_at_extremes, batch_order_does_not_matter, micro_batches_add_up, masking_equals_deleting,
    data_gets_no_gradient, one_step_lowers_the_loss,
)  # fmt: skip


def _loss_and_gradient(loss: Loss, batch: Example, impl: str = "eager", **options) -> tuple[Tensor, Tensor]:
    logps = batch.logps.detach().clone().requires_grad_()
    out = _run(loss, batch, logps, impl=impl, **options)
    (grad,) = torch.autograd.grad(out.loss, logps)
    return out.loss.detach(), grad


def _reversed_prompts(layout: Layout) -> tuple[Layout, Tensor, Tensor]:
    """The layout with the prompts in reverse order, and the rows and responses in that order."""
    rows = torch.arange(layout.num_tokens).split(list(layout.lengths))
    responses = torch.arange(layout.num_responses).split(list(layout.group_sizes))
    order = torch.cat(responses[::-1])
    lengths = [layout.lengths[r] for r in order.tolist()]
    return Layout.groups(lengths, layout.group_sizes[::-1]), torch.cat([rows[r] for r in order.tolist()]), order
