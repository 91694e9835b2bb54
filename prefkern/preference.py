"""From log-probabilities, hidden states or logits to any preference loss and its metrics."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from prefkern import rows as torch_rows
from prefkern.gradients import first_order_only
from prefkern.group_local import Differentiated, Known, walk
from prefkern.head import IGNORE_INDEX, Head, LoRA, Operands, RowStats
from prefkern.layout import Layout
from prefkern.losses.base import Loss
from prefkern.planner import LOCAL, Plan, uses_triton
from prefkern.preference_tail import (
    Given,
    PreferenceOutput,
    Promptwise,
    Tail,
    check_tail,
    finish,
    loss_of_logps,
    prepare,
)
from prefkern.token_logps import (
    HiddenCall,
    LogitsCall,
    TokenLogpsOutput,
    autocast_head,
    check_head,
    check_labels,
    check_logits,
    check_outputs,
    check_ref_hidden,
    logits_gradient,
    logits_rows,
    logits_token_logps,
    must_keep,
    plan_head,
    token_logps,
)

# Metrics that are means over counted tokens (the others are over prompts), and the token_logps output each is made of.
TOKEN_METRICS = {"entropy": "entropy", "mean_token_accuracy": "is_top1", "logits/mean": "mean_logit", "lse": "lse"}


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

    Under torch.compile the whole of it is one operator (`prefkern.operators`) and breaks no graph. Lengths and numbers
    of prompts are no constants of that graph; the loss object is one, and so is a normalizer that is a float (pass a
    tensor where it changes). Build layout and loss outside the compiled function. The output's scores are None; with
    `state` the call stays outside the graph.

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
    return loss_of_logps(logps, layout, loss, given, normalizer, impl, state)


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
    lora: LoRA | None = None,
    ref_hidden: Tensor | None = None,
    filter_eps: float | None = None,
) -> PreferenceOutput:
    """`preference_loss` of hidden states under a head, without the logits.

    Where the head trains and the loss is a sum over prompts, each of which fits the workspace, the gradients are made
    with the value, and every logit is computed once: see `planner.GROUP_LOCAL`.

    Args:
        hidden: (N, D) states that predict the packed response tokens; weight (V, D), labels (N,), bias, softcap,
            logit_scale, temperature, ignore_index, outputs, impl, workspace_bytes, lora, filter_eps: as in
            `token_logps`.
        layout, loss, ref_logps, token_weights, normalizer, targets, mismatched, token_kl, state, diagnostics: as in
            `preference_loss`. Rows with ignore_index count nowhere.
        on_policy: in place of ref_logps, compare with the policy itself, held constant: every log-ratio is 0 and only
            carries the gradient.
        ref_hidden: in place of ref_logps, the reference model's states under the same head without the adapter.
    Returns:
        PreferenceOutput; metrics as in `preference_loss`, and means over counted tokens of what `outputs` names:
        entropy (nats), mean_token_accuracy (of is_top1), logits/mean, lse.
    Gradient:
        With respect to hidden, weight, bias, the adapter and token_kl; a reference is data.
    Raises:
        ValueError: more than one reference; else as `token_logps` and `preference_loss`.
    """
    if on_policy and ref_logps is not None:
        raise ValueError("on_policy=True makes the policy its own reference, but ref_logps were given; leave them out")
    if ref_hidden is not None and (on_policy or ref_logps is not None):
        other = "on_policy=True" if on_policy else "ref_logps"
        raise ValueError(f"ref_hidden are a reference's, and so is {other}; pass one of them")
    head = {
        "softcap": softcap, "logit_scale": logit_scale, "temperature": temperature, "ignore_index": ignore_index,
    }  # fmt: skip
    want = (*check_outputs(outputs), *_row_outputs(loss))
    given = Given(
        ref_logps,
        token_weights,
        (labels != ignore_index).reshape(-1),
        targets,
        mismatched,
        token_kl_N=token_kl,
        vocab_size=weight.shape[0],
        diagnostics=diagnostics,
    )
    trained = any(t is not None and t.requires_grad for t in (weight, bias, None if lora is None else lora.b))
    if not torch.compiler.is_compiling() and trained and filter_eps is None and Promptwise.serves(loss, given, state):
        operands, plan = _plan_local(hidden, weight, bias, labels, lora, layout, ignore_index, impl, workspace_bytes)
        if plan is not None:
            if ref_hidden is not None:
                ref_hidden = check_ref_hidden(ref_hidden, operands.hidden, labels.shape)
                with torch.no_grad():
                    ref = token_logps(
                        ref_hidden, operands.weight, labels.reshape(-1), operands.bias, **head,
                        workspace_bytes=workspace_bytes,
                    )  # fmt: skip
                given = replace(given, ref_logps_N=ref.logps)
            rows = torch_rows.implementation(weight.device, operands.hidden.dtype)
            call = HiddenCall(Head(**head), want, rows, plan)
            return _loss_by_prompts(operands, labels.reshape(-1), layout, loss, given, normalizer, call, on_policy)
    out = token_logps(
        hidden, weight, labels, bias, **head, outputs=want, impl=impl, workspace_bytes=workspace_bytes, lora=lora,
        ref_hidden=ref_hidden, filter_eps=filter_eps,
    )  # fmt: skip
    if ref_hidden is not None:
        ref_logps = out.ref_logps.reshape(-1)
    given = replace(given, ref_logps_N=out.logps.detach().reshape(-1) if on_policy else ref_logps)
    return _from_token_logps(out, layout, loss, given, normalizer, tail_impl(impl), state)


def _plan_local(
    hidden, weight, bias, labels, lora: LoRA | None, layout: Layout, ignore_index: int, impl: str, workspace_bytes
) -> tuple[Operands | None, Plan | None]:
    """What `token_logps` would multiply, and the plan, if whole prompts at a time are what the planner chooses."""
    fits = labels.numel() == layout.num_tokens > 0
    if not fits or impl not in ("auto", "chunked") or not torch.is_grad_enabled():
        return None, None
    hidden, weight, bias = autocast_head(hidden, weight, bias)
    check_head(hidden, weight, bias, labels)
    check_labels(labels, weight.shape[0], ignore_index)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    low, low_weight = (None, None) if lora is None else lora.factors(hidden, weight)
    group_rows = max(layout.rows_per_prompt)
    plan = plan_head(hidden, weight, bias, impl, workspace_bytes, low, low_weight, group_rows)
    return (Operands(hidden, weight, bias, low, low_weight), plan) if plan.row in LOCAL.values() else (None, None)


def _loss_by_prompts(operands, labels_N, layout, loss, given: Given, normalizer, call: HiddenCall, on_policy: bool):
    """The loss with its gradients, in chunks of whole prompts; its value and metrics are made as anywhere else."""
    runs = layout.runs(call.plan.rows_per_chunk)
    promptwise = Promptwise(layout, loss, given, normalizer, "auto", own_reference=on_policy)
    names = _row_outputs(loss)

    def upstream(number: int, stats: RowStats) -> Tensor:
        return promptwise.gradient(runs[number], stats.logps, {name: getattr(stats, name) for name in names})

    chunks = [layout.prompts(run).rows for run in runs]
    stats, gradients = walk(operands, labels_N, call.head, call.plan, call.flags, call.rows, chunks, upstream)
    out = _asked(stats, call.want)
    given = replace(given, ref_logps_N=out.logps if on_policy else given.ref_logps_N)
    with torch.no_grad():
        result = _from_token_logps(out, layout, loss, given, normalizer, "auto", None)
    return result._replace(loss=Differentiated.apply(Known(result.loss, gradients), *operands))


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
        impl: "auto" (one fused Triton launch on a GPU, torch elsewhere), "triton" or "eager". Two launches forward
            where the rows have to be known before they are summed: for losses that look at all scores first, or at
            statistics of the rows (`row_outputs`), that add up token_kl or have several addends; and under
            torch.compile.
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
    want = check_outputs(outputs)
    eager = impl == "eager" or impl == "auto" and not uses_triton(logits.device, logits.dtype)
    if eager or torch.compiler.is_compiling() or not _fits_one_launch(loss, token_kl):
        out = logits_token_logps(
            logits, labels, softcap, logit_scale, temperature, ignore_index, (*want, *_row_outputs(loss)),
            impl=impl, keep_logits=keep_logits,
        )  # fmt: skip
        return _from_token_logps(out, layout, loss, given, normalizer, impl, state)
    check_logits(logits, labels, ignore_index)
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    given = replace(given, mask_N=given.mask_N.reshape(-1))
    check_tail(labels, layout, loss, given)
    tail = prepare(loss.segmented(layout), loss, logits.device, torch.float32, given, state)
    head = Head(softcap, logit_scale, temperature, ignore_index)
    call = LogitsCall(head, want, logits_rows(impl, logits), keep_logits or must_keep(logits))
    summed, score_S, *found = FusedLogits.apply(logits, labels, tail, call)
    out = _asked(RowStats(*found), want)
    return finish(summed, score_S, out.logps, tail, normalizer, _row_metrics(out, given.mask_N))


class FusedLogits(torch.autograd.Function):
    """logits -> (sum of weighted group values, segment scores, row statistics), one launch each way."""

    @staticmethod
    def forward(ctx, logits, labels, tail: Tail, call: LogitsCall):
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
    if torch.compiler.is_compiling():
        from prefkern import operators

        return operators.facts(loss.key, False).row_outputs
    return tuple(name for term in loss.addends() for name in term.loss.row_outputs)


def _fits_one_launch(loss: Loss, token_kl: Tensor | None) -> bool:
    return loss.is_one and not loss.needs_first_pass and not loss.row_outputs and token_kl is None


def _asked(stats: RowStats, want: Collection[str]) -> TokenLogpsOutput:
    return TokenLogpsOutput(stats.logps, **{name: getattr(stats, name) for name in want})


def _from_token_logps(out, layout, loss, given: Given, normalizer, impl, state) -> PreferenceOutput:
    flat = TokenLogpsOutput(*(None if t is None else t.reshape(-1) for t in out))
    stats = {name: getattr(flat, name) for name in _row_outputs(loss)}
    given = replace(given, mask_N=given.mask_N.reshape(-1), stats=stats)
    result = loss_of_logps(flat.logps, layout, loss, given, normalizer, impl, state)
    result.metrics.update(_row_metrics(flat, given.mask_N))
    return result


def _row_metrics(out: TokenLogpsOutput, mask: Tensor) -> dict[str, Tensor]:
    values = {name: getattr(out, field) for name, field in TOKEN_METRICS.items()}
    with torch.no_grad():
        count = mask.sum().clamp(min=1)
        return {
            name: value.detach().sum(dtype=torch.float32) / count for name, value in values.items() if value is not None
        }
