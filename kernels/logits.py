"""What every kernel does with a tile of raw logits: transform it, fold it into running row sums, differentiate it.

    z = z0 * in_scale                          without a softcap,   in_scale = logit_scale / temperature
    z = out_scale * tanh(z0 * in_scale)        with one,            in_scale = logit_scale / softcap,
                                                                    out_scale = softcap / temperature
    dz/dz0 = in_scale * out_scale * (1 - (z / out_scale)^2)         the bracket only with a softcap

A tile is (rows, vocabulary) fp32, or (rows, lanes, vocabulary) where each lane of a row keeps sums of its own. Vectors
over the rows carry the suffix _n, running sums over rows and perhaps lanes none. Nothing here reads memory.
"""

import triton
import triton.language as tl

from prefkern.head import Head

# Below it exp is 0 in fp32 by far; a finite stand-in for -inf where it is multiplied by that 0.
LOG_ZERO = tl.constexpr(-1e4)
LOG2_E = tl.constexpr(1.4426950408889634)


def transform_args(head: Head) -> dict[str, float | bool]:
    """Keyword arguments of a kernel that uses `transform`: two run-time scalars and a constexpr."""
    if head.softcap is None:
        return dict(in_scale=head.logit_scale / head.temperature, out_scale=1.0, HAS_SOFTCAP=False)
    return dict(in_scale=head.logit_scale / head.softcap, out_scale=head.softcap / head.temperature, HAS_SOFTCAP=True)


@triton.jit
def exp(x):
    """e^x as one multiplication and one instruction, where tl.exp spends five to keep results below 2^-126: 0 here."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def tanh(x):
    """tanh, good to a few ulp: libdevice has no twin in the interpreter, and exp alone cancels near 0."""
    e = exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0, e - 1.0, 1.0 - e) / (1.0 + e)
    s = x * x
    near = x * (1.0 + s * (-0.33333333333 + s * (0.13333333333 - s * 0.05396825397)))
    return tl.where(tl.abs(x) < 0.15, near, far)


@triton.jit
def transform(z0, in_scale, out_scale, HAS_SOFTCAP: tl.constexpr):
    """Raw logits z0 (fp32, any shape) to the logits z that enter the softmax."""
    z = z0 * in_scale
    if HAS_SOFTCAP:
        z = out_scale * tanh(z)
    return z


@triton.jit
def cap_slope(z, out_scale):
    """The share of dz/dz0 that differs between logits under a softcap."""
    t = z * (1.0 / out_scale)
    return 1.0 - t * t


@triton.jit
def transform_grad(z, in_scale, out_scale, HAS_SOFTCAP: tl.constexpr):
    """dz/dz0, given z; of z's shape with a softcap, a scalar without."""
    slope = in_scale * out_scale
    if HAS_SOFTCAP:
        slope = slope * cap_slope(z, out_scale)
    return slope


@triton.jit
def label_column(label_n, V):
    """Column of each label, int32, -1 where outside [0, V): 64-bit comparisons cost the tile its registers."""
    return tl.where((label_n >= 0) & (label_n < V), label_n, -1).to(tl.int32)


@triton.jit
def finite(maximum):
    """The maximum to subtract: 0 where there is nothing but -inf so far, so that exp(-inf) and not NaN comes out."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def fold_tile(
    z, max_nk, sum_nk, dot_nk, square_nk,
    WANT_ENTROPY: tl.constexpr, WANT_COLLISION: tl.constexpr,
):  # fmt: skip
    """Fold a tile z (-inf where masked) along its last axis into running sums of the shape without it.

    max_nk is the running maximum m (start: -inf), sum_nk = sum exp(z - m), dot_nk = sum exp(z - m) (z - m) and
    square_nk = sum exp(2 (z - m)). At the end lse = m + log(sum_nk), entropy = log(sum_nk) - dot_nk / sum_nk and
    log sum_v p_v^2 = log(square_nk) - 2 log(sum_nk), which stay exact however large the logits are.
    """
    axis: tl.constexpr = len(z.shape) - 1
    new_max_nk = tl.maximum(max_nk, tl.max(z, axis=axis))
    origin = finite(new_max_nk)
    d = z - tl.expand_dims(origin, axis)
    e = exp(d)
    decay = exp(max_nk - origin)
    if WANT_ENTROPY:
        shift = tl.where(max_nk == float("-inf"), 0.0, max_nk - origin)
        dot_nk = decay * (dot_nk + shift * sum_nk) + tl.sum(e * tl.maximum(d, LOG_ZERO), axis=axis)
    if WANT_COLLISION:
        square_nk = decay * decay * square_nk + tl.sum(e * e, axis=axis)
    sum_nk = decay * sum_nk + tl.sum(e, axis=axis)
    return new_max_nk, sum_nk, dot_nk, square_nk


@triton.jit
def merge_sums(
    max_nk, sum_nk, dot_nk, square_nk, axis: tl.constexpr,
    WANT_ENTROPY: tl.constexpr, WANT_COLLISION: tl.constexpr,
):  # fmt: skip
    """Running sums of parts of each row (lanes, or splits of the vocabulary) to the row's; see fold_tile."""
    max_n = tl.max(max_nk, axis=axis)
    origin_n = finite(max_n)
    origin_nk = tl.expand_dims(origin_n, axis)
    decay_nk = exp(max_nk - origin_nk)
    dot_n = tl.zeros_like(max_n)
    square_n = tl.zeros_like(max_n)
    if WANT_ENTROPY:
        shift_nk = tl.where(max_nk == float("-inf"), 0.0, max_nk - origin_nk)
        dot_n = tl.sum(decay_nk * (dot_nk + shift_nk * sum_nk), axis=axis)
    if WANT_COLLISION:
        square_n = tl.sum(decay_nk * decay_nk * square_nk, axis=axis)
    return max_n, tl.sum(decay_nk * sum_nk, axis=axis), dot_n, square_n


@triton.jit
def online_update(z, max_n, sum_n, dot_n, WANT_ENTROPY: tl.constexpr):
    """fold_tile without the sum of squares."""
    max_n, sum_n, dot_n, _ = fold_tile(z, max_n, sum_n, dot_n, sum_n, WANT_ENTROPY, False)
    return max_n, sum_n, dot_n


@triton.jit
def label_logp_grad(z, is_label, lse_n, grad_logp_n, entropy_n, grad_entropy_n, HAS_ENTROPY: tl.constexpr):
    """dL/dz of a tile: grad_logp (onehot - p) - grad_entropy p (log p + entropy), p = exp(z - lse).

    is_label (rows, columns) marks the label's column. Rows to ignore are the caller's: their lse is not theirs.
    """
    logp = z - lse_n[:, None]
    p = exp(logp)
    pull = grad_logp_n[:, None]
    if HAS_ENTROPY:
        # The rows' share first: one value less to keep for each logit.
        pull_n = grad_logp_n + grad_entropy_n * entropy_n
        pull = pull_n[:, None] + grad_entropy_n[:, None] * tl.maximum(logp, LOG_ZERO)
    return tl.where(is_label, grad_logp_n[:, None], 0.0) - p * pull
