"""Memory of a large tensor that is gone, for the next one of its size.

The gradient of a head is made anew in each step, of fresh pages, which the system clears one by one: 4 to 7 percent of
a step on a CPU. So where such memory is asked for again and again, the last piece is kept while no tensor has it, in
pages as large as the system gives. It may take them meanwhile, and does when memory is short (MADV_FREE); until then
they count as the process's own. Memory asked for once is given back at once. On Linux only.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref

import torch
from torch import Tensor

# Less is used again by malloc itself.
_LEAST = 32 << 20
_IS_LINUX = all(hasattr(mmap, name) for name in ("MADV_FREE", "MADV_HUGEPAGE"))


class _Pages(mmap.mmap):
    is_used_again = False


_spare: list[_Pages] = []  # at most one


def empty_like(x: Tensor) -> Tensor:
    """A dense tensor of x's shape, dtype and device, of whatever values."""
    size = x.numel() * x.element_size()
    if x.device.type != "cpu" or size < _LEAST or not _IS_LINUX:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    pages = _spare.pop() if _spare else None
    if pages is None or len(pages) != size:
        pages = _Pages(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(pages)  # lives as long as the tensor's storage
    weakref.finalize(view, _keep, pages).atexit = False
    return torch.frombuffer(view, dtype=x.dtype).view(x.shape)


def _keep(pages: _Pages) -> None:
    try:
        pages.madvise(mmap.MADV_FREE if pages.is_used_again else mmap.MADV_DONTNEED)
    except OSError:  # locked memory, say
        return
    if not pages.is_used_again:
        pages.is_used_again = True
        with contextlib.suppress(OSError):  # a system without large pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    _spare[:] = [pages]
