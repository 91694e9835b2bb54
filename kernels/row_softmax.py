"""Log-probability of each row's label and more row statistics from stored logits, in one read; the gradient in place.

    forward    z = transform(logits + bias);  lse = logsumexp_v z;  logp = z[label] - lse;
               entropy = lse - sum_v p_v z_v;  log_collision = log sum_v p_v^2;  p = exp(z - lse)
    backward   dlogits = s (g (onehot - p) - h p (log p + entropy)) dz/dz0,    g = dL/dlogp, h = dL/dentropy

Bytes: forward reads the logits once, backward reads them once and writes their gradient once; rows to ignore are not
read. All maths and all row results are fp32; the gradient is rounded once, to the logits' dtype.

A row may be split over programs. In forward each leaves its running sums and counts itself in, and the last to arrive
combines them, whichever that is. Each thread keeps running sums of its own, and they meet at the end, so no thread
waits for another while logits are on their way. Tiles are counted from a multiple of 16 bytes wherever a row starts,
so all but the crumbs at its ends loads 16 bytes at a time. The order of the sums follows from shape, strides and where
in 16 bytes the rows start: deterministic.
Source: Milakov & Gimelshein 2018, arXiv:1805.02867 (online normaliser); the entropy sum is derived.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefkern.head import Head, RowStats

from .logits import cap_slope, fold_tile, label_column, label_logp_grad, merge_sums, transform, transform_args
from .tuning import (
    MAX_ROW_SPLITS,
    TYPE_NAMES,
    Arch,
    RowConfig,
    Specialization,
    arch_of,
    choose,
    on_its_device,
    register_limit,
    row_config,
    row_splits,
)

MAX_REGISTERS = 80  # of a thread in forward
PARTS = 5  # running sums of a split: max, sum, dot, square, total
ALL_SPLITS = tl.constexpr(MAX_ROW_SPLITS)
LOAD_BYTES = tl.constexpr(16)  # the widest load


@triton.jit
def cut_columns(row_ptr, wanted, split, splits, V, WIDTH: tl.constexpr, BLOCK_V: tl.constexpr):
    """Which columns of the row at row_ptr are one split's: (shift, begin, first, last, stop, end).

    Columns are counted from `shift` elements before the row, a multiple of WIDTH elements in memory. The split is
    [begin, end), or nothing unless `wanted`; of that, [first, stop) are whole pieces of WIDTH, and [first, last) whole
    tiles of BLOCK_V.
    """
    shift = 0
    if WIDTH > 1:
        ITEM: tl.constexpr = row_ptr.dtype.element_ty.primitive_bitwidth // 8
        shift = (row_ptr.to(tl.int64) // ITEM % WIDTH).to(tl.int32)
    span = tl.cdiv(tl.cdiv(V, BLOCK_V), splits) * BLOCK_V
    begin = split * span
    end = tl.where(split == splits - 1, V + shift, tl.minimum(begin + span, V + shift))
    end = tl.where(wanted & (begin < end), end, begin)
    first = begin + tl.where(begin < tl.minimum(shift, end), WIDTH, 0)
    stop = end // WIDTH * WIDTH
    last = first + tl.maximum(stop - first, 0) // BLOCK_V * BLOCK_V
    return shift, begin, first, last, stop, end


@triton.jit
def crumbs(shift, begin, first, stop, end, WIDTH: tl.constexpr):
    """What whole pieces leave over: (whether there is anything, 2 * WIDTH columns, which of them are meant)."""
    offs = tl.arange(0, 2 * WIDTH)
    column = tl.where(offs < WIDTH, begin + offs, stop - WIDTH + offs)
    meant = tl.where(offs < WIDTH, first > begin, stop >= first) & (column >= shift) & (column < end)
    return (first > begin) | (stop < end), column, meant


@triton.jit
def to_lanes(z, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """(rows, columns) to (rows, lanes, rest): a lane gets the columns that loads of WIDTH elements give one thread."""
    BLOCK_N: tl.constexpr = z.shape[0]
    OWN: tl.constexpr = z.shape[1] // LANES
    if LANES == 1:
        lanes = tl.reshape(z, [BLOCK_N, 1, OWN])
    else:
        pieces = tl.reshape(z, [BLOCK_N, OWN // WIDTH, LANES, WIDTH])
        lanes = tl.reshape(tl.permute(pieces, (0, 2, 1, 3)), [BLOCK_N, LANES, OWN])
    return lanes


@triton.jit
def load_logits(
    row_ptrs, bias_ptr, column, shift, mask, mask_v, stride_lv, in_scale, out_scale,
    HAS_SOFTCAP: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """Transformed logits z of one tile, fp32; 0 where masked. mask and mask_v (columns) may be None."""
    ptrs = row_ptrs[:, None] + (column.to(tl.int64) * stride_lv)[None, :]
    if mask is None:
        z0 = tl.load(ptrs, eviction_policy=EVICTION).to(tl.float32)
    else:
        z0 = tl.load(ptrs, mask=mask, other=0.0, eviction_policy=EVICTION).to(tl.float32)
    if bias_ptr is not None:
        if mask_v is None:
            z0 += tl.load(bias_ptr + column - shift).to(tl.float32)[None, :]
        else:
            z0 += tl.load(bias_ptr + column - shift, mask=mask_v, other=0.0).to(tl.float32)[None, :]
    return transform(z0, in_scale, out_scale, HAS_SOFTCAP)


@triton.jit
def fold_columns(
    row_ptrs, bias_ptr, start, shift, stop, stride_lv, in_scale, out_scale,
    max_nk, sum_nk, dot_nk, square_nk, total_nk,
    EDGE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr, WANT_MEAN: tl.constexpr, WANT_COLLISION: tl.constexpr,
    BLOCK_V: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Fold the tile of columns from start on into the lanes' running sums; EDGE: it does not reach to its end."""
    column = start + tl.arange(0, BLOCK_V)
    mask_v = None
    mask = None
    if EDGE:
        mask_v = column < stop
        mask = mask_v[None, :]
    z = load_logits(
        row_ptrs, bias_ptr, column, shift, mask, mask_v, stride_lv, in_scale, out_scale, HAS_SOFTCAP, ""
    )  # fmt: skip
    if WANT_MEAN:
        total_nk += tl.sum(to_lanes(z, LANES, WIDTH), axis=2)
    if EDGE:
        z = tl.where(mask, z, float("-inf"))
    max_nk, sum_nk, dot_nk, square_nk = fold_tile(
        to_lanes(z, LANES, WIDTH), max_nk, sum_nk, dot_nk, square_nk, WANT_ENTROPY, WANT_COLLISION
    )
    return max_nk, sum_nk, dot_nk, square_nk, total_nk


@triton.jit
def split_sums(
    row_ptrs, row_ptr, bias_ptr, wanted, split, splits, stride_lv, V, in_scale, out_scale,
    HAS_SOFTCAP: tl.constexpr, WANT_ENTROPY: tl.constexpr, WANT_MEAN: tl.constexpr, WANT_COLLISION: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Running sums (max, sum, dot, square, total) of the rows at row_ptrs over one split; row_ptr is the first."""
    BLOCK_N: tl.constexpr = row_ptrs.shape[0]
    shift, begin, first, last, stop, end = cut_columns(row_ptr, wanted, split, splits, V, WIDTH, BLOCK_V)
    if WIDTH > 1:
        row_ptrs = tl.multiple_of(row_ptrs - shift, [LOAD_BYTES])
    max_nk = tl.full([BLOCK_N, LANES], float("-inf"), tl.float32)
    sum_nk = tl.zeros([BLOCK_N, LANES], tl.float32)
    dot_nk = tl.zeros([BLOCK_N, LANES], tl.float32)
    square_nk = tl.zeros([BLOCK_N, LANES], tl.float32)
    total_nk = tl.zeros([BLOCK_N, LANES], tl.float32)
    for start in range(first, last, BLOCK_V):
        max_nk, sum_nk, dot_nk, square_nk, total_nk = fold_columns(
            row_ptrs, bias_ptr, start, shift, stop, stride_lv, in_scale, out_scale,
            max_nk, sum_nk, dot_nk, square_nk, total_nk,
            False, HAS_SOFTCAP, WANT_ENTROPY, WANT_MEAN, WANT_COLLISION, BLOCK_V, LANES, WIDTH,
        )  # fmt: skip
    if last < stop:
        max_nk, sum_nk, dot_nk, square_nk, total_nk = fold_columns(
            row_ptrs, bias_ptr, last, shift, stop, stride_lv, in_scale, out_scale,
            max_nk, sum_nk, dot_nk, square_nk, total_nk,
            True, HAS_SOFTCAP, WANT_ENTROPY, WANT_MEAN, WANT_COLLISION, BLOCK_V, LANES, WIDTH,
        )  # fmt: skip
    max_n, sum_n, dot_n, square_n = merge_sums(max_nk, sum_nk, dot_nk, square_nk, 1, WANT_ENTROPY, WANT_COLLISION)
    total_n = tl.sum(total_nk, axis=1)
    if WIDTH > 1:
        has_crumbs, column, mask_v = crumbs(shift, begin, first, stop, end, WIDTH)
        if has_crumbs:
            mask = mask_v[None, :]
            z = load_logits(
                row_ptrs, bias_ptr, column, shift, mask, mask_v, stride_lv, in_scale, out_scale, HAS_SOFTCAP, ""
            )  # fmt: skip
            if WANT_MEAN:
                total_n += tl.sum(z, axis=1)
            z = tl.where(mask, z, float("-inf"))
            max_n, sum_n, dot_n, square_n = fold_tile(
                z, max_n, sum_n, dot_n, square_n, WANT_ENTROPY, WANT_COLLISION
            )  # fmt: skip
    return max_n, sum_n, dot_n, square_n, total_n


@triton.jit
def finish_stats(
    logp_ptr, lse_ptr, entropy_ptr, top1_ptr, mean_ptr,
    offs_n, mask_n, label_n, z_label_n, max_n, sum_n, dot_n, total_n, V, ignore_index,
):  # fmt: skip
    """Row sums to row statistics, and store them; an output that is None is not wanted."""
    kept_n = label_n != ignore_index
    z_label_n = tl.where((label_n >= 0) & (label_n < V), z_label_n, float("nan"))
    log_sum_n = tl.log(sum_n)
    lse_n = max_n + log_sum_n
    # (z - max) first: both are large when logits are, their difference is not.
    tl.store(logp_ptr + offs_n, tl.where(kept_n, (z_label_n - max_n) - log_sum_n, 0.0), mask=mask_n)
    tl.store(lse_ptr + offs_n, tl.where(kept_n, lse_n, 0.0), mask=mask_n)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + offs_n, tl.where(kept_n, log_sum_n - dot_n / sum_n, 0.0), mask=mask_n)
    if top1_ptr is not None:
        tl.store(top1_ptr + offs_n, kept_n & (z_label_n >= max_n), mask=mask_n)
    if mean_ptr is not None:
        tl.store(mean_ptr + offs_n, tl.where(kept_n, total_n / V, 0.0), mask=mask_n)


@triton.jit
def row_statistics(
    pid, logits_ptr, bias_ptr, labels_ptr,
    logp_ptr, lse_ptr, entropy_ptr, top1_ptr, mean_ptr, collision_ptr,
    parts_ptr, arrived_ptr,
    stride_ln, stride_lv, N, V, splits, ignore_index, in_scale, out_scale,
    HAS_SOFTCAP: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One split of BLOCK_N rows, and if it is the last of theirs to be done, their results; returns whether it was."""
    WANT_ENTROPY: tl.constexpr = entropy_ptr is not None
    WANT_MEAN: tl.constexpr = mean_ptr is not None
    WANT_COLLISION: tl.constexpr = collision_ptr is not None
    block = pid // splits
    split = pid % splits
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)  # rows past the end repeat the last one: no mask, no log of 0
    label_n = tl.load(labels_ptr + rows)
    wanted = tl.max((label_n != ignore_index).to(tl.int32), axis=0) > 0
    row_ptrs = logits_ptr + rows * stride_ln
    max_n, sum_n, dot_n, square_n, total_n = split_sums(
        row_ptrs, logits_ptr + (block * BLOCK_N).to(tl.int64) * stride_ln, bias_ptr,
        wanted, split, splits, stride_lv, V, in_scale, out_scale,
        HAS_SOFTCAP, WANT_ENTROPY, WANT_MEAN, WANT_COLLISION, WIDTH, BLOCK_V, LANES,
    )  # fmt: skip

    is_last = pid >= 0
    if splits > 1:
        size = tl.cast(N, tl.int64)
        plane = size * splits
        own_ptrs = parts_ptr + split * size + rows
        tl.store(own_ptrs, max_n, mask=mask_n)
        tl.store(own_ptrs + plane, sum_n, mask=mask_n)
        if WANT_ENTROPY:
            tl.store(own_ptrs + 2 * plane, dot_n, mask=mask_n)
        if WANT_COLLISION:
            tl.store(own_ptrs + 3 * plane, square_n, mask=mask_n)
        if WANT_MEAN:
            tl.store(own_ptrs + 4 * plane, total_n, mask=mask_n)
        tl.debug_barrier()  # every thread has written its rows' sums before one of them says so
        # acq_rel: publishes these sums, and makes those of who came before visible.
        is_last = tl.atomic_add(arrived_ptr + block, 1, sem="acq_rel") == splits - 1
        if is_last:
            offs_k = tl.arange(0, ALL_SPLITS)[:, None]
            all_ptrs = parts_ptr + offs_k * size + rows[None, :]
            mask_k = offs_k < splits
            max_kn = tl.load(all_ptrs, mask=mask_k, other=float("-inf"), volatile=True)
            sum_kn = tl.load(all_ptrs + plane, mask=mask_k, other=0.0, volatile=True)
            dot_kn = sum_kn
            square_kn = sum_kn
            if WANT_ENTROPY:
                dot_kn = tl.load(all_ptrs + 2 * plane, mask=mask_k, other=0.0, volatile=True)
            if WANT_COLLISION:
                square_kn = tl.load(all_ptrs + 3 * plane, mask=mask_k, other=0.0, volatile=True)
            if WANT_MEAN:
                total_n = tl.sum(tl.load(all_ptrs + 4 * plane, mask=mask_k, other=0.0, volatile=True), axis=0)
            max_n, sum_n, dot_n, square_n = merge_sums(
                max_kn, sum_kn, dot_kn, square_kn, 0, WANT_ENTROPY, WANT_COLLISION
            )

    if is_last:
        # One gather per row instead of a comparison per logit.
        inside_n = (label_n >= 0) & (label_n < V)
        z_label_n = tl.load(row_ptrs + label_n.to(tl.int64) * stride_lv, mask=inside_n, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            z_label_n += tl.load(bias_ptr + label_n, mask=inside_n, other=0.0).to(tl.float32)
        z_label_n = transform(z_label_n, in_scale, out_scale, HAS_SOFTCAP)
        finish_stats(
            logp_ptr, lse_ptr, entropy_ptr, top1_ptr, mean_ptr,
            offs_n, mask_n, label_n, z_label_n, max_n, sum_n, dot_n, total_n, V, ignore_index,
        )  # fmt: skip
        if WANT_COLLISION:
            log_collision_n = tl.log(square_n) - 2.0 * tl.log(sum_n)
            tl.store(collision_ptr + offs_n, tl.where(label_n != ignore_index, log_collision_n, 0.0), mask=mask_n)
    return is_last


# Neither the numbers of rows and columns nor where a view starts may cost a recompile.
SIZES = ["stride_ln", "N", "V", "splits", "ignore_index"]
ROW_POINTERS = ["logits_ptr", "bias_ptr", "labels_ptr"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ROW_POINTERS)
def row_softmax_forward_kernel(
    logits_ptr, bias_ptr, labels_ptr,  # in: (N, V), (V,) or None, (N,)
    logp_ptr, lse_ptr, entropy_ptr, top1_ptr, mean_ptr, collision_ptr,  # out: (N,) each, the last four or None
    parts_ptr, arrived_ptr,  # (PARTS, splits, N) fp32; (row blocks,) int32, 0 at the start; unused with one split
    stride_ln, stride_lv,
    N, V, splits, ignore_index,
    in_scale, out_scale,
    HAS_SOFTCAP: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BLOCK_N) * splits,): one program walks one split of BLOCK_N rows, see row_statistics."""
    row_statistics(
        tl.program_id(0), logits_ptr, bias_ptr, labels_ptr,
        logp_ptr, lse_ptr, entropy_ptr, top1_ptr, mean_ptr, collision_ptr, parts_ptr, arrived_ptr,
        stride_ln, stride_lv, N, V, splits, ignore_index, in_scale, out_scale,
        HAS_SOFTCAP, WIDTH, BLOCK_N, BLOCK_V, LANES,
    )  # fmt: skip


@triton.jit
def write_gradient(
    row_ptrs, out_ptrs, bias_ptr, column, mask_v, shift, stride_lv, stride_ov,
    column_n, kept_n, mask_n, lse_n, grad_logp_n, entropy_n, grad_entropy_n, in_scale, out_scale,
    HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """Gradient of those of the given columns that mask_v says."""
    read = kept_n[:, None] & mask_v[None, :]
    write = mask_n[:, None] & mask_v[None, :]
    z = load_logits(
        row_ptrs, bias_ptr, column, shift, read, mask_v, stride_lv, in_scale, out_scale, HAS_SOFTCAP, "evict_first"
    )  # fmt: skip
    is_label = column[None, :] == column_n[:, None]
    dz = label_logp_grad(z, is_label, lse_n, grad_logp_n, entropy_n, grad_entropy_n, HAS_ENTROPY)
    if HAS_SOFTCAP:
        dz *= cap_slope(z, out_scale)
    if bias_ptr is not None:  # else z is 0 where not kept
        dz = tl.where(kept_n[:, None], dz, 0.0)
    ptrs = out_ptrs[:, None] + (column.to(tl.int64) * stride_ov)[None, :]
    tl.store(ptrs, dz.to(ptrs.dtype.element_ty), mask=write)


@triton.jit(
    do_not_specialize=[*SIZES, "stride_on"],
    do_not_specialize_on_alignment=[
        *ROW_POINTERS, "lse_ptr", "entropy_ptr", "grad_logp_ptr", "grad_entropy_ptr", "grad_scale_ptr", "out_ptr",
    ],
)  # fmt: skip
def row_softmax_backward_kernel(
    logits_ptr, bias_ptr, labels_ptr, lse_ptr, entropy_ptr,  # in: (N, V), (V,) or None, (N,), (N,), (N,) or None
    grad_logp_ptr, grad_entropy_ptr, grad_scale_ptr,  # in: (N,), (N,) or None, () or None
    out_ptr,  # out: (N, V), may be logits_ptr: each element is read and written by one thread
    stride_ln, stride_lv, stride_on, stride_ov,
    N, V, splits, ignore_index,
    in_scale, out_scale,
    HAS_SOFTCAP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BLOCK_N) * splits,): one program writes one split of the gradient of BLOCK_N rows."""
    HAS_ENTROPY: tl.constexpr = grad_entropy_ptr is not None
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # what the forward read last is still in the cache
    block = pid // splits
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    rows = offs_n.to(tl.int64)
    label_n = tl.load(labels_ptr + offs_n, mask=mask_n, other=ignore_index)
    kept_n = mask_n & (label_n != ignore_index)
    scale = in_scale * out_scale
    if grad_scale_ptr is not None:
        scale *= tl.load(grad_scale_ptr).to(tl.float32)
    # The lse of an ignored row is not its own: with infinity, p is 0.
    lse_n = tl.load(lse_ptr + offs_n, mask=kept_n, other=float("inf"))
    grad_logp_n = tl.load(grad_logp_ptr + offs_n, mask=kept_n, other=0.0).to(tl.float32) * scale
    entropy_n = lse_n
    grad_entropy_n = grad_logp_n
    if HAS_ENTROPY:
        entropy_n = tl.load(entropy_ptr + offs_n, mask=kept_n, other=0.0)
        grad_entropy_n = tl.load(grad_entropy_ptr + offs_n, mask=kept_n, other=0.0).to(tl.float32) * scale

    row_ptrs = logits_ptr + rows * stride_ln
    out_ptrs = out_ptr + rows * stride_on
    row_ptr = logits_ptr + (block * BLOCK_N).to(tl.int64) * stride_ln
    shift, begin, first, _, stop, end = cut_columns(row_ptr, True, pid % splits, splits, V, WIDTH, BLOCK_V)
    column_n = label_column(label_n, V)
    column_n = tl.where(kept_n & (column_n >= 0), column_n + shift, -1)
    if WIDTH > 1:
        row_ptrs = tl.multiple_of(row_ptrs - shift, [LOAD_BYTES])
        out_ptrs = tl.multiple_of(out_ptrs - shift, [LOAD_BYTES])
    for start in range(first, stop, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        write_gradient(
            row_ptrs, out_ptrs, bias_ptr, column, column < stop, shift, stride_lv, stride_ov,
            column_n, kept_n, mask_n, lse_n, grad_logp_n, entropy_n, grad_entropy_n, in_scale, out_scale,
            HAS_SOFTCAP, HAS_ENTROPY,
        )  # fmt: skip
    if WIDTH > 1:
        has_crumbs, column, meant = crumbs(shift, begin, first, stop, end, WIDTH)
        if has_crumbs:
            write_gradient(
                row_ptrs, out_ptrs, bias_ptr, column, meant, shift, stride_lv, stride_ov,
                column_n, kept_n, mask_n, lse_n, grad_logp_n, entropy_n, grad_entropy_n, in_scale, out_scale,
                HAS_SOFTCAP, HAS_ENTROPY,
            )  # fmt: skip


def empty_stats(
    N: int, device: torch.device, want_entropy: bool, want_top1: bool, want_mean: bool, want_collision: bool = False
) -> RowStats:
    """Fresh outputs for N rows; None where not wanted."""

    def fresh(wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.empty(N, dtype=dtype, device=device) if wanted else None

    top1 = fresh(want_top1, torch.bool)
    return RowStats(fresh(True), fresh(True), fresh(want_entropy), top1, fresh(want_mean), fresh(want_collision))


def row_grid(logits_NV: Tensor, config: RowConfig) -> tuple[int, int]:
    """Blocks of rows, and splits of each."""
    N, V = logits_NV.shape
    return triton.cdiv(N, config.block_n), row_splits(N, V, config, arch_of(logits_NV.device))


def split_parts(N: int, splits: int, device: torch.device) -> Tensor:
    """Where the splits of a row leave their sums for the last of them; empty where rows are not split."""
    return torch.empty((PARTS, splits, N) if splits > 1 else 0, dtype=torch.float32, device=device)


def zeroed_counters(*numbers: int, device: torch.device) -> tuple[Tensor, ...]:
    """Counters of arrivals, so many of each kind.

    They are fresh in every call. Kept between calls, and reset by whoever completes a count, they would need no
    zeroing; but two streams, or a captured graph replayed beside its successor, could then count in the same ones.
    """
    return torch.zeros(sum(numbers), dtype=torch.int32, device=device).split(numbers)


def load_width(config: RowConfig, *matrices: Tensor) -> int:
    """Elements of the pieces that tiles load and store: 16 bytes of them, or 1 where pieces would not be aligned.

    They are with one row a program and unit strides, if every row starts equally far from a multiple of 16 bytes in
    all of the matrices.
    """
    first = matrices[0]
    alike = all(
        m.stride(1) == 1
        and m.dtype == first.dtype
        and (m.data_ptr() - first.data_ptr()) % LOAD_BYTES.value == 0
        and (m.stride(0) - first.stride(0)) * m.itemsize % LOAD_BYTES.value == 0
        for m in matrices
    )
    return LOAD_BYTES.value // first.itemsize if alike and config.lanes > 1 else 1


@on_its_device
def row_softmax_forward(
    logits_NV: Tensor,
    labels_N: Tensor,
    head: Head,
    *,
    bias_V: Tensor | None = None,
    want_entropy: bool = False,
    want_top1: bool = False,
    want_mean: bool = False,
    want_collision: bool = False,
) -> RowStats:
    """Row statistics of stored raw logits.

    Args:
        logits_NV: (N, V) fp32, fp16 or bf16, any strides.
        labels_N: (N,) int64 in [0, V), or head.ignore_index. A label outside both gives logp NaN: finding it on the
            host would cost a synchronisation.
        head: the transform from raw logits to those of the softmax.
        bias_V: (V,), added to the raw logits.
        want_entropy, want_top1, want_mean, want_collision: which optional statistics to compute.
    Returns:
        RowStats of fresh (N,) tensors; ignored rows hold 0 and False.
    """
    N, V = logits_NV.shape
    assert labels_N.shape == (N,) and V > 0
    stats = empty_stats(N, logits_NV.device, want_entropy, want_top1, want_mean, want_collision)
    if N == 0:
        return stats
    labels_N = labels_N.contiguous()
    bias_V = None if bias_V is None else bias_V.contiguous()

    def launch(config: RowConfig) -> None:
        blocks, splits = row_grid(logits_NV, config)
        device = logits_NV.device
        (arrived,) = zeroed_counters(blocks if splits > 1 else 0, device=device)
        row_softmax_forward_kernel[(blocks * splits,)](
            logits_NV, bias_V, labels_N, *stats, split_parts(N, splits, device), arrived,
            *logits_NV.stride(), N, V, splits, head.ignore_index,
            WIDTH=load_width(config, logits_NV), LANES=config.lanes, **transform_args(head), **launch_options(config),
            **register_limit(MAX_REGISTERS, arch_of(device)),
        )  # fmt: skip

    launch(_configure("row_softmax_forward", logits_NV, launch, writes=False))
    return stats


@on_its_device
def row_softmax_backward(
    logits_NV: Tensor,
    labels_N: Tensor,
    lse_N: Tensor,
    grad_logps_N: Tensor,
    head: Head,
    *,
    bias_V: Tensor | None = None,
    entropy_N: Tensor | None = None,
    grad_entropy_N: Tensor | None = None,
    grad_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient with respect to the raw logits (before bias and transform), which is the bias's, row by row, too.

    Args:
        logits_NV, labels_N, head, bias_V: as in the forward.
        lse_N, entropy_N: (N,) fp32 from the forward; the entropy only with grad_entropy_N.
        grad_logps_N, grad_entropy_N: (N,) dL/dlogp and dL/dentropy.
        grad_scale: 0-dim on the device, multiplies the result.
        out: (N, V) tensor to write, `logits_NV` itself for a gradient in place; None makes a new one.
    Returns:
        (N, V) in the dtype of the logits (of `out`); ignored rows are exactly 0.
    """
    N, V = logits_NV.shape
    assert labels_N.shape == lse_N.shape == grad_logps_N.shape == (N,)
    assert grad_entropy_N is None or entropy_N is not None
    out = torch.empty((N, V), dtype=logits_NV.dtype, device=logits_NV.device) if out is None else out
    assert out.shape == (N, V)
    if N == 0:
        return out
    labels_N, lse_N, grad_logps_N = labels_N.contiguous(), lse_N.contiguous(), grad_logps_N.contiguous()
    optional = (bias_V, entropy_N, grad_entropy_N)
    bias_V, entropy_N, grad_entropy_N = (None if t is None else t.contiguous() for t in optional)

    def launch(config: RowConfig, out: Tensor) -> None:
        blocks, splits = row_grid(logits_NV, config)
        row_softmax_backward_kernel[(blocks * splits,)](
            logits_NV, bias_V, labels_N, lse_N, entropy_N, grad_logps_N, grad_entropy_N, grad_scale, out,
            *logits_NV.stride(), *out.stride(), N, V, splits, head.ignore_index,
            WIDTH=load_width(config, logits_NV, out), **transform_args(head), **launch_options(config),
        )  # fmt: skip

    # A search may launch many times: not in place.
    config = _configure(
        "row_softmax_backward", logits_NV, lambda c: launch(c, torch.empty_like(logits_NV)), writes=True
    )
    launch(config, out)
    return out


def launch_options(config: RowConfig) -> dict[str, int]:
    """Keyword arguments of a row kernel's launch."""
    return dict(
        BLOCK_N=config.block_n, BLOCK_V=config.block_v, num_warps=config.num_warps, num_stages=config.num_stages
    )


def _configure(name: str, logits_NV: Tensor, launch, *, writes: bool) -> RowConfig:
    (N, V), dtype, arch = logits_NV.shape, logits_NV.dtype, arch_of(logits_NV.device)
    return choose((name, arch, dtype, triton.next_power_of_2(N), V), row_config(V, dtype, arch, writes=writes), launch)


def specializations(arch: Arch, dtype: torch.dtype) -> list[Specialization]:
    """What to compile ahead of time: both kernels on a large and a small vocabulary, bare and with every option."""
    return [*_specializations(128_256, "", arch, dtype), *_specializations(507, " short", arch, dtype)]


def _specializations(V: int, suffix: str, arch: Arch, dtype: torch.dtype) -> list[Specialization]:
    x, f = f"*{TYPE_NAMES[dtype]}", "*fp32"
    common = {"labels_ptr": "*i64", "lse_ptr": f, "logits_ptr": x, "in_scale": "fp32", "out_scale": "fp32"}
    common |= dict.fromkeys(SIZES, "i32")
    forward = common | {"logp_ptr": f, "parts_ptr": f, "arrived_ptr": "*i32"}
    backward = common | {"grad_logp_ptr": f, "out_ptr": x, "stride_on": "i32"}
    forward_options = {"bias_ptr": x, "entropy_ptr": f, "top1_ptr": "*i1", "mean_ptr": f, "collision_ptr": f}
    backward_options = {"bias_ptr": x, "entropy_ptr": f, "grad_entropy_ptr": f, "grad_scale_ptr": f}

    def both(name, kernel, required, optional, unit_strides, writes):
        config = row_config(V, dtype, arch, writes=writes)
        fixed = dict.fromkeys(unit_strides, 1) | launch_options(config) | ({} if writes else {"LANES": config.lanes})
        fixed["WIDTH"] = LOAD_BYTES.value // dtype.itemsize if config.lanes > 1 else 1
        launch = {"num_warps": fixed.pop("num_warps"), "num_stages": fixed.pop("num_stages")}
        launch |= {"sizes": {"V": V}, "config": config, "limits": {} if writes else register_limit(MAX_REGISTERS, arch)}
        plain, full = {key: None for key in optional} | {"HAS_SOFTCAP": False}, {"HAS_SOFTCAP": True}
        yield Specialization(f"{name} plain{suffix}", kernel, required, fixed | plain, **launch)
        yield Specialization(f"{name} full{suffix}", kernel, required | optional, fixed | full, **launch)

    return [
        *both("row_softmax_forward", row_softmax_forward_kernel, forward, forward_options, ["stride_lv"], False),
        *both(
            "row_softmax_backward", row_softmax_backward_kernel, backward, backward_options,
            ["stride_lv", "stride_ov"], True,
        ),
    ]  # fmt: skip
