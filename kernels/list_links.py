"""Links of any number of responses: see links.py for what a link is.

Scores here are anchored logits u = (log-ratio) / tau; p = softmax(u) over the group's members.
"""

import triton
import triton.language as tl

from .link_math import log_softmax, tilt


@triton.jit
def cross_entropy(score_K, valid_K, target_K, margin, p0, p1, p2, p3, p4, p5):
    """Cross-entropy of softmax(score) against the targets, any K, no hyper-parameters.

    value = -sum_i q_i log p_i,    dvalue/dscore_i = (sum q) p_i - q_i
    """
    log_p_K = log_softmax(score_K, valid_K)
    mass = tl.sum(target_K, axis=0)
    return -tl.sum(target_K * log_p_K, axis=0), tl.where(valid_K, mass * tl.exp(log_p_K) - target_K, 0.0)


@triton.jit
def plackett_luce(score_K, valid_K, target_K, margin, p0, p1, p2, p3, p4, p5):
    """Negative log-likelihood of a ranking, any K: target = rank (0 is best), p0 = positions (0: all), p1 = e, p2 = c.

    nll_k  = logsumexp(score of ranks >= k) - score of rank k,                     k = 0 .. K - 2
    x_k    = (1 - e) nll_k + e (logsumexp(score of ranks >= k) - their mean)
    value  = mean over the positions of x_k + c (1 - exp(-x_k))
    dvalue = mean of (1 + c exp(-x_k)) dx_k

    One position after the other: registers do not grow with K^2, and few positions cost little.
    """
    rank_K = target_K.to(tl.int32)
    members = tl.sum(tl.where(valid_K, 1.0, 0.0), axis=0)
    positions = members - 1.0
    positions = tl.where(p0 > 0.0, tl.minimum(positions, p0), positions)
    value_K = tl.zeros_like(score_K)  # added up over the members at the end
    dscore_K = tl.zeros_like(score_K)
    for k in range(0, positions.to(tl.int32)):
        rest_K = valid_K & (rank_K >= k)
        chosen_K = valid_K & (rank_K == k)
        z_K = tl.where(rest_K, score_K, float("-inf"))
        z_K = z_K - tl.max(z_K, axis=0)
        e_K = tl.exp(z_K)
        total = tl.sum(e_K, axis=0)
        count = members - k
        weight_K = tl.where(chosen_K, 1.0 - p1, 0.0) + tl.where(rest_K, p1 / count, 0.0)
        x = tl.log(total) - tl.sum(weight_K * tl.where(rest_K, z_K, 0.0), axis=0)
        certainty = tl.exp(-x)
        value_K += tl.where(chosen_K, x + p2 * (1.0 - certainty), 0.0)
        dscore_K += (1.0 + p2 * certainty) * (e_K / total - weight_K)
    share = 1.0 / tl.maximum(positions, 1.0)
    return share * tl.sum(value_K, axis=0), share * dscore_K


@triton.jit
def alpha_divergence(score_K, valid_K, target_K, margin, p0, p1, p2, p3, p4, p5):
    """Alpha-divergence of p = softmax(score) from the targets q, any K: margin = a in [0, 1], p0 = smallest q.

    value          = (1 - sum_i q_i^a p_i^(1-a)) / (a (1 - a));    a = 0: KL(p || q),  a = 1: KL(q || p)
    dvalue/dscore_i = p_i sum(w) - w_i,    w_i = (q_i^a p_i^(1-a) - p_i) / a;    a = 0: w_i = p_i log(q_i / p_i)

    1 - sum_i q_i^a p_i^(1-a) = -sum_i (q_i^a p_i^(1-a) - p_i), and q in p's place for a >= 1/2, where that is exact: no
    difference of nearly equal sums is divided by a small number. Any multiple of p may be taken from w without changing
    the derivative; the one that leaves nothing at the largest p keeps its digits where that p is nearly 1.
    """
    log_p_K = log_softmax(score_K, valid_K)
    log_q_K = tl.where(valid_K, tl.log(tl.maximum(target_K, p0)), 0.0)
    a_K = tl.zeros_like(score_K) + margin
    near_q_K = a_K >= 0.5
    c_K = tl.where(near_q_K, 1.0 - a_K, a_K)
    base_K, other_K = tl.where(near_q_K, log_q_K, log_p_K), tl.where(near_q_K, log_p_K, log_q_K)
    value = -tl.sum(tilt(base_K, other_K, c_K) / (1.0 - c_K), axis=0)
    w_K, p_K = tilt(log_p_K, log_q_K, a_K), tl.exp(log_p_K)
    offs_k = tl.arange(0, score_K.shape[0])
    top = tl.max(tl.where(valid_K, log_p_K, float("-inf")), axis=0)
    is_top_K = offs_k == tl.min(tl.where(valid_K & (log_p_K == top), offs_k, score_K.shape[0]), axis=0)
    ratio = tl.sum(tl.where(is_top_K, w_K, 0.0), axis=0) / tl.sum(tl.where(is_top_K, p_K, 0.0), axis=0)
    w_K = tl.where(valid_K & ~is_top_K, w_K - p_K * ratio, 0.0)
    return value, tl.where(valid_K, p_K * tl.sum(w_K, axis=0) - w_K, 0.0)


LINKS = (
    (cross_entropy, 64),
    (plackett_luce, 64),
    (alpha_divergence, 64),
)
