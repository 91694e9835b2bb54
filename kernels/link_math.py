"""Arithmetic that links share: exact where a loss saturates, the same on every backend.

Nothing here needs libdevice: the same arithmetic runs on every backend and in the interpreter.
"""

import math

import triton
import triton.language as tl

from prefkern.losses.f_divergence import MAX_EXPONENT
from prefkern.losses.orpo import MAX_MEAN_LOGP

_MAX_EXPONENT, _MAX_MEAN_LOGP = tl.constexpr(MAX_EXPONENT), tl.constexpr(MAX_MEAN_LOGP)
_LOG_2 = tl.constexpr(math.log(2))


@triton.jit
def log1p_unit(t):
    """log(1 + t) for t in [-1/2, 1], to a few fp32 ulps of the result however small t is.

        log(1 + t) = 2 atanh(s) = 2 (s + s^3/3 + s^5/5 + ...),    s = t / (2 + t),  |s| <= 1/3

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
def log_softmax(score_K, valid_K):
    """log softmax over the members; 0 at padding."""
    z_K = tl.where(valid_K, score_K, float("-inf"))
    z_K = z_K - tl.max(z_K, axis=0)
    return tl.where(valid_K, z_K - tl.log(tl.sum(tl.exp(z_K), axis=0)), 0.0)


@triton.jit
def expm1_ratio(x):
    """(exp(x) - 1) / x for |x| <= 1, 1 at 0: the power series, remainder below 2^-28."""
    ratio = 1.0 + x / 11
    for i in tl.static_range(1, 10):
        ratio = 1.0 + x * ratio / (11 - i)
    return ratio


@triton.jit
def tilt(log_base, log_other, c):
    """(base^(1-c) other^c - base) / c for c in [0, 1], and base log(other / base) at c = 0; finite where the logs are.

    Near base, by expm1, so that small differences and small c lose nothing; elsewhere by its terms, so that a base that
    underflows to 0 is not multiplied by infinity.
    """
    x = c * (log_other - log_base)
    near = tl.abs(x) < 1.0
    base = tl.exp(log_base)
    close = base * (log_other - log_base) * expm1_ratio(tl.where(near, x, 0.0))
    far = (tl.exp((1.0 - c) * log_base + c * log_other) - base) / tl.where(near, 1.0, c)
    return tl.where(near, close, far)


@triton.jit
def pair_members(score_K):
    """score_0 and score_1."""
    offs_k = tl.arange(0, score_K.shape[0])
    return tl.sum(tl.where(offs_k == 0, score_K, 0.0), axis=0), tl.sum(tl.where(offs_k == 1, score_K, 0.0), axis=0)


@triton.jit
def pair_places(first, second, score_K):
    """first, second, 0, 0, ...: values at the places of a group's members."""
    offs_k = tl.arange(0, score_K.shape[0])
    return tl.where(offs_k == 0, first, tl.where(offs_k == 1, second, 0.0))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), to a few ulps on both sides."""
    t = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, t) / (1.0 + t)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = -log sigma(-x)."""
    return tl.maximum(x, 0.0) + log1p_unit(tl.exp(-tl.abs(x)))


@triton.jit
def expm1(t):
    """exp(t) - 1; within 1/2 of 0 by Taylor's series, whose remainder is below 2^-27 of the result there."""
    series = 1.0 + t / 6 * (1.0 + t / 7 * (1.0 + t / 8))
    series = t * (1.0 + t / 2 * (1.0 + t / 3 * (1.0 + t / 4 * (1.0 + t / 5 * series))))
    return tl.where(tl.abs(t) < 0.5, series, tl.exp(t) - 1.0)


@triton.jit
def log1mexp(x):
    """log(1 - exp(x)) for x < 0, by whichever of expm1 and log1p does not cancel."""
    near = x > -_LOG_2
    return tl.where(near, tl.log(tl.where(near, -expm1(x), 1.0)), log1p_unit(-tl.exp(tl.minimum(x, -_LOG_2))))


@triton.jit
def divergence_difference(score_K, factor_K, code, exponent):
    """s_0 - s_1 and its derivative, s the score under an f-divergence: see prefkern/losses/f_divergence.py.

    code 0: s = score;  1: s = factor (exp(exponent score) - 1) / exponent;  2: s = factor log(2 sigmoid(score)).
    """
    t = exponent * score_K
    inside = tl.minimum(t, _MAX_EXPONENT)
    slope_K = tl.exp(inside)
    power_K = (expm1(inside) + slope_K * (t - inside)) / tl.where(exponent == 0.0, 1.0, exponent)
    js_K = _LOG_2 - softplus(-score_K)
    mapped_K = tl.where(code == 1.0, power_K, js_K) * factor_K
    slope_K = tl.where(code == 1.0, slope_K, sigmoid(-score_K)) * factor_K
    difference, sign_K = pair_difference(tl.where(code == 0.0, score_K, mapped_K))
    return difference, tl.where(code == 0.0, 1.0, slope_K) * sign_K


@triton.jit
def log_odds(logp):
    """log(p / (1 - p)) of p = exp(logp), and its derivative 1 / (1 - p); a tangent where p is 1 to rounding."""
    inside = tl.minimum(logp, _MAX_MEAN_LOGP)
    slope = -1.0 / expm1(inside)
    return inside - log1mexp(inside) + slope * (logp - inside), slope
