"""torch.library operators of the package, for torch.compile and torch.export; imported while one of them traces.

Eager calls go through autograd.Functions, which cost less a call. A traced call goes through an operator whose fake
implementation knows shapes and dtypes alone, so neither the head nor the loss breaks a graph, and no length, number
of prompts or boundary of a segment is a constant of it:

    prefkern::token_logps, token_logps_backward                  the head
    prefkern::logits_token_logps, logits_token_logps_backward    logits that exist already
    prefkern::preference                                         the loss, its metrics, and dloss/dlogps

A layout enters as its `handle`, a 0-dim tensor, and a loss as a string that stands for the object. Operators return
fresh tensors and write into no argument; a result that was not asked for is a tensor of no elements.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from prefkern import checks, preference_tail, reference
from prefkern import rows as torch_rows
from prefkern.gradients import first_order_only
from prefkern.head import Head, Operands, RowStats
from prefkern.layout import Layout
from prefkern.losses.base import Loss
from prefkern.planner import FROZEN, plan
from prefkern.reference import accumulator
from prefkern.token_logps import (
    HiddenCall,
    LogitsCall,
    _head_forward,
    _head_gradient,
    logits_rows,
)

# --- the head ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("prefkern::token_logps", mutates_args=())
def token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    low_weight: Tensor | None,
    ref_hidden: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    want: str,
    impl: str,
    workspace_bytes: int | None,
    filter_eps: float | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """RowStats, ref_logps, and the unit gradients of hidden and low, of (N, D) hidden states.

    Args:
        hidden, weight, bias, ref_hidden, labels, and softcap to ignore_index, impl, workspace_bytes, filter_eps: as in
            `prefkern.token_logps`, checked already.
        low, low_weight: the factors of an adapter, `LoRA.factors`.
        want: names of `prefkern.token_logps.OUTPUTS`, separated by commas.
        needs: whether hidden, weight, bias, low and low_weight need gradients: an operator cannot ask its arguments.
    """
    call = _call(hidden, weight, low, softcap, logit_scale, temperature, ignore_index, want, impl, workspace_bytes,
                 filter_eps, needs)  # fmt: skip
    stats, ref_logps, units = _head_forward(Operands(hidden, weight, bias, low, low_weight), ref_hidden, labels, call)
    return tuple(_fresh(x, hidden) for x in (*stats, ref_logps, *units))


def _fresh(x: Tensor | None, like: Tensor) -> Tensor:
    """Memory of its own, dense: an operator's results may not share any."""
    if x is None:
        return like.new_empty(0)
    part = x.untyped_storage().nbytes() != x.nbytes  # below an operator views do not know their base
    return x.clone(memory_format=torch.contiguous_format) if part or not x.is_contiguous() else x


def _call(hidden, weight, low, softcap, logit_scale, temperature, ignore_index, want, impl, workspace_bytes,
          filter_eps, needs) -> HiddenCall:  # fmt: skip
    chosen = plan(
        (hidden.shape[0], hidden.shape[1], weight.shape[0]), hidden.dtype, hidden.device,
        grad_hidden=needs[0], grad_head=needs[1] or needs[2], grad_weight=needs[1],
        rank=0 if low is None else low.shape[1], grad_low=(needs[3], needs[4]), impl=impl,
        workspace_bytes=workspace_bytes, keep_logits=False,
    )  # fmt: skip
    head = Head(softcap, logit_scale, temperature, ignore_index)
    rows = torch_rows.implementation(hidden.device, hidden.dtype)
    return HiddenCall(head, _names(want), rows, chosen, filter_eps)


def _names(want: str) -> tuple[str, ...]:
    return tuple(want.split(",")) if want else ()


def _fake_stats(rows: Tensor, want: str) -> list[Tensor]:
    """RowStats as shapes: a value a row of `rows`."""
    wide, names, n = accumulator(rows.dtype), _names(want), rows.shape[0]

    def column(wanted: bool, dtype: torch.dtype = wide) -> Tensor:
        return rows.new_empty(n, dtype=dtype) if wanted else rows.new_empty(0)

    return [
        column(True), column(True), column("entropy" in names), column("is_top1" in names, torch.bool),
        column("mean_logit" in names), column("log_collision" in names),
    ]  # fmt: skip


def _keeps_units(impl: str, needs: Sequence[bool]) -> bool:
    """Whether forward leaves the gradients of hidden and low for g = 1: the planner's row, whatever the sizes."""
    row = plan(
        (1, 1, 1), torch.float32, torch.device("cpu"), grad_hidden=needs[0], grad_head=needs[1] or needs[2],
        grad_weight=needs[1], grad_low=(needs[3], needs[4]), impl="chunked" if impl == "auto" else impl,
        workspace_bytes=1,
    ).row if impl != "cut" else None  # fmt: skip
    return row is FROZEN


@token_logps.register_fake
def _(hidden, weight, bias, low, low_weight, ref_hidden, labels, softcap, logit_scale, temperature, ignore_index, want,
      impl, workspace_bytes, filter_eps, needs):  # fmt: skip
    stats = _fake_stats(hidden, want)
    ref_logps = hidden.new_empty(0) if ref_hidden is None else torch.empty_like(stats[0])
    keeps = _keeps_units(impl, needs)
    unit = hidden.new_empty(hidden.shape if keeps and needs[0] else 0)
    unit_low = hidden.new_empty(low.shape if keeps and needs[3] else 0)
    return *stats, ref_logps, unit, unit_low


@torch.library.custom_op("prefkern::token_logps_backward", mutates_args=())
def token_logps_backward(
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    low_weight: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    want: str,
    impl: str,
    workspace_bytes: int | None,
    filter_eps: float | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, bias, low and low_weight, as `needs` says, from dL/dlogps and dL/dentropy."""
    call = _call(hidden, weight, low, softcap, logit_scale, temperature, ignore_index, want, impl, workspace_bytes,
                 filter_eps, needs)  # fmt: skip
    operands = Operands(hidden, weight, bias, low, low_weight)
    grads = _head_gradient(call, operands, labels, lse, entropy, grad_logps, grad_entropy, tuple(needs))
    return tuple(_fresh(g, hidden) for g in grads)


@token_logps_backward.register_fake
def _(grad_logps, grad_entropy, hidden, weight, bias, low, low_weight, labels, lse, entropy, softcap, logit_scale,
      temperature, ignore_index, want, impl, workspace_bytes, filter_eps, needs):  # fmt: skip
    operands = hidden, weight, bias, low, low_weight
    return tuple(
        x.new_empty(x.shape) if need and x is not None else hidden.new_empty(0) for x, need in zip(operands, needs)
    )


def _no_second_derivative(ctx, *_):
    raise RuntimeError("prefkern's operators have no second derivative; use impl='eager' for it")


def _save_head(ctx, inputs, output) -> None:
    hidden, weight, bias, low, low_weight, _, labels, *scalars = inputs
    _, lse, entropy, *_, unit, unit_low = output
    ctx.save_for_backward(hidden, weight, bias, low, low_weight, labels, lse, entropy, unit, unit_low)
    ctx.mark_non_differentiable(lse, *output[3:])
    ctx.scalars = scalars
    ctx.set_materialize_grads(False)


def _head_backward(ctx, grad_logps, _lse, grad_entropy, *_):
    *operands, labels, lse, entropy, unit, unit_low = ctx.saved_tensors
    hidden, low = operands[0], operands[3]
    *scalars, needs = ctx.scalars
    want, impl = scalars[4:6]
    entropy, grad_entropy = (entropy, grad_entropy) if "entropy" in _names(want) else (None, None)
    if grad_logps is None and grad_entropy is None:
        return (None,) * 16
    if _keeps_units(impl, needs) and grad_entropy is None:
        dhidden = (unit * grad_logps[:, None]).to(hidden.dtype) if needs[0] else None
        dlow = (unit_low * grad_logps[:, None]).to(low.dtype) if needs[3] else None
        grads = first_order_only((dhidden, None, None, dlow, None), operands)
    else:
        grad_logps = torch.zeros_like(lse) if grad_logps is None else grad_logps
        found = token_logps_backward(grad_logps, grad_entropy, *operands, labels, lse, entropy, *scalars, needs)
        grads = tuple(g if need else None for g, need in zip(found, needs))
    return *grads, *[None] * 11


token_logps.register_autograd(_head_backward, setup_context=_save_head)
token_logps_backward.register_autograd(_no_second_derivative)


def traced_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    low_weight: Tensor | None,
    ref_hidden: Tensor | None,
    labels: Tensor,
    head: Head,
    want: tuple[str, ...],
    impl: str,
    workspace_bytes: int | None,
    filter_eps: float | None,
) -> tuple[RowStats, Tensor | None]:
    """Row statistics and the reference's logps as one operator of the graph being traced; impl="eager": as torch's."""
    if impl == "eager":
        stats = reference.rows_from_hidden(hidden, weight, bias, labels, head, want, low, low_weight)
        if ref_hidden is None:
            return stats, None
        return stats, reference.rows_from_hidden(ref_hidden, weight, bias, labels, head).logps.detach()
    operands = hidden, weight, bias, low, low_weight
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in operands]
    *stats, ref_logps, _, _ = token_logps(
        *operands, ref_hidden, labels, head.softcap, head.logit_scale, head.temperature, head.ignore_index,
        ",".join(want), impl, workspace_bytes, filter_eps, needs,
    )  # fmt: skip
    return _asked(stats, want), None if ref_hidden is None else ref_logps.detach()


def _asked(stats: Sequence[Tensor], want: tuple[str, ...]) -> RowStats:
    logps, lse, entropy, is_top1, mean_logit, log_collision = stats
    return RowStats(
        logps,
        lse.detach(),
        entropy if "entropy" in want else None,
        is_top1 if "is_top1" in want else None,
        mean_logit.detach() if "mean_logit" in want else None,
        log_collision.detach() if "log_collision" in want else None,
    )


# --- logits that exist already ----------------------------------------------------------------------------------------


@torch.library.custom_op("prefkern::logits_token_logps", mutates_args=())
def logits_token_logps(
    logits: Tensor,
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    want: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """RowStats of (N, V) raw logits; arguments as in `prefkern.logits_token_logps` and `token_logps`."""
    call = _logits_call(logits, softcap, logit_scale, temperature, ignore_index, want, impl)
    stats = call.rows.row_softmax_forward(logits, labels, call.head, **call.flags)
    return tuple(_fresh(x, logits) for x in stats)


def _logits_call(logits, softcap, logit_scale, temperature, ignore_index, want, impl) -> LogitsCall:
    head = Head(softcap, logit_scale, temperature, ignore_index)
    return LogitsCall(head, _names(want), logits_rows(impl, logits), keep_logits=True)


@logits_token_logps.register_fake
def _(logits, labels, softcap, logit_scale, temperature, ignore_index, want, impl):
    return tuple(_fake_stats(logits, want))


@torch.library.custom_op("prefkern::logits_token_logps_backward", mutates_args=())
def logits_token_logps_backward(
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    want: str,
    impl: str,
) -> Tensor:
    """dL/dlogits in their dtype, in new memory: in a graph nothing is written over its inputs."""
    call = _logits_call(logits, softcap, logit_scale, temperature, ignore_index, want, impl)
    dlogits = call.rows.row_softmax_backward(
        logits, labels, lse, grad_logps, call.head, entropy_N=entropy, grad_entropy_N=grad_entropy,
        out=torch.empty_like(logits, memory_format=torch.contiguous_format),
    )  # fmt: skip
    return dlogits


@logits_token_logps_backward.register_fake
def _(grad_logps, grad_entropy, logits, labels, lse, entropy, softcap, logit_scale, temperature, ignore_index, want,
      impl):  # fmt: skip
    return logits.new_empty(logits.shape)


def _save_logits(ctx, inputs, output) -> None:
    logits, labels, *scalars = inputs
    ctx.save_for_backward(logits, labels, output[1], output[2])
    ctx.mark_non_differentiable(output[1], *output[3:])
    ctx.scalars = scalars
    ctx.set_materialize_grads(False)


def _logits_backward(ctx, grad_logps, _lse, grad_entropy, *_):
    logits, labels, lse, entropy = ctx.saved_tensors
    if "entropy" not in _names(ctx.scalars[4]):
        entropy = grad_entropy = None
    if grad_logps is None and grad_entropy is None:
        return (None,) * 8
    grad_logps = torch.zeros_like(lse) if grad_logps is None else grad_logps
    dlogits = logits_token_logps_backward(grad_logps, grad_entropy, logits, labels, lse, entropy, *ctx.scalars)
    return dlogits, *[None] * 7


logits_token_logps.register_autograd(_logits_backward, setup_context=_save_logits)
logits_token_logps_backward.register_autograd(_no_second_derivative)


def traced_logits_token_logps(
    logits_NV: Tensor, labels: Tensor, head: Head, want: tuple[str, ...], impl: str
) -> RowStats:
    """Row statistics as one operator of the graph being traced; impl="eager": as torch's."""
    if impl == "eager":
        return reference.rows_from_logits(logits_NV, labels, head, want)
    stats = logits_token_logps(
        logits_NV, labels, head.softcap, head.logit_scale, head.temperature, head.ignore_index, ",".join(want), impl
    )
    return _asked(stats, want)


# --- the loss ---------------------------------------------------------------------------------------------------------


class LossFacts(NamedTuple):
    """What tracing has to know of a loss: constants of the graph."""

    row_outputs: tuple[str, ...]  # see Loss.row_outputs, of all addends
    metrics: tuple[str, ...]  # names, in order


_TRACED: dict[str, Loss] = {}  # a graph keeps the losses that it names alive


@torch.compiler.assume_constant_result
def facts(key: str, diagnostics: bool) -> LossFacts:
    """Row outputs and metrics of a loss; the metrics' names are those of a call on an invented batch."""
    loss = _TRACED.setdefault(key, Loss.of_key(key))
    row_outputs = tuple(dict.fromkeys(name for term in loss.addends() for name in term.loss.row_outputs))
    layout = checks.layout_for(loss)
    try:
        loss.segmented(layout)
    except ValueError:  # it takes the segments of a layout that is cut
        layout = layout.adaptive(1)
    batch = checks.example(loss, layout, torch.float32)
    given = preference_tail.Given(
        batch.ref_logps, batch.token_weights, None, batch.targets, batch.mismatched, batch.stats, batch.token_kl, 64,
        diagnostics,
    )  # fmt: skip
    result = preference_tail.sum_of_addends(batch.logps, batch.layout, loss, given, None, "eager", None)
    return LossFacts(row_outputs, tuple(result.metrics))


@torch.library.custom_op("prefkern::preference", mutates_args=())
def preference(
    logps: Tensor,
    layout: Tensor,
    loss: str,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
    mask: Tensor | None,
    targets: Tensor | None,
    mismatched: Tensor | None,
    stats: Sequence[Tensor],
    token_kl: Tensor | None,
    normalizers: Sequence[Tensor],
    vocab_size: int | None,
    diagnostics: bool,
    impl: str,
    metrics: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics (M,), dloss/dlogps and dloss/dtoken_kl of (N,) log-probabilities.

    Args:
        layout: `Layout.handle`. loss: `Loss.key`. stats: in the order of `LossFacts.row_outputs`.
        normalizers: 0-dim, one for each addend, or none.
        metrics: M, `len(LossFacts.metrics)`. needs: whether logps and token_kl need gradients.
        All else as in `prefkern.preference_loss`.
    Raises:
        ValueError: as `prefkern.preference_loss`.
        RuntimeError: the layout is gone.
    """
    known = _TRACED[loss] if loss in _TRACED else Loss.of_key(loss)
    names = tuple(dict.fromkeys(name for term in known.addends() for name in term.loss.row_outputs))
    given = preference_tail.Given(
        ref_logps, token_weights, mask, targets, mismatched, dict(zip(names, stats)), None, vocab_size, diagnostics
    )
    # Autograd is off below an operator; the loss's own definition is differentiated here.
    below = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with below, torch.set_grad_enabled(any(needs)):
        x = logps.detach().requires_grad_(needs[0])
        kl = None if token_kl is None else token_kl.detach().requires_grad_(needs[1])
        given = replace(given, token_kl_N=kl)
        own = [n.item() if n.device.type == "cpu" else n for n in normalizers] or None
        result = preference_tail.sum_of_addends(x, Layout.of_handle(layout), known, given, own, impl, None)
        wanted = [t for t, need in zip((x, kl), needs) if need]
        grads = iter(torch.autograd.grad(result.loss, wanted) if wanted else ())
    if len(result.metrics) != metrics:
        raise RuntimeError(f"{known.name} reports {', '.join(result.metrics)}, but was traced with {metrics} metrics")
    wide = accumulator(logps.dtype)
    column = torch.stack([m.detach().to(wide) for m in result.metrics.values()]) if metrics else logps.new_empty(0)
    dlogps, dkl = (_fresh(next(grads) if need else None, logps) for need in needs)
    return result.loss.detach().to(wide, copy=True), column.to(wide), dlogps, dkl


@preference.register_fake
def _(logps, layout, loss, ref_logps, token_weights, mask, targets, mismatched, stats, token_kl, normalizers,
      vocab_size, diagnostics, impl, metrics, needs):  # fmt: skip
    wide = accumulator(logps.dtype)
    return (
        logps.new_empty((), dtype=wide),
        logps.new_empty(metrics, dtype=wide),
        logps.new_empty(logps.shape if needs[0] else 0),
        token_kl.new_empty(token_kl.shape) if needs[1] else logps.new_empty(0),
    )


def _save_loss(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], inputs[9], *output[2:])
    ctx.needs, ctx.stats, ctx.normalizers = inputs[-1], len(inputs[8]), len(inputs[10])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _loss_backward(ctx, grad_loss, *_):
    logps, token_kl, *units = ctx.saved_tensors
    grads = tuple(u * grad_loss if need and grad_loss is not None else None for u, need in zip(units, ctx.needs))
    dlogps, dkl = first_order_only(grads, (logps, token_kl))
    return dlogps, *[None] * 7, [None] * ctx.stats, dkl, [None] * ctx.normalizers, *[None] * 5


preference.register_autograd(_loss_backward, setup_context=_save_loss)


def traced_preference(
    logps: Tensor, layout: Layout, loss: Loss, given: preference_tail.Given, normalizer, impl: str, state
) -> preference_tail.PreferenceOutput:
    """`preference_tail.loss_of_logps` as one operator of the graph being traced; its scores are None."""
    if state is not None:
        return _with_state(logps, layout, loss, given, normalizer, impl, state)
    known = facts(loss.key, given.diagnostics)
    listed = [] if normalizer is None else preference_tail._listed(normalizer)
    normalizers = [n if isinstance(n, Tensor) else torch.tensor(n, dtype=torch.float64, device="cpu") for n in listed]
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (logps, given.token_kl_N)]
    value, metrics, _, _ = preference(
        logps, layout.handle, loss.key, given.ref_logps_N, given.token_weights_N, given.mask_N, given.target_R,
        given.mismatched_R, [given.stats[name] for name in known.row_outputs if name in given.stats],
        given.token_kl_N, normalizers, given.vocab_size, given.diagnostics, impl, len(known.metrics), needs,
    )  # fmt: skip
    named = dict(zip(known.metrics, metrics.detach().unbind()))
    return preference_tail.PreferenceOutput(value, named, logps.detach(), None)


# With running statistics the loss updates buffers that no argument names: outside any graph, and with fullgraph=True
# an error that says so.
_with_state = torch.compiler.disable(
    preference_tail.sum_of_addends, reason="prefkern: a loss with state= updates running statistics in place"
)
