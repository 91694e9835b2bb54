"""Library products whose sums outlive one call."""

import torch
from torch import Tensor


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b with an fp32 total, the product kept in fp32 where the library can."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and torch.version.hip is None:  # torch 2.9 on ROCm refuses out_dtype
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total += torch.mm(a, b)
