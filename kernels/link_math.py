"""Arithmetic that links share: exact where a loss saturates, the same on every backend.

Nothing here needs libdevice: the same arithmetic runs on every backend and in the interpreter.
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
