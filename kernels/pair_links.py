"""Links of one chosen and one rejected response, K = 2: see links.py for what a link is."""

import triton
import triton.language as tl

from .link_math import (
    divergence_difference,
    log1p_unit,
    log_odds,
    pair_difference,
    pair_members,
    pair_places,
    sigmoid,
    softplus,
)

# Links of a difference of scores take the scores under any f-divergence: p2 = which one, p3 = its exponent, target_K =
# factors of the mapped scores; see divergence_difference. With p2 = 0 the difference is score_0 - score_1.


@triton.jit
def logistic(score_K, valid_K, target_K, margin, p0, p1, p2, p3, p4, p5):
    """Bradley-Terry with label smoothing, K = 2: p0 = beta, p1 = e < 0.5; e < 0 unlearns as much (robust DPO).

    x      = beta (s_0 - s_1) - margin
    value  = -(1 - e) logsig(x) - e logsig(-x) = max(-x, 0) + log1p(exp(-|x|)) + e x
    dvalue = (e - sigmoid(-x)) dx
    """
    difference, slope_K = divergence_difference(score_K, target_K, p2, p3)
    x = p0 * difference - margin
    t = tl.exp(-tl.abs(x))
    smoothing = tl.where(p1 == 0.0, 0.0, p1 * x)  # 0 times an infinite x is NaN
    value = tl.maximum(-x, 0.0) + log1p_unit(t) + smoothing
    sigmoid_of_minus_x = tl.where(x > 0, t, 1.0) / (1.0 + t)
    return value, (p0 * (p1 - sigmoid_of_minus_x)) * slope_K


@triton.jit
def squared(score_K, valid_K, target_K, margin, p0, p1, p2, p3, p4, p5):
    """Squared error of the score difference, K = 2; no hyper-parameters but the divergence's.

    x = s_0 - s_1 - margin,    value = x^2,    dvalue = 2 x dx
    """
    difference, slope_K = divergence_difference(score_K, target_K, p2, p3)
    x = difference - margin
    return x * x, (2.0 * x) * slope_K


@triton.jit
def hinge(score_K, valid_K, target_K, margin, p0, p1, p2, p3, p4, p5):
    """Hinge at 1, K = 2: p0 = beta.

    x = beta (s_0 - s_1) - margin,    value = max(1 - x, 0),    dvalue = -dx where x < 1
    """
    difference, slope_K = divergence_difference(score_K, target_K, p2, p3)
    x = p0 * difference - margin
    return tl.maximum(1.0 - x, 0.0), tl.where(x < 1.0, -p0, 0.0) * slope_K


@triton.jit
def reverse_cross(score_K, valid_K, target_K, margin, p0, p1, p2, p3, p4, p5):
    """KL(Bernoulli(sigmoid(x)) || Bernoulli(1 - e)), K = 2: p0 = beta, p1 = log e, p4 = log(1 - e).

    x = beta (s_0 - s_1) - margin,  q = sigmoid(x)
    value  = q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e)
    dvalue = q (1 - q) (x - log(1 - e) + log e) dx
    """
    difference, slope_K = divergence_difference(score_K, target_K, p2, p3)
    x = p0 * difference - margin
    q, r = sigmoid(x), sigmoid(-x)
    value = q * (-softplus(-x) - p4) + r * (-softplus(x) - p1)
    return value, (p0 * (q * (r * (x - p4 + p1)))) * slope_K


@triton.jit
def discovered(score_K, valid_K, target_K, margin, p0, p1, p2, p3, p4, p5):
    """DiscoPOP's blend of a logistic and an exponential loss, K = 2: p0 = beta, p1 = tau in (0, 1].

    x = beta (s_0 - s_1) - margin,  m = sigmoid(x / tau)
    value  = -logsig(x) (1 - m) + exp(-x) m,    exp(-x) m = exp(-x + logsig(x / tau)), as exp(-x) overflows
    dvalue = ( -sigmoid(-x) (1 - m) + logsig(x) m (1 - m) / tau + exp(-x) m ((1 - m) / tau - 1) ) dx
    """
    difference, slope_K = divergence_difference(score_K, target_K, p2, p3)
    x = p0 * difference - margin
    z = x / p1
    logistic_part, m, rest = softplus(-x), sigmoid(z), sigmoid(-z)
    exponential_part = tl.exp(-x - softplus(-z))
    value = logistic_part * rest + exponential_part
    dvalue = -sigmoid(-x) * rest - logistic_part * (m * rest / p1) + exponential_part * (rest / p1 - 1.0)
    return value, (p0 * dvalue) * slope_K


@triton.jit
def logistic_each(score_K, valid_K, target_K, margin, p0, p1, p2, p3, p4, p5):
    """Each member classified on its own, K = 2: p0 = beta, p1 and p2 = weights.

    x_k    = beta score_k - margin
    value  = -logsig(x_0) - p1 logsig(-x_0) - p2 logsig(-x_1)
    dvalue = (-sigmoid(-x_0) + p1 sigmoid(x_0)) dx_0 + p2 sigmoid(x_1) dx_1
    """
    score_0, score_1 = pair_members(score_K)
    x_0, x_1 = p0 * score_0 - margin, p0 * score_1 - margin
    value = softplus(-x_0) + p1 * softplus(x_0) + p2 * softplus(x_1)
    return value, pair_places(p0 * (p1 * sigmoid(x_0) - sigmoid(-x_0)), p0 * (p2 * sigmoid(x_1)), score_K)


@triton.jit
def sigmoid_each(score_K, valid_K, target_K, margin, p0, p1, p2, p3, p4, p5):
    """Two sigmoids, K = 2, no margin: p0 = beta, p1 and p2 = signs.

    value = sigmoid(p1 x_0) + sigmoid(x_1 + p2 x_0),    x_k = beta score_k
    """
    score_0, score_1 = pair_members(score_K)
    a, b = p1 * (p0 * score_0), p0 * (score_1 + p2 * score_0)
    slope_a, slope_b = sigmoid(a) * sigmoid(-a), sigmoid(b) * sigmoid(-b)
    return sigmoid(a) + sigmoid(b), pair_places(p0 * (p1 * slope_a + p2 * slope_b), p0 * slope_b, score_K)


@triton.jit
def squared_each(score_K, valid_K, target_K, margin, p0, p1, p2, p3, p4, p5):
    """Squared errors to two opposite goals, K = 2, no margin: p0 = goal of score_0.

    value = (score_0 - p0)^2 + (score_1 + p0)^2
    """
    score_0, score_1 = pair_members(score_K)
    x_0, x_1 = score_0 - p0, score_1 + p0
    return x_0 * x_0 + x_1 * x_1, pair_places(2.0 * x_0, 2.0 * x_1, score_K)


@triton.jit
def odds_ratio(score_K, valid_K, target_K, margin, p0, p1, p2, p3, p4, p5):
    """Logistic of the log odds ratio, K = 2: p0 = weight; target_K = coefficients c of the log-odds, 1 for ORPO.

    o_k    = log(p_k / (1 - p_k)),  p_k = exp(score_k);    x = c_0 o_0 - c_1 o_1 - margin
    value  = -p0 logsig(x)
    dvalue = -p0 sigmoid(-x) dx,    do_k = dscore_k / (1 - p_k)
    """
    odds_K, slope_K = log_odds(score_K)
    difference, sign_K = pair_difference(target_K * odds_K)
    x = difference - margin
    return p0 * softplus(-x), (-p0 * sigmoid(-x)) * (target_K * slope_K) * sign_K


@triton.jit
def soft_logistic(score_K, valid_K, target_K, margin, p0, p1, p2, p3, p4, p5):
    """Bradley-Terry with a probability q as its label, K = 2: p0 = beta, q = target_0.

    x = beta (score_0 - score_1) - margin,    value = log(1 + exp(x)) - q x,    dvalue = (sigmoid(x) - q) dx
    """
    difference, sign_K = pair_difference(score_K)
    q = tl.sum(tl.where(sign_K > 0.0, target_K, 0.0), axis=0)
    x = p0 * difference - margin
    t = tl.exp(-tl.abs(x))
    doubt = tl.where(q == 1.0, 0.0, (1.0 - q) * x)  # 0 times an infinite x is NaN
    value = tl.maximum(-x, 0.0) + log1p_unit(t) + doubt
    sigmoid_of_minus_x = tl.where(x > 0, t, 1.0) / (1.0 + t)
    return value, (p0 * ((1.0 - q) - sigmoid_of_minus_x)) * sign_K


LINKS = (
    (logistic, 2),
    (soft_logistic, 2),
    (squared, 2),
    (hinge, 2),
    (reverse_cross, 2),
    (discovered, 2),
    (logistic_each, 2),
    (sigmoid_each, 2),
    (squared_each, 2),
    (odds_ratio, 2),
)
