"""Pieces of a tiled matrix product: the order of programs, and the sum over the inner dimension.

A tile of a @ b.T, a (rows, K) and b (columns, K), adds up in an fp32 accumulator, BLOCK_K of the inner dimension at a
time in order: deterministic. fp32 operands are multiplied as IEEE asks.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def grouped_order(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Program number to (row block, column block): GROUP_M row blocks meet a column block while L2 has it."""
    first_m = pid // (GROUP_M * num_n) * GROUP_M
    size_m = tl.minimum(num_m - first_m, GROUP_M)
    local = pid % (GROUP_M * num_n)
    return first_m + local % size_m, local // size_m


@triton.jit
def add_dot(
    total, a_ptr, b_ptr, rows, cols, K, stride_am, stride_ak, stride_bn, stride_bk,
    EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr = None,
):  # fmt: skip
    """total + a[rows] @ b[cols].T; rows and cols: int64, in range, the caller clamps. STAGES: None: as launched."""
    offs_k = tl.arange(0, BLOCK_K)
    dims = offs_k.to(tl.int64)
    a_ptrs = a_ptr + (rows * stride_am)[:, None] + (dims * stride_ak)[None, :]
    b_ptrs = b_ptr + (cols * stride_bn)[None, :] + (dims * stride_bk)[:, None]
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(offs_k < K - start)[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=(offs_k < K - start)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        a_ptrs += BLOCK_K * tl.cast(stride_ak, tl.int64)
        b_ptrs += BLOCK_K * tl.cast(stride_bk, tl.int64)
    return total


@triton.jit
def add_dot_copied(total, a, b, first_row, first_col, K, BLOCK_K: tl.constexpr):
    """The same for a tile of two descriptors: the copy engine fetches it, and zeros for what is past the end."""
    for start in range(0, K, BLOCK_K):
        total = tl.dot(a.load([first_row, start]), b.load([first_col, start]).T, total, input_precision="ieee")
    return total


def descriptor(matrix: Tensor, block_rows: int, block_cols: int) -> TensorDescriptor:
    """What the copy engine has to know of a matrix; `tuning.can_bulk_copy` says which it takes."""
    return TensorDescriptor.from_tensor(matrix, [block_rows, block_cols])
