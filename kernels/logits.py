"""What every kernel does with a tile of raw logits: transform it, fold it into running row sums, differentiate it.

    z = z0 * in_scale                          without a softcap,   in_scale = logit_scale / temperature
    z = out_scale * tanh(z0 * in_scale)        with one,            in_scale = logit_scale / softcap,
                                                                    out_scale = softcap / temperature
    dz/dz0 = in_scale * out_scale * (1 - (z / out_scale)^2)         the bracket only with a softcap

A tile is (rows, vocabulary) fp32; a kernel of one row a program uses a tile of one row. Vectors over the rows
carry the suffix _n. Nothing here reads memory, so forward and backward agree to the bit on z.
"""

import triton
import triton.language as tl

from prefkern.head import Head

# Below it exp is 0 in fp32 by far; a finite stand-in for -inf where it is multiplied by that 0.
LOG_ZERO = tl.constexpr(-1e4)


def transform_args(head: Head) -> dict[str, float | bool]:
    """Keyword arguments of a kernel that uses `transform`: two run-time scalars and a constexpr."""
    if head.softcap is None:
        return dict(in_scale=head.logit_scale / head.temperature, out_scale=1.0, HAS_SOFTCAP=False)
    return dict(in_scale=head.logit_scale / head.softcap, out_scale=head.softcap / head.temperature, HAS_SOFTCAP=True)


@triton.jit
def tanh(x):
    """tanh, good to a few ulp: libdevice has no twin in the interpreter, and exp alone cancels near 0."""
    e = tl.exp(-2.0 * tl.abs(x))
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
def transform_grad(z, in_scale, out_scale, HAS_SOFTCAP: tl.constexpr):
    """dz/dz0, given z; of z's shape with a softcap, a scalar without."""
    slope = in_scale * out_scale
    if HAS_SOFTCAP:
        t = z * (1.0 / out_scale)
        slope = slope * (1.0 - t * t)
    return slope


@triton.jit
def label_column(label_n, V):
    """Column of each label, int32, -1 where outside [0, V): 64-bit comparisons cost the tile its registers."""
    return tl.where((label_n >= 0) & (label_n < V), label_n, -1).to(tl.int32)


@triton.jit
def online_update(z, max_n, sum_n, dot_n, WANT_ENTROPY: tl.constexpr):
    """Fold a tile z (rows, columns; -inf where masked) into the running sums of its rows.

    max_n is the running maximum m (start: -inf), sum_n = sum exp(z - m), dot_n = sum exp(z - m) (z - m). At the end
    lse = m + log(sum_n) and entropy = log(sum_n) - dot_n / sum_n, which stays exact however large the logits are.
    """
    new_max_n = tl.maximum(max_n, tl.max(z, axis=1))
    finite_max_n = tl.where(new_max_n == float("-inf"), 0.0, new_max_n)  # a row of -inf so far: exp(-inf), not NaN
    d = z - finite_max_n[:, None]
    e = tl.exp(d)
    decay_n = tl.exp(max_n - finite_max_n)
    if WANT_ENTROPY:
        shift_n = tl.where(max_n == float("-inf"), 0.0, max_n - finite_max_n)
        tile_dot_n = tl.sum(e * tl.maximum(d, LOG_ZERO), axis=1)
        dot_n = decay_n * (dot_n + shift_n * sum_n) + tile_dot_n
    sum_n = decay_n * sum_n + tl.sum(e, axis=1)
    return new_max_n, sum_n, dot_n


@triton.jit
def online_collision(z, old_max_n, max_n, square_n):
    """Fold a tile z into square_n = sum exp(2 (z - m)); max_n is the running maximum with the tile, old_max_n without.

    At the end log sum_v p_v^2 = log(square_n) - 2 log(sum_n).
    """
    finite_max_n = tl.where(max_n == float("-inf"), 0.0, max_n)
    e = tl.exp(z - finite_max_n[:, None])
    decay_n = tl.exp(old_max_n - finite_max_n)
    return decay_n * decay_n * square_n + tl.sum(e * e, axis=1)


@triton.jit
def label_logp_grad(z, is_label, lse_n, grad_logp_n, entropy_n, grad_entropy_n, HAS_ENTROPY: tl.constexpr):
    """dL/dz of a tile: grad_logp (onehot - p) - grad_entropy p (log p + entropy), p = exp(z - lse).

    is_label (rows, columns) marks the label's column. Rows to ignore are the caller's: their lse is not theirs.
    """
    logp = z - lse_n[:, None]
    p = tl.exp(logp)
    pull = grad_logp_n[:, None]
    if HAS_ENTROPY:
        # The rows' share first: one value less to keep for each logit.
        pull_n = grad_logp_n + grad_entropy_n * entropy_n
        pull = pull_n[:, None] + grad_entropy_n[:, None] * tl.maximum(logp, LOG_ZERO)
    return tl.where(is_label, grad_logp_n[:, None], 0.0) - p * pull
