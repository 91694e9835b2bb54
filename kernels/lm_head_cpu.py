"""An LM head on a CPU by compiled code, products and softmax of a slice of the vocabulary at a time: lm_head_cpu.cpp.

    forward    e = exp(z - r);   sum += sum_v e;   dot += sum_v e (z - r);   acc += e @ weight, without the label's e
    backward   d = g (onehot - p) - e p (log p + entropy);   dhidden += d @ weight;   dweight = d.T @ hidden

r is each row's own reference: near its log-sum-exp, not its maximum. Logits are folded while they are in registers,
and e and d lie in memory only as the products read them.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from prefkern.head import Head, Operands, RowStats
from prefkern.rows import RowSums

from . import product_cpu
from .product_cpu import Matrix, library, matrix

# A slice's width has to be a multiple.
_GRADIENT_COLUMNS = 32


class _Head(ctypes.Structure):
    _fields_ = [
        ("hidden", ctypes.c_void_p), ("weight", Matrix),
        ("rows", ctypes.c_int64), ("vocab", ctypes.c_int64), ("depth", ctypes.c_int64),
        ("first", ctypes.c_int64), ("step", ctypes.c_int64),
        ("labels", ctypes.c_void_p), ("ignore_index", ctypes.c_int64),
        ("scale", ctypes.c_float), ("threads", ctypes.c_int32),
        ("logits", ctypes.c_void_p), ("logits_apart", ctypes.c_int64), ("rows_before", ctypes.c_int64),
        ("acc", ctypes.c_void_p), ("acc_stride", ctypes.c_int64), ("gradient", ctypes.c_int64),
        ("unit", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("reference", "sum", "label", "dot", "top")),
    ]  # fmt: skip


class _Upstream(ctypes.Structure):
    _fields_ = [
        ("logits", ctypes.c_void_p), ("hidden", Matrix), ("weight", Matrix),
        ("rows", ctypes.c_int64), ("width", ctypes.c_int64), ("depth", ctypes.c_int64),
        ("logits_stride", ctypes.c_int64),
        ("labels", ctypes.c_void_p), ("first", ctypes.c_int64), ("ignore_index", ctypes.c_int64),
        ("scale", ctypes.c_float), ("threads", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("lse", "g", "entropy", "e", "dhidden", "dweight", "dweight_sum")),
        ("dhidden_stride", ctypes.c_int64), ("dweight_stride", ctypes.c_int64),
    ]  # fmt: skip


def serves(operands: Operands, head: Head, want: dict[str, bool]) -> bool:
    """Whether these rows can be folded here: what the products take, and a softmax of a multiple of the logits.

    Args:
        want: as keywords of `rows.row_softmax_forward`; of these, entropy and is_top1 are served.
    """
    if operands.hidden.dtype != torch.bfloat16 or operands.hidden.device.type != "cpu":
        return False
    others = any(wanted for flag, wanted in want.items() if flag not in ("want_entropy", "want_top1"))
    if others or head.softcap is not None or operands.bias is not None or operands.low is not None:
        return False
    hidden, weight = operands.hidden, operands.weight
    return product_cpu.serves(hidden, weight.t()) and weight.stride(1) == 1


@dataclass(frozen=True)
class Rows:
    """A block of rows of hidden, packed once for all slices."""

    hidden: Tensor
    packed: Tensor
    labels: Tensor
    head: Head

    @classmethod
    def of(cls, hidden_ND: Tensor, labels_N: Tensor, head: Head) -> Rows:
        sizes = [*map(ctypes.c_int64, hidden_ND.shape)]
        count_words = library().prefkern_packed_words
        count_words.restype = ctypes.c_int64
        packed = torch.empty(count_words(*sizes), dtype=torch.int32)
        to, threads = ctypes.c_void_p(packed.data_ptr()), ctypes.c_int64(torch.get_num_threads())
        library().prefkern_pack_rows(ctypes.byref(matrix(hidden_ND)), *sizes, to, threads)
        return cls(hidden_ND, packed, labels_N.contiguous(), head)

    def fold(
        self,
        weight: Tensor,
        first: int,
        step: int,
        sums: RowSums,
        top: Tensor | None,
        *,
        logits: Tensor | None = None,
        rows_before: int = 0,
        acc: Tensor | None = None,
        unit: Tensor | None = None,
    ) -> int:
        """Fold the vocabulary into `sums`, slice after slice, up to the first that compiled code cannot do.

        Args:
            weight: (V, D), the head; first: the entry to begin with; step: how many make a slice.
            sums: of the rows, over what was seen before. `top` is their reference, -inf where there is none yet.
            top: (N,) the largest z, or None.
            logits: (V, X) memory in which raw logits are to be left: those of a slice of W entries are lines of W from
                its first entry's line on, these rows' after rows_before others; may be written to in any case.
            acc: (M, D) fp32, of the M leading rows; scaled as their reference moves. Ignored rows may hold anything.
            unit: (M, D) dense, d logp / d hidden of these rows; written if all of the vocabulary has been folded.
        Returns:
            The entry that the first slice not folded begins with, V if all were: sums and acc are those up to it.
        """
        if "torch.utils.flop_counter" in sys.modules:
            _count_flops()
        return torch.ops.prefkern.head_forward(
            *sums[:4], top, logits, acc, unit, self.hidden, self.packed, weight, self.labels, first, step, rows_before,
            self.head.ignore_index, self.head.logit_scale / self.head.temperature,
        )  # fmt: skip


@dataclass(frozen=True)
class Gradient:
    """What dL/dlogits is made of, of all rows."""

    operands: Operands
    labels: Tensor
    head: Head
    lse: Tensor
    g: Tensor  # dL/dlogp, times the scale of the logits
    entropy: Tensor | None
    e: Tensor | None  # dL/dentropy, times that scale

    @classmethod
    def of(
        cls, operands: Operands, labels_N: Tensor, head: Head, stats: RowStats, grad_logps_N: Tensor,
        grad_entropy_N: Tensor | None,
    ) -> Gradient:  # fmt: skip
        def scaled(g: Tensor | None) -> Tensor | None:
            return None if g is None else (g * (head.logit_scale / head.temperature)).to(torch.float32).contiguous()

        entropy = None if grad_entropy_N is None else stats.entropy.contiguous()
        labels, lse = labels_N.contiguous(), stats.lse.contiguous()
        return cls(operands, labels, head, lse, scaled(grad_logps_N), entropy, scaled(grad_entropy_N))

    def takes(self, part: slice) -> bool:
        """Whether a slice of the vocabulary is of a width that `add` can do."""
        return (part.stop - part.start) % _GRADIENT_COLUMNS == 0

    def add(self, logits: Tensor, rows: slice, part: slice, dhidden: Tensor | None, dweight: Tensor | None) -> None:
        """Gradients of a block of rows and a slice of the vocabulary.

        Args:
            logits: (N, W) raw, of these rows and this slice.
            dhidden: (N, D) fp32, added to; or None.
            dweight: (W, D) fp32, added to, or bf16, written over, be it the memory of the logits; or None.
        """
        if "torch.utils.flop_counter" in sys.modules:
            _count_flops()
        factors = (None if x is None else x[rows] for x in (self.lse, self.g, self.entropy, self.e))
        torch.ops.prefkern.head_slice_gradient(
            dhidden, dweight, logits, self.operands.hidden[rows], self.operands.weight[part], self.labels[rows],
            part.start, self.head.ignore_index, self.head.logit_scale / self.head.temperature, *factors,
        )  # fmt: skip


_operators = torch.library.Library("prefkern", "FRAGMENT")
_operators.define(
    "head_forward(Tensor(a!) reference, Tensor(b!) sum, Tensor(c!) label, Tensor(d!)? dot, Tensor(e!)? top,"
    " Tensor(f!)? logits, Tensor(g!)? acc, Tensor(h!)? unit, Tensor hidden, Tensor packed, Tensor weight,"
    " Tensor labels, int first, int step, int rows_before, int ignore_index, float scale) -> int"
)
_operators.define(
    "head_slice_gradient(Tensor(a!)? dhidden, Tensor(b!)? dweight, Tensor logits, Tensor hidden, Tensor weight,"
    " Tensor labels, int first, int ignore_index, float scale, Tensor lse, Tensor g, Tensor? entropy, Tensor? e) -> ()"
)


@torch.library.impl(_operators, "head_forward", "CPU")
def _head_forward(
    reference: Tensor,
    sum: Tensor,
    label: Tensor,
    dot: Tensor | None,
    top: Tensor | None,
    logits: Tensor | None,
    acc: Tensor | None,
    unit: Tensor | None,
    hidden: Tensor,
    packed: Tensor,
    weight: Tensor,
    labels: Tensor,
    first: int,
    step: int,
    rows_before: int,
    ignore_index: int,
    scale: float,
) -> int:
    # An operator, so that whoever counts or traces operators sees the products.
    rows, depth = hidden.shape
    if (dot is None) != (top is None):  # they come together
        dot, top = (torch.zeros_like(sum) if x is None else x for x in (dot, top))
    arguments = _Head(
        packed.data_ptr(), matrix(weight), rows, weight.shape[0], depth, first, step, labels.data_ptr(), ignore_index,
        scale, torch.get_num_threads(), _address(logits), _stride(logits), rows_before, _address(acc), _stride(acc),
        0 if acc is None else acc.shape[0], *map(_address, (unit, reference, sum, label, dot, top)),
    )  # fmt: skip
    forward = library().prefkern_head_forward
    forward.restype = ctypes.c_int64
    done = forward(ctypes.byref(arguments))
    if done < 0:
        raise MemoryError(f"no memory for slices of {step} entries of the vocabulary and {rows} rows")
    return done


@torch.library.impl(_operators, "head_slice_gradient", "CPU")
def _head_slice_gradient(
    dhidden: Tensor | None,
    dweight: Tensor | None,
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    first: int,
    ignore_index: int,
    scale: float,
    lse: Tensor,
    g: Tensor,
    entropy: Tensor | None,
    e: Tensor | None,
) -> None:
    (rows, width), depth = logits.shape, hidden.shape[1]
    is_sum = dweight is not None and dweight.dtype == torch.float32
    arguments = _Upstream(
        logits.data_ptr(), matrix(hidden), matrix(weight), rows, width, depth, logits.stride(0), labels.data_ptr(),
        first, ignore_index, scale, torch.get_num_threads(), *map(_address, (lse, g, entropy, e, dhidden)),
        *map(_address, (None, dweight) if is_sum else (dweight, None)), _stride(dhidden), _stride(dweight),
    )  # fmt: skip
    if library().prefkern_gradient_slice(ctypes.byref(arguments)):
        raise MemoryError(
            f"no memory for the gradients of a slice of {width} entries of the vocabulary and {rows} rows"
        )


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


@functools.cache
def _count_flops() -> None:
    """Tell torch's FlopCounterMode of the operator. Its module imports triton, so not before somebody uses it."""
    from torch.utils.flop_counter import register_flop_formula

    @register_flop_formula(torch.ops.prefkern.head_forward, get_raw=True)
    def flops(*args, out_val: int, **kwargs) -> int:
        acc, hidden, first = args[6], args[8], args[12]
        rows = hidden.shape[0] + (0 if acc is None else acc.shape[0])
        return 2 * rows * (out_val - first) * hidden.shape[1]

    @register_flop_formula(torch.ops.prefkern.head_slice_gradient)
    def flops_of_gradient(dhidden_shape, dweight_shape, logits_shape, hidden_shape, *args, **kwargs) -> int:
        products = sum(shape is not None for shape in (dhidden_shape, dweight_shape))
        return 2 * products * logits_shape[0] * logits_shape[1] * hidden_shape[1]


if "torch.utils.flop_counter" in sys.modules:
    _count_flops()
