"""The cut body: from hidden states and head weights to row statistics, with nothing of size N x V in memory.

    forward    z0 = hidden @ weight.T + low @ low_weight.T + bias;  z = transform(z0);  lse = logsumexp_v z
               logp = z[label] - lse; entropy, ...
    backward   dz0 = (g (onehot - p) - h p (log p + entropy)) dz/dz0,          g = dL/dlogp, h = dL/dentropy
               dhidden = dz0 @ weight;  dweight = dz0.T @ hidden;  dbias = sum_n dz0; low's and low_weight's likewise

FLOPs: 2NDV forward; backward 2NDV to recompute the logits and 2NDV for each of dhidden and dweight that is needed. A
second pair of factors of R columns (LoRA) adds R to D. Forward: a program holds one tile of logits in registers and
folds tile after tile of its part of the vocabulary into row sums; a second kernel folds the parts. Backward: the
vocabulary is walked in slices. A kernel recomputes a slice's logits and writes only their gradient, in the dtype of the
hidden states, to one reused workspace; library products do the rest, or with a filter those of block_sparse.py, which
skip tiles. Sums over the slices (dhidden) are fp32; a slice's dweight is complete, so the product's fp32 accumulator is
all it needs. Logits, row sums and z are fp32. Every sum has a fixed order: deterministic.
Source: Wijmans et al. 2024, arXiv:2411.09009 (forward, filter); the slices are ours.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefkern.head import Head, RowStats
from prefkern.products import add_product

from . import block_sparse
from .logits import label_column, label_logp_grad, online_update, transform, transform_args, transform_grad
from .matmul import add_dot, add_dot_copied, descriptor, grouped_order
from .row_softmax import empty_stats, finish_stats
from .tuning import (
    TYPE_NAMES,
    Arch,
    HeadConfig,
    Specialization,
    arch_of,
    can_bulk_copy,
    choose,
    combine_block,
    head_config,
    on_its_device,
    require_dot_dtype,
    slice_width,
    tiles_per_program,
)


@triton.jit
def logits_tile(
    hidden, weight, bias_ptr, low_ptr, low_weight_ptr, first_n, first_v, rows, cols, D, R,
    stride_hn, stride_hd, stride_wv, stride_wd, in_scale, out_scale,
    HAS_SOFTCAP: tl.constexpr, TMA: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """z (BLOCK_N, BLOCK_V) from row first_n and column first_v on, fp32; rows, cols: the same as int64, clamped."""
    z0 = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    if TMA:
        z0 = add_dot_copied(z0, hidden, weight, first_n, first_v, D, BLOCK_D)
    else:
        z0 = add_dot(z0, hidden, weight, rows, cols, D, stride_hn, stride_hd, stride_wv, stride_wd, EVEN_D, BLOCK_D)
    if low_ptr is not None:  # a few steps: a pipeline of its own would cost the tile its registers
        z0 = add_dot(z0, low_ptr, low_weight_ptr, rows, cols, R, R, 1, R, 1, False, BLOCK_R, 1)
    if bias_ptr is not None:
        z0 += tl.load(bias_ptr + cols).to(tl.float32)[None, :]
    return transform(z0, in_scale, out_scale, HAS_SOFTCAP)


@triton.jit(do_not_specialize=["N", "tiles_per_split", "splits"])
def lm_head_forward_kernel(
    hidden, weight,  # in: (N, D) and (V, D), pointers or, with TMA, descriptors
    low_ptr, low_weight_ptr, bias_ptr, labels_ptr,  # in: (N, R) and (V, R) or None, (V,) or None, (N,)
    max_ptr, sum_ptr, label_ptr, dot_ptr, total_ptr,  # out: (splits, N) each, the last two or None
    stride_hn, stride_hd, stride_wv, stride_wd,
    N, D, V, R, tiles_per_split, splits,
    in_scale, out_scale,
    HAS_SOFTCAP: tl.constexpr, TMA: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_N: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks * splits,): one program folds tiles_per_split tiles of logits into the sums of BLOCK_N rows."""
    WANT_ENTROPY: tl.constexpr = dot_ptr is not None
    WANT_MEAN: tl.constexpr = total_ptr is not None
    pid_n, pid_s = grouped_order(tl.program_id(0), tl.cdiv(N, BLOCK_N), splits, GROUP_N)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    column_n = label_column(tl.load(labels_ptr + rows), V)

    max_n = tl.full([BLOCK_N], float("-inf"), tl.float32)
    sum_n = tl.zeros([BLOCK_N], tl.float32)
    z_label_n = tl.zeros([BLOCK_N], tl.float32)
    dot_n = tl.zeros([BLOCK_N], tl.float32)
    total_n = tl.zeros([BLOCK_N], tl.float32)
    first = pid_s * tiles_per_split * BLOCK_V
    for start in range(first, tl.minimum(first + tiles_per_split * BLOCK_V, V), BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z = logits_tile(
            hidden, weight, bias_ptr, low_ptr, low_weight_ptr,
            pid_n * BLOCK_N, start, rows, tl.minimum(offs_v, V - 1).to(tl.int64), D, R,
            stride_hn, stride_hd, stride_wv, stride_wd, in_scale, out_scale,
            HAS_SOFTCAP, TMA, EVEN_D, BLOCK_N, BLOCK_V, BLOCK_D, BLOCK_R,
        )  # fmt: skip
        mask_v = (offs_v < V)[None, :]
        if WANT_MEAN:
            total_n += tl.sum(tl.where(mask_v, z, 0.0), axis=1)
        in_tile_n = column_n - start
        if tl.max(((in_tile_n >= 0) & (in_tile_n < BLOCK_V)).to(tl.int32)) > 0:  # most tiles hold no row's label
            is_label = tl.arange(0, BLOCK_V)[None, :] == in_tile_n[:, None]
            z_label_n += tl.sum(tl.where(is_label, z, 0.0), axis=1)
        z = tl.where(mask_v, z, float("-inf"))
        max_n, sum_n, dot_n = online_update(z, max_n, sum_n, dot_n, WANT_ENTROPY)

    mask_n = offs_n < N
    offs = pid_s.to(tl.int64) * N + offs_n
    tl.store(max_ptr + offs, max_n, mask=mask_n)
    tl.store(sum_ptr + offs, sum_n, mask=mask_n)
    tl.store(label_ptr + offs, z_label_n, mask=mask_n)
    if WANT_ENTROPY:
        tl.store(dot_ptr + offs, dot_n, mask=mask_n)
    if WANT_MEAN:
        tl.store(total_ptr + offs, total_n, mask=mask_n)


@triton.jit(do_not_specialize=["N", "ignore_index", "splits"])
def lm_head_combine_kernel(
    max_ptr, sum_ptr, label_ptr, dot_ptr, total_ptr,  # in: (splits, N) each, the last two or None
    labels_ptr,  # in: (N,)
    logp_ptr, lse_ptr, entropy_ptr, top1_ptr, mean_ptr,  # out: (N,) each, the last three or None
    N, V, splits, ignore_index,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BLOCK_N),): one program folds the parts of BLOCK_N rows, BLOCK_S at a time."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    max_n = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for first in range(0, splits, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        offs = tl.minimum(offs_s, splits - 1).to(tl.int64)[:, None] * N + rows[None, :]
        max_n = tl.maximum(max_n, tl.max(tl.load(max_ptr + offs), axis=0))
    finite_max_n = tl.where(max_n == float("-inf"), 0.0, max_n)
    sum_n = tl.zeros([BLOCK_N], tl.float32)
    z_label_n = tl.zeros([BLOCK_N], tl.float32)
    dot_n = tl.zeros([BLOCK_N], tl.float32)
    total_n = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, splits, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        offs = offs_s.to(tl.int64)[:, None] * N + rows[None, :]
        mask = (offs_s < splits)[:, None]
        shift = tl.load(max_ptr + offs, mask=mask, other=float("-inf")) - finite_max_n[None, :]
        part_sum = tl.load(sum_ptr + offs, mask=mask, other=0.0)
        decay = tl.exp(shift)
        sum_n += tl.sum(decay * part_sum, axis=0)
        z_label_n += tl.sum(tl.load(label_ptr + offs, mask=mask, other=0.0), axis=0)
        if dot_ptr is not None:
            shift = tl.where(decay > 0.0, shift, 0.0)
            part_dot = tl.load(dot_ptr + offs, mask=mask, other=0.0)
            dot_n += tl.sum(decay * (part_dot + shift * part_sum), axis=0)
        if total_ptr is not None:
            total_n += tl.sum(tl.load(total_ptr + offs, mask=mask, other=0.0), axis=0)
    finish_stats(
        logp_ptr, lse_ptr, entropy_ptr, top1_ptr, mean_ptr,
        offs_n, offs_n < N, tl.load(labels_ptr + rows), z_label_n, max_n, sum_n, dot_n, total_n, V, ignore_index,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "first_v", "ignore_index"])
def lm_head_dlogits_kernel(
    hidden, weight, low_ptr, low_weight_ptr, bias_ptr, labels_ptr,  # in: as the forward's
    lse_ptr, entropy_ptr, grad_logp_ptr, grad_entropy_ptr,  # in: (N,) each, the entropy's or None
    out_ptr,  # out: (N, width), gradient of columns first_v, first_v + 1, ...; width a multiple of BLOCK_V
    kept_ptr,  # out: (row blocks, column blocks) int8, whether a tile has an element of filter_eps or more; or None
    stride_hn, stride_hd, stride_wv, stride_wd,
    N, D, V, R, first_v, width, ignore_index,
    in_scale, out_scale, filter_eps,
    HAS_SOFTCAP: tl.constexpr, TMA: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_N: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks * column blocks of the slice,): one program recomputes and differentiates one tile of logits."""
    HAS_ENTROPY: tl.constexpr = grad_entropy_ptr is not None
    num_v = tl.cdiv(tl.minimum(width, V - first_v), BLOCK_V)
    pid_n, pid_v = grouped_order(tl.program_id(0), tl.cdiv(N, BLOCK_N), num_v, GROUP_N)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    offs_w = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_v = first_v + offs_w
    z = logits_tile(
        hidden, weight, bias_ptr, low_ptr, low_weight_ptr,
        pid_n * BLOCK_N, first_v + pid_v * BLOCK_V, rows, tl.minimum(offs_v, V - 1).to(tl.int64), D, R,
        stride_hn, stride_hd, stride_wv, stride_wd, in_scale, out_scale,
        HAS_SOFTCAP, TMA, EVEN_D, BLOCK_N, BLOCK_V, BLOCK_D, BLOCK_R,
    )  # fmt: skip
    label_n = tl.load(labels_ptr + rows)
    kept_n = (label_n != ignore_index) & (offs_n < N)
    lse_n = tl.where(kept_n, tl.load(lse_ptr + rows), float("inf"))  # the lse of an ignored row is not its own: p = 0
    grad_logp_n = tl.load(grad_logp_ptr + rows).to(tl.float32)
    entropy_n = lse_n
    grad_entropy_n = grad_logp_n
    if HAS_ENTROPY:
        entropy_n = tl.load(entropy_ptr + rows)
        grad_entropy_n = tl.load(grad_entropy_ptr + rows).to(tl.float32)
    is_label = offs_v[None, :] == label_column(label_n, V)[:, None]
    dz = label_logp_grad(z, is_label, lse_n, grad_logp_n, entropy_n, grad_entropy_n, HAS_ENTROPY)
    dz0 = dz * transform_grad(z, in_scale, out_scale, HAS_SOFTCAP)
    dz0 = tl.where(kept_n[:, None] & (offs_v < V)[None, :], dz0, 0.0)
    if kept_ptr is not None:
        kept = tl.max(tl.where(tl.abs(dz0) < filter_eps, 0, 1))  # NaN is kept
        tl.store(kept_ptr + pid_n.to(tl.int64) * num_v + pid_v, kept.to(tl.int8))
        dz0 = tl.where(kept > 0, dz0, 0.0)
    out_ptrs = out_ptr + (offs_n.to(tl.int64) * width)[:, None] + offs_w[None, :]
    tl.store(out_ptrs, dz0.to(out_ptr.dtype.element_ty), mask=(offs_n < N)[:, None])


@on_its_device
def lm_head_forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    head: Head,
    *,
    bias_V: Tensor | None = None,
    low_NR: Tensor | None = None,
    low_weight_VR: Tensor | None = None,
    want_entropy: bool = False,
    want_top1: bool = False,
    want_mean: bool = False,
) -> RowStats:
    """Row statistics of hidden @ weight.T + low @ low_weight.T + bias, whose elements live in registers only.

    Args:
        hidden_ND: (N, D) fp32, fp16 or bf16, any strides.
        weight_VD: (V, D), same dtype, any strides.
        labels_N: (N,) int64 in [0, V), or head.ignore_index; logp is NaN for a label outside both.
        head: the transform from raw logits to those of the softmax.
        bias_V: (V,), added to the raw logits.
        low_NR, low_weight_VR: (N, R) and (V, R), same dtype: a second pair of factors, R of 1 to a few hundred.
        want_entropy, want_top1, want_mean: which optional statistics to compute.
    Returns:
        RowStats of fresh (N,) tensors; ignored rows hold 0 and False.
    """
    inputs = _Inputs.of(hidden_ND, weight_VD, labels_N, bias_V, low_NR, low_weight_VR)
    (N, D), V, device = hidden_ND.shape, weight_VD.shape[0], hidden_ND.device
    stats = empty_stats(N, device, want_entropy, want_top1, want_mean)
    if N == 0:
        return stats
    arch = arch_of(device)

    def launch(config: HeadConfig) -> None:
        per_program = tiles_per_program(N, D, V, config, arch)
        splits = triton.cdiv(triton.cdiv(V, config.block_v), per_program)
        wanted = (True, True, True, want_entropy, want_mean)
        parts = [torch.empty((splits, N), dtype=torch.float32, device=device) if want else None for want in wanted]
        lm_head_forward_kernel[(triton.cdiv(N, config.block_n) * splits,)](
            *inputs.pointers(config), *parts, *inputs.strides, N, D, V, inputs.rank, per_program, splits,
            **transform_args(head), **_options(config, D, inputs.rank),
        )  # fmt: skip
        block_s, block_n = combine_block(arch)
        lm_head_combine_kernel[(triton.cdiv(N, block_n),)](
            *parts, inputs.labels_N, *stats[:5], N, V, splits, head.ignore_index,
            BLOCK_S=block_s, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip

    bare = head.softcap is None and not want_entropy and not want_mean
    config = inputs.config(arch, bare=bare, gradient=False)
    launch(inputs.choose("lm_head_forward", config, arch, launch))
    return stats


@on_its_device
def lm_head_backward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    lse_N: Tensor,
    grad_logps_N: Tensor,
    head: Head,
    *,
    bias_V: Tensor | None = None,
    low_NR: Tensor | None = None,
    low_weight_VR: Tensor | None = None,
    entropy_N: Tensor | None = None,
    grad_entropy_N: Tensor | None = None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    needs_low: bool = False,
    needs_low_weight: bool = False,
    workspace_bytes: int,
    filter_eps: float | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the forward's logps (and entropy), of the inputs that need them.

    Args:
        hidden_ND, weight_VD, labels_N, head, bias_V, low_NR, low_weight_VR: as in the forward.
        lse_N, entropy_N: (N,) fp32 from the forward; the entropy only with grad_entropy_N.
        grad_logps_N, grad_entropy_N: (N,) dL/dlogp and dL/dentropy.
        needs_hidden, needs_weight, needs_bias, needs_low, needs_low_weight: what to compute.
        workspace_bytes: most that a slice's gradient may take; one column of tiles, N * block_v elements, is the
            least it gets. Beside it there is the fp32 sum of dhidden, (N, D), and of dlow, (N, R).
        filter_eps: None: exact. Otherwise a tile of the logits' gradient (block_n rows by block_v vocabulary entries)
            is taken as zero, and dhidden and dweight skip it, if all of it is below filter_eps in absolute value. The
            unit is that of dL/dlogits, before the transform: an element is about grad_logps_n * p_nv, so a filter of
            1e-4 means 1e-4 of probability only where |grad_logps| is 1. With dropped(n) and dropped(v) the elements
            of skipped tiles, what is lost is at most

                |error of dhidden_n| <= filter_eps * sum_{v in dropped(n)} |weight_v|        elementwise; so for dlow
                |error of dweight_v| <= filter_eps * sum_{n in dropped(v)} |hidden_n|        so for dlow_weight, dbias
    Returns:
        (dhidden, dweight, dbias, dlow, dlow_weight), each in the dtype of its parameter, None where not needed.
    """
    inputs = _Inputs.of(hidden_ND, weight_VD, labels_N, bias_V, low_NR, low_weight_VR)
    (N, D), V = hidden_ND.shape, weight_VD.shape[0]
    assert lse_N.shape == grad_logps_N.shape == (N,) and (grad_entropy_N is None or entropy_N is not None)
    assert filter_eps is None or filter_eps >= 0
    needs = (needs_hidden, needs_weight, needs_bias, needs_low, needs_low_weight)
    parameters = (hidden_ND, weight_VD, bias_V, low_NR, low_weight_VR)
    if N == 0 or not any(needs):
        return tuple(t.new_zeros(t.shape) if need else None for t, need in zip(parameters, needs))
    arch = arch_of(hidden_ND.device)
    rows = [None if t is None else t.contiguous() for t in (lse_N, entropy_N, grad_logps_N, grad_entropy_N)]

    def launch(config: HeadConfig, out: Tensor, first: int) -> Tensor | None:
        blocks_n = triton.cdiv(N, config.block_n)
        blocks_v = triton.cdiv(min(out.shape[1], V - first), config.block_v)
        flags = None if filter_eps is None else torch.empty((blocks_n, blocks_v), dtype=torch.int8, device=out.device)
        lm_head_dlogits_kernel[(blocks_n * blocks_v,)](
            *inputs.pointers(config), *rows, out, flags, *inputs.strides,
            N, D, V, inputs.rank, first, out.shape[1], head.ignore_index, filter_eps=float(filter_eps or 0),
            **transform_args(head), **_options(config, D, inputs.rank),
        )  # fmt: skip
        return flags

    def workspace(config: HeadConfig) -> Tensor:
        # A multiple of block_v also in the last slice: aligned rows for the products.
        return hidden_ND.new_empty((N, slice_width(N, V, config, hidden_ND.itemsize, workspace_bytes)))

    bare = head.softcap is None and grad_entropy_N is None and filter_eps is None
    config = inputs.config(arch, bare=bare, gradient=True)
    config = inputs.choose("lm_head_dlogits", config, arch, lambda c: launch(c, workspace(c), 0))
    slice_NW = workspace(config)
    # Sums over the slices start from 0; of the others each slice writes its own part.
    dhidden, dlow = (
        torch.zeros_like(t, dtype=torch.float32, memory_format=torch.contiguous_format) if needed else None
        for t, needed in ((hidden_ND, needs_hidden), (low_NR, needs_low))
    )
    dweight, dlow_weight, dbias = (
        torch.empty(t.shape, dtype=dtype, device=t.device) if needed else None
        for t, dtype, needed in (
            (weight_VD, weight_VD.dtype, needs_weight),
            (low_weight_VR, weight_VD.dtype, needs_low_weight),
            (bias_V, torch.float32, needs_bias),
        )
    )
    for first in range(0, V, slice_NW.shape[1]):
        flags = launch(config, slice_NW, first)
        part = slice(first, min(first + slice_NW.shape[1], V))
        dlogits = slice_NW[:, : part.stop - first]
        if flags is None:
            _add_products(dhidden, dweight, dlogits, hidden_ND, weight_VD, part)
        else:
            _add_kept_products(dhidden, dweight, slice_NW, flags, config, hidden_ND, weight_VD, part)
        _add_products(dlow, dlow_weight, dlogits, low_NR, low_weight_VR, part)
        if dbias is not None:
            torch.sum(dlogits, 0, dtype=torch.float32, out=dbias[part])
    found = (dhidden, dweight, dbias, dlow, dlow_weight)
    return tuple(None if grad is None else grad.to(t.dtype) for grad, t in zip(found, parameters))


def _add_products(drows, dcolumns, dlogits_NW: Tensor, rows: Tensor, columns: Tensor, part: slice) -> None:
    """drows += dlogits @ columns[part] and dcolumns[part] = dlogits.T @ rows, where not None."""
    if drows is not None:
        add_product(drows, dlogits_NW, columns[part])
    if dcolumns is not None:
        torch.mm(dlogits_NW.t(), rows, out=dcolumns[part])


def _add_kept_products(
    drows, dcolumns, slice_NW: Tensor, flags: Tensor, config: HeadConfig, rows: Tensor, columns: Tensor, part: slice
) -> None:
    """The same, but for the tiles that are not flagged."""
    if drows is not None:
        block_sparse.add_rows_product(drows, slice_NW, columns[part], block_sparse.kept_tiles(flags), config)
    if dcolumns is not None:
        kept = block_sparse.kept_tiles(flags.t().contiguous())
        block_sparse.columns_product(dcolumns[part], slice_NW, rows, kept, config)


class _Inputs(NamedTuple):
    """What both directions read, checked; pairs of factors and vectors contiguous."""

    hidden_ND: Tensor
    weight_VD: Tensor
    low_NR: Tensor | None
    low_weight_VR: Tensor | None
    bias_V: Tensor | None
    labels_N: Tensor

    @classmethod
    def of(cls, hidden_ND, weight_VD, labels_N, bias_V, low_NR, low_weight_VR) -> "_Inputs":
        (N, D), V, dtype = hidden_ND.shape, weight_VD.shape[0], hidden_ND.dtype
        assert weight_VD.shape == (V, D) and weight_VD.dtype == dtype and labels_N.shape == (N,) and V > 0
        assert (low_NR is None) == (low_weight_VR is None)
        if low_NR is not None:
            assert low_NR.shape == (N, low_weight_VR.shape[1]) and low_weight_VR.shape[0] == V
            assert low_NR.dtype == low_weight_VR.dtype == dtype
        require_dot_dtype(dtype)
        small = (low_NR, low_weight_VR, bias_V, labels_N)
        return cls(hidden_ND, weight_VD, *(None if t is None else t.contiguous() for t in small))

    @property
    def rank(self) -> int:
        return 0 if self.low_NR is None else self.low_NR.shape[1]

    @property
    def strides(self) -> tuple[int, ...]:
        return *self.hidden_ND.stride(), *self.weight_VD.stride()

    def pointers(self, config: HeadConfig) -> tuple:
        """The kernels' first arguments, in their order."""
        if not config.tma:
            return tuple(self)
        hidden = descriptor(self.hidden_ND, config.block_n, config.block_d)
        return hidden, descriptor(self.weight_VD, config.block_v, config.block_d), *self[2:]

    def config(self, arch: Arch, *, bare: bool, gradient: bool) -> HeadConfig:
        copies = can_bulk_copy(self.hidden_ND) and can_bulk_copy(self.weight_VD)
        N, dtype = self.hidden_ND.shape[0], self.hidden_ND.dtype
        bias = self.bias_V is not None
        return head_config(N, dtype, arch, bare=bare, bulk_copies=copies, gradient=gradient, bias=bias)

    def choose(self, name: str, config: HeadConfig, arch: Arch, launch: Callable) -> HeadConfig:
        (N, D), V = self.hidden_ND.shape, self.weight_VD.shape[0]
        return choose((name, arch, self.hidden_ND.dtype, triton.next_power_of_2(N), D, V), config, launch)


def _options(config: HeadConfig, D: int, rank: int) -> dict[str, int | bool]:
    block_r = min(32, triton.next_power_of_2(max(16, rank)))
    return dict(
        TMA=config.tma, EVEN_D=config.tma or D % config.block_d == 0, BLOCK_N=config.block_n, BLOCK_V=config.block_v,
        BLOCK_D=config.block_d, BLOCK_R=block_r, GROUP_N=config.group_n, num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip


def specializations(arch: Arch, dtype: torch.dtype) -> list[Specialization]:
    """What to compile ahead of time: each kernel with no option, with LoRA and with every option.

    With few rows, and without the copy engine, where that makes a difference.
    """
    found = {}
    for (name, kernel), (variant, n, full, bias, rank, copies) in itertools.product(_KERNELS, _VARIANTS):
        gradient = kernel is lm_head_dlogits_kernel
        config = head_config(n, dtype, arch, bare=not full, bulk_copies=copies, gradient=gradient, bias=bias)
        sizes = {"D": 4112 if full else 4096, "R": rank} | ({} if n == _MANY else {"N": n})
        spec = _specialization(f"{name} {variant}", kernel, config, dtype, full, bias, sizes)
        found.setdefault((kernel, config, full, rank), spec)
    forward = head_config(_MANY, dtype, arch, bare=True, bulk_copies=True, bias=False)
    filtered = head_config(_MANY, dtype, arch, bare=False, bulk_copies=True, gradient=True)
    return [*found.values(), *block_sparse.specializations(dtype, filtered), _combine_specialization(arch, forward)]


_KERNELS = (("lm_head_forward", lm_head_forward_kernel), ("lm_head_dlogits", lm_head_dlogits_kernel))
_MANY, _FEW = 8192, 64
# name, rows, every option but the bias, the bias, rank of the second factors, whether the copy engine may be used
_VARIANTS = (
    ("plain", _MANY, False, False, 0, True),
    ("lora", _MANY, False, False, 16, True),
    ("full", _MANY, True, True, 128, True),
    ("without bias", _MANY, True, False, 128, True),
    ("few rows", _FEW, False, False, 0, True),
    ("few rows without bias", _FEW, True, False, 128, True),
    ("pointers", _MANY, False, False, 0, False),
    ("pointers full", _MANY, True, True, 128, False),
    ("pointers few rows", _FEW, False, False, 0, False),
    ("pointers few rows without bias", _FEW, True, False, 128, False),
)


def _specialization(
    name: str, kernel, config: HeadConfig, dtype: torch.dtype, full: bool, bias: bool, sizes: dict[str, int]
) -> Specialization:
    x, f = f"*{TYPE_NAMES[dtype]}", "*fp32"
    ints = ("stride_hn", "stride_wv", "N", "D", "V", "R")
    types = {"labels_ptr": "*i64", "in_scale": "fp32", "out_scale": "fp32"} | dict.fromkeys(ints, "i32")
    blocks = {"hidden": config.block_n, "weight": config.block_v}
    element = TYPE_NAMES[dtype]
    types |= {n: f"tensordesc<{element}[{b}, {config.block_d}]>" if config.tma else x for n, b in blocks.items()}
    low = dict.fromkeys(("low_ptr", "low_weight_ptr"), x)
    if kernel is lm_head_forward_kernel:
        types |= {"max_ptr": f, "sum_ptr": f, "label_ptr": f, "tiles_per_split": "i32", "splits": "i32"}
        optional = {"dot_ptr": f, "total_ptr": f}
    else:
        types |= {"lse_ptr": f, "grad_logp_ptr": f, "out_ptr": x, "filter_eps": "fp32"}
        types |= dict.fromkeys(("first_v", "width", "ignore_index"), "i32")
        optional = {"entropy_ptr": f, "grad_entropy_ptr": f, "kept_ptr": "*i8"}
    options = _options(config, sizes["D"], sizes["R"])
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    fixed = {"stride_hd": 1, "stride_wd": 1, "HAS_SOFTCAP": full} | options
    for given, names in ((sizes["R"] > 0, low), (full, optional), (bias, {"bias_ptr": x})):
        types, fixed = (types | names, fixed) if given else (types, fixed | dict.fromkeys(names))
    divisible = ("stride_hn", "stride_wv", "D", "V", "R", "width")
    return Specialization(
        name, kernel, types, fixed, warps, stages, divisible, tensor_cores=dtype != torch.float32, sizes=sizes,
        config=config,
    )  # fmt: skip


def _combine_specialization(arch: Arch, config: HeadConfig) -> Specialization:
    pointers = ("max", "sum", "label", "dot", "total", "logp", "lse", "entropy", "mean")
    signature = {f"{name}_ptr": "*fp32" for name in pointers} | {"labels_ptr": "*i64", "top1_ptr": "*i1"}
    signature |= {name: "i32" for name in ("N", "V", "splits", "ignore_index")}
    block_s, block_n = combine_block(arch)
    fixed = {"BLOCK_S": block_s, "BLOCK_N": block_n}
    return Specialization(
        "lm_head_combine", lm_head_combine_kernel, signature, fixed, num_warps=4, num_stages=1, config=config
    )
