"""The definition: every quantity of the package in a few lines of plain torch, differentiable by autograd.

Kernels and chunked bodies are tested against these functions. They hold the whole N x V matrix of logits.
Arithmetic is fp32 for fp32, fp16 and bf16 inputs, and float64 for float64 inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.head import Head, RowStats
from prefkern.layout import TailIndex


def transform(raw_NV: Tensor, head: Head) -> Tensor:
    """z = softcap * tanh(logit_scale * raw / softcap) / temperature, in at least fp32."""
    z = raw_NV.to(accumulator(raw_NV.dtype)) * head.logit_scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / head.temperature


def rows_from_logits(raw_NV: Tensor, labels_N: Tensor, head: Head, want: tuple[str, ...] = ()) -> RowStats:
    """Row statistics of raw logits; see RowStats for their meaning, `want` names the optional ones."""
    z = transform(raw_NV, head)
    valid = labels_N != head.ignore_index
    label = labels_N.clamp(0, z.shape[-1] - 1)
    lse = torch.logsumexp(z, -1)
    log_p = F.log_softmax(z, -1)
    logps = log_p.gather(-1, label[:, None])[:, 0]
    plogp = log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0.0)  # before the product: 0 times -inf is NaN
    best = z.gather(-1, label[:, None])[:, 0] >= z.amax(-1)

    def keep(x: Tensor) -> Tensor:
        return torch.where(valid, x, 0.0)

    return RowStats(
        logps=keep(torch.where((labels_N >= 0) & (labels_N < z.shape[-1]), logps, torch.nan)),
        lse=keep(lse).detach(),
        entropy=keep(-plogp.sum(-1)) if "entropy" in want else None,
        is_top1=(best & valid).detach() if "is_top1" in want else None,
        mean_logit=keep(z.mean(-1)).detach() if "mean_logit" in want else None,
        log_collision=keep(torch.logsumexp(2 * log_p, -1)).detach() if "log_collision" in want else None,
    )


def rows_from_hidden(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    head: Head,
    want: tuple[str, ...] = (),
    low_NR: Tensor | None = None,
    low_weight_VR: Tensor | None = None,
) -> RowStats:
    """Row statistics of hidden states under a language-model head; the logits are rounded to hidden's dtype.

    low_NR, low_weight_VR: an adapter's factors, whose product is added to the logits.
    """
    bias_V = None if bias_V is None else bias_V.to(hidden_ND.dtype)
    raw_NV = F.linear(hidden_ND, weight_VD, bias_V)
    if low_NR is not None:
        raw_NV = raw_NV + F.linear(low_NR, low_weight_VR)
    return rows_from_logits(raw_NV, labels_N, head, want)


def kl_from_hidden(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    ref_hidden_NE: Tensor,
    ref_weight_VE: Tensor,
    ref_bias_V: Tensor | None,
    valid_N: Tensor,
    head: Head,
) -> Tensor:
    """(N,) KL(reference || policy) in nats, differentiable in the policy; 0 where not valid.

    A vocabulary entry whose reference probability is 0 adds nothing, whatever the policy's is.
    """

    def log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(hidden.dtype)
        return F.log_softmax(transform(F.linear(hidden, weight, bias), head), -1)

    log_p = log_softmax(hidden_ND, weight_VD, bias_V)
    with torch.no_grad():
        log_ref = log_softmax(ref_hidden_NE, ref_weight_VE, ref_bias_V)
        ref = log_ref.exp()
    apart = torch.where(ref > 0, log_ref - log_p, 0.0)  # before the product: 0 times -inf is NaN
    return torch.where(valid_N, (ref * apart).sum(-1), 0.0)


def log_ratios(logps_N: Tensor, ref_logps_N: Tensor | None, token_weights_N: Tensor | None) -> Tensor:
    """d_n = token_weight_n * (logp_n - ref_logp_n), exactly 0, also in gradient, where the weight is 0."""
    if token_weights_N is None:
        return logps_N if ref_logps_N is None else logps_N - ref_logps_N
    counted = token_weights_N != 0
    d = torch.where(counted, logps_N, 0.0)  # before the product: 0 times an infinite log-ratio is NaN, in backward too
    if ref_logps_N is not None:
        d = d - torch.where(counted, ref_logps_N, 0.0)
    return d * token_weights_N


def span_sums(values_N: Tensor, offsets: Tensor) -> Tensor:
    """Sum of each span [offsets[i], offsets[i + 1]), in float64 inside, the same bits on every call.

    The spans cover all of values_N, one after the other.
    """
    wide = values_N.cpu() if values_N.device.type == "mps" else values_N  # Apple's GPU has no float64
    sums = _SpanSums.apply(wide.double(), offsets.to(wide.device))
    return sums.to(accumulator(values_N.dtype)).to(values_N.device)


class _SpanSums(torch.autograd.Function):
    """torch.segment_reduce has no second derivative; its own backward, a gather, has one."""

    @staticmethod
    def forward(ctx, values_N, offsets):
        ctx.save_for_backward(offsets)
        ctx.num_values = values_N.shape[0]
        return torch.segment_reduce(values_N, "sum", offsets=offsets, axis=0, unsafe=True, initial=0)

    @staticmethod
    def backward(ctx, grad):
        (offsets,) = ctx.saved_tensors
        return grad.repeat_interleave(offsets.diff(), output_size=ctx.num_values), None


def segment_scores(d_N: Tensor, index: TailIndex, scale_R: Tensor | None, parts_R: tuple[int, ...]) -> Tensor:
    """score_s = scale * sum of d over segment s (prefix: over the response up to the segment's end), in group order."""
    raw = span_sums(d_N, index.row_order_offsets)
    if index.prefix:
        raw = torch.cat([part.cumsum(0) for part in raw.split(parts_R)]) if parts_R else raw
    score_S = torch.empty_like(raw).index_copy(0, index.token_order_S, raw)
    return score_S if scale_R is None else score_S * scale_R[index.response_of_segment_S]


def pad_groups(score_S: Tensor, index: TailIndex) -> tuple[Tensor, Tensor]:
    """(G, K) scores and their validity, from scores in group order; places past a group's size hold 0."""
    groups, segments = index.group_offsets.numel() - 1, score_S.numel()
    member = torch.arange(segments, device=score_S.device) - index.group_offsets[index.group_of_segment_S]
    place = index.group_of_segment_S * index.max_group + member
    flat = score_S.new_zeros(groups * index.max_group)
    valid = torch.zeros_like(flat, dtype=torch.bool).index_fill(0, place, True)
    shape = (groups, index.max_group)
    return flat.index_copy(0, place, score_S).view(shape), valid.view(shape)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
