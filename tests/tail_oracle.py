"""The tail's definition in plain torch, by Python loops, and operands to feed it: shared by the kernel tests."""

import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import DEVICE
from prefkern.layout import Layout


def eager_tail(logps, layout, loss, *, ref=None, weights=None, scale=None, margin=None, target=None, weight=None):
    """value_G and score_S by Python loops; `loss(score_K, target_K, margin)`. Differentiable, in the dtype of logps."""
    index = layout.index("cpu")
    d = logps if ref is None else logps - ref
    if weights is not None:
        d = torch.where(weights == 0, 0.0, d * weights)
    raw = [d[a:b].sum() for a, b in zip(index.segment_start_S.tolist(), index.segment_end_S.tolist())]
    if index.prefix:
        running = {}
        for s, response in enumerate(index.response_of_segment_S.tolist()):
            raw[s] = running[response] = running.get(response, 0.0) + raw[s]
    score = torch.stack(raw) if raw else d.new_zeros(0)
    score = score if scale is None else score * scale
    values = []
    for g, (a, b) in enumerate(zip(index.group_offsets.tolist(), index.group_offsets.tolist()[1:])):
        value = loss(score[a:b], None if target is None else target[a:b], 0.0 if margin is None else margin[g])
        values.append(value if weight is None else value * weight[g])
    return (torch.stack(values) if values else d.new_zeros(0)), score


def logistic(beta, e):
    def loss(score, _, margin):
        x = beta * (score[0] - score[1]) - margin
        return -(1 - e) * F.logsigmoid(x) - e * F.logsigmoid(-x)

    return loss


def squared(score, _, margin):
    return (score[0] - score[1] - margin) ** 2


def negative(score, _, margin):
    return -score[0]


def listwise(p0):
    return lambda score, target, margin: margin - (target * (p0 * score).log_softmax(0)).sum()


def rows(layout: Layout, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probabilities and reference log-probabilities, both like those of language models: -3 +- 2, correlated."""
    generator = torch.Generator().manual_seed(seed)
    logps = -torch.rand(layout.num_tokens, generator=generator) * 6
    return logps, logps + 0.5 * torch.randn(layout.num_tokens, generator=generator)


def random_operands(layout: Layout, seed: int = 1) -> dict[str, Tensor]:
    """Every optional operand. Prefix sums want one scale per response."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.rand(n, generator=generator) + 0.5

    weights = draw(layout.num_tokens)
    weights[::5] = 0.0
    scale = draw(layout.num_responses)[layout.index("cpu").response_of_segment_S]
    return dict(weights=weights, scale=scale, margin=draw(layout.num_groups) - 1, weight=draw(layout.num_groups))


def kernel_operands(operands: dict[str, Tensor]) -> dict[str, Tensor]:
    """The oracle's operands under the kernels' names, on the device under test."""
    names = dict(ref="ref_logps_N", weights="token_weights_N", scale="scale_S", margin="margin_G", target="target_S")
    names["weight"] = "weight_G"
    return {names[key]: value.to(DEVICE) for key, value in operands.items()}
