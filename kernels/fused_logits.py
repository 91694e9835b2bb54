"""One launch from stored logits to any preference loss: row statistics, segment sums, link and token gradients.

    forward    row_softmax's forward for every row, tail's chain for every chain, both in the same grid
    backward   row_softmax_backward with the g of this launch, in place if wanted: also one launch

A program writes the log-probabilities of its rows (where rows are split: whoever is the last of theirs to arrive)
and then counts itself in at their chains. Whoever completes a chain's count knows that all of its rows are written,
and computes the chain. Nobody waits for anybody, so the order in which programs run does not matter; and whoever comes
last does the same sums in the same order: deterministic. The counters are integers, there are no atomics on floats.

Bytes: the logits once, plus the tail's few bytes per row, which are in the cache. All results are fp32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefkern.head import Head, RowStats
from prefkern.layout import TailIndex

from . import links
from .logits import transform_args
from .row_softmax import (
    LOAD_BYTES,
    ROW_POINTERS,
    SIZES,
    empty_stats,
    launch_options,
    load_width,
    row_grid,
    row_statistics,
    split_parts,
    zeroed_counters,
)
from .tail import OPTIONAL_POINTERS, TAIL_POINTERS, chain_tail, fp32_vector, tail_args, tail_signature, tail_tile
from .tuning import TYPE_NAMES, Arch, Specialization, arch_of, on_its_device, register_limit, row_config

# The tail works less at a time than it does alone, so that its registers do not cost the rows their programs.
TAIL_ELEMENTS_PER_WARP = 64
MAX_REGISTERS = 96


@triton.jit(
    do_not_specialize=SIZES,
    do_not_specialize_on_alignment=[
        *TAIL_POINTERS,
        *ROW_POINTERS,
        "chain_of_token_ptr",
        "chain_tokens_ptr",
        "arrived_ptr",
    ],
)
def fused_logits_forward_kernel(
    logits_ptr, bias_ptr, labels_ptr,  # in: (N, V), (V,) or None, (N,)
    logps_ptr, lse_ptr, entropy_ptr, top1_ptr, mean_ptr, collision_ptr,  # out: (N,) each, the last four or None
    parts_ptr, row_arrived_ptr,  # as row_softmax_forward_kernel's
    stride_ln, stride_lv, N, V, splits, ignore_index, in_scale, out_scale,
    # layout and counters, (C,) int32, 0 at the start
    chain_of_token_ptr, chain_tokens_ptr, arrived_ptr,
    # as in chain_tail
    ref_logps_ptr, token_weight_ptr,
    segment_start_ptr, segment_end_ptr, group_offsets_ptr, chain_offsets_ptr,
    scale_ptr, target_ptr, margin_ptr, group_weight_ptr, p0, p1, p2, p3, p4, p5,
    value_ptr, score_ptr, g_ptr, u_ptr,
    HAS_SOFTCAP: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr,
    LINK: tl.constexpr, PREFIX: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BLOCK_N) * splits + C,): BLOCK_N rows a program, or a split of them; then one program per chain
    that only counts itself in.

    The latter are there for chains without any row. A chain is complete after (its rows + 1) arrivals.
    """
    pid = tl.program_id(0)
    row_programs = tl.cdiv(N, BLOCK_N) * splits
    is_rows = pid < row_programs
    is_done = pid >= row_programs
    first = pid - row_programs
    last = first + 1
    if is_rows:
        is_done = row_statistics(
            pid, logits_ptr, bias_ptr, labels_ptr, logps_ptr, lse_ptr, entropy_ptr, top1_ptr, mean_ptr, collision_ptr,
            parts_ptr, row_arrived_ptr, stride_ln, stride_lv, N, V, splits, ignore_index, in_scale, out_scale,
            HAS_SOFTCAP, WIDTH, BLOCK_N, BLOCK_V, LANES,
        )  # fmt: skip
        first = pid // splits * BLOCK_N
        last = tl.where(is_done, tl.minimum(first + BLOCK_N, N), first)
        if is_done:
            if g_ptr is not None:  # for rows that lie in no segment; those that do are written again by their chain
                offs_n = first + tl.arange(0, BLOCK_N)
                tl.store(g_ptr + offs_n, tl.zeros([BLOCK_N], dtype=tl.float32), mask=offs_n < N)
            tl.debug_barrier()  # every thread has written its rows before one of them says so

    for i in range(first, last):
        chain = tl.load(chain_of_token_ptr + i, mask=is_rows, other=i)
        # acq_rel: publishes this program's rows, and makes the rows of those who came before visible.
        earlier = tl.atomic_add(arrived_ptr + chain, 1, sem="acq_rel")
        if earlier == tl.load(chain_tokens_ptr + chain):
            chain_tail(
                chain,
                logps_ptr, ref_logps_ptr, token_weight_ptr, labels_ptr, ignore_index,
                segment_start_ptr, segment_end_ptr, group_offsets_ptr, chain_offsets_ptr,
                scale_ptr, target_ptr, margin_ptr, group_weight_ptr, p0, p1, p2, p3, p4, p5,
                value_ptr, score_ptr, g_ptr, u_ptr,
                LINK, PREFIX, True, BLOCK_K, BLOCK_T,
            )  # fmt: skip


@on_its_device
def fused_logits_forward(
    logits_NV: Tensor,
    labels_N: Tensor,
    head: Head,
    index: TailIndex,
    link: triton.JITFunction,
    params: Sequence[float] = (),
    *,
    bias_V: Tensor | None = None,
    ref_logps_N: Tensor | None = None,
    token_weights_N: Tensor | None = None,
    scale_S: Tensor | None = None,
    margin_G: Tensor | None = None,
    target_S: Tensor | None = None,
    weight_G: Tensor | None = None,
    want_grad: bool = True,
    want_entropy: bool = False,
    want_top1: bool = False,
    want_mean: bool = False,
    want_collision: bool = False,
) -> tuple[RowStats, Tensor, Tensor, Tensor | None]:
    """`row_softmax_forward` and `tail` of its log-probabilities, in one launch.

    Args:
        logits_NV: (N, V) fp32, fp16 or bf16 raw logits, any strides.
        labels_N: (N,) int64 in [0, V), or head.ignore_index: such a row has log-ratio 0, whatever its reference.
        head, bias_V, want_entropy, want_top1, want_mean, want_collision: as in `row_softmax_forward`.
        index, link, params and the operands by row, segment and group: as in `tail`.
    Returns:
        RowStats of (N,) tensors, then value_G, score_S and g_N as `tail` returns them; g_N is 0 on ignored rows.
    Gradient:
        row_softmax_backward(logits_NV, labels_N, stats.lse, g_N, head, grad_scale=dL/dvalue, out=...).
    """
    N, V = logits_NV.shape
    num_segments, num_groups = index.segment_start_S.shape[0], index.prompt_of_group_G.shape[0]
    num_chains = index.chain_tokens_C.shape[0]
    assert labels_N.shape == (N,) and V > 0
    assert index.chain_of_token_N.shape == (N,), "the layout is of another number of tokens"
    stats = empty_stats(N, logits_NV.device, want_entropy, want_top1, want_mean, want_collision)
    fp32 = dict(dtype=torch.float32, device=logits_NV.device)
    value_G, score_S = torch.empty(num_groups, **fp32), torch.empty(num_segments, **fp32)
    g_N = torch.empty(N, **fp32) if want_grad else None
    if num_chains == 0:
        return stats, value_G, score_S, g_N
    arch = arch_of(logits_NV.device)
    config = row_config(V, logits_NV.dtype, arch, writes=False)
    tile, _ = tail_tile(index.max_group, N, num_segments, config.num_warps, TAIL_ELEMENTS_PER_WARP)
    blocks, splits = row_grid(logits_NV, config)
    counters = zeroed_counters(blocks if splits > 1 else 0, num_chains, device=logits_NV.device)
    fused_logits_forward_kernel[(blocks * splits + num_chains,)](
        logits_ptr=logits_NV,
        bias_ptr=None if bias_V is None else bias_V.contiguous(),
        labels_ptr=labels_N.contiguous(),
        logps_ptr=stats.logps,
        lse_ptr=stats.lse,
        entropy_ptr=stats.entropy,
        top1_ptr=stats.is_top1,
        mean_ptr=stats.mean_logit,
        collision_ptr=stats.log_collision,
        parts_ptr=split_parts(N, splits, logits_NV.device),
        row_arrived_ptr=counters[0],
        stride_ln=logits_NV.stride(0),
        stride_lv=logits_NV.stride(1),
        N=N,
        V=V,
        splits=splits,
        ignore_index=head.ignore_index,
        chain_of_token_ptr=index.chain_of_token_N,
        chain_tokens_ptr=index.chain_tokens_C,
        arrived_ptr=counters[1],
        ref_logps_ptr=fp32_vector(ref_logps_N, N),
        token_weight_ptr=fp32_vector(token_weights_N, N),
        value_ptr=value_G,
        score_ptr=score_S,
        g_ptr=g_N,
        u_ptr=torch.empty_like(score_S) if want_grad and index.prefix else None,
        LINK=link,
        WIDTH=load_width(config, logits_NV),
        LANES=config.lanes,
        **launch_options(config),
        **register_limit(MAX_REGISTERS, arch),
        **transform_args(head),
        **tail_args(index, params, scale_S, margin_G, target_S, weight_G),
        **tile,
    )
    return stats, value_G, score_S, g_N


def specializations(arch: Arch, dtype: torch.dtype) -> list[Specialization]:
    """What to compile ahead of time: pairs with no option on a large and a small vocabulary, lists with every one."""
    x, f, i = f"*{TYPE_NAMES[dtype]}", "*fp32", "*i64"
    rows = {"logits_ptr": x, "bias_ptr": x, "labels_ptr": i, "lse_ptr": f, "entropy_ptr": f, "top1_ptr": "*i1"}
    rows |= {"mean_ptr": f, "collision_ptr": f, "in_scale": "fp32", "out_scale": "fp32"} | dict.fromkeys(SIZES, "i32")
    rows |= {"parts_ptr": f, "row_arrived_ptr": "*i32"}
    rows |= {"chain_of_token_ptr": i, "chain_tokens_ptr": i, "arrived_ptr": "*i32"}

    def one(name, link, prefix, max_group, mean_rows, absent, V=128_256):
        config = row_config(V, dtype, arch, writes=False)
        tile, _ = tail_tile(max_group, mean_rows, 1, config.num_warps, TAIL_ELEMENTS_PER_WARP)
        types, nones = tail_signature([a for a in absent if a in TAIL_POINTERS])
        types |= {key: kind for key, kind in rows.items() if key not in absent}
        constexprs = nones | {key: None for key in absent} | tile
        constexprs |= {"stride_lv": 1, "HAS_SOFTCAP": "bias_ptr" in types, "LINK": link, "PREFIX": prefix}
        constexprs |= {"LANES": config.lanes} | launch_options(config)
        constexprs["WIDTH"] = LOAD_BYTES.value // dtype.itemsize if config.lanes > 1 else 1
        return Specialization(
            f"fused_logits {name}", fused_logits_forward_kernel, types, constexprs,
            num_warps=constexprs.pop("num_warps"), num_stages=constexprs.pop("num_stages"),
            sizes={"V": V, "segment_rows": mean_rows}, config=config, limits=register_limit(MAX_REGISTERS, arch),
        )  # fmt: skip

    plain = [*OPTIONAL_POINTERS, "u_ptr", "bias_ptr", "entropy_ptr", "top1_ptr", "mean_ptr", "collision_ptr"]
    return [
        one("pairs plain", links.logistic, False, 2, 1000, plain),
        one("pairs plain short", links.logistic, False, 2, 1000, plain, V=507),
        one("lists prefix full", links.squared, True, 64, 1000, []),
    ]
