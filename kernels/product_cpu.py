"""Products of bf16 matrices on a CPU by compiled code: see product_cpu.cpp.

    out   = a @ b                               rounded once to bf16
    total = keep total + gain (a @ b)           in fp32; keep, gain: a factor for each row

By vectors of pairs of bf16 (AVX-512 BF16) or, where the processor has them, its matrix registers (AMX). A library does
the work where it has neither, and on Intel's that have only the former: see prefkern/products.py.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch
from torch import Tensor

from .compiled import load

VECTORS, TILES = 1, 2  # what may multiply
_LEAST = 64  # rows, columns and depth below which packing is not worth its time


class Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("transposed", ctypes.c_int64)]


class _Result(ctypes.Structure):
    _fields_ = [
        ("bf16", ctypes.c_void_p), ("fp32", ctypes.c_void_p), ("stride", ctypes.c_int64),
        ("keep", ctypes.c_void_p), ("gain", ctypes.c_void_p),
    ]  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled products, set to the fastest way to multiply that this processor has.

    None where not built or not the fastest: a property of the machine, never timed.
    """
    found = load("_product_cpu")
    # One built before its source was last changed may lack a part.
    if found is None or not hasattr(found, "prefkern_multiply_by"):
        return None
    try:
        is_intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    # Of Intel's, those that have bf16 but no tiles were never measured.
    return found if found.prefkern_multiply_by(TILES) >= (TILES if is_intel else VECTORS) else None


def serves(a: Tensor, b: Tensor) -> bool:
    """Whether a @ b is better computed here: two bf16 matrices on a CPU, dense in one direction, and not small."""
    if a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16 or a.device.type != "cpu":
        return False
    if min(*a.shape, b.shape[1]) < _LEAST or type(a) not in _PLAIN or type(b) not in _PLAIN:
        return False
    return _is_lines(a) and _is_lines(b) and library() is not None


_PLAIN = (Tensor, torch.nn.Parameter)
_operators = torch.library.Library("prefkern", "FRAGMENT")
_operators.define("product(Tensor(a!) out, Tensor a, Tensor b, Tensor? keep=None, Tensor? gain=None) -> ()")


def product_into(out: Tensor, a: Tensor, b: Tensor, keep: Tensor | None = None, gain: Tensor | None = None) -> None:
    """out = a @ b, or of an fp32 `out`, out = keep out + gain (a @ b).

    Args:
        out: (M, L), bf16 or fp32, each row's elements side by side; neither a nor b.
        a, b: (M, K) and (K, L), for which `serves` is true.
        keep, gain: (M,) fp32 factors, or None for ones.
    Raises:
        MemoryError: there is none for the packed matrices.
    """
    if "torch.utils.flop_counter" in sys.modules:
        _count_flops()
    torch.ops.prefkern.product(out, a, b, keep, gain)


@torch.library.impl(_operators, "product", "CPU")
def _product(out: Tensor, a: Tensor, b: Tensor, keep: Tensor | None = None, gain: Tensor | None = None) -> None:
    # An operator, so that whoever counts or traces operators sees the product.
    (rows, depth), columns = a.shape, b.shape[1]
    is_fp32 = out.dtype == torch.float32
    keep, gain = (None if x is None else x.to(torch.float32).contiguous() for x in (keep, gain))
    result = _Result(
        None if is_fp32 else out.data_ptr(), out.data_ptr() if is_fp32 else None, out.stride(0),
        *(None if x is None else x.data_ptr() for x in (keep, gain)),
    )  # fmt: skip
    sizes = map(ctypes.c_int64, (rows, columns, depth, torch.get_num_threads()))
    if not library().prefkern_product(*map(ctypes.byref, (matrix(a), matrix(b), result)), *sizes):
        raise MemoryError(f"no memory to multiply {tuple(a.shape)} by {tuple(b.shape)}")


@functools.cache
def _count_flops() -> None:
    """Tell torch's FlopCounterMode of the operator. Its module imports triton, so not before somebody uses it."""
    from torch.utils.flop_counter import register_flop_formula

    @register_flop_formula(torch.ops.prefkern.product)
    def flops(_, a_shape, b_shape, *__, **___) -> int:
        return 2 * a_shape[0] * a_shape[1] * b_shape[1]


if "torch.utils.flop_counter" in sys.modules:
    _count_flops()


def matrix(x: Tensor) -> Matrix:
    """The argument for x, whose rows or columns are runs of memory."""
    transposed = x.stride(1) != 1
    return Matrix(x.data_ptr(), x.stride(0 if not transposed else 1), transposed)


def _is_lines(x: Tensor) -> bool:
    """Whether rows or columns are runs of memory that do not overlap."""
    (n, m), (down, along) = x.shape, x.stride()
    return (along == 1 and down >= m) or (down == 1 and along >= n)
