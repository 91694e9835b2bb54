"""Logits that forward leaves where backward will write the head's gradient."""

from __future__ import annotations

from torch import Tensor

from prefkern import spare_memory


class KeptLogits:
    """Raw logits of the leading rows, in the memory of dweight.

    A slice of w vocabulary entries has w * D numbers of dweight, and of at most D rows no more logits than that. So
    the logits of a slice lie, rows one after the other, where its dweight will: backward takes them from there and
    only then writes dweight over them. The step's peak of memory stays what it is, for dweight is part of it anyway.
    Source: derived.

    Fields:
        memory: (V, D), dense; dweight in the end.
        rows: how many rows' logits it holds, at most D.
        step: vocabulary entries of a slice.
    """

    def __init__(self, memory: Tensor, rows: int, step: int) -> None:
        self.memory, self.rows, self.step = memory, rows, step

    def store(self, logits: Tensor, start: int, part: slice) -> None:
        """Keep those of the rows from `start` on that there is room for; `part` of the vocabulary is what they are."""
        count = min(self.rows - start, logits.shape[0])
        if count <= 0:
            return
        i = part.start
        while i < part.stop:
            first = i - i % self.step
            whole = slice(first, min(first + self.step, self.memory.shape[0]))
            stop = min(whole.stop, part.stop)
            own = logits[:count, i - part.start : stop - part.start]
            self.slice(whole)[start : start + count, i - first : stop - first] = own
            i = stop

    def room(self, rows: slice, part: slice) -> Tensor | None:
        """Memory, without gaps, of the logits of these rows and this part; None unless the part is a whole slice."""
        whole = part.start % self.step == 0 and part.stop == min(part.start + self.step, self.memory.shape[0])
        return self.slice(part)[rows] if whole and rows.stop <= self.rows else None

    def slice(self, part: slice) -> Tensor:
        """(rows, w) logits of one whole slice of the vocabulary."""
        width = part.stop - part.start
        return self.memory[part].view(-1)[: self.rows * width].view(self.rows, width)


def memory_like(weight_VD: Tensor) -> Tensor:
    """Memory of a gradient of the weight."""
    return spare_memory.empty_like(weight_VD)
