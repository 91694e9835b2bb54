"""Products with a matrix of which most tiles are zero: only the others are read and multiplied.

    rows     total (N, D) fp32   +=  slice (N, width) @ other (columns, D)
    columns  out (columns, D)     =  slice.T @ other (N, D)

The slice comes with a flag for each of its tiles. Sorting the flags of a row (column) of tiles gives the list of those
to visit, so the loop has no branch in it and its loads are pipelined; neither a count nor a flag reaches the host.
FLOPs: 2 D for each element of a flagged tile. Accumulators are fp32, tiles are visited in order: deterministic.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .matmul import grouped_order
from .tuning import TYPE_NAMES, HeadConfig, Specialization


class Kept(NamedTuple):
    """The flagged tiles of each row (or column) of tiles: their numbers in order, flagged ones first, and how many."""

    tiles: Tensor  # (lines, tiles of a line) int64
    count: Tensor  # (lines,) int32


def kept_tiles(flags_LT: Tensor) -> Kept:
    """From (lines, tiles of a line) int8 flags."""
    assert flags_LT.is_contiguous()
    return Kept(flags_LT.argsort(dim=1, descending=True, stable=True), flags_LT.sum(1, dtype=torch.int32))


@triton.jit(do_not_specialize=["N", "columns", "line"])
def sparse_product_kernel(
    slice_ptr, other_ptr,  # in: (N, width) with zeros in columns past `columns`; (columns, D), or (N, D) if OF_COLUMNS
    tiles_ptr, count_ptr,  # in: (lines, line) int64, (lines,) int32
    out_ptr,  # in and out: (N, D) fp32; or out: (columns, D) if OF_COLUMNS
    width, stride_ok, stride_od,
    N, columns, D, line,
    OF_COLUMNS: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Grid (lines * blocks of D,): one program makes TILE_M rows of BLOCK_D columns of the product."""
    if OF_COLUMNS:
        M, K = columns, N
    else:
        M, K = N, columns
    pid_m, pid_d = grouped_order(tl.program_id(0), tl.cdiv(M, TILE_M), tl.cdiv(D, BLOCK_D), GROUP_M)
    offs_m = pid_m * TILE_M + tl.arange(0, TILE_M)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = (offs_d < D)[None, :]
    total = tl.zeros([TILE_M, BLOCK_D], tl.float32)
    STEPS: tl.constexpr = TILE_K // BLOCK_K
    steps = tl.load(count_ptr + pid_m) * STEPS
    tiles_ptr += pid_m * line
    following = tl.load(tiles_ptr).to(tl.int32)
    for step in range(0, steps):
        # Read a step ahead: were the number of a tile read with it, the pipeline would wait for one to fetch the other.
        tile = following
        following = tl.load(tiles_ptr + tl.minimum(step + 1, steps - 1) // STEPS).to(tl.int32)
        offs_k = tile * TILE_K + step % STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
        # Rows of the slice past the end are not there; its columns past the end are, so their loads need no mask.
        if OF_COLUMNS:
            a_ptrs = slice_ptr + (offs_k.to(tl.int64) * width)[None, :] + offs_m[:, None]
            a = tl.load(a_ptrs, mask=(offs_k < N)[None, :], other=0.0)
        else:
            a_ptrs = slice_ptr + (tl.minimum(offs_m, N - 1).to(tl.int64) * width)[:, None] + offs_k[None, :]
            a = tl.load(a_ptrs)
        rows_k = tl.minimum(offs_k, K - 1).to(tl.int64)
        b_ptrs = other_ptr + (rows_k * stride_ok)[:, None] + (offs_d.to(tl.int64) * stride_od)[None, :]
        if EVEN_D:
            b = tl.load(b_ptrs)
        else:
            b = tl.load(b_ptrs, mask=mask_d, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    out_ptrs = out_ptr + (offs_m.to(tl.int64) * D)[:, None] + offs_d[None, :]
    mask = (offs_m < M)[:, None] & mask_d
    if not OF_COLUMNS:
        total += tl.load(out_ptrs, mask=mask, other=0.0)
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


def add_rows_product(total_ND: Tensor, slice_NW: Tensor, other_CD: Tensor, kept: Kept, config: HeadConfig) -> None:
    """total += slice @ other by the kept tiles of each row of tiles; config is that of the kernel that made them."""
    _launch(slice_NW, other_CD, kept, total_ND, other_CD.shape[0], config, of_columns=False)


def columns_product(out_CD: Tensor, slice_NW: Tensor, other_ND: Tensor, kept: Kept, config: HeadConfig) -> None:
    """out = slice.T @ other by the kept tiles of each column of tiles."""
    _launch(slice_NW, other_ND, kept, out_CD, out_CD.shape[0], config, of_columns=True)


def _launch(slice_NW: Tensor, other: Tensor, kept: Kept, out: Tensor, columns: int, config: HeadConfig, *, of_columns):
    assert out.is_contiguous() and slice_NW.is_contiguous() and slice_NW.shape[1] % config.block_v == 0
    (N, width), D = slice_NW.shape, other.shape[1]
    lines, line = kept.tiles.shape
    options = _options(config, D, of_columns)
    sparse_product_kernel[(lines * triton.cdiv(D, options["BLOCK_D"]),)](
        slice_NW, other, kept.tiles, kept.count, out, width, *other.stride(), N, columns, D, line, **options
    )


def _options(config: HeadConfig, D: int, of_columns: bool) -> dict[str, int | bool]:
    """Tiles of the slice as they were made, and an accumulator of the size of one."""
    tile_m, tile_k = (config.block_v, config.block_n) if of_columns else (config.block_n, config.block_v)
    block_d = tile_k
    return dict(
        OF_COLUMNS=of_columns, TILE_M=tile_m, TILE_K=tile_k, BLOCK_K=min(config.block_d, tile_k), BLOCK_D=block_d,
        EVEN_D=D % block_d == 0, GROUP_M=config.group_n, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def specializations(dtype: torch.dtype, config: HeadConfig) -> list[Specialization]:
    """What to compile ahead of time: both products, for tiles of the given configuration."""
    x = f"*{TYPE_NAMES[dtype]}"
    types = {"slice_ptr": x, "other_ptr": x, "tiles_ptr": "*i64", "count_ptr": "*i32"}
    types |= {name: "i32" for name in ("width", "stride_ok", "N", "columns", "D", "line")}
    found = []
    for name, of_columns in (("rows", False), ("columns", True)):
        options = _options(config, 4096, of_columns)
        launch = dict(num_warps=options.pop("num_warps"), num_stages=options.pop("num_stages"), config=config)
        launch |= dict(divisible=("width", "stride_ok", "D"), tensor_cores=dtype != torch.float32)
        signature, fixed = types | {"out_ptr": x if of_columns else "*fp32"}, {"stride_od": 1} | options
        name = f"lm_head_sparse_product {name}"
        found.append(Specialization(name, sparse_product_kernel, signature, fixed, **launch))
    return found
