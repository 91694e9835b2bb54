"""KL divergence of the policy from a reference at every row, over the whole vocabulary, without either's logits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prefkern import reference
from prefkern.chunked import walk_vocabulary
from prefkern.gradients import first_order_only, graph_is_kept, scaled
from prefkern.head import IGNORE_INDEX, Head, Operands
from prefkern.planner import Plan
from prefkern.products import product, product_into
from prefkern.rows import pieces, slope_of, transformed
from prefkern.token_logps import autocast_head, check_head, plan_head


def token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    impl: str = "auto",
    workspace_bytes: int | None = None,
) -> Tensor:
    """KL(reference || policy) of the next-token distributions at each row, from hidden states under two heads.

        kl[n] = sum_v q[n, v] (log q[n, v] - log p[n, v]),      p = softmax(z), q = softmax(z_ref)
        z     = cap(logit_scale * (hidden @ weight.T + bias)) / temperature, as in `token_logps`; z_ref likewise

    Args:
        hidden: (N, D), or (B, T, D), of the policy: fp32, fp16, bf16 or float64; any strides.
        weight: (V, D), the policy's head, same dtype and device. Its gradient is computed only if it requires one.
        ref_hidden, ref_weight: (N, E) or (B, T, E), and (V, E), of the reference: one dtype, which may be another;
            constants.
        labels: (N,) or (B, T); a row with ignore_index yields 0 and gets no gradient. None: every row counts.
        bias, ref_bias: (V,), or None.
        softcap, logit_scale, temperature: of both heads; see `token_logps`.
        impl: "auto" or "chunked" (library products, row work by torch), or "eager" (plain torch, all logits).
        workspace_bytes: bytes that a block of both models' logits may take together; None:
            `prefkern.planner.default_workspace`. At least one row is taken at a time, whatever this says.
    Returns:
        (N,) or (B, T), fp32 (float64 for float64 inputs), in nats, at least 0; infinite where the policy excludes
        (with a logit of -inf) what the reference does not. Entries whose q is 0 add nothing.
    Gradient:
        For g = dL/dkl and ignoring the transform, dz = g (p - q), dhidden = dz @ weight, dweight = dz.T @ hidden,
        dbias = dz.sum(0); each in its parameter's dtype, accumulated in fp32. Where the head trains, backward takes p
        and q from the fp32 log-sum-exp, as `token_logps` does. None to the reference.
        Second derivatives raise RuntimeError except with impl="eager".
    Raises:
        ValueError: shapes, dtypes or devices disagree; the vocabularies differ; an unknown impl, or "cut", which has no
            such body.
    Source:
        derived; the quantity is what Zeng et al. 2024, arXiv:2404.11999, add up over a response.
    """
    if impl == "cut":
        raise ValueError("impl='cut' cannot compare two heads: use impl='auto' or 'chunked' for token_kl")
    hidden, weight, bias = autocast_head(hidden, weight, bias)
    ref_hidden, ref_weight, ref_bias = autocast_head(ref_hidden, ref_weight, ref_bias)
    rows = hidden.new_zeros(hidden.shape[:-1], dtype=torch.int64) if labels is None else labels
    check_head(hidden, weight, bias, rows)
    check_head(ref_hidden, ref_weight, ref_bias, rows, "ref_")
    if weight.shape[0] != ref_weight.shape[0]:
        raise ValueError(
            f"weight has {weight.shape[0]} vocabulary entries and ref_weight {ref_weight.shape[0]}; they must be of one"
            " vocabulary"
        )
    head, shape = Head(softcap, logit_scale, temperature, ignore_index), rows.shape
    valid = torch.ones_like(rows, dtype=torch.bool) if labels is None else labels != ignore_index
    valid, hidden = valid.reshape(-1), hidden.reshape(-1, hidden.shape[-1])
    ref_hidden = ref_hidden.reshape(-1, ref_hidden.shape[-1])
    ref = tuple(None if t is None else t.detach() for t in (ref_hidden, ref_weight, ref_bias))
    chosen = plan_head(hidden, weight, bias, impl, workspace_bytes)
    if chosen.row.body == "eager":
        return reference.kl_from_hidden(hidden, weight, bias, *ref, valid, head).view(shape)
    both = replace(chosen, itemsize=hidden.dtype.itemsize + ref_hidden.dtype.itemsize, kept_rows=0)
    return TokenKL.apply(hidden, weight, bias, *ref, valid, _Call(head, both)).view(shape)


@dataclass(frozen=True)
class _Call:
    """Everything of one call that is not a tensor."""

    head: Head
    plan: Plan  # whose itemsize is that of one logit of each model


class TokenKL(torch.autograd.Function):
    """Two hidden states and heads -> KL per row, by chunks of rows; backward by slices of the vocabulary."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, valid, call: _Call):
        frozen_head = call.plan.row.name == "frozen_head"
        policy, ref = (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias)
        kl, lse, ref_lse, unit = _forward(policy, ref, valid, call, gradient=frozen_head)
        ctx.save_for_backward(*policy, *ref, valid, lse, ref_lse, unit)
        ctx.call = call
        return kl

    @staticmethod
    def backward(ctx, grad_kl):
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, valid, lse, ref_lse, unit = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[:3])
        with torch.no_grad():
            if unit is not None:
                grads = scaled(unit, grad_kl, in_place=not graph_is_kept()), None, None
            else:
                policy, ref = (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias)
                grads = _backward(policy, ref, valid, ctx.call, lse, ref_lse, grad_kl, needs)
        return *first_order_only(grads, (hidden, weight, bias)), None, None, None, None, None


def _forward(
    policy: tuple, ref: tuple, valid_N: Tensor, call: _Call, *, gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """KL and both log-sum-exps (N,), and dkl_n / dhidden_n (N, D) in hidden's dtype if `gradient`."""
    (hidden_ND, weight_VD, bias_V), (ref_hidden_NE, ref_weight_VE, ref_bias_V) = policy, ref
    n, vocab, head, step = hidden_ND.shape[0], weight_VD.shape[0], call.head, call.plan.rows_per_chunk
    scale = head.logit_scale / head.temperature
    scratch, ref_scratch = hidden_ND.new_empty(min(step, n), vocab), ref_hidden_NE.new_empty(min(step, n), vocab)
    wide = reference.accumulator(hidden_ND.dtype)
    kl_N, lse_N, ref_lse_N = (hidden_ND.new_empty(n, dtype=wide) for _ in range(3))
    unit_ND = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format) if gradient else None
    for i in range(0, n, step):
        chunk = slice(i, min(i + step, n))
        logits = product(hidden_ND[chunk], weight_VD.t(), out=scratch[: chunk.stop - i])
        ref_logits = product(ref_hidden_NE[chunk], ref_weight_VE.t(), out=ref_scratch[: chunk.stop - i])
        for piece in pieces(logits):
            rows = slice(i + piece.start, i + piece.stop)
            z, z_ref = transformed(logits[piece], head, bias_V), transformed(ref_logits[piece], head, ref_bias_V)
            slope = slope_of(z, head) if gradient else None
            kl_N[rows], lse_N[rows], ref_lse_N[rows], dz = _row_kl(z, z_ref.to(z.dtype))
            if gradient:
                dz = dz if slope is None else dz.mul_(slope)
                logits[piece] = dz if scale == 1.0 else dz.mul_(scale)  # here it is not rounded once more
        if gradient:
            product_into(unit_ND[chunk], logits, weight_VD)
    kl_N.masked_fill_(~valid_N, 0.0)
    if gradient:
        unit_ND.masked_fill_(~valid_N[:, None], 0.0)
    return kl_N, lse_N, ref_lse_N, unit_ND


def _row_kl(z: Tensor, z_ref: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL, both log-sum-exps, and p - q, of a few rows; writes over both.

    What is summed is q (log q - log p) - q + p, at least 0 in every entry: p and q add up to 1 only up to the rounding
    of their normalisers, which a small divergence would drown in, and the last two terms take that back.
    """

    p, q = z.softmax(1), z_ref.softmax(1)
    top, ref_top, p_top, q_top = (x.amax(1, keepdim=True) for x in (z, z_ref, p, q))
    # The largest p is 1 / sum exp(z - top). Of two such sums that are nearly equal, the logarithm of the ratio has more
    # digits than the difference of the logarithms.
    lse, ref_lse = top - p_top.log(), ref_top - q_top.log()
    apart = z_ref.sub_(ref_top).sub_(z.sub_(top)).add_((q_top / p_top).log_())
    dz = p.sub_(q)
    # Where q is 0 the product with an infinity is NaN, and means 0; a NaN of the logits themselves is in dz too.
    kl = apart.mul_(q).nan_to_num_(0.0, torch.inf, -torch.inf).add_(dz).sum(1).clamp_(min=0.0)
    return kl, lse[:, 0], ref_lse[:, 0], dz


def _backward(
    policy: tuple, ref: tuple, valid_N: Tensor, call: _Call, lse_N: Tensor, ref_lse_N: Tensor, grad_N: Tensor, needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, as `needs` says."""
    (hidden_ND, weight_VD, bias_V), (ref_hidden_NE, ref_weight_VE, ref_bias_V) = policy, ref
    n, vocab, head = hidden_ND.shape[0], weight_VD.shape[0], call.head
    g = torch.where(valid_N, grad_N * (head.logit_scale / head.temperature), 0.0)[:, None]
    # An ignored row's log-sum-exp may not be finite: with infinity, p and q are 0.
    lse, ref_lse = (torch.where(valid_N, x, torch.inf)[:, None] for x in (lse_N, ref_lse_N))
    height, step = call.plan.slab
    ref_scratch = ref_hidden_NE.new_empty(min(n, height) * min(step, vocab))

    def gradient(logits: Tensor, block: slice, part: slice, out: Tensor) -> None:
        ref_out = ref_scratch[: logits.numel()].view(logits.shape)
        ref_logits = product(ref_hidden_NE[block], ref_weight_VE[part].t(), ref_out)
        own, other = (None if b is None else b[part] for b in (bias_V, ref_bias_V))
        for piece in pieces(logits):
            z, z_ref = transformed(logits[piece], head, own), transformed(ref_logits[piece], head, other)
            slope = slope_of(z, head)
            dz = z.sub_(lse[block][piece]).exp_().sub_(z_ref.sub_(ref_lse[block][piece]).exp_()).mul_(g[block][piece])
            out[piece] = dz if slope is None else dz.mul_(slope)
        out.masked_fill_(~valid_N[block, None], 0.0)  # 0 times a logit that is not finite is NaN

    operands = Operands(hidden_ND, weight_VD, bias_V)
    return tuple(walk_vocabulary(operands, call.plan, gradient, (*needs, False, False))[:3])
