"""Memory of a large tensor that is gone, for the next one of its size.

The gradient of a head is made anew in each step, of fresh pages, which the system clears one by one: in bf16 that is a
tenth of a step on a CPU. So where such memory is asked for twice, the last piece is kept while no tensor has it, in
pages as large as the system gives. It may take them meanwhile, and does when memory is short (MADV_FREE); until then
they count as the process's own. Memory asked for once is given back at once. On Linux only.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref

import torch
from torch import Tensor

# Less is used again by malloc itself.
_LEAST = 32 << 20
_CAN_KEEP = all(hasattr(mmap, name) for name in ("MADV_FREE", "MADV_HUGEPAGE"))


class _Pages(mmap.mmap):
    were_kept = False


_spare: list[_Pages] = []  # at most one

if _CAN_KEEP:
    # A forked child would hold them too, and writing here would copy them, page by small page.
    os.register_at_fork(before=lambda: _spare.clear())


def empty_like(x: Tensor) -> Tensor:
    """A dense tensor of x's shape, dtype and device, of whatever values; if it is large, it cannot be resized."""
    size = x.numel() * x.element_size()
    pages = _take(size) if x.device.type == "cpu" and size >= _LEAST and _CAN_KEEP else None
    if pages is None:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    view = memoryview(pages)  # lives as long as the tensor's storage
    weakref.finalize(view, _keep, pages).atexit = False
    return torch.frombuffer(view, dtype=x.dtype).view(x.shape)


def _take(size: int) -> _Pages | None:
    with contextlib.suppress(IndexError):  # not asked first: another thread may take it
        pages = _spare.pop()
        if len(pages) == size:
            return pages
        del pages  # before there are others
    try:
        return _Pages(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # torch says best that there is none
        return None


def _keep(pages: _Pages) -> None:
    try:
        pages.madvise(mmap.MADV_FREE if pages.were_kept else mmap.MADV_DONTNEED)
    except OSError:  # locked memory, say
        return
    if not pages.were_kept:
        pages.were_kept = True
        with contextlib.suppress(OSError):  # a system without large pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    _spare[:] = [pages]
