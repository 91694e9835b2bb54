"""From padded batches to packed rows, for callers who do not pack already."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from prefkern.head import IGNORE_INDEX


class Packed(NamedTuple):
    """Packed rows of a padded batch."""

    hidden: Tensor  # (N, D)
    labels: Tensor  # (N,)
    lengths: tuple[int, ...]  # rows of each sequence, for Layout


def pack(hidden: Tensor, labels: Tensor, mask: Tensor | None = None, ignore_index: int = IGNORE_INDEX) -> Packed:
    """Keep the rows that count of a padded batch, sequence after sequence.

    Args:
        hidden: (B, T, D) states; row t of `hidden` predicts `labels[:, t]` (labels are shifted already).
        labels: (B, T) int64.
        mask: (B, T) bool, True where a row counts; None: where the label is not ignore_index.
    Returns:
        Packed; `Layout.pairs(lengths[::2], lengths[1::2])` fits a batch of alternating chosen and rejected rows.
    Gradient:
        Flows to the kept rows of hidden.
    Raises:
        ValueError: shapes disagree.
    The lengths are read back to the host, once a batch: a collator that knows them packs without waiting.
    """
    mask = labels != ignore_index if mask is None else mask.bool()
    if hidden.ndim != 3 or labels.shape != hidden.shape[:2] or mask.shape != labels.shape:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} must be (B, T, D), labels {tuple(labels.shape)} and"
            f" mask {tuple(mask.shape)} (B, T)"
        )
    return Packed(hidden[mask], labels[mask], tuple(mask.sum(1).tolist()))
