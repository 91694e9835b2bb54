"""Row statistics of a block of logits and their gradient on a CPU, by compiled code: see row_softmax_cpu.cpp.

The functions and their formulas are those of prefkern/rows.py, which serves what these do not: other dtypes than
bfloat16 and float32, logits whose columns do not lie one after the other, tensors that are not plain memory, and
machines where setup.py found no compiler. Each row is read from memory once and its gradient written once.
"""

from __future__ import annotations

import ctypes
from types import ModuleType

import torch
from torch import Tensor

from prefkern import rows
from prefkern.gradients import stands_for_many
from prefkern.head import Head, Operands, RowStats
from prefkern.rows import RowSums

from .compiled import load

DTYPES = (torch.bfloat16, torch.float32)
_SMALL = 1 << 14  # elements that one thread is done with before a second has woken


class _Tile(ctypes.Structure):
    _fields_ = [
        ("logits", ctypes.c_void_p), ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64), ("width", ctypes.c_int64), ("stride", ctypes.c_int64), ("out_stride", ctypes.c_int64),
        ("labels", ctypes.c_void_p), ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_float), ("softcap", ctypes.c_float), ("temperature", ctypes.c_float),
        ("is_bf16", ctypes.c_int32), ("threads", ctypes.c_int32),
    ]  # fmt: skip


class _Sums(ctypes.Structure):
    _fields_ = [("gradient", ctypes.c_int64), *((name, ctypes.c_void_p) for name in RowSums._fields)]


class _Upstream(ctypes.Structure):
    _fields_ = [("ignore_index", ctypes.c_int64), *((name, ctypes.c_void_p) for name in ("lse", "g", "entropy", "e"))]


def library() -> ctypes.CDLL | None:
    """The compiled row functions; None where they are not there."""
    return load("_row_softmax_cpu")


def fold(tile: Tensor, labels_N: Tensor, head: Head, *, gradient: int = 0, **options) -> RowSums:
    """As `rows.fold`; of the tile only the rows that want a gradient are written over, whatever `overwrite` allows."""
    if not _served(tile):
        return rows.fold(tile, labels_N, head, gradient=gradient, **options)
    return _fold(tile, labels_N, head, gradient=gradient, **options)


def _fold(
    tile: Tensor,
    labels_N: Tensor,
    head: Head,
    *,
    bias_V: Tensor | None = None,
    want_entropy: bool = False,
    want_mean: bool = False,
    want_collision: bool = False,
    gradient: int = 0,
    overwrite: bool = True,
) -> RowSums:
    wanted = (True, True, True, want_entropy, want_mean, want_collision)
    sums = RowSums(*(tile.new_empty(tile.shape[0], dtype=torch.float32) if wants else None for wants in wanted))
    labels, bias = labels_N.contiguous(), _fp32(bias_V)
    arguments = _tile(tile, tile, labels, bias, head), _Sums(gradient, *map(_address, sums))
    library().prefkern_fold(*map(ctypes.byref, arguments))
    return sums


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
    """As `rows.row_softmax_forward`."""
    want = dict(want_entropy=want_entropy, want_mean=want_mean, want_collision=want_collision)
    if not _served(logits_NV):
        return rows.row_softmax_forward(logits_NV, labels_N, head, bias_V=bias_V, want_top1=want_top1, **want)
    sums = _fold(logits_NV, labels_N, head, bias_V=bias_V, **want)
    return rows.statistics(sums, labels_N, logits_NV.shape[1], head, want_top1=want_top1)


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
    """As `rows.row_softmax_backward`."""
    out = torch.empty_like(logits_NV) if out is None else out
    if not (_served(logits_NV) and _served(out)) or stands_for_many(grad_logps_N, grad_entropy_N):
        return rows.row_softmax_backward(
            logits_NV, labels_N, lse_N, grad_logps_N, head, bias_V=bias_V, entropy_N=entropy_N,
            grad_entropy_N=grad_entropy_N, grad_scale=grad_scale, out=out,
        )  # fmt: skip
    scale = head.logit_scale / head.temperature

    def upstream(g: Tensor) -> Tensor:
        return _fp32(g * scale if grad_scale is None else g * scale * grad_scale)

    g, e = upstream(grad_logps_N), None if grad_entropy_N is None else upstream(grad_entropy_N)
    labels, lse, bias = labels_N.contiguous(), _fp32(lse_N), _fp32(bias_V)
    entropy = None if e is None else _fp32(entropy_N)
    factors = _Upstream(head.ignore_index, *map(_address, (lse, g, entropy, e)))
    library().prefkern_gradient(ctypes.byref(_tile(logits_NV, out, labels, bias, head)), ctypes.byref(factors))
    return out


def whole_head(operands: Operands, head: Head, want: dict[str, bool]) -> ModuleType | None:
    """As `rows.whole_head`."""
    from . import lm_head_cpu

    return lm_head_cpu if lm_head_cpu.serves(operands, head, want) else None


def _served(x_NV: Tensor) -> bool:
    """Whether the compiled functions take this block: bf16 or fp32 in plain memory, a row's elements side by side."""
    plain = type(x_NV) is Tensor and x_NV.dtype in DTYPES and x_NV.device.type == "cpu"
    return plain and (x_NV.shape[1] <= 1 or x_NV.stride(1) == 1)


def _tile(logits: Tensor, out: Tensor, labels: Tensor, bias: Tensor | None, head: Head) -> _Tile:
    """The arguments that both functions share; the caller keeps the tensors alive."""
    capped = head.softcap is not None
    n, width = logits.shape
    return _Tile(
        logits.data_ptr(), out.data_ptr(), n, width, logits.stride(0), out.stride(0), labels.data_ptr(),
        _address(bias), head.logit_scale if capped else head.logit_scale / head.temperature, head.softcap or 0.0,
        head.temperature, logits.dtype == torch.bfloat16, torch.get_num_threads() if n * width > _SMALL else 1,
    )  # fmt: skip


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()
