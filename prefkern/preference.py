"""From log-probabilities, hidden states or logits to any preference loss and its metrics."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prefkern import reference
from prefkern.diagnostics import gradient_ratios
from prefkern.head import IGNORE_INDEX, Head
from prefkern.layout import Layout, TailIndex
from prefkern.losses.base import Batch, Loss
from prefkern.planner import require_triton, uses_triton
from prefkern.token_logps import (
    LogitsCall,
    TokenLogpsOutput,
    check_logits,
    check_outputs,
    first_order_only,
    logits_gradient,
    logits_rows,
    logits_token_logps,
    must_keep,
    token_logps,
)

# Metrics that are means over counted tokens (the others are over prompts), and the token_logps output each is made of.
TOKEN_METRICS = {"entropy": "entropy", "mean_token_accuracy": "is_top1", "logits/mean": "mean_logit", "lse": "lse"}


class PreferenceOutput(NamedTuple):
    """A loss to call backward on, and what happened, all on the device; reading a metric is the caller's host sync."""

    loss: Tensor  # 0-dim, fp32
    metrics: dict[str, Tensor]  # 0-dim each, detached
    logps: Tensor  # (N,) per-token log-probabilities in nats, detached
    scores: Tensor  # (S,) segment scores in group order (see Layout), detached


@dataclass(frozen=True)
class Given:
    """What a call brings beside log-probabilities and layout; constants under differentiation, except token_kl."""

    ref_logps_N: Tensor | None = None
    token_weights_N: Tensor | None = None
    mask_N: Tensor | None = None
    target_R: Tensor | None = None
    mismatched_R: Tensor | None = None
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    token_kl_N: Tensor | None = None
    vocab_size: int | None = None
    diagnostics: bool = False


@dataclass(frozen=True)
class _Tail:
    """One loss's constants, as the tail wants them."""

    loss: Loss
    batch: Batch
    index: TailIndex
    ref_logps_N: Tensor | None
    scale_R: Tensor | None
    margin: float | Tensor
    target_R: Tensor | None
    weight_G: Tensor | None
    diagnostics: bool = False

    def of_segments(self, values_R: Tensor | None) -> Tensor | None:
        """(S,) values of each segment's response."""
        return None if values_R is None else values_R[self.index.response_of_segment_S]

    @property
    def kernel_arguments(self) -> dict[str, Tensor | None]:
        """Keyword arguments that tail and fused_logits share."""
        margin_G = self.margin
        if not isinstance(margin_G, Tensor):
            groups, device = self.batch.layout.num_groups, self.batch.count_R.device
            margin_G = torch.full((groups,), margin_G, device=device) if margin_G != 0 else None
        return {
            "ref_logps_N": self.ref_logps_N, "token_weights_N": self.batch.weights_N,
            "scale_S": self.of_segments(self.scale_R), "margin_G": margin_G,
            "target_S": self.of_segments(self.target_R), "weight_G": self.weight_G,
        }  # fmt: skip


def preference_loss(
    logps: Tensor,
    layout: Layout,
    loss: Loss,
    ref_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    mask: Tensor | None = None,
    normalizer: float | Tensor | Sequence[float | Tensor] | None = None,
    impl: str = "auto",
    *,
    targets: Tensor | None = None,
    mismatched: Tensor | None = None,
    stats: Mapping[str, Tensor] | None = None,
    token_kl: Tensor | None = None,
    state: nn.Module | None = None,
    vocab_size: int | None = None,
    diagnostics: bool = False,
) -> PreferenceOutput:
    """Any registered loss from per-token log-probabilities.

        score_s = scale * sum over segment s of token_weight_n * (logp_n - ref_logp_n)
        loss    = sum_g weight_g * link(scores of group g, targets of group g, margin_g) / normalizer

    A group in which no token counts has weight 0. A loss of several addends (`nll_weight`, `combination`) is the sum of
    theirs, each divided by its own normalizer.

    Args:
        logps: (N,) policy log-probabilities of the packed response tokens, in nats.
        layout: where the responses lie; cut by the loss's granularity if it has one.
        loss: from `prefkern.losses`.
        ref_logps: (N,) reference log-probabilities in nats; required by losses that need a reference, refused by
            those that use none.
        token_weights: (N,), multiplies each log-ratio; a weight of 0 removes the token from the sums, even an infinite
            one, but not from a length.
        mask: (N,) bool, or 0 and 1; False removes a token from sums, lengths and metrics.
        normalizer: what the sum over groups is divided by; None: number of prompts (`nll`: of counted tokens). With
            gradient accumulation or several ranks, pass the count of the whole batch; one for each addend of the loss
            (`loss.normalizers`) where it has several.
        impl: "auto" (Triton on a GPU, torch elsewhere), "triton" or "eager".
        targets: (R,) what the data says of each response, for losses with a `target_kind`: "score" (any real number),
            "label" (1 desirable, 0 undesirable) or "preference" (probability of being the preferred one of the pair).
        mismatched: log-ratio sums of other prompts' responses, in nats, for losses with `needs_mismatched` (kto).
        stats: (N,) outputs of `token_logps` that the loss names in `row_outputs`.
        token_kl: (N,) KL(reference || policy) at each row, in nats, for losses with `needs_token_kl` (tdpo1, tdpo2).
        vocab_size: V, for losses that compare an entropy in nats with its maximum, log V.
        state: running statistics, from `loss.new_state()`; None: those of this call alone. Updated in training mode.
        diagnostics: for pair losses, add to the metrics how much harder the chosen response is pulled than the rejected
            one: gradients/log_ratio_*, in nats, see `diagnostics.gradient_ratios`, and the same with the ending _before
            for the loss at coefficient 1 (adadpo). Of several parts, those of the first. Costs one more pass of the
            tail in plain torch.
    Returns:
        PreferenceOutput. metrics: rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies,
        logps/chosen, logps/rejected for pairs; what others report, their `metrics` says. loss/<name> where there are
        several addends.
    Gradient:
        With respect to logps and token_kl; all else is data.
    Raises:
        ValueError: shapes disagree with the layout, the layout with the loss, devices with each other, or a reference
            is missing or too many.
        RuntimeError: impl="triton" where Triton cannot run.
    Source:
        Each loss's docstring names its own.
    """
    given = Given(ref_logps, token_weights, mask, targets, mismatched, stats or {}, token_kl, vocab_size, diagnostics)
    return _preference_loss(logps, layout, loss, given, normalizer, impl, state)


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    layout: Layout,
    loss: Loss,
    ref_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | Sequence[float | Tensor] | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    outputs: Collection[str] = ("entropy", "is_top1"),
    impl: str = "auto",
    workspace_bytes: int | None = None,
    *,
    targets: Tensor | None = None,
    mismatched: Tensor | None = None,
    token_kl: Tensor | None = None,
    state: nn.Module | None = None,
    on_policy: bool = False,
    diagnostics: bool = False,
) -> PreferenceOutput:
    """`preference_loss` of hidden states under a head, without the logits.

    Args:
        hidden: (N, D) states that predict the packed response tokens; weight (V, D), labels (N,), bias, softcap,
            logit_scale, temperature, ignore_index, outputs, impl, workspace_bytes: as in `token_logps`.
        layout, loss, ref_logps, token_weights, normalizer, targets, mismatched, token_kl, state, diagnostics: as in
            `preference_loss`. Rows with ignore_index count nowhere.
        on_policy: in place of ref_logps, compare with the policy itself, held constant: every log-ratio is 0 and only
            carries the gradient.
    Returns:
        PreferenceOutput; metrics as in `preference_loss`, and means over counted tokens of what `outputs` names:
        entropy (nats), mean_token_accuracy (of is_top1), logits/mean, lse.
    """
    if on_policy and ref_logps is not None:
        raise ValueError("on_policy=True makes the policy its own reference, but ref_logps were given; leave them out")
    out = token_logps(
        hidden, weight, labels, bias=bias, softcap=softcap, logit_scale=logit_scale, temperature=temperature,
        ignore_index=ignore_index, outputs=(*outputs, *_row_outputs(loss)), impl=impl, workspace_bytes=workspace_bytes,
    )  # fmt: skip
    given = Given(
        out.logps.detach() if on_policy else ref_logps,
        token_weights,
        labels != ignore_index,
        targets,
        mismatched,
        token_kl_N=token_kl,
        vocab_size=weight.shape[0],
        diagnostics=diagnostics,
    )
    return _from_token_logps(out, layout, loss, given, normalizer, tail_impl(impl), state)


def logits_preference_loss(
    logits: Tensor,
    labels: Tensor,
    layout: Layout,
    loss: Loss,
    ref_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | Sequence[float | Tensor] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    outputs: Collection[str] = ("entropy", "is_top1"),
    impl: str = "auto",
    keep_logits: bool = False,
    *,
    targets: Tensor | None = None,
    mismatched: Tensor | None = None,
    token_kl: Tensor | None = None,
    state: nn.Module | None = None,
    diagnostics: bool = False,
) -> PreferenceOutput:
    """`preference_loss` from logits: on a GPU one launch forward, one backward over the logits themselves.

    Args:
        logits: (N, V) or (B, T, V) raw logits that predict the packed response tokens, any floating dtype and strides;
            labels, softcap, logit_scale, temperature, ignore_index, outputs, keep_logits: as in `logits_token_logps`.
        layout, loss, ref_logps, token_weights, normalizer, targets, mismatched, token_kl, state, diagnostics: as in
            `preference_loss`. Rows with ignore_index count nowhere.
        impl: "auto" (one fused Triton launch on a GPU, torch elsewhere), "triton" or "eager". A loss that needs all
            scores before its link takes two launches.
    Returns:
        PreferenceOutput; metrics as in `linear_preference_loss`.
    Gradient:
        With respect to logits alone, in their dtype; written over them unless they are kept.
    Raises:
        As `logits_token_logps` and `preference_loss`.
    """
    given = Given(
        ref_logps,
        token_weights,
        labels != ignore_index,
        targets,
        mismatched,
        token_kl_N=token_kl,
        vocab_size=logits.shape[-1],
        diagnostics=diagnostics,
    )
    eager = impl == "eager" or impl == "auto" and not uses_triton(logits.device, logits.dtype)
    if eager or not _fits_one_launch(loss, token_kl, outputs):
        out = logits_token_logps(
            logits, labels, softcap, logit_scale, temperature, ignore_index, (*outputs, *_row_outputs(loss)),
            impl=impl, keep_logits=keep_logits,
        )  # fmt: skip
        return _from_token_logps(out, layout, loss, given, normalizer, impl, state)
    want = check_outputs(outputs)
    check_logits(logits, labels, ignore_index)
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    given = replace(given, mask_N=given.mask_N.reshape(-1))
    _check_tail(labels, layout, loss, given)
    tail = _prepare(layout, loss, logits.device, torch.float32, given, state)
    head = Head(softcap, logit_scale, temperature, ignore_index)
    call = LogitsCall(head, want, logits_rows(impl, logits), keep_logits or must_keep(logits))
    summed, score_S, *stats = FusedLogits.apply(logits, labels, tail, call)
    out = TokenLogpsOutput(
        stats[0], entropy=stats[2], is_top1=stats[3], mean_logit=stats[4], lse=stats[1] if "lse" in want else None
    )
    return _finish(summed, score_S, out.logps, tail, normalizer, _row_metrics(out, given.mask_N))


class PreferenceTail(torch.autograd.Function):
    """logps -> (sum of weighted group values, segment scores), by the tail kernel; g_N is made in forward."""

    @staticmethod
    def forward(ctx, logps, call: _Tail):
        from prefkern.kernels import links, tail

        value_G, score_S, g_N = tail.tail(
            logps.detach(), call.index, links.find(call.loss.link), call.loss.link_params(),
            want_grad=ctx.needs_input_grad[0], **call.kernel_arguments,
        )  # fmt: skip
        ctx.save_for_backward(logps, g_N)
        ctx.mark_non_differentiable(score_S)
        return value_G.sum(), score_S

    @staticmethod
    def backward(ctx, grad_loss, _):
        logps, g_N = ctx.saved_tensors
        with torch.no_grad():
            dlogps = g_N * grad_loss
        return *first_order_only((dlogps,), (logps,)), None


class FusedLogits(torch.autograd.Function):
    """logits -> (sum of weighted group values, segment scores, row statistics), one launch each way."""

    @staticmethod
    def forward(ctx, logits, labels, tail: _Tail, call: LogitsCall):
        from prefkern.kernels import fused_logits, links

        stats, value_G, score_S, g_N = fused_logits.fused_logits_forward(
            logits.detach(), labels, call.head, tail.index, links.find(tail.loss.link), tail.loss.link_params(),
            want_grad=ctx.needs_input_grad[0], **tail.kernel_arguments, **call.flags,
        )  # fmt: skip
        ctx.save_for_backward(logits, labels, stats.lse, g_N)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(score_S, *[s for s in stats if s is not None])
        return value_G.sum(), score_S, *stats

    @staticmethod
    def backward(ctx, grad_loss, *_):
        logits, labels, lse, g_N = ctx.saved_tensors
        if grad_loss is None:
            return None, None, None, None
        dlogits = logits_gradient(ctx.call, logits, labels, lse, g_N, grad_scale=grad_loss)
        return *first_order_only((dlogits,), (logits,)), None, None, None


def tail_impl(impl: str) -> str:
    """The tail's body that goes with a body of the head."""
    return {"cut": "triton", "eager": "eager"}.get(impl, "auto")


def _row_outputs(loss: Loss) -> tuple[str, ...]:
    return tuple(name for term in loss.addends() for name in term.loss.row_outputs)


def _fits_one_launch(loss: Loss, token_kl: Tensor | None, outputs: Collection[str]) -> bool:
    simple = loss.is_one and not loss.needs_first_pass and not loss.row_outputs
    return simple and token_kl is None and "log_collision" not in outputs


def _from_token_logps(out, layout, loss, given: Given, normalizer, impl, state) -> PreferenceOutput:
    flat = TokenLogpsOutput(*(None if t is None else t.reshape(-1) for t in out))
    stats = {name: getattr(flat, name) for name in _row_outputs(loss)}
    given = replace(given, mask_N=given.mask_N.reshape(-1), stats=stats)
    result = _preference_loss(flat.logps, layout, loss, given, normalizer, impl, state)
    result.metrics.update(_row_metrics(flat, given.mask_N))
    return result


def _preference_loss(logps, layout, loss, given: Given, normalizer, impl, state) -> PreferenceOutput:
    if loss.is_one:
        return _one_loss(logps, layout, loss, given, normalizer, impl, state)
    addends = loss.addends(state)
    normalizers = [None] * len(addends) if normalizer is None else _listed(normalizer)
    if len(normalizers) != len(addends):
        raise ValueError(
            f"{loss.name} has {len(addends)} addends ({', '.join(term.loss.name for term in addends)}), but"
            f" {len(normalizers)} normalizer(s) were given; pass one for each, as loss.normalizers counts them"
        )
    loss.check_layout(layout)
    _check_diagnostics(loss, given)
    results = [
        _one_loss(logps, layout, term.loss, _share(given, term.loss), own, impl, term.state)
        for term, own in zip(addends, normalizers)
    ]
    total = sum(term.weight * result.loss for term, result in zip(addends, results))
    metrics: dict[str, Tensor] = {}
    for term, result in zip(addends, results):
        again = sum(name.split("#")[0] == f"loss/{term.loss.name}" for name in metrics)
        metrics[f"loss/{term.loss.name}" + f"#{again + 1}" * bool(again)] = result.loss.detach()
    return PreferenceOutput(total, {**results[0].metrics, **metrics}, logps.detach(), results[0].scores)


def _listed(normalizer: float | Tensor | Sequence[float | Tensor]) -> list[float | Tensor]:
    several = isinstance(normalizer, Sequence) or isinstance(normalizer, Tensor) and normalizer.dim() > 0
    return list(normalizer) if several else [normalizer]


def _share(given: Given, loss: Loss) -> Given:
    """What one addend looks at: the others' reference and targets are not its concern."""
    return replace(
        given,
        ref_logps_N=given.ref_logps_N if loss.needs_reference else None,
        target_R=given.target_R if loss.target_kind else None,
        mismatched_R=given.mismatched_R if loss.needs_mismatched else None,
        token_kl_N=given.token_kl_N if loss.needs_token_kl else None,
        diagnostics=given.diagnostics and loss.arity == "pair",
    )


def _one_loss(logps, layout, loss, given: Given, normalizer, impl, state) -> PreferenceOutput:
    _check_tail(logps, layout, loss, given)
    tail = _prepare(layout, loss, logps.device, reference.accumulator(logps.dtype), given, state, logps)
    x = _with_token_kl(logps, given.token_kl_N, tail)
    if _use_triton(impl, logps):
        summed, score_S = PreferenceTail.apply(x, tail)
    else:
        summed, score_S = _eager_tail(x, tail)
    return _finish(summed, score_S, logps.detach(), tail, normalizer, {}, x.detach())


def _with_token_kl(logps: Tensor, kl_N: Tensor | None, tail: _Tail) -> Tensor:
    """What the loss adds up: log-probabilities, and its share of the divergence where it has one."""
    if kl_N is None:
        return logps
    weights_N = tail.batch.weights_N
    kl_N = kl_N if weights_N is None else torch.where(weights_N != 0, kl_N, 0.0)
    return tail.loss.with_token_kl(logps, kl_N, tail.batch.index)


def _prepare(layout, loss, device, wide: torch.dtype, given: Given, state, logps=None) -> _Tail:
    layout = loss.segmented(layout)
    index = layout.index(device)
    with torch.no_grad():
        ref_logps, weights, target_R, mismatched_R = (
            None if t is None else t.detach().to(wide)
            for t in (given.ref_logps_N, given.token_weights_N, given.target_R, given.mismatched_R)
        )
        mask = None if given.mask_N is None else given.mask_N.bool()
        if mask is None:
            count_R = index.response_offsets.diff().to(wide)
        else:
            weights = mask.to(wide) if weights is None else torch.where(mask, weights, 0.0)
            count_R = reference.span_sums(mask.to(wide), index.response_offsets)
        stats = {name: t.detach().to(wide) for name, t in given.stats.items()}
        batch = Batch(layout, index, count_R, mask, weights, target_R, mismatched_R, stats, state, given.vocab_size)
        factor_N = loss.token_factor(batch)
        if factor_N is not None:
            weights = factor_N if weights is None else weights * factor_N
            batch = replace(batch, weights_N=weights)
        if loss.needs_first_pass:
            first = logps.detach().to(wide)

            def sums(x_N: Tensor, ref_N: Tensor | None = None) -> Tensor:
                return reference.span_sums(reference.log_ratios(x_N, ref_N, weights), index.response_offsets)

            logp_R = sums(first)
            ref_R = torch.zeros_like(logp_R) if ref_logps is None else sums(ref_logps)
            ratio_R = logp_R if ref_logps is None else sums(first, ref_logps)
            batch = replace(batch, logps_N=first, logp_R=logp_R, ref_R=ref_R, ratio_R=ratio_R)
        scale_R, margin, target_R = loss.scale(batch), loss.margin(batch), loss.target(batch)
        tail_index = loss.regroup(batch)
        weight_G = _alive(layout, tail_index, weights, wide)
        own_G = loss.group_weight(batch)
        own_G = None if own_G is None else own_G.to(wide)
        weight_G = own_G if weight_G is None else weight_G if own_G is None else weight_G * own_G
        return _Tail(loss, batch, tail_index, ref_logps, scale_R, margin, target_R, weight_G, given.diagnostics)


def _alive(layout: Layout, index: TailIndex, weights_N: Tensor | None, wide: torch.dtype) -> Tensor | None:
    """(G,) 1, or 0 where no token of the group counts: nothing was compared, so nothing is lost. None: 1 everywhere."""
    if weights_N is not None:
        sums = reference.span_sums((weights_N != 0).to(wide), index.row_order_offsets)
        tokens_S = torch.empty_like(sums).index_copy(0, index.token_order_S, sums)
    elif layout.has_empty_group or index is not layout.index(index.group_offsets.device):  # regrouped: empty with empty
        tokens_S = (index.segment_end_S - index.segment_start_S).to(wide)
    else:
        return None
    return (reference.span_sums(tokens_S, index.group_offsets) > 0).to(wide)


def _eager_tail(logps: Tensor, tail: _Tail) -> tuple[Tensor, Tensor]:
    d = reference.log_ratios(logps, tail.ref_logps_N, tail.batch.weights_N)
    score_S = reference.segment_scores(d, tail.index, tail.scale_R, tail.batch.layout.segments_per_response)
    score_GK, valid_GK = reference.pad_groups(score_S, tail.index)
    targets = ()
    if tail.loss.link_targets:
        targets = reference.pad_groups(tail.of_segments(tail.target_R), tail.index)[0], valid_GK
    value_G = tail.loss.eager(score_GK, tail.margin, *targets)
    return (value_G if tail.weight_G is None else value_G * tail.weight_G).sum(), score_S.detach()


def _finish(summed, score_S, logps_N, tail: _Tail, normalizer, metrics, x_N=None) -> PreferenceOutput:
    batch = tail.batch
    if normalizer is None:
        normalizer = tail.loss.normalizer(batch.layout, batch.count_R)
    else:
        *others, normalizer = _listed(normalizer)
        if others:
            raise ValueError(f"{tail.loss.name} has one addend, but {len(others) + 1} normalizers were given")
    with torch.no_grad():
        d = reference.log_ratios(logps_N if x_N is None else x_N, tail.ref_logps_N, batch.weights_N)
        score_R = reference.span_sums(d, batch.index.response_offsets)
        score_R = score_R if tail.scale_R is None else score_R * tail.scale_R
        logp_R = _counted_sums(logps_N, batch)
        own = tail.loss.metrics(score_R, logp_R, batch)
        if tail.diagnostics:
            own.update(_gradient_ratios(logps_N if x_N is None else x_N, logp_R, tail))
    return PreferenceOutput(summed / normalizer, {**own, **metrics}, logps_N, score_S)


def _counted_sums(values_N: Tensor, batch: Batch) -> Tensor:
    """(R,) sums over each response's counted tokens, whatever their weights."""
    kept_N = values_N if batch.mask_N is None else torch.where(batch.mask_N, values_N, 0.0)
    return reference.span_sums(kept_N, batch.index.response_offsets)


def _gradient_ratios(x_N: Tensor, logp_R: Tensor, tail: _Tail) -> dict[str, Tensor]:
    batch, offsets, before = tail.batch, tail.batch.index.response_offsets, tail.loss.uncorrected()
    ref_R = None if tail.ref_logps_N is None else _counted_sums(tail.ref_logps_N, batch)

    def ratios(tail: _Tail, suffix: str) -> dict[str, Tensor]:
        x = x_N.detach().requires_grad_()
        with torch.enable_grad():
            (g_N,) = torch.autograd.grad(_eager_tail(x, tail)[0], x)
        grad_R = reference.span_sums(g_N, offsets) / batch.count_R.clamp(min=1)
        return gradient_ratios(grad_R, logp_R, batch.count_R, ref_R, suffix)

    out = ratios(tail, "")
    if before is not None:
        tail = replace(tail, loss=before, scale_R=before.scale(batch), target_R=before.target(batch))
        out.update(ratios(tail, "_before"))
    return out


def _row_metrics(out: TokenLogpsOutput, mask: Tensor) -> dict[str, Tensor]:
    values = {name: getattr(out, field) for name, field in TOKEN_METRICS.items()}
    with torch.no_grad():
        count = mask.sum().clamp(min=1)
        return {
            name: value.detach().sum(dtype=torch.float32) / count for name, value in values.items() if value is not None
        }


def _use_triton(impl: str, logps: Tensor) -> bool:
    if impl not in ("auto", "triton", "eager"):
        raise ValueError(f"impl={impl!r} must be one of auto, triton, eager")
    if impl == "triton":
        require_triton(logps.device, logps.dtype)
        return True
    return impl == "auto" and uses_triton(logps.device, logps.dtype)


def _check_diagnostics(loss: Loss, given: Given) -> None:
    if given.diagnostics and torch.is_inference_mode_enabled():
        raise ValueError("diagnostics differentiate, which torch.inference_mode forbids; use torch.no_grad")
    if given.diagnostics and loss.arity != "pair":
        raise ValueError(
            f"diagnostics compare the responses of a pair, but {loss.name} is not of pairs; leave them out"
        )


def _check_tail(rows_N: Tensor, layout: Layout, loss: Loss, given: Given) -> None:
    loss.check_layout(layout)
    _check_diagnostics(loss, given)
    needs = (
        (loss.needs_reference, given.ref_logps_N, "compares with a reference", "uses no reference", "ref_logps",
         "(N,) from token_logps of the reference model"),
        (loss.target_kind, given.target_R, "reads targets", "reads no targets", "targets",
         f"(R,), a {loss.target_kind} of each response"),
        (loss.needs_mismatched, given.mismatched_R, "needs a baseline", "needs no baseline", "mismatched",
         "log-ratio sums of prompts with other prompts' responses"),
        (loss.needs_token_kl, given.token_kl_N, "needs the KL divergence of every row", "uses no KL divergence",
         "token_kl", "(N,) from token_kl"),
    )  # fmt: skip
    for needed, value, does, does_not, name, what in needs:
        if needed and value is None:
            raise ValueError(f"{loss.name} {does}: pass {name}, {what}")
        if not needed and value is not None:
            raise ValueError(f"{loss.name} {does_not}, but {name} were given; leave them out")
    if loss.needs_token_weights and given.token_weights_N is None:
        raise ValueError(f"{loss.name} weights tokens: pass token_weights, (N,)")
    for name in loss.row_outputs:
        if name not in given.stats:
            raise ValueError(f"{loss.name} needs the output {name!r} of token_logps: pass stats={{{name!r}: ...}}")
    rows = {"logps": rows_N, "ref_logps": given.ref_logps_N, "token_weights": given.token_weights_N,
            "mask": given.mask_N, "token_kl": given.token_kl_N, **given.stats}  # fmt: skip
    for name, t in rows.items():
        if t is not None and t.shape != (layout.num_tokens,):
            raise ValueError(f"{name} has shape {tuple(t.shape)}, but the layout holds {layout.num_tokens} tokens")
    if given.target_R is not None and given.target_R.shape != (layout.num_responses,):
        raise ValueError(
            f"targets has shape {tuple(given.target_R.shape)}, but the layout holds {layout.num_responses} responses"
        )
    for name, t in {**rows, "targets": given.target_R, "mismatched": given.mismatched_R}.items():
        if t is not None and t.device != rows_N.device:
            raise ValueError(f"{name} is on {t.device}, but the policy's log-probabilities are on {rows_N.device}")
