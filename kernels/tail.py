"""From per-token log-probabilities to any preference loss: segment sums, link and token gradients in one launch.

Forward, per group of K segments:

    d[n]     = (logp[n] - ref_logp[n]) * token_weight[n]
    raw[s]   = sum of d over the rows of segment s;   with prefix: plus raw of the response's earlier segments
    score[s] = scale[s] * raw[s]
    value, dscore[s] = link(score of the group, target, margin)
    value[g] = weight[g] * value

Backward, for L = sum_g value[g], in the same launch:

    u[s] = weight[g] * dscore[s] * scale[s];          with prefix: plus u of the response's later segments
    g[n] = dL/dlogp[n] = u[segment of n] * token_weight[n]

Bytes: 4 per row and operand (log-probs, reference, weights) and 4 for g; it is a few percent of the head at most.

Everything is fp32. Sums are made by one program in a fixed order, so the same inputs give the same bits; each lane
carries the rounding error of its sum along (Knuth's two-sum), so a segment of 10^6 rows is as exact as one of 100.
A row of token weight 0, and a group of weight 0, contribute exactly 0 even where their values are not finite.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefkern.layout import TailIndex

from . import links
from .tuning import Arch, Specialization, arch_of, on_its_device, register_limit

MAX_PARAMS = 6  # p0..p5 of a link
MAX_WARPS = 16
MAX_REGISTERS = 128  # what MAX_WARPS of them leave each thread
ELEMENTS_PER_WARP = 128
SHORT_SEGMENT = 16  # rows, on average


@triton.jit
def two_sum(a, b):
    """a + b rounded, and what the rounding lost (Knuth); 0 is lost where the sum is not finite, so inf stays inf."""
    total = a + b
    b_seen = total - a
    lost = (a - (total - b_seen)) + (b - b_seen)
    return total, tl.where(tl.abs(total) < float("inf"), lost, 0.0)


@triton.jit
def at_rows(ptr, start_K, offs_t):
    """Pointers to rows start_K + offs_t: 64 bits are spent on the segments' starts only, which saves registers."""
    return (ptr + start_K)[:, None] + offs_t[None, :]


@triton.jit
def row_weights(start_K, offs_t, mask, token_weight_ptr, labels_ptr, ignore_index):
    """Token weights of a tile of rows: 1 where there are none, 0 at ignored labels and outside the mask."""
    weight = tl.where(mask, 1.0, 0.0)
    if token_weight_ptr is not None:
        weight = tl.load(at_rows(token_weight_ptr, start_K, offs_t), mask=mask, other=0.0).to(tl.float32)
    if labels_ptr is not None:
        label = tl.load(at_rows(labels_ptr, start_K, offs_t), mask=mask, other=ignore_index)
        weight = tl.where(label != ignore_index, weight, 0.0)
    return weight


@triton.jit
def segment_sums(
    start_K, end_K, logps_ptr, ref_logps_ptr, token_weight_ptr, labels_ptr, ignore_index,
    VOLATILE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """(BLOCK_K,) sums of the weighted log-ratios of rows [start, end), tile by tile."""
    length_K = (end_K - start_K).to(tl.int32)
    total = tl.zeros((BLOCK_K, BLOCK_T), dtype=tl.float32)
    lost = tl.zeros((BLOCK_K, BLOCK_T), dtype=tl.float32)
    for t in range(0, tl.max(length_K, axis=0), BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask = offs_t[None, :] < length_K[:, None]
        ratio = tl.load(at_rows(logps_ptr, start_K, offs_t), mask=mask, other=0.0, volatile=VOLATILE)
        if ref_logps_ptr is not None:
            ratio -= tl.load(at_rows(ref_logps_ptr, start_K, offs_t), mask=mask, other=0.0)
        weight = row_weights(start_K, offs_t, mask, token_weight_ptr, labels_ptr, ignore_index)
        total, tile_lost = two_sum(total, tl.where(weight == 0.0, 0.0, ratio * weight))
        lost += tile_lost
    return tl.sum(total, axis=1) + tl.sum(lost, axis=1)


@triton.jit
def spread(
    u_K, start_K, end_K, g_ptr, token_weight_ptr, labels_ptr, ignore_index,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write g = u * token weight to rows [start, end) of every member."""
    length_K = (end_K - start_K).to(tl.int32)
    for t in range(0, tl.max(length_K, axis=0), BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask = offs_t[None, :] < length_K[:, None]
        weight = row_weights(start_K, offs_t, mask, token_weight_ptr, labels_ptr, ignore_index)
        g = tl.where(weight == 0.0, 0.0, u_K[:, None] * weight)
        tl.store(at_rows(g_ptr, start_K, offs_t), g, mask=mask)


@triton.jit
def group_members(group, group_offsets_ptr, segment_start_ptr, segment_end_ptr, BLOCK_K: tl.constexpr):
    """Segment numbers of a group's members, which of the BLOCK_K exist, and their rows [start, end)."""
    first_segment = tl.load(group_offsets_ptr + group)
    segment_K = first_segment + tl.arange(0, BLOCK_K)
    valid_K = segment_K < tl.load(group_offsets_ptr + group + 1)
    start_K = tl.load(segment_start_ptr + segment_K, mask=valid_K, other=0)
    end_K = tl.load(segment_end_ptr + segment_K, mask=valid_K, other=0)
    return segment_K, valid_K, start_K, end_K


@triton.jit
def chain_tail(
    chain,
    # rows
    logps_ptr, ref_logps_ptr, token_weight_ptr, labels_ptr, ignore_index,
    # layout, int64
    segment_start_ptr, segment_end_ptr, group_offsets_ptr, chain_offsets_ptr,
    # segments and groups
    scale_ptr, target_ptr, margin_ptr, group_weight_ptr, p0, p1, p2, p3, p4, p5,
    # results
    value_ptr, score_ptr, g_ptr, u_ptr,
    LINK: tl.constexpr, PREFIX: tl.constexpr, VOLATILE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Values, scores and token gradients of one chain: forward over its groups and, for prefix sums, back again.

    Pointers that a call does not need are None. VOLATILE: the log-probs were written by this very launch.
    """
    first_group = tl.load(chain_offsets_ptr + chain)
    last_group = tl.load(chain_offsets_ptr + chain + 1)
    running_K = tl.zeros((BLOCK_K,), dtype=tl.float32)
    running_lost_K = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for group in range(first_group, last_group):
        segment_K, valid_K, start_K, end_K = group_members(
            group, group_offsets_ptr, segment_start_ptr, segment_end_ptr, BLOCK_K
        )
        raw_K = segment_sums(
            start_K, end_K, logps_ptr, ref_logps_ptr, token_weight_ptr, labels_ptr, ignore_index,
            VOLATILE, BLOCK_K, BLOCK_T,
        )  # fmt: skip
        if PREFIX:
            running_K, lost_K = two_sum(running_K, raw_K)
            running_lost_K += lost_K
            raw_K = running_K + running_lost_K
        scale_K = tl.where(valid_K, 1.0, 0.0)
        if scale_ptr is not None:
            scale_K = tl.load(scale_ptr + segment_K, mask=valid_K, other=0.0)
        score_K = scale_K * raw_K
        tl.store(score_ptr + segment_K, score_K, mask=valid_K)

        target_K = tl.zeros((BLOCK_K,), dtype=tl.float32)
        if target_ptr is not None:
            target_K = tl.load(target_ptr + segment_K, mask=valid_K, other=0.0)
        margin = 0.0
        if margin_ptr is not None:
            margin = tl.load(margin_ptr + group)
        value, dscore_K = LINK(score_K, valid_K, target_K, margin, p0, p1, p2, p3, p4, p5)
        if group_weight_ptr is not None:
            group_weight = tl.load(group_weight_ptr + group)
            value = tl.where(group_weight == 0.0, 0.0, group_weight * value)
            dscore_K = tl.where(group_weight == 0.0, 0.0, group_weight * dscore_K)
        tl.store(value_ptr + group, value)
        if g_ptr is not None:
            u_K = dscore_K * scale_K
            if PREFIX:  # the later segments' share is not known yet
                tl.store(u_ptr + segment_K, u_K, mask=valid_K)
            else:
                spread(u_K, start_K, end_K, g_ptr, token_weight_ptr, labels_ptr, ignore_index, BLOCK_T)

    if PREFIX:
        if g_ptr is not None:
            tl.debug_barrier()  # u, stored above by the threads of this program
            later_K = tl.zeros((BLOCK_K,), dtype=tl.float32)
            later_lost_K = tl.zeros((BLOCK_K,), dtype=tl.float32)
            for step in range(0, last_group - first_group):
                segment_K, valid_K, start_K, end_K = group_members(
                    last_group - 1 - step, group_offsets_ptr, segment_start_ptr, segment_end_ptr, BLOCK_K
                )
                later_K, lost_K = two_sum(later_K, tl.load(u_ptr + segment_K, mask=valid_K, other=0.0))
                later_lost_K += lost_K
                u_K = later_K + later_lost_K
                spread(u_K, start_K, end_K, g_ptr, token_weight_ptr, labels_ptr, ignore_index, BLOCK_T)


# Layouts are views into one buffer: whether a view happens to be 16-byte aligned must not cost a recompile, and the
# loads of a segment start anywhere anyway.
LAYOUT_POINTERS = ["segment_start_ptr", "segment_end_ptr", "group_offsets_ptr", "chain_offsets_ptr"]
OPTIONAL_POINTERS = [
    "ref_logps_ptr", "token_weight_ptr", "scale_ptr", "target_ptr", "margin_ptr", "group_weight_ptr",
]  # fmt: skip
TAIL_POINTERS = [
    *LAYOUT_POINTERS, *OPTIONAL_POINTERS, "logps_ptr", "value_ptr", "score_ptr", "g_ptr", "u_ptr",
]  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=TAIL_POINTERS)
def tail_kernel(
    logps_ptr, ref_logps_ptr, token_weight_ptr,
    segment_start_ptr, segment_end_ptr, group_offsets_ptr, chain_offsets_ptr,
    scale_ptr, target_ptr, margin_ptr, group_weight_ptr, p0, p1, p2, p3, p4, p5,
    value_ptr, score_ptr, g_ptr, u_ptr,
    LINK: tl.constexpr, PREFIX: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid (chains,): one program computes one chain, see chain_tail."""
    chain_tail(
        tl.program_id(0),
        logps_ptr, ref_logps_ptr, token_weight_ptr, None, 0,
        segment_start_ptr, segment_end_ptr, group_offsets_ptr, chain_offsets_ptr,
        scale_ptr, target_ptr, margin_ptr, group_weight_ptr, p0, p1, p2, p3, p4, p5,
        value_ptr, score_ptr, g_ptr, u_ptr,
        LINK, PREFIX, False, BLOCK_K, BLOCK_T,
    )  # fmt: skip


def tail_tile(
    max_group: int, num_tokens: int, num_segments: int, max_warps: int, elements_per_warp: int = ELEMENTS_PER_WARP
) -> tuple[dict[str, int], int]:
    """Tile of chain_tail and warps that suit it: the smaller of two sizes where segments are short on average.

    One program reads a whole chain: a big tile keeps enough loads in flight. Segments of a few tokens (static(1))
    mean many small programs instead, where a big tile would be nearly all mask. Two sizes only: lengths may cause one
    recompile, not one a batch. Four elements a thread is what fits in MAX_REGISTERS at any BLOCK_K.
    """
    short = num_tokens <= SHORT_SEGMENT * num_segments
    block_k = triton.next_power_of_2(max_group)
    most = max(1, max_warps * elements_per_warp // block_k)
    block_t = min(most, max(16, 64 // block_k)) if short else most
    num_warps = min(max_warps, max(1, block_k * block_t // elements_per_warp))
    return dict(BLOCK_K=block_k, BLOCK_T=block_t), num_warps


def tail_args(
    index: TailIndex,
    params: Sequence[float],
    scale_S: Tensor | None,
    margin_G: Tensor | None,
    target_S: Tensor | None,
    weight_G: Tensor | None,
) -> dict[str, Tensor | float | None]:
    """Keyword arguments of a kernel that calls chain_tail: layout, per-segment and per-group operands, parameters."""
    num_segments, num_groups = index.segment_start_S.shape[0], index.prompt_of_group_G.shape[0]
    assert len(params) <= MAX_PARAMS, f"{len(params)} parameters, a link has {MAX_PARAMS}"
    p0, p1, p2, p3, p4, p5 = (*map(float, params), *[0.0] * (MAX_PARAMS - len(params)))
    return dict(
        segment_start_ptr=index.segment_start_S,
        segment_end_ptr=index.segment_end_S,
        group_offsets_ptr=index.group_offsets,
        chain_offsets_ptr=index.chain_offsets,
        scale_ptr=fp32_vector(scale_S, num_segments),
        target_ptr=fp32_vector(target_S, num_segments),
        margin_ptr=fp32_vector(margin_G, num_groups),
        group_weight_ptr=fp32_vector(weight_G, num_groups),
        p0=p0, p1=p1, p2=p2, p3=p3, p4=p4, p5=p5, PREFIX=index.prefix,
    )  # fmt: skip


def fp32_vector(x: Tensor | None, length: int) -> Tensor | None:
    """x as the contiguous fp32 vector of that length which a kernel expects; None stays None."""
    if x is None:
        return None
    assert x.shape == (length,), f"expected shape ({length},), got {tuple(x.shape)}"
    return x.to(torch.float32).contiguous()


@on_its_device
def tail(
    logps_N: Tensor,
    index: TailIndex,
    link: triton.JITFunction,
    params: Sequence[float] = (),
    *,
    ref_logps_N: Tensor | None = None,
    token_weights_N: Tensor | None = None,
    scale_S: Tensor | None = None,
    margin_G: Tensor | None = None,
    target_S: Tensor | None = None,
    weight_G: Tensor | None = None,
    want_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss of every group, score of every segment, and the gradient with respect to every log-probability.

    Args:
        logps_N: (N,) fp32 log-probabilities of the packed response tokens.
        index: the layout of the same N rows, on the same device.
        link: a function of links.py.
        params: its hyper-parameters, at most six numbers.
        ref_logps_N: (N,) reference log-probabilities, subtracted; None for 0.
        token_weights_N: (N,) weights of the log-ratios; None for 1. Rows of weight 0 take no part at all.
        scale_S: (S,) multiplies the segment sums; None for 1. One value per response where sums are prefix sums.
        margin_G: (G,) handed to the link; None for 0.
        target_S: (S,) handed to the link; None for 0.
        weight_G: (G,) weight of each group's loss; None for 1. Groups of weight 0 take no part at all.
        want_grad: compute g_N.
    Returns:
        value_G: (G,) fp32, weight * link value.
        score_S: (S,) fp32, in group order.
        g_N: (N,) fp32, d(sum of value_G)/d logps_N; None unless wanted. 0 on rows that belong to no segment.
    """
    (num_tokens,) = logps_N.shape
    num_segments, num_groups = index.segment_start_S.shape[0], index.prompt_of_group_G.shape[0]
    num_chains = index.chain_tokens_C.shape[0]
    assert index.chain_of_token_N.shape == (num_tokens,), "the layout is of another number of tokens"
    tile, num_warps = tail_tile(index.max_group, num_tokens, num_segments, MAX_WARPS)
    fp32 = dict(dtype=torch.float32, device=logps_N.device)
    value_G, score_S = torch.empty(num_groups, **fp32), torch.empty(num_segments, **fp32)
    g_N = torch.zeros(num_tokens, **fp32) if want_grad else None
    if num_chains == 0:
        return value_G, score_S, g_N
    tail_kernel[(num_chains,)](
        logps_ptr=fp32_vector(logps_N, num_tokens),
        ref_logps_ptr=fp32_vector(ref_logps_N, num_tokens),
        token_weight_ptr=fp32_vector(token_weights_N, num_tokens),
        value_ptr=value_G,
        score_ptr=score_S,
        g_ptr=g_N,
        u_ptr=torch.empty_like(score_S) if want_grad and index.prefix else None,
        LINK=link,
        **tail_args(index, params, scale_S, margin_G, target_S, weight_G),
        **tile,
        **register_limit(MAX_REGISTERS, arch_of(logps_N.device)),
        num_warps=num_warps,
    )
    return value_G, score_S, g_N


def tail_signature(absent: Sequence[str]) -> tuple[dict[str, str], dict[str, None]]:
    """Types of chain_tail's arguments for ahead-of-time compilation, and None for those that are absent."""
    pointers = {name: "*i64" if name in LAYOUT_POINTERS else "*fp32" for name in TAIL_POINTERS}
    types = {name: kind for name, kind in pointers.items() if name not in absent}
    return types | {f"p{i}": "fp32" for i in range(MAX_PARAMS)}, {name: None for name in absent}


def specializations(arch: Arch, dtype: torch.dtype) -> list[Specialization]:
    """What to compile ahead of time: every link, short segments, prefix sums over lists, and a bare evaluation."""
    if dtype != torch.float32:  # no argument of the kernel has another
        return []

    def one(name, link, prefix, max_group, mean_rows, absent):
        tile, num_warps = tail_tile(max_group, mean_rows, 1, MAX_WARPS)
        types, nones = tail_signature(absent=absent)
        constexprs = nones | tile | {"LINK": link, "PREFIX": prefix}
        return Specialization(
            f"tail {name}", tail_kernel, types, constexprs, num_warps, num_stages=1,
            sizes={"segment_rows": mean_rows}, limits=register_limit(MAX_REGISTERS, arch),
        )  # fmt: skip

    return [
        *(one(f"link {link.__name__}", link, False, members, 1000, ["u_ptr"]) for link, members in links.LINKS),
        one("pairs short", links.logistic, False, 2, 1, ["u_ptr"]),
        one("lists prefix", links.squared, True, 64, 1000, []),
        one("single plain", links.negative, False, 1, 1000, [*OPTIONAL_POINTERS, "g_ptr", "u_ptr"]),
    ]
