"""Links of one chosen and one rejected response, K = 2: see links.py for what a link is."""

import triton
import triton.language as tl

from .link_math import log1p_unit, pair_difference


@triton.jit
def logistic(score_K, valid_K, target_K, margin, p0, p1, p2, p3, p4, p5):
    """Bradley-Terry with label smoothing, K = 2: p0 = beta, p1 = e in [0, 0.5).

    x      = beta (score_0 - score_1) - margin
    value  = -(1 - e) logsig(x) - e logsig(-x) = max(-x, 0) + log1p(exp(-|x|)) + e x
    dvalue = (e - sigmoid(-x)) dx
    """
    difference, sign_K = pair_difference(score_K)
    x = p0 * difference - margin
    t = tl.exp(-tl.abs(x))
    smoothing = tl.where(p1 == 0.0, 0.0, p1 * x)  # 0 times an infinite x is NaN
    value = tl.maximum(-x, 0.0) + log1p_unit(t) + smoothing
    sigmoid_of_minus_x = tl.where(x > 0, t, 1.0) / (1.0 + t)
    return value, (p0 * (p1 - sigmoid_of_minus_x)) * sign_K


@triton.jit
def squared(score_K, valid_K, target_K, margin, p0, p1, p2, p3, p4, p5):
    """Squared error of the score difference, K = 2, no hyper-parameters.

    x = score_0 - score_1 - margin,    value = x^2,    dvalue = 2 x dx
    """
    difference, sign_K = pair_difference(score_K)
    x = difference - margin
    return x * x, (2.0 * x) * sign_K


LINKS = (
    (logistic, 2),
    (squared, 2),
)
