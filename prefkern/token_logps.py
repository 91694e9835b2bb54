"""Per-token log-probabilities and their gradient: the heavy part, which knows nothing of preferences."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from prefkern import chunked, reference
from prefkern import rows as torch_rows
from prefkern.gradients import first_order_only, graph_is_kept, scaled
from prefkern.head import IGNORE_INDEX, Head, LoRA, Operands, RowStats
from prefkern.kept_logits import KeptLogits, memory_like
from prefkern.planner import Plan, plan, require_triton

OUTPUTS = ("entropy", "is_top1", "mean_logit", "lse", "log_collision")
# Keywords of the row functions. The cut body and the one-launch kernel of logits do not know want_collision.
_WANT = {
    "entropy": "want_entropy",
    "is_top1": "want_top1",
    "mean_logit": "want_mean",
    "log_collision": "want_collision",
}


class TokenLogpsOutput(NamedTuple):
    """Per-token results, each in the shape of `labels`; None where not asked for.

    logps and entropy carry gradients, the others never do.
    """

    logps: Tensor  # fp32, nats
    entropy: Tensor | None = None  # fp32, nats
    is_top1: Tensor | None = None  # bool: no logit is greater than the label's
    mean_logit: Tensor | None = None  # fp32: mean over the vocabulary of the transformed logits
    lse: Tensor | None = None  # fp32, nats: log-sum-exp of the transformed logits
    log_collision: Tensor | None = None  # fp32, nats: log sum_v p_v^2, the log-probability that two samples agree
    ref_logps: Tensor | None = None  # fp32, nats: logps of ref_hidden under the same head; never carries a gradient


@dataclass(frozen=True)
class _Call:
    """Everything of one call that is not a tensor."""

    head: Head
    want: tuple[str, ...]
    rows: ModuleType  # row_softmax_forward and row_softmax_backward

    @property
    def flags(self) -> dict[str, bool]:
        """The wanted outputs as keyword arguments of the row functions."""
        return {flag: True for name, flag in _WANT.items() if name in self.want}


@dataclass(frozen=True)
class HiddenCall(_Call):
    """A call that starts from hidden states."""

    plan: Plan
    filter_eps: float | None = None


@dataclass(frozen=True)
class LogitsCall(_Call):
    """A call that starts from logits."""

    keep_logits: bool  # False: backward may write over them


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    outputs: Collection[str] = (),
    impl: str = "auto",
    workspace_bytes: int | None = None,
    *,
    lora: LoRA | None = None,
    ref_hidden: Tensor | None = None,
    filter_eps: float | None = None,
) -> TokenLogpsOutput:
    """Log-probability of each label under softmax of the head's logits, without storing the logits.

        logp[n] = z[n, labels[n]] - logsumexp_v z[n, v]
        z       = cap(logit_scale * (hidden @ weight.T + bias)) / temperature,   cap(x) = softcap * tanh(x / softcap)

    Args:
        hidden: (N, D), or (B, T, D): fp32, fp16, bf16 or float64; any strides.
        weight: (V, D), same dtype and device. Its gradient is computed only if it requires one.
        labels: (N,) or (B, T), int64 in [0, V), or ignore_index: such a row yields 0 and gets no gradient.
        bias: (V,), or None.
        softcap: positive, or None. logit_scale, temperature: see the formula.
        outputs: any of "entropy", "is_top1", "mean_logit", "lse", "log_collision" (not with impl="cut").
        impl: "auto", "chunked" (library products), "cut" (Triton, no logits in memory) or "eager" (plain torch).
        workspace_bytes: bytes that a block of logits may take; None: `prefkern.planner.default_workspace`. At least
            one logit on a CPU, elsewhere one row (in backward one vocabulary entry), is taken at a time.
        lora: adapter on the head, weight + scale * b @ a; the sum is never made.
        ref_hidden: of hidden's shape: a reference model's states under the same weight and bias, without the adapter.
            Its logps are the output's ref_logps, from the same pass over the weight.
        filter_eps: only with impl="cut": backward takes blocks of dL/dlogits that are wholly below it in absolute
            value as zero. None: exact. See `kernels.lm_head.lm_head_backward` for the bound on the error.
    Returns:
        TokenLogpsOutput: fp32 (float64 for float64 inputs), in nats.
    Gradient:
        For g = dL/dlogp, e = dL/dentropy and ignoring the transform,
        dz = g (onehot - p) - e p (log p + entropy), dhidden = dz @ weight, dweight = dz.T @ hidden, dbias = dz.sum(0);
        each in its parameter's dtype, accumulated in fp32; of lora, da = scale * dlow.T @ hidden with dlow = dz @ b,
        and db = scale * dz.T @ hidden @ a.T. Entropy is differentiable, the other outputs are not.
        Backward takes p from the fp32 log-sum-exp: half an ulp of it is the relative error of p, 1e-6 at logits of 20
        and 5e-4 at logits of 1e4. Logits that it computes again may differ from forward's in the last bits.
        Second derivatives raise RuntimeError except with impl="eager".
    Memory:
        Beside the results: the workspace; where hidden needs a gradient (N, D) in at least its dtype; and where weight
        does, from forward on, the (V, D) that become its gradient and hold logits until then (not under torch.compile,
        and not with impl="cut"). The latter, where it is 32 MiB or more on a CPU under Linux, cannot be resized, and
        its memory is kept for the next step when it is gone, though the system may take it (`spare_memory`).
    Overflow:
        Of fp16 inputs, a raw logit beyond 65,504 is infinite except with impl="cut", which keeps logits in fp32: the
        row's results are NaN, as plain torch's are, never a wrong number.
        Under torch.compile: an operator (`prefkern.operators`) that breaks no graph; labels are not looked at.
    Raises:
        ValueError: shapes, dtypes or devices disagree; an unknown output or impl, or an output that the impl lacks;
            on a CPU, a label outside [0, V). (On a GPU such a label yields NaN: looking would stop the host.)
        RuntimeError: impl="cut" where Triton cannot run.
    Source:
        Online log-sum-exp: Milakov & Gimelshein 2018, arXiv:1805.02867. Matmul without stored logits: Wijmans et al.
        2024, arXiv:2411.09009. The frozen head's one-pass gradient: derived (see planner.FROZEN).
    """
    head, want = Head(softcap, logit_scale, temperature, ignore_index), check_outputs(outputs)
    hidden, weight, bias = autocast_head(hidden, weight, bias)
    check_head(hidden, weight, bias, labels)
    check_labels(labels, weight.shape[0], ignore_index)
    shape, hidden, labels = labels.shape, hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if impl == "cut" and "log_collision" in want:
        raise ValueError("impl='cut' has no output 'log_collision': use impl='auto' or 'chunked'")
    if filter_eps is not None and (impl != "cut" or not filter_eps >= 0):
        raise ValueError(f"filter_eps={filter_eps!r} must be at least 0, and belongs to impl='cut'; impl is {impl!r}")
    low, low_weight = (None, None) if lora is None else lora.factors(hidden, weight)
    if ref_hidden is not None:
        ref_hidden = check_ref_hidden(ref_hidden, hidden, shape)
    if torch.compiler.is_compiling():
        from prefkern import operators

        operands = hidden, weight, bias, low, low_weight, ref_hidden, labels
        stats, ref_logps = operators.traced_token_logps(*operands, head, want, impl, workspace_bytes, filter_eps)
        return _output(stats, want, shape, ref_logps)
    chosen = plan_head(hidden, weight, bias, impl, workspace_bytes, low, low_weight)
    if chosen.row.body == "eager":
        stats = reference.rows_from_hidden(hidden, weight, bias, labels, head, want, low, low_weight)
        ref_logps = None
        if ref_hidden is not None:
            with torch.no_grad():
                ref_logps = reference.rows_from_hidden(ref_hidden, weight, bias, labels, head).logps
    else:
        call = HiddenCall(head, want, torch_rows.implementation(hidden.device, hidden.dtype), chosen, filter_eps)
        *stats, ref_logps = TokenLogps.apply(hidden, weight, bias, low, low_weight, ref_hidden, labels, call)
        stats = RowStats(*stats)
    return _output(stats, want, shape, ref_logps)


def plan_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    impl: str,
    workspace_bytes: int | None,
    low: Tensor | None = None,
    low_weight: Tensor | None = None,
    group_rows: int | None = None,
) -> Plan:
    """The planner's choice for (N, D) hidden states under a head, by what of them wants a gradient now."""

    def wants(x: Tensor | None) -> bool:
        return torch.is_grad_enabled() and x is not None and x.requires_grad

    return plan(
        (hidden.shape[0], hidden.shape[1], weight.shape[0]), hidden.dtype, hidden.device,
        grad_hidden=wants(hidden), grad_head=wants(weight) or wants(bias), grad_weight=wants(weight),
        rank=0 if low is None else low.shape[1], grad_low=(wants(low), wants(low_weight)),
        group_rows=group_rows, impl=impl, workspace_bytes=workspace_bytes,
    )  # fmt: skip


def logits_token_logps(
    logits: Tensor,
    labels: Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    outputs: Collection[str] = (),
    impl: str = "auto",
    keep_logits: bool = False,
) -> TokenLogpsOutput:
    """`token_logps` from logits that exist already: one read forward, one write backward.

    Args:
        logits: (N, V) or (B, T, V) raw logits, any floating dtype and strides.
        labels, softcap, logit_scale, temperature, ignore_index, outputs: as in `token_logps`.
        impl: "auto" (Triton on a GPU, torch elsewhere), "triton" or "eager".
        keep_logits: True: backward allocates the gradient. False: backward writes it over the logits, which must not
            be used again; autograd raises if a later backward needs them, and so it does for two calls on parts of one
            tensor. Logits that are a leaf or a view of one, or whose rows share memory, are always kept.
    Returns:
        TokenLogpsOutput, fp32, in nats.
    Raises:
        ValueError: shapes or devices disagree; an unknown output or impl; on a CPU, a label outside [0, V).
        RuntimeError: impl="triton" where Triton cannot run.
    """
    head, want = Head(softcap, logit_scale, temperature, ignore_index), check_outputs(outputs)
    check_logits(logits, labels, ignore_index)
    shape, logits_NV, labels = labels.shape, logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    if torch.compiler.is_compiling():
        from prefkern import operators

        stats = operators.traced_logits_token_logps(logits_NV, labels, head, want, impl)
    elif impl == "eager":
        stats = reference.rows_from_logits(logits_NV, labels, head, want)
    else:
        call = LogitsCall(head, want, logits_rows(impl, logits), keep_logits or must_keep(logits_NV))
        stats = RowStats(*LogitsTokenLogps.apply(logits_NV, labels, call))
    return _output(stats, want, shape)


class TokenLogps(torch.autograd.Function):
    """hidden, head, adapter -> row statistics and the reference's logps, by the chunked or the cut body."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, low, low_weight, ref_hidden, labels, call: HiddenCall):
        operands = Operands(hidden, weight, bias, low, low_weight)
        memory = memory_like(weight) if call.plan.kept_rows else None
        stats, ref_logps, units = _head_forward(operands, ref_hidden, labels, call, _kept(call, memory))
        ctx.save_for_backward(*operands, labels, stats.lse, stats.entropy, *units, memory)
        ctx.call, ctx.keeps = call, memory is not None
        _mark(ctx, stats, ref_logps)
        return *stats, ref_logps

    @staticmethod
    def backward(ctx, grad_logps, _lse, grad_entropy, *_):
        *operands, labels, lse, entropy, unit, unit_low, memory = ctx.saved_tensors
        operands, needs = Operands(*operands), tuple(ctx.needs_input_grad[:5])
        if grad_logps is None and grad_entropy is None:
            return (None,) * 8
        # .data: autograd shall not mind that they are written over, which a second backward knows from `keeps`.
        kept = _kept(ctx.call, memory.data) if ctx.keeps else None
        ctx.keeps = ctx.keeps and not needs[1]
        with torch.no_grad():
            if (unit is not None or unit_low is not None) and grad_entropy is None:
                last = not graph_is_kept()
                dhidden, dlow = (
                    scaled(u, grad_logps, in_place=last) if need and u is not None else None
                    for u, need in ((unit, needs[0]), (unit_low, needs[3]))
                )
                grads = dhidden, None, None, dlow, None
            else:
                grad_logps = torch.zeros_like(lse) if grad_logps is None else grad_logps
                grads = _head_gradient(ctx.call, operands, labels, lse, entropy, grad_logps, grad_entropy, needs, kept)
        return *first_order_only(tuple(grads), operands), None, None, None


def _kept(call: HiddenCall, memory: Tensor | None) -> KeptLogits | None:
    return None if memory is None else KeptLogits(memory, call.plan.kept_rows, call.plan.slab[1])


def _head_forward(operands: Operands, ref_hidden, labels, call: HiddenCall, kept: KeptLogits | None = None):
    """Row statistics, the reference's logps or None, and unit gradients of hidden and low where the head is frozen."""
    n = operands.hidden.shape[0]
    if ref_hidden is not None:  # one pass over the weight for both; the reference has no adapter
        low = None if operands.low is None else torch.cat([operands.low, torch.zeros_like(operands.low)])
        operands = operands._replace(hidden=torch.cat([operands.hidden, ref_hidden]), low=low)
        labels = torch.cat([labels, labels])
    units = None, None
    if call.plan.row.body == "cut":
        from prefkern.kernels import lm_head

        hidden, weight, bias, low, low_weight = operands
        stats = lm_head.lm_head_forward(
            hidden, weight, labels, call.head, bias_V=bias, low_NR=low, low_weight_VR=low_weight, **call.flags
        )
    else:
        stats, *units = chunked.forward(
            operands, labels, call.head, call.plan, call.flags,
            gradient=n if call.plan.row.name == "frozen_head" else 0, rows=call.rows, kept=kept,
        )  # fmt: skip
    if ref_hidden is None:
        return stats, None, units
    return RowStats(*(None if x is None else x[:n] for x in stats)), stats.logps[n:], units


def _head_gradient(
    call: HiddenCall, operands: Operands, labels, lse, entropy, grad_logps, grad_entropy, needs,
    kept: KeptLogits | None = None,
) -> chunked.Gradients | tuple[Tensor | None, ...]:  # fmt: skip
    if call.plan.row.body == "cut":
        from prefkern.kernels import lm_head

        hidden, weight, bias, low, low_weight = operands
        return lm_head.lm_head_backward(
            hidden, weight, labels, lse, grad_logps, call.head,
            bias_V=bias, entropy_N=entropy, grad_entropy_N=grad_entropy, needs_hidden=needs[0], needs_weight=needs[1],
            needs_bias=needs[2], needs_low=needs[3], needs_low_weight=needs[4], low_NR=low, low_weight_VR=low_weight,
            workspace_bytes=call.plan.workspace_bytes, filter_eps=call.filter_eps,
        )  # fmt: skip
    stats = RowStats(lse, lse, entropy)
    return chunked.backward(
        operands, labels, call.head, call.plan, stats, grad_logps, grad_entropy, needs=needs, rows=call.rows, kept=kept
    )


class LogitsTokenLogps(torch.autograd.Function):
    """Raw logits -> row statistics, by the row kernel or its torch twin."""

    @staticmethod
    def forward(ctx, logits, labels, call: LogitsCall):
        stats = call.rows.row_softmax_forward(logits.detach(), labels, call.head, **call.flags)
        ctx.save_for_backward(logits, labels, stats.lse, stats.entropy)
        ctx.call = call
        _mark(ctx, stats)
        return tuple(stats)

    @staticmethod
    def backward(ctx, grad_logps, _lse, grad_entropy, *_):
        logits, labels, lse, entropy = ctx.saved_tensors
        if grad_logps is None and grad_entropy is None:
            return None, None, None
        grad_logps = torch.zeros_like(lse) if grad_logps is None else grad_logps
        dlogits = logits_gradient(
            ctx.call, logits, labels, lse, grad_logps, entropy_N=entropy, grad_entropy_N=grad_entropy
        )
        return *first_order_only((dlogits,), (logits,)), None, None


def logits_gradient(
    call: LogitsCall, logits: Tensor, labels: Tensor, lse: Tensor, grad_logps: Tensor, **options
) -> Tensor:
    """The row kernel's backward, over the logits themselves unless the call keeps them."""
    with torch.no_grad():
        raw = logits.detach()
        out = None if call.keep_logits else raw
        dlogits = call.rows.row_softmax_backward(raw, labels, lse, grad_logps, call.head, out=out, **options)
        if out is not None:
            torch.autograd.graph.increment_version(logits)  # a second backward through these logits now raises
    return dlogits


def _mark(ctx, stats: RowStats, ref_logps: Tensor | None = None) -> None:
    ctx.set_materialize_grads(False)
    constant = (stats.lse, stats.is_top1, stats.mean_logit, stats.log_collision, ref_logps)
    ctx.mark_non_differentiable(*[s for s in constant if s is not None])


def _output(
    stats: RowStats, want: tuple[str, ...], shape: torch.Size, ref_logps: Tensor | None = None
) -> TokenLogpsOutput:
    asked = {name: getattr(stats, name).view(shape) for name in OUTPUTS if name in want}
    ref_logps = None if ref_logps is None else ref_logps.view(shape)
    return TokenLogpsOutput(stats.logps.view(shape), **asked, ref_logps=ref_logps)


def must_keep(logits_NV: Tensor) -> bool:
    """Whether a gradient may not be written over these logits: the memory is a leaf's, or is that of several rows."""
    (inner, count), (outer, lines) = sorted(zip(logits_NV.stride(), logits_NV.shape))
    overlap = (count > 1 and inner == 0) or (lines > 1 and outer <= inner * (count - 1))
    return overlap or logits_NV.is_leaf or (logits_NV._base is not None and logits_NV._base.is_leaf)


def logits_rows(impl: str, logits: Tensor) -> ModuleType:
    """The row functions for logits that exist already."""
    if impl not in ("auto", "triton"):
        raise ValueError(f"impl={impl!r} must be one of auto, triton, eager")
    if impl == "auto":
        return torch_rows.implementation(logits.device, logits.dtype)
    require_triton(logits.device, logits.dtype)
    from prefkern.kernels import row_softmax

    return row_softmax


def check_outputs(outputs: Collection[str]) -> tuple[str, ...]:
    """The names as a tuple; ValueError on an unknown one."""
    outputs = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    for name in outputs:
        if name not in OUTPUTS:
            raise ValueError(f"outputs: unknown {name!r}; known are {', '.join(OUTPUTS)}")
    return outputs


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, which: str = "") -> None:
    """Raise ValueError where shapes, dtypes or devices disagree; `which` begins the names in the message."""
    if hidden.ndim not in (2, 3) or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{which}hidden {tuple(hidden.shape)} must be (N, D) or (B, T, D)"
            f" and {which}weight {tuple(weight.shape)} (V, D)"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} must have the shape of {which}hidden less its last axis"
            f" {tuple(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{which}bias {tuple(bias.shape)} must be ({weight.shape[0]},)")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"{which}hidden is {hidden.dtype} and {which}weight {weight.dtype}; they must be one floating dtype"
        )
    devices = {t.device for t in (hidden, weight, bias, labels) if t is not None}
    if len(devices) > 1:
        raise ValueError(
            f"{which}hidden, {which}weight, {which}bias and labels are on different devices:"
            f" {sorted(map(str, devices))}"
        )


def check_ref_hidden(ref_hidden: Tensor, hidden: Tensor, shape: torch.Size) -> Tensor:
    """The reference's states as (N, D) data in hidden's dtype; ValueError where they do not go with hidden's."""
    if ref_hidden.shape != (*shape, hidden.shape[-1]) or ref_hidden.device != hidden.device:
        raise ValueError(
            f"ref_hidden {tuple(ref_hidden.shape)} on {ref_hidden.device} must have hidden's shape"
            f" {(*shape, hidden.shape[-1])} and device {hidden.device}"
        )
    return ref_hidden.detach().reshape(hidden.shape).to(hidden.dtype)


def check_logits(logits: Tensor, labels: Tensor, ignore_index: int) -> None:
    """Raise ValueError where logits (..., V) and labels (...) do not go together, or a CPU label is out of range."""
    if logits.ndim not in (2, 3) or labels.shape != logits.shape[:-1] or not logits.is_floating_point():
        raise ValueError(
            f"logits {tuple(logits.shape)} {logits.dtype} must be floating (N, V) or (B, T, V), and labels"
            f" {tuple(labels.shape)} of its shape less the last axis"
        )
    if logits.device != labels.device:
        raise ValueError(f"logits are on {logits.device}, but labels on {labels.device}")
    check_labels(labels, logits.shape[-1], ignore_index)


def check_labels(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Raise ValueError on a label outside the vocabulary, for labels on the CPU; integer dtype is always checked."""
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}; they must be int64")
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if wrong.any():
        raise ValueError(
            f"label {labels[wrong][0].item()} is outside the vocabulary of {vocab}, and not ignore_index={ignore_index}"
        )


def autocast_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inside torch.autocast the head runs in autocast's dtype, as F.linear would; float64 stays."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
