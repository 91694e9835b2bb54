"""The cut body: from hidden states and head weights to row statistics, with nothing of size N x V in memory.

    forward    z = transform(hidden @ weight.T + bias);  lse = logsumexp_v z;  logp = z[label] - lse; entropy, ...
    backward   dz0 = (g (onehot - p) - h p (log p + entropy)) dz/dz0,          g = dL/dlogp, h = dL/dentropy
               dhidden = dz0 @ weight;  dweight = dz0.T @ hidden;  dbias = sum_n dz0

FLOPs: 2NDV forward; backward 2NDV to recompute the logits and 2NDV for each of dhidden and dweight that is needed.
Forward: a program holds one tile of logits in registers and folds tile after tile of its part of the vocabulary into
row sums; a second kernel folds the parts. Backward: the vocabulary is walked in slices. A kernel recomputes a slice's
logits and writes only their gradient, in the dtype of the hidden states, to one reused workspace; two library products
do the rest. dhidden adds up in fp32 over the slices; a slice's dweight is complete, so the library's fp32 accumulator
is all it needs. Logits, row sums and z are fp32. Every sum has a fixed order: deterministic.
Source: Wijmans et al. 2024, arXiv:2411.09009 (forward); the slices are ours.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefkern.head import Head, RowStats
from prefkern.products import add_product

from .logits import label_column, label_logp_grad, online_update, transform, transform_args, transform_grad
from .row_softmax import empty_stats, finish_stats
from .tuning import (
    TYPE_NAMES,
    Arch,
    HeadConfig,
    Specialization,
    arch_of,
    choose,
    head_config,
    on_its_device,
    require_dot_dtype,
    vocab_splits,
)


@triton.jit
def grouped_order(pid, num_n, num_v, GROUP_N: tl.constexpr):
    """Program number to (row block, vocabulary block): GROUP_N row blocks meet a part of the weight while L2 has it."""
    first_n = pid // (GROUP_N * num_v) * GROUP_N
    size_n = tl.minimum(num_n - first_n, GROUP_N)
    local = pid % (GROUP_N * num_v)
    return first_n + local % size_n, local // size_n


@triton.jit
def logits_tile(
    hidden_ptr, weight_ptr, bias_ptr, rows, cols, D,
    stride_hn, stride_hd, stride_wv, stride_wd, in_scale, out_scale,
    HAS_SOFTCAP: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z (BLOCK_N, BLOCK_V) of the given rows and columns (int64, in range: the caller clamps), fp32."""
    offs_d = tl.arange(0, BLOCK_D)
    dims = offs_d.to(tl.int64)
    hidden_ptrs = hidden_ptr + (rows * stride_hn)[:, None] + (dims * stride_hd)[None, :]
    weight_ptrs = weight_ptr + (cols * stride_wv)[None, :] + (dims * stride_wd)[:, None]
    z0 = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            h = tl.load(hidden_ptrs)
            w = tl.load(weight_ptrs)
        else:
            h = tl.load(hidden_ptrs, mask=(offs_d < D - start)[None, :], other=0.0)
            w = tl.load(weight_ptrs, mask=(offs_d < D - start)[:, None], other=0.0)
        z0 = tl.dot(h, w, z0, input_precision="ieee")
        hidden_ptrs += BLOCK_D * tl.cast(stride_hd, tl.int64)
        weight_ptrs += BLOCK_D * tl.cast(stride_wd, tl.int64)
    if bias_ptr is not None:
        z0 += tl.load(bias_ptr + cols).to(tl.float32)[None, :]
    return transform(z0, in_scale, out_scale, HAS_SOFTCAP)


@triton.jit(do_not_specialize=["N", "tiles_per_split", "splits"])
def lm_head_forward_kernel(
    hidden_ptr, weight_ptr, bias_ptr, labels_ptr,  # in: (N, D), (V, D), (V,) or None, (N,)
    max_ptr, sum_ptr, label_ptr, dot_ptr, total_ptr,  # out: (splits, N) each, the last two or None
    stride_hn, stride_hd, stride_wv, stride_wd,
    N, D, V, tiles_per_split, splits,
    in_scale, out_scale,
    HAS_SOFTCAP: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
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
            hidden_ptr, weight_ptr, bias_ptr, rows, tl.minimum(offs_v, V - 1).to(tl.int64), D,
            stride_hn, stride_hd, stride_wv, stride_wd, in_scale, out_scale,
            HAS_SOFTCAP, EVEN_D, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        mask_v = (offs_v < V)[None, :]
        if WANT_MEAN:
            total_n += tl.sum(tl.where(mask_v, z, 0.0), axis=1)
        is_label = offs_v[None, :] == column_n[:, None]
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
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BLOCK_N),): one program folds the parts of BLOCK_N rows, first part first."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    max_n = tl.load(max_ptr + rows)
    for s in range(1, splits):
        max_n = tl.maximum(max_n, tl.load(max_ptr + tl.cast(s, tl.int64) * N + rows))
    finite_max_n = tl.where(max_n == float("-inf"), 0.0, max_n)
    sum_n = tl.zeros([BLOCK_N], tl.float32)
    z_label_n = tl.zeros([BLOCK_N], tl.float32)
    dot_n = tl.zeros([BLOCK_N], tl.float32)
    total_n = tl.zeros([BLOCK_N], tl.float32)
    for s in range(0, splits):
        offs = tl.cast(s, tl.int64) * N + rows
        part_max_n = tl.load(max_ptr + offs)
        part_sum_n = tl.load(sum_ptr + offs)
        decay_n = tl.exp(part_max_n - finite_max_n)
        sum_n += decay_n * part_sum_n
        z_label_n += tl.load(label_ptr + offs)
        if dot_ptr is not None:
            shift_n = tl.where(decay_n > 0.0, part_max_n - finite_max_n, 0.0)
            dot_n += decay_n * (tl.load(dot_ptr + offs) + shift_n * part_sum_n)
        if total_ptr is not None:
            total_n += tl.load(total_ptr + offs)
    finish_stats(
        logp_ptr, lse_ptr, entropy_ptr, top1_ptr, mean_ptr,
        offs_n, offs_n < N, tl.load(labels_ptr + rows), z_label_n, max_n, sum_n, dot_n, total_n, V, ignore_index,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "first_v", "ignore_index"])
def lm_head_dlogits_kernel(
    hidden_ptr, weight_ptr, bias_ptr, labels_ptr, lse_ptr, entropy_ptr,  # in: as the forward's, (N,) or None
    grad_logp_ptr, grad_entropy_ptr,  # in: (N,), (N,) or None
    out_ptr,  # out: (N, width), gradient of columns first_v, first_v + 1, ...; width a multiple of BLOCK_V
    stride_hn, stride_hd, stride_wv, stride_wd,
    N, D, V, first_v, width, ignore_index,
    in_scale, out_scale,
    HAS_SOFTCAP: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
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
        hidden_ptr, weight_ptr, bias_ptr, rows, tl.minimum(offs_v, V - 1).to(tl.int64), D,
        stride_hn, stride_hd, stride_wv, stride_wd, in_scale, out_scale,
        HAS_SOFTCAP, EVEN_D, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    label_n = tl.load(labels_ptr + rows)
    kept_n = label_n != ignore_index
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
    dz0 = tl.where(kept_n[:, None], dz0, 0.0)
    out_ptrs = out_ptr + (offs_n.to(tl.int64) * width)[:, None] + offs_w[None, :]
    mask = (offs_n < N)[:, None] & (offs_v < V)[None, :]
    tl.store(out_ptrs, dz0.to(out_ptr.dtype.element_ty), mask=mask)


@on_its_device
def lm_head_forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    head: Head,
    *,
    bias_V: Tensor | None = None,
    want_entropy: bool = False,
    want_top1: bool = False,
    want_mean: bool = False,
) -> RowStats:
    """Row statistics of hidden @ weight.T, whose elements live in registers only.

    Args:
        hidden_ND: (N, D) fp32, fp16 or bf16, any strides.
        weight_VD: (V, D), same dtype, any strides.
        labels_N: (N,) int64 in [0, V), or head.ignore_index; logp is NaN for a label outside both.
        head: the transform from raw logits to those of the softmax.
        bias_V: (V,), added to the raw logits.
        want_entropy, want_top1, want_mean: which optional statistics to compute.
    Returns:
        RowStats of fresh (N,) tensors; ignored rows hold 0 and False.
    """
    (N, D), V, device = hidden_ND.shape, weight_VD.shape[0], hidden_ND.device
    assert weight_VD.shape == (V, D) and weight_VD.dtype == hidden_ND.dtype and labels_N.shape == (N,) and V > 0
    require_dot_dtype(hidden_ND.dtype)
    stats = empty_stats(N, device, want_entropy, want_top1, want_mean)
    if N == 0:
        return stats
    arch = arch_of(device)
    labels_N = labels_N.contiguous()
    bias_V = None if bias_V is None else bias_V.contiguous()

    def launch(config: HeadConfig) -> None:
        tiles = triton.cdiv(V, config.block_v)
        tiles_per_split = triton.cdiv(tiles, vocab_splits(N, V, config, arch))
        splits = triton.cdiv(tiles, tiles_per_split)
        wanted = (True, True, True, want_entropy, want_mean)
        parts = [torch.empty((splits, N), dtype=torch.float32, device=device) if want else None for want in wanted]
        lm_head_forward_kernel[(triton.cdiv(N, config.block_n) * splits,)](
            hidden_ND, weight_VD, bias_V, labels_N, *parts, *hidden_ND.stride(), *weight_VD.stride(),
            N, D, V, tiles_per_split, splits, **transform_args(head), **_options(config, D),
        )  # fmt: skip
        block_n = _COMBINE_ROWS
        lm_head_combine_kernel[(triton.cdiv(N, block_n),)](
            *parts, labels_N, *stats[:5], N, V, splits, head.ignore_index, BLOCK_N=block_n, num_warps=4
        )

    bare = head.softcap is None and not want_entropy and not want_mean
    config = head_config(hidden_ND.dtype, arch, bare=bare)
    launch(_configure("lm_head_forward", config, hidden_ND, V, arch, launch))
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
    entropy_N: Tensor | None = None,
    grad_entropy_N: Tensor | None = None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    workspace_bytes: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the forward's logps (and entropy), of the inputs that need them.

    Args:
        hidden_ND, weight_VD, labels_N, head, bias_V: as in the forward.
        lse_N, entropy_N: (N,) fp32 from the forward; the entropy only with grad_entropy_N.
        grad_logps_N, grad_entropy_N: (N,) dL/dlogp and dL/dentropy.
        needs_hidden, needs_weight, needs_bias: what to compute.
        workspace_bytes: most that a slice's gradient may take; one column of tiles, N * block_v elements, is the
            least it gets. Beside it there is the fp32 sum of dhidden, (N, D).
    Returns:
        (dhidden, dweight, dbias), each in the dtype of its parameter, None where not needed.
    """
    (N, D), V, device = hidden_ND.shape, weight_VD.shape[0], hidden_ND.device
    assert labels_N.shape == lse_N.shape == grad_logps_N.shape == (N,)
    assert grad_entropy_N is None or entropy_N is not None
    require_dot_dtype(hidden_ND.dtype)
    needs = (needs_hidden, needs_weight, needs_bias)
    if N == 0 or not any(needs):
        return tuple(t.new_zeros(t.shape) if n else None for t, n in zip((hidden_ND, weight_VD, bias_V), needs))
    arch = arch_of(device)
    labels_N, lse_N, grad_logps_N = labels_N.contiguous(), lse_N.contiguous(), grad_logps_N.contiguous()
    optional = (bias_V, entropy_N, grad_entropy_N)
    bias_V, entropy_N, grad_entropy_N = (None if t is None else t.contiguous() for t in optional)

    def launch(config: HeadConfig, out: Tensor, first: int) -> None:
        blocks = triton.cdiv(N, config.block_n) * triton.cdiv(min(out.shape[1], V - first), config.block_v)
        lm_head_dlogits_kernel[(blocks,)](
            hidden_ND, weight_VD, bias_V, labels_N, lse_N, entropy_N, grad_logps_N, grad_entropy_N, out,
            *hidden_ND.stride(), *weight_VD.stride(), N, D, V, first, out.shape[1], head.ignore_index,
            **transform_args(head), **_options(config, D),
        )  # fmt: skip

    def workspace(config: HeadConfig) -> Tensor:
        # A multiple of block_v also in the last slice: aligned rows for the products.
        tiles = min(workspace_bytes // (N * config.block_v * hidden_ND.itemsize), triton.cdiv(V, config.block_v))
        return hidden_ND.new_empty((N, max(1, tiles) * config.block_v))

    config = head_config(hidden_ND.dtype, arch, bare=False)
    config = _configure("lm_head_dlogits", config, hidden_ND, V, arch, lambda c: launch(c, workspace(c), 0))
    slice_NW = workspace(config)
    width = slice_NW.shape[1]
    dhidden = torch.zeros((N, D), dtype=torch.float32, device=device) if needs_hidden else None
    dweight = torch.empty((V, D), dtype=weight_VD.dtype, device=device) if needs_weight else None
    dbias = torch.empty(V, dtype=torch.float32, device=device) if needs_bias else None
    for first in range(0, V, width):
        launch(config, slice_NW, first)
        last = min(first + width, V)
        dlogits = slice_NW[:, : last - first]
        if dhidden is not None:
            add_product(dhidden, dlogits, weight_VD[first:last])
        if dweight is not None:
            torch.mm(dlogits.t(), hidden_ND, out=dweight[first:last])
        if dbias is not None:
            torch.sum(dlogits, 0, dtype=torch.float32, out=dbias[first:last])
    dhidden = None if dhidden is None else dhidden.to(hidden_ND.dtype)
    return dhidden, dweight, None if dbias is None else dbias.to(bias_V.dtype)


# Rows of one program of the combine kernel.
_COMBINE_ROWS = 256


def _options(config: HeadConfig, D: int) -> dict[str, int | bool]:
    return dict(
        BLOCK_N=config.block_n, BLOCK_V=config.block_v, BLOCK_D=config.block_d, GROUP_N=config.group_n,
        EVEN_D=D % config.block_d == 0, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _configure(name: str, config: HeadConfig, hidden_ND: Tensor, V: int, arch: Arch, launch) -> HeadConfig:
    N, D = hidden_ND.shape
    return choose((name, arch, hidden_ND.dtype, triton.next_power_of_2(N), D, V), config, launch)


def specializations(arch: Arch, dtype: torch.dtype) -> list[Specialization]:
    """What to compile ahead of time: forward and gradient with no option and with every one; combine."""
    x, f = f"*{TYPE_NAMES[dtype]}", "*fp32"
    shapes = {name: "i32" for name in ("stride_hn", "stride_wv", "N", "D", "V")}
    common = {"hidden_ptr": x, "weight_ptr": x, "labels_ptr": "*i64", "in_scale": "fp32", "out_scale": "fp32"} | shapes
    forward = common | {"max_ptr": f, "sum_ptr": f, "label_ptr": f, "tiles_per_split": "i32", "splits": "i32"}
    dlogits = common | {"lse_ptr": f, "grad_logp_ptr": f, "out_ptr": x}
    dlogits |= {name: "i32" for name in ("first_v", "width", "ignore_index")}
    kernels = [
        ("lm_head_forward", lm_head_forward_kernel, forward, {"bias_ptr": x, "dot_ptr": f, "total_ptr": f}),
        ("lm_head_dlogits", lm_head_dlogits_kernel, dlogits, {"bias_ptr": x, "entropy_ptr": f, "grad_entropy_ptr": f}),
    ]
    found = []
    for (name, kernel, required, optional), full in itertools.product(kernels, (False, True)):
        config = head_config(dtype, arch, bare=not full and kernel is lm_head_forward_kernel)
        options = _options(config, D=4112 if full else 4096)
        warps, stages = options.pop("num_warps"), options.pop("num_stages")
        fixed = {"stride_hd": 1, "stride_wd": 1, "HAS_SOFTCAP": full} | options
        fixed |= {} if full else dict.fromkeys(optional)
        types = required | (optional if full else {})
        divisible = ("stride_hn", "stride_wv", "D", "V", "width")
        cores = dtype != torch.float32
        variant = "full" if full else "plain"
        found.append(Specialization(f"{name} {variant}", kernel, types, fixed, warps, stages, divisible, cores))
    return [*found, _combine_specialization()]


def _combine_specialization() -> Specialization:
    pointers = ("max", "sum", "label", "dot", "total", "logp", "lse", "entropy", "mean")
    signature = {f"{name}_ptr": "*fp32" for name in pointers} | {"labels_ptr": "*i64", "top1_ptr": "*i1"}
    signature |= {name: "i32" for name in ("N", "V", "splits", "ignore_index")}
    return Specialization(
        "lm_head_combine", lm_head_combine_kernel, signature, {"BLOCK_N": _COMBINE_ROWS}, num_warps=4, num_stages=1
    )
