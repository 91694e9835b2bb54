"""Links: how the scores of one group become a loss and its derivative, one small function per family.

    value, dscore_K = link(score_K, valid_K, target_K, margin, p0, p1, p2, p3)

score_K holds the scores of the group's K members and 0 where valid_K is false (K is padded to a power of two);
target_K holds what each member should be (0 where the loss has no targets); margin is the group's scalar; p0..p3 are
hyper-parameters, run-time values. value is a scalar; dscore_K = dvalue/dscore_K is exactly 0 at padding. All is fp32.

A link runs inside the tail kernel (tail.py), which is compiled with it as a constant. Nothing here needs libdevice:
the same arithmetic runs on every backend and in the interpreter.
"""

import triton
import triton.language as tl


@triton.jit
def log1p_unit(t):
    """log(1 + t) for t in [0, 1], to a few fp32 ulps of the result however small t is.

        log(1 + t) = 2 atanh(s) = 2 (s + s^3/3 + s^5/5 + ...),    s = t / (2 + t) <= 1/3

    Eight terms leave a relative remainder below 2^-28. log(1 + t) itself would lose t under the rounding of the sum,
    and the usual correction by t / ((1 + t) - 1) needs a logarithm that is exact near 1, which a GPU's is not.
    """
    s = t / (2.0 + t)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))))))
    return 2.0 * s * series


@triton.jit
def pair_difference(score_K):
    """score_0 - score_1, and its derivative +1, -1, 0, 0, ..."""
    offs_k = tl.arange(0, score_K.shape[0])
    sign_K = tl.where(offs_k == 0, 1.0, tl.where(offs_k == 1, -1.0, 0.0))
    return tl.sum(tl.where(offs_k < 2, sign_K * score_K, 0.0), axis=0), sign_K


@triton.jit
def logistic(score_K, valid_K, target_K, margin, p0, p1, p2, p3):
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
def squared(score_K, valid_K, target_K, margin, p0, p1, p2, p3):
    """Squared error of the score difference, K = 2, no hyper-parameters.

        x = score_0 - score_1 - margin,    value = x^2,    dvalue = 2 x dx
    """
    difference, sign_K = pair_difference(score_K)
    x = difference - margin
    return x * x, (2.0 * x) * sign_K


@triton.jit
def negative(score_K, valid_K, target_K, margin, p0, p1, p2, p3):
    """Maximum likelihood, K = 1, no hyper-parameters: value = -score_0, dvalue = -dscore_0."""
    first_K = tl.arange(0, score_K.shape[0]) == 0
    return -tl.sum(tl.where(first_K, score_K, 0.0), axis=0), tl.where(first_K, -1.0, 0.0)
