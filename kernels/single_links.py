"""Links of responses that stand alone, K = 1: see links.py for what a link is."""

import triton
import triton.language as tl

from .link_math import sigmoid


@triton.jit
def negative(score_K, valid_K, target_K, margin, p0, p1, p2, p3, p4, p5):
    """Maximum likelihood, K = 1, no hyper-parameters: value = -score_0, dvalue = -dscore_0."""
    first_K = tl.arange(0, score_K.shape[0]) == 0
    return -tl.sum(tl.where(first_K, score_K, 0.0), axis=0), tl.where(first_K, -1.0, 0.0)


@triton.jit
def prospect(score_K, valid_K, target_K, margin, p0, p1, p2, p3, p4, p5):
    """A response judged by its label, K = 1: p0 = beta; target_0 above 1/2 is desirable.

    x      = s (beta score_0 - margin),  s = +1 where desirable, -1 elsewhere
    value  = sigmoid(-x)
    dvalue = -sigmoid(x) sigmoid(-x) dx
    """
    first_K = tl.arange(0, score_K.shape[0]) == 0
    sign = tl.sum(tl.where(first_K, tl.where(target_K > 0.5, 1.0, -1.0), 0.0), axis=0)
    x = sign * (p0 * tl.sum(tl.where(first_K, score_K, 0.0), axis=0) - margin)
    return sigmoid(-x), tl.where(first_K, -(p0 * sign) * (sigmoid(x) * sigmoid(-x)), 0.0)


LINKS = ((negative, 1), (prospect, 1))
