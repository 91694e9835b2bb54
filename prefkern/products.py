"""Products: the fastest that the machine has for two matrices, and sums that outlive one call."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

# Below it the choice of the library does not matter.
_SMALL = 1 << 16  # multiply-adds
# Terms of a sum that oneDNN is given at once: its rms error is 1.7 times MKL's from 512 of them on, 2.2 times from
# 2,048 on, and about the same at 256. That few cost nothing where b's rows lie one after the other, as in the
# gradients, and a third of the time elsewhere.
_SUM, _SUM_OVER_ROWS = 1024, 256


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in the dtype of both.

    Args:
        a: (M, K); b: (K, L), of one dtype, any strides.
        out: (M, L) memory that may be used for the result. It need not be: use what is returned.
    """
    if _compiled_serves(a, b, out, a.dtype):
        out = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
        _compiled(out, a, b)
        return out
    if _onednn_serves(a, b):
        return _onednn(a, b, out)
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b."""
    result = product(a, b, out)
    if result is not out:
        out.copy_(result)


def add_product(total: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """total += alpha * a @ b with an fp32 total, the product kept in fp32 where the library can."""
    if _compiled_serves(a, b, total, torch.float32):
        _compiled(total, a, b, gain=None if alpha == 1.0 else total.new_full((len(total),), alpha))
    elif a.dtype == total.dtype and not _onednn_serves(a, b):
        total.addmm_(a, b, alpha=alpha)
    elif a.is_cuda and a.dtype != total.dtype and torch.version.hip is None:  # torch 2.9 on ROCm refuses out_dtype
        total.add_(torch.mm(a, b, out_dtype=total.dtype), alpha=alpha)
    else:
        total.add_(product(a, b), alpha=alpha)


def blend_product(total: Tensor, keep_N: Tensor, a: Tensor, b: Tensor, gain_N: Tensor) -> None:
    """total = keep total + gain (a @ b) with an fp32 total and factors for each of its rows."""
    if _compiled_serves(a, b, total, torch.float32):
        _compiled(total, a, b, keep_N, gain_N)
    else:
        total.mul_(keep_N[:, None]).addcmul_(product(a, b), gain_N[:, None])


def _compiled_serves(a: Tensor, b: Tensor, out: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether hand-written code takes these two and is the faster: bf16 matrices on some x86 processors.

    Args:
        dtype: of the result: bf16 is written over, fp32 is added to.
    """
    if a.dtype != torch.bfloat16 or a.device.type != "cpu":
        return False
    from prefkern.kernels import product_cpu

    return product_cpu.serves(a, b) and (out is None or (out.dtype == dtype and out.stride(1) == 1))


def _compiled(*args: Tensor | None, **factors: Tensor | None) -> None:
    from prefkern.kernels import product_cpu

    product_cpu.product_into(*args, **factors)


def _onednn(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    """a @ b; a long sum is that of several products, in `out` if given."""
    step = _SUM_OVER_ROWS if b.is_contiguous() else _SUM
    multiply = torch.ops.mkldnn._linear_pointwise
    if a.shape[1] <= step:
        return multiply(a, b.t(), None, "none", [], "")
    total = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
    for i, (x, y) in enumerate(zip(a.split(step, 1), b.split(step))):
        piece = multiply(_packed(x), _packed(y).t(), None, "none", [], "")
        total.copy_(piece) if i == 0 else total.add_(piece)
    return total


def _packed(x: Tensor) -> Tensor:
    """The same numbers without gaps: of matrices with gaps oneDNN takes minutes."""
    if _dense(x):
        return x
    return x.t().contiguous().t() if x.stride(0) == 1 else x.contiguous()


def _onednn_serves(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN takes these two and is the faster: fp32 matrices on an x86 processor that MKL does not favour."""
    if not _has_two_libraries(a) or a.numel() == 0 or a.numel() * b.shape[1] < _SMALL:
        return False
    return _dense(a) and _dense(b) and _onednn_is_faster()


def _has_two_libraries(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu"


def _dense(x: Tensor) -> bool:
    """Whether rows or columns lie one after the other, without gaps: what oneDNN takes as it is."""
    return x.is_contiguous() or x.t().is_contiguous()


@functools.cache
def _onednn_is_faster() -> bool:
    """With AVX-512 on a processor that is not Intel's: on Zen 5 two to two and a half times as fast as torch.mm.

    A property of the machine, never timed: a choice that a busy moment could turn would turn bits too.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
