"""Shared by the kernel tests: what is true (float64, plain torch), and how near to it a kernel has to be."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import DEVICE
from prefkern.head import Head, RowStats

# The interpreter's tl.dot returns garbage on bf16 operands, so kernels are interpreted in these two only.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

# Ways in which a matrix may lie in memory: what to make of one of at least 4 rows and columns, of the same shape.
VIEWS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "columns of a wider one": lambda x: torch.cat([x, x], 1)[:, 3 : 3 + x.shape[1]],
    "rows of a longer one": lambda x: torch.cat([x, x])[3 : 3 + x.shape[0]],
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "expanded rows": lambda x: x[:1].expand_as(x),
    "expanded columns": lambda x: x[:, :1].expand_as(x),
    "one value": lambda x: x[:1, :1].expand_as(x),
}


def assert_as_good_as_torch(got: Tensor, torch_same_dtype: Tensor, truth_float64: Tensor, eps: float) -> None:
    """max |got - truth| <= 2 max |torch_same_dtype - truth| + eps max |truth|; NaN and infinities where truth has them.

    Args:
        got: the result under test.
        torch_same_dtype: plain torch on the same inputs in the same dtype.
        truth_float64: the same in float64.
        eps: relative to the largest true value; a truth of all zeros has to be met exactly.
    """
    assert got.shape == truth_float64.shape, f"shape {tuple(got.shape)}, expected {tuple(truth_float64.shape)}"
    got, same, truth = (t.detach().cpu().double() for t in (got, torch_same_dtype, truth_float64))
    finite = truth.isfinite()
    torch.testing.assert_close(got[~finite], truth[~finite], rtol=0, atol=0, equal_nan=True)
    assert got[finite].isfinite().all(), f"{int((~got[finite].isfinite()).sum())} values are not finite"
    if not finite.any():
        return
    error = (got - truth)[finite].abs().max().item()
    torch_error = (same - truth)[finite].abs().nan_to_num(0.0).max().item()
    bound = 2 * torch_error + eps * truth[finite].abs().max().item()
    assert error <= bound, f"error {error:.3e} > {bound:.3e} = 2 x torch's {torch_error:.3e} + eps"


def row_stats(logits: Tensor, labels: Tensor, head: Head, bias: Tensor | None = None) -> RowStats:
    """All row statistics in plain torch, differentiable; fp32 maths, or float64 when the logits are float64."""
    z = logits if bias is None else logits + bias
    z = (z if z.dtype == torch.float64 else z.float()) * head.logit_scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    z = z / head.temperature
    kept = labels != head.ignore_index
    logp = z.log_softmax(-1)
    label = labels.clamp(0, z.shape[-1] - 1)[:, None]
    plogp = (logp.exp() * logp.masked_fill(logp.isneginf(), 0.0)).sum(-1)
    values = (
        logp.gather(-1, label)[:, 0],
        z.logsumexp(-1),
        -plogp,
        z.mean(-1),
        (2 * z).logsumexp(-1) - 2 * z.logsumexp(-1),
    )
    logps, lse, entropy, mean_logit, log_collision = (torch.where(kept, x, 0.0) for x in values)
    is_top1 = kept & (z.gather(-1, label)[:, 0] >= z.amax(-1))
    return RowStats(logps, lse, entropy, is_top1, mean_logit, log_collision)


def poison(monkeypatch) -> None:
    """Make torch.empty and torch.empty_like hand out NaN (or the largest integer): what is read has been written."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args, _original=original, **kwargs):
            t = _original(*args, **kwargs)
            if t.is_floating_point():
                return t.fill_(float("nan"))
            return t.fill_(True if t.dtype == torch.bool else torch.iinfo(t.dtype).max)

        monkeypatch.setattr(torch, name, poisoned)


def far_apart(logits: Tensor, strides: tuple[int, int], directory) -> Tensor:
    """A copy with these strides; on a CPU in a file that is a hole but for the copy, so that any size fits."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(logits.shape, strides))
    if DEVICE == "cpu":
        memory = torch.from_file(str(directory / "logits"), shared=True, size=size, dtype=logits.dtype)
    else:
        memory = torch.empty(size, dtype=logits.dtype, device=DEVICE)
    return memory.as_strided(logits.shape, strides).copy_(logits)


class LargestTensor(TorchDispatchMode):
    """The largest tensor, in bytes, that any operation returns, views of given tensors aside."""

    def __init__(self, known):
        super().__init__()
        self.known, self.bytes = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out
