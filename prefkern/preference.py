"""From log-probabilities, hidden states or logits to any preference loss and its metrics."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from prefkern import reference
from prefkern.head import IGNORE_INDEX, Head
from prefkern.layout import Layout, TailIndex
from prefkern.losses.base import Loss
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
class _Batch:
    """One call's data for the tail, all of it constant under differentiation."""

    loss: Loss
    layout: Layout
    index: TailIndex
    ref_logps_N: Tensor | None
    weights_N: Tensor | None
    scale_R: Tensor | None
    margin: float | Tensor
    weight_G: Tensor | None
    count_R: Tensor

    @property
    def kernel_arguments(self) -> dict[str, Tensor | None]:
        """Keyword arguments that tail and fused_logits share."""
        scale_S = None if self.scale_R is None else self.scale_R[self.index.response_of_segment_S]
        margin_G = self.margin
        if not isinstance(margin_G, Tensor):
            groups, device = self.layout.num_groups, self.count_R.device
            margin_G = torch.full((groups,), margin_G, device=device) if margin_G != 0 else None
        return {
            "ref_logps_N": self.ref_logps_N, "token_weights_N": self.weights_N, "scale_S": scale_S,
            "margin_G": margin_G, "weight_G": self.weight_G,
        }  # fmt: skip


def preference_loss(
    logps: Tensor,
    layout: Layout,
    loss: Loss,
    ref_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    impl: str = "auto",
) -> PreferenceOutput:
    """Any registered loss from per-token log-probabilities.

        score_s = scale * sum over segment s of token_weight_n * (logp_n - ref_logp_n)
        loss    = sum_g weight_g * link(scores of group g, margin) / normalizer

    A group in which no token counts has weight 0.

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
            gradient accumulation or several ranks, pass the count of the whole batch.
        impl: "auto" (Triton on a GPU, torch elsewhere), "triton" or "eager".
    Returns:
        PreferenceOutput. metrics: rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies,
        logps/chosen, logps/rejected for pairs, logps/response for single sequences.
    Gradient:
        With respect to logps alone; ref_logps and token_weights are data.
    Raises:
        ValueError: shapes disagree with the layout, the layout with the loss, devices with each other, or a reference
            is missing or too many.
        RuntimeError: impl="triton" where Triton cannot run.
    Source:
        Each loss's docstring names its own.
    """
    _check_tail(logps, layout, loss, ref_logps, token_weights, mask)
    batch = _prepare(
        layout, loss, logps.device, reference.accumulator(logps.dtype), ref_logps, token_weights, mask, logps
    )
    if _use_triton(impl, logps):
        summed, score_S = PreferenceTail.apply(logps, batch)
    else:
        summed, score_S = _eager_tail(logps, batch)
    return _finish(summed, score_S, logps.detach(), batch, normalizer, {})


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    layout: Layout,
    loss: Loss,
    ref_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    outputs: Collection[str] = ("entropy", "is_top1"),
    impl: str = "auto",
    workspace_bytes: int | None = None,
) -> PreferenceOutput:
    """`preference_loss` of hidden states under a head, without the logits.

    Args:
        hidden: (N, D) states that predict the packed response tokens; weight (V, D), labels (N,), bias, softcap,
            logit_scale, temperature, ignore_index, outputs, impl, workspace_bytes: as in `token_logps`.
        layout, loss, ref_logps, token_weights, normalizer: as in `preference_loss`. Rows with ignore_index count
            nowhere.
    Returns:
        PreferenceOutput; metrics as in `preference_loss`, and means over counted tokens of what `outputs` names:
        entropy (nats), mean_token_accuracy (of is_top1), logits/mean, lse.
    """
    out = token_logps(
        hidden, weight, labels, bias=bias, softcap=softcap, logit_scale=logit_scale, temperature=temperature,
        ignore_index=ignore_index, outputs=outputs, impl=impl, workspace_bytes=workspace_bytes,
    )  # fmt: skip
    return _from_token_logps(
        out, labels, layout, loss, ref_logps, token_weights, normalizer, ignore_index, tail_impl(impl)
    )


def logits_preference_loss(
    logits: Tensor,
    labels: Tensor,
    layout: Layout,
    loss: Loss,
    ref_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    outputs: Collection[str] = ("entropy", "is_top1"),
    impl: str = "auto",
    keep_logits: bool = False,
) -> PreferenceOutput:
    """`preference_loss` from logits: on a GPU one launch forward, one backward over the logits themselves.

    Args:
        logits: (N, V) or (B, T, V) raw logits that predict the packed response tokens, any floating dtype and strides;
            labels, softcap, logit_scale, temperature, ignore_index, outputs, keep_logits: as in `logits_token_logps`.
        layout, loss, ref_logps, token_weights, normalizer: as in `preference_loss`. Rows with ignore_index count
            nowhere.
        impl: "auto" (one fused Triton launch on a GPU, torch elsewhere), "triton" or "eager". A loss that needs all
            scores before its link takes two launches.
    Returns:
        PreferenceOutput; metrics as in `linear_preference_loss`.
    Gradient:
        With respect to logits alone, in their dtype; written over them unless they are kept.
    Raises:
        As `logits_token_logps` and `preference_loss`.
    """
    if impl == "eager" or loss.needs_scores or impl == "auto" and not uses_triton(logits.device, logits.dtype):
        out = logits_token_logps(
            logits, labels, softcap, logit_scale, temperature, ignore_index, outputs, impl=impl, keep_logits=keep_logits
        )
        return _from_token_logps(out, labels, layout, loss, ref_logps, token_weights, normalizer, ignore_index, impl)
    want = check_outputs(outputs)
    check_logits(logits, labels, ignore_index)
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    mask = labels != ignore_index
    _check_tail(labels, layout, loss, ref_logps, token_weights, mask)
    batch = _prepare(layout, loss, logits.device, torch.float32, ref_logps, token_weights, mask)
    head = Head(softcap, logit_scale, temperature, ignore_index)
    call = LogitsCall(head, want, logits_rows(impl, logits), keep_logits or must_keep(logits))
    summed, score_S, *stats = FusedLogits.apply(logits, labels, batch, call)
    out = TokenLogpsOutput(
        stats[0], entropy=stats[2], is_top1=stats[3], mean_logit=stats[4], lse=stats[1] if "lse" in want else None
    )
    return _finish(summed, score_S, out.logps, batch, normalizer, _row_metrics(out, mask))


class PreferenceTail(torch.autograd.Function):
    """logps -> (sum of weighted group values, segment scores), by the tail kernel; g_N is made in forward."""

    @staticmethod
    def forward(ctx, logps, batch: _Batch):
        from prefkern.kernels import links, tail

        value_G, score_S, g_N = tail.tail(
            logps.detach(), batch.index, getattr(links, batch.loss.link), batch.loss.link_params(),
            want_grad=ctx.needs_input_grad[0], **batch.kernel_arguments,
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
    def forward(ctx, logits, labels, batch: _Batch, call: LogitsCall):
        from prefkern.kernels import fused_logits, links

        stats, value_G, score_S, g_N = fused_logits.fused_logits_forward(
            logits.detach(), labels, call.head, batch.index, getattr(links, batch.loss.link), batch.loss.link_params(),
            want_grad=ctx.needs_input_grad[0], **batch.kernel_arguments, **call.flags,
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


def _from_token_logps(out, labels, layout, loss, ref_logps, token_weights, normalizer, ignore_index, impl):
    mask = (labels != ignore_index).reshape(-1)
    flat = TokenLogpsOutput(*(None if t is None else t.reshape(-1) for t in out))
    result = preference_loss(flat.logps, layout, loss, ref_logps, token_weights, mask, normalizer, impl)
    result.metrics.update(_row_metrics(flat, mask))
    return result


def _prepare(layout, loss, device, wide: torch.dtype, ref_logps, token_weights, mask, logps=None) -> _Batch:
    layout = loss.segmented(layout)
    index = layout.index(device)
    with torch.no_grad():
        ref_logps, weights = (None if t is None else t.detach().to(wide) for t in (ref_logps, token_weights))
        if mask is not None:
            mask = mask.bool()
            weights = mask.to(wide) if weights is None else torch.where(mask, weights, 0.0)
        if mask is None:
            count_R = index.response_offsets.diff().to(wide)
        else:
            count_R = reference.span_sums(mask.to(wide), index.response_offsets)
        scale_R, margin = loss.scale(count_R), 0.0
        if loss.needs_scores:
            d = reference.log_ratios(logps, ref_logps, weights)
            margin = loss.margin(reference.segment_scores(d, index, scale_R, layout.segments_per_response), layout)
        else:
            margin = loss.margin(None, layout)
        weight_G = _alive(layout, index, weights, wide)
        own_G = loss.group_weight(index)
        own_G = None if own_G is None else own_G.to(wide)
        weight_G = own_G if weight_G is None else weight_G if own_G is None else weight_G * own_G
        return _Batch(loss, layout, index, ref_logps, weights, scale_R, margin, weight_G, count_R)


def _alive(layout: Layout, index: TailIndex, weights_N: Tensor | None, wide: torch.dtype) -> Tensor | None:
    """(G,) 1, or 0 where no token of the group counts: nothing was compared, so nothing is lost. None: 1 everywhere."""
    if weights_N is not None:
        sums = reference.span_sums((weights_N != 0).to(wide), index.row_order_offsets)
        tokens_S = torch.empty_like(sums).index_copy(0, index.token_order_S, sums)
    elif layout.has_empty_group:
        tokens_S = (index.segment_end_S - index.segment_start_S).to(wide)
    else:
        return None
    return (reference.span_sums(tokens_S, index.group_offsets) > 0).to(wide)


def _eager_tail(logps: Tensor, batch: _Batch) -> tuple[Tensor, Tensor]:
    d = reference.log_ratios(logps, batch.ref_logps_N, batch.weights_N)
    score_S = reference.segment_scores(d, batch.index, batch.scale_R, batch.layout.segments_per_response)
    score_GK, _ = reference.pad_groups(score_S, batch.index)
    value_G = batch.loss.eager(score_GK, batch.margin)
    return (value_G if batch.weight_G is None else value_G * batch.weight_G).sum(), score_S.detach()


def _finish(summed, score_S, logps_N, batch: _Batch, normalizer, metrics) -> PreferenceOutput:
    if normalizer is None:
        normalizer = batch.loss.normalizer(batch.layout, batch.count_R.sum())
    with torch.no_grad():
        d = reference.log_ratios(logps_N, batch.ref_logps_N, batch.weights_N)
        ratio_R = reference.span_sums(d, batch.index.response_offsets)
        ratio_R = ratio_R if batch.scale_R is None else ratio_R * batch.scale_R
        counted = reference.log_ratios(
            logps_N, None, None if batch.weights_N is None else (batch.weights_N != 0).float()
        )
        own = batch.loss.metrics(ratio_R, reference.span_sums(counted, batch.index.response_offsets))
    return PreferenceOutput(summed / normalizer, {**own, **metrics}, logps_N, score_S)


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


def _check_tail(rows_N: Tensor, layout: Layout, loss: Loss, ref_logps, token_weights, mask) -> None:
    loss.check_layout(layout)
    if not loss.needs_reference and ref_logps is not None:
        raise ValueError(f"{loss.name} uses no reference, but ref_logps were given; leave them out")
    if loss.needs_reference and ref_logps is None:
        raise ValueError(
            f"{loss.name} compares with a reference: pass ref_logps, (N,) from token_logps of the reference model"
        )
    for name, t in (("logps", rows_N), ("ref_logps", ref_logps), ("token_weights", token_weights), ("mask", mask)):
        if t is not None and t.shape != (layout.num_tokens,):
            raise ValueError(f"{name} has shape {tuple(t.shape)}, but the layout holds {layout.num_tokens} tokens")
        if t is not None and t.device != rows_N.device:
            raise ValueError(f"{name} is on {t.device}, but the policy's log-probabilities are on {rows_N.device}")
