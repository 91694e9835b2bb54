"""How critical each token is: what a model of right answers and one of wrong answers think of it, without logits."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from prefkern import reference
from prefkern.head import IGNORE_INDEX, Head
from prefkern.planner import plan
from prefkern.rows import pieces, transformed
from prefkern.token_logps import autocast_head, check_head, check_labels


@torch.no_grad()
def critical_token_scores(
    hidden_pos: Tensor,
    weight_pos: Tensor,
    hidden_neg: Tensor,
    weight_neg: Tensor,
    labels: Tensor,
    gamma: float = 1.0,
    bias_pos: Tensor | None = None,
    bias_neg: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    workspace_bytes: int | None = None,
) -> Tensor:
    """Contrastive score of each label: high where the positive model, told from the negative one, would not say it.

        s[n] = 1 - softmax( (1 + gamma) z_pos[n] - gamma z_neg[n] )[labels[n]]

    Args:
        hidden_pos, weight_pos: (N, D) or (B, T, D), and (V, D), of the model tuned on right answers: fp32, fp16, bf16
            or float64; any strides.
        hidden_neg, weight_neg: (N, E) or (B, T, E), and (V, E), of the model tuned on wrong answers.
        labels: (N,) or (B, T), int64 in [0, V), or ignore_index: such a row yields 0.
        gamma: strength of the contrast, at least 0; 0 asks the positive model alone.
        bias_pos, bias_neg: (V,), or None.
        softcap, logit_scale, temperature: from each model's raw logits to its z; see `token_logps`.
        workspace_bytes: bytes that a block of both models' logits may take together; None:
            `prefkern.planner.default_workspace`. At least one row is taken at a time, whatever this says.
    Returns:
        (N,) or (B, T), fp32 (float64 for float64 inputs), in [0, 1]; small ones keep their digits. A vocabulary entry
        that the positive model excludes (a logit of -inf) has probability 0, whatever the negative one says; NaN where
        logits are not numbers, or only the negative model excludes an entry.
    Gradient:
        None: scores are data.
    Raises:
        ValueError: shapes, dtypes or devices disagree; the vocabularies differ; a negative gamma; on a CPU, a label
            outside [0, V). (On a GPU such a label yields NaN.)
    Source:
        Lin et al. 2024, arXiv:2411.19943, as in the authors' code, where gamma is 1.
    """
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma={gamma!r} must be a number of at least 0 (1 in the authors' code)")
    head = Head(softcap, logit_scale, temperature, ignore_index)
    hidden_pos, weight_pos, bias_pos = autocast_head(hidden_pos, weight_pos, bias_pos)
    hidden_neg, weight_neg, bias_neg = autocast_head(hidden_neg, weight_neg, bias_neg)
    check_head(hidden_pos, weight_pos, bias_pos, labels, "positive ")
    check_head(hidden_neg, weight_neg, bias_neg, labels, "negative ")
    if weight_pos.shape[0] != weight_neg.shape[0]:
        raise ValueError(
            f"weight_pos has {weight_pos.shape[0]} vocabulary entries and weight_neg {weight_neg.shape[0]}; they must"
            " be of one vocabulary"
        )
    check_labels(labels, weight_pos.shape[0], ignore_index)
    shape, labels = labels.shape, labels.reshape(-1)
    n, vocab = len(labels), weight_pos.shape[0]
    hidden_pos, hidden_neg = (h.reshape(n, h.shape[-1]) for h in (hidden_pos, hidden_neg))
    one = plan(
        (n, hidden_pos.shape[1], vocab), hidden_pos.dtype, hidden_pos.device, grad_hidden=False, grad_head=False,
        workspace_bytes=workspace_bytes,
    )  # fmt: skip
    rows = replace(one, itemsize=hidden_pos.dtype.itemsize + hidden_neg.dtype.itemsize).rows_per_chunk
    scratch_pos, scratch_neg = (h.new_empty(min(rows, n), vocab) for h in (hidden_pos, hidden_neg))
    scores = hidden_pos.new_empty(n, dtype=reference.accumulator(hidden_pos.dtype))
    for i in range(0, n, rows):
        chunk = slice(i, min(i + rows, n))
        raw_pos = torch.mm(hidden_pos[chunk], weight_pos.t(), out=scratch_pos[: chunk.stop - i])
        raw_neg = torch.mm(hidden_neg[chunk], weight_neg.t(), out=scratch_neg[: chunk.stop - i])
        for piece in pieces(raw_pos):
            z_pos, z_neg = transformed(raw_pos[piece], head, bias_pos), transformed(raw_neg[piece], head, bias_neg)
            _scores(z_pos, z_neg, labels[chunk][piece], gamma, out=scores[chunk][piece])
    inside = (labels >= 0) & (labels < vocab)
    return scores.masked_fill_(~inside, torch.nan).masked_fill_(labels == ignore_index, 0.0).view(shape)


def _scores(z_pos: Tensor, z_neg: Tensor, labels: Tensor, gamma: float, out: Tensor) -> None:
    """1 - p as the share of the others: subtracting a p near 1 from 1 would leave nothing but its rounding."""
    excluded = z_pos.isneginf()
    z = z_pos.mul_(1 + gamma).sub_(z_neg, alpha=gamma).masked_fill_(excluded, -torch.inf)
    e = z.sub_(z.amax(1, keepdim=True)).exp_()
    label = labels.clamp(0, z.shape[1] - 1)[:, None]
    own = e.gather(1, label)[:, 0]
    others = e.scatter_(1, label, 0.0).sum(1)
    torch.div(others, others + own, out=out)
