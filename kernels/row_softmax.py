"""Log-probability of each row's label and more row statistics from stored logits, in one read; the gradient in place.

    forward    z = transform(logits + bias);  lse = logsumexp_v z;  logp = z[label] - lse;
               entropy = lse - sum_v p_v z_v;  log_collision = log sum_v p_v^2;  p = exp(z - lse)
    backward   dlogits = s (g (onehot - p) - h p (log p + entropy)) dz/dz0,    g = dL/dlogp, h = dL/dentropy

Bytes: forward reads the logits once, backward reads them once and writes their gradient once. All maths and all row
results are fp32; the gradient is rounded once, to the logits' dtype. Sums run in a fixed order: deterministic.
Source: Milakov & Gimelshein 2018, arXiv:1805.02867 (online normaliser); the entropy sum is derived.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefkern.head import Head, RowStats

from .logits import (
    label_column,
    label_logp_grad,
    online_collision,
    online_update,
    transform,
    transform_args,
    transform_grad,
)
from .tuning import TYPE_NAMES, Arch, RowConfig, Specialization, arch_of, choose, on_its_device, row_config


@triton.jit
def load_logits(
    ptrs, bias_ptr, offs_v, mask, V, in_scale, out_scale,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Transformed logits z of one tile, fp32; 0 where masked."""
    z0 = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z0 += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
    return transform(z0, in_scale, out_scale, HAS_SOFTCAP)


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


@triton.jit(do_not_specialize=["N", "ignore_index"])
def row_softmax_forward_kernel(
    logits_ptr, bias_ptr, labels_ptr,  # in: (N, V), (V,) or None, (N,)
    logp_ptr, lse_ptr, entropy_ptr, top1_ptr, mean_ptr, collision_ptr,  # out: (N,) each, the last four or None
    stride_ln, stride_lv,
    N, V, ignore_index,
    in_scale, out_scale,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BLOCK_N),): one program walks BLOCK_N rows from the first column to the last."""
    WANT_ENTROPY: tl.constexpr = entropy_ptr is not None
    WANT_MEAN: tl.constexpr = mean_ptr is not None
    WANT_COLLISION: tl.constexpr = collision_ptr is not None
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)  # rows past the end repeat the last one: no mask, no log of 0
    row_ptrs = logits_ptr + rows * stride_ln
    tile_offs = tl.arange(0, BLOCK_V)
    tile_ptrs = row_ptrs[:, None] + (tile_offs.to(tl.int64) * stride_lv)[None, :]

    max_n = tl.full([BLOCK_N], float("-inf"), tl.float32)
    sum_n = tl.zeros([BLOCK_N], tl.float32)
    dot_n = tl.zeros([BLOCK_N], tl.float32)
    total_n = tl.zeros([BLOCK_N], tl.float32)
    square_n = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tile_offs
        mask = (offs_v < V)[None, :]
        ptrs = tile_ptrs + tl.cast(start, tl.int64) * stride_lv
        z = load_logits(ptrs, bias_ptr, offs_v, mask, V, in_scale, out_scale, HAS_SOFTCAP)
        if WANT_MEAN:
            total_n += tl.sum(tl.where(mask, z, 0.0), axis=1)
        z = tl.where(mask, z, float("-inf"))
        old_max_n = max_n
        max_n, sum_n, dot_n = online_update(z, max_n, sum_n, dot_n, WANT_ENTROPY)
        if WANT_COLLISION:
            square_n = online_collision(z, old_max_n, max_n, square_n)

    # One gather per row instead of a comparison per logit.
    label_n = tl.load(labels_ptr + rows)
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


@triton.jit(do_not_specialize=["N", "ignore_index"])
def row_softmax_backward_kernel(
    logits_ptr, bias_ptr, labels_ptr, lse_ptr, entropy_ptr,  # in: (N, V), (V,) or None, (N,), (N,), (N,) or None
    grad_logp_ptr, grad_entropy_ptr, grad_scale_ptr,  # in: (N,), (N,) or None, () or None
    out_ptr,  # out: (N, V), may be logits_ptr: each element is read and written by one thread
    stride_ln, stride_lv, stride_on, stride_ov,
    N, V, ignore_index,
    in_scale, out_scale,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BLOCK_N),): one program writes the gradient of BLOCK_N rows."""
    HAS_ENTROPY: tl.constexpr = grad_entropy_ptr is not None
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    rows = offs_n.to(tl.int64)
    tile_offs = tl.arange(0, BLOCK_V)
    tile_cols = tile_offs.to(tl.int64)
    tile_ptrs = logits_ptr + (rows * stride_ln)[:, None] + (tile_cols * stride_lv)[None, :]
    out_ptrs = out_ptr + (rows * stride_on)[:, None] + (tile_cols * stride_ov)[None, :]

    label_n = tl.load(labels_ptr + offs_n, mask=mask_n, other=0)
    column_n = label_column(label_n, V)
    kept_n = label_n != ignore_index
    scale = 1.0
    if grad_scale_ptr is not None:
        scale = tl.load(grad_scale_ptr).to(tl.float32)
    # The lse of an ignored row is not its own: with infinity, p is 0.
    lse_n = tl.where(kept_n, tl.load(lse_ptr + offs_n, mask=mask_n, other=0.0), float("inf"))
    grad_logp_n = tl.load(grad_logp_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32) * scale
    entropy_n = lse_n
    grad_entropy_n = grad_logp_n
    if HAS_ENTROPY:
        entropy_n = tl.load(entropy_ptr + offs_n, mask=mask_n, other=0.0)
        grad_entropy_n = tl.load(grad_entropy_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32) * scale

    for start in range(0, V, BLOCK_V):
        offs_v = start + tile_offs
        mask = mask_n[:, None] & (offs_v < V)[None, :]
        ptrs = tile_ptrs + tl.cast(start, tl.int64) * stride_lv
        z = load_logits(ptrs, bias_ptr, offs_v, mask, V, in_scale, out_scale, HAS_SOFTCAP)
        is_label = offs_v[None, :] == column_n[:, None]
        dz = label_logp_grad(z, is_label, lse_n, grad_logp_n, entropy_n, grad_entropy_n, HAS_ENTROPY)
        dz0 = dz * transform_grad(z, in_scale, out_scale, HAS_SOFTCAP)
        dz0 = tl.where(kept_n[:, None], dz0, 0.0)
        store_ptrs = out_ptrs + tl.cast(start, tl.int64) * stride_ov
        tl.store(store_ptrs, dz0.to(out_ptr.dtype.element_ty), mask=mask)


def empty_stats(
    N: int, device: torch.device, want_entropy: bool, want_top1: bool, want_mean: bool, want_collision: bool = False
) -> RowStats:
    """Fresh outputs for N rows; None where not wanted."""

    def fresh(wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.empty(N, dtype=dtype, device=device) if wanted else None

    top1 = fresh(want_top1, torch.bool)
    return RowStats(fresh(True), fresh(True), fresh(want_entropy), top1, fresh(want_mean), fresh(want_collision))


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
        row_softmax_forward_kernel[(triton.cdiv(N, config.block_n),)](
            logits_NV, bias_V, labels_N, *stats, logits_NV.stride(0), logits_NV.stride(1), N, V, head.ignore_index,
            **transform_args(head), **_options(config),
        )  # fmt: skip

    launch(_configure("row_softmax_forward", logits_NV, launch))
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
        row_softmax_backward_kernel[(triton.cdiv(N, config.block_n),)](
            logits_NV, bias_V, labels_N, lse_N, entropy_N, grad_logps_N, grad_entropy_N, grad_scale, out,
            *logits_NV.stride(), *out.stride(), N, V, head.ignore_index, **transform_args(head), **_options(config),
        )  # fmt: skip

    # A search may launch many times: not in place.
    config = _configure("row_softmax_backward", logits_NV, lambda c: launch(c, torch.empty_like(logits_NV)))
    launch(config, out)
    return out


def _options(config: RowConfig) -> dict[str, int]:
    return dict(
        BLOCK_N=config.block_n, BLOCK_V=config.block_v, num_warps=config.num_warps, num_stages=config.num_stages
    )


def _configure(name: str, logits_NV: Tensor, launch) -> RowConfig:
    (N, V), dtype, arch = logits_NV.shape, logits_NV.dtype, arch_of(logits_NV.device)
    return choose((name, arch, dtype, triton.next_power_of_2(N), V), row_config(V, dtype, arch), launch)


def specializations(arch: Arch, dtype: torch.dtype) -> list[Specialization]:
    """What to compile ahead of time: both kernels on a large and a small vocabulary, bare and with every option."""
    return [*_specializations(128_256, "", arch, dtype), *_specializations(507, " short", arch, dtype)]


def _specializations(V: int, suffix: str, arch: Arch, dtype: torch.dtype) -> list[Specialization]:
    config = row_config(V, dtype, arch)
    x, f = f"*{TYPE_NAMES[dtype]}", "*fp32"
    common = {"labels_ptr": "*i64", "lse_ptr": f, "stride_ln": "i32", "N": "i32", "V": "i32", "ignore_index": "i32"}
    common |= {"logits_ptr": x, "in_scale": "fp32", "out_scale": "fp32"}
    fixed = {"stride_lv": 1, "BLOCK_N": config.block_n, "BLOCK_V": config.block_v}
    forward = {"bias_ptr": x, "entropy_ptr": f, "top1_ptr": "*i1", "mean_ptr": f, "collision_ptr": f}
    backward = {"bias_ptr": x, "entropy_ptr": f, "grad_entropy_ptr": f, "grad_scale_ptr": f}

    def both(name, kernel, required, optional, fixed):
        divisible = ("stride_ln", "stride_on", "V") if V % 16 == 0 else ()
        launch = dict(num_warps=config.num_warps, num_stages=config.num_stages, divisible=divisible, sizes={"V": V})
        plain, full = {key: None for key in optional} | {"HAS_SOFTCAP": False}, {"HAS_SOFTCAP": True}
        yield Specialization(f"{name} plain{suffix}", kernel, required, fixed | plain, **launch)
        yield Specialization(f"{name} full{suffix}", kernel, required | optional, fixed | full, **launch)

    return [
        *both("row_softmax_forward", row_softmax_forward_kernel, common | {"logp_ptr": f}, forward, fixed),
        *both(
            "row_softmax_backward", row_softmax_backward_kernel,
            common | {"grad_logp_ptr": f, "out_ptr": x, "stride_on": "i32"}, backward, fixed | {"stride_ov": 1},
        ),
    ]  # fmt: skip
