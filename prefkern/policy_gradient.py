"""Token-level objectives of policy-gradient training on the seam of `token_logps`: log-probabilities in, g_N out.

    loss = sum over responses or tokens of (surrogate_n + beta * k3_n) / normalizer

Every objective is an importance ratio (of the token or of its response), a surrogate of ratio and advantage, and an
aggregation. They are plain torch: a few vectors of N numbers, whatever the vocabulary. Write another one with
`importance_ratio`, `clipped_surrogate` or `soft_surrogate`, `k3_kl` and the sums of `prefkern.reference`.

Arguments that all objectives share:
    logps: (N,) log-probabilities of the packed response tokens under the policy, in nats; carries the gradient.
    old_logps: (N,) the same under the policy that generated; None: this policy (every ratio is 1).
    advantages: (R,) one for each response, see `group_advantages`, or (N,) one for each token. R = N is read as (R,).
    layout: where the responses lie; groups and cuts play no part.
    mask: (N,) bool, or 0 and 1; False removes a token from sums, lengths and metrics: other people's tokens in a
        conversation, a tool's output, truncated responses.
    normalizer: what the sum is divided by; None: its number in this call. Under gradient accumulation or data
        parallelism pass the number of the whole batch (a tensor on the device costs no host sync), and add gradients
        up: no way of splitting the batch then changes the result. Each function says what it counts.
    ref_logps, beta: (N,) under a reference, and the weight of `k3_kl` against it. With beta = 0 it is a metric only.
    weight_kl: multiplies the penalty by the importance ratio, differentiated too, which makes its gradient unbiased
        off-policy (TRL's `use_bias_correction_kl`).
    level: "token": ratio of the token's probabilities. "sequence": geometric mean over the response's counted tokens.
        "sequence_token": the value of "sequence", the gradient of each token's own.

All arithmetic is fp32, or float64 for float64 inputs. Log-ratios may be anything: exp is itself up to 40 and its
tangent beyond, so that values, gradients and their squares stay finite in fp32. Gradients flow into `logps` alone.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from prefkern import reference
from prefkern.layout import Layout

Level = Literal["token", "sequence", "sequence_token"]
EXP_LIMIT = 40.0  # exp(40) squared is 5.5e34: a norm over thousands of such gradients still fits in fp32


class PolicyOutput(NamedTuple):
    """A loss to call backward on, and what happened, all on the device.

    metrics, means over counted tokens: clip_ratio/low and clip_ratio/high (fraction of tokens whose gradient the clip
    takes away on either side; cispo: whose weight it caps), approx_kl (k3 estimate of KL(old || policy), nats), kl
    (of KL(policy || reference), where there is one).
    """

    loss: Tensor  # 0-dim, fp32
    metrics: dict[str, Tensor]  # 0-dim each, detached


class _Rows(NamedTuple):
    """The arguments of a call, checked, wide, and 0 where a token does not count."""

    logps_N: Tensor
    ref_logps_N: Tensor | None
    log_ratio_N: Tensor  # of the token
    ratio_N: Tensor  # at the chosen level
    advantage_N: Tensor
    kept_N: Tensor  # bool
    offsets: Tensor  # (R + 1,)
    count_R: Tensor  # counted tokens, at least 1

    def kept(self, values_N: Tensor) -> Tensor:
        return torch.where(self.kept_N, values_N, 0.0)

    def response_means(self, values_N: Tensor) -> Tensor:
        """Sum over responses of their means over counted tokens."""
        return (reference.span_sums(self.kept(values_N), self.offsets) / self.count_R).sum()

    def token_sum(self, values_N: Tensor) -> Tensor:
        return reference.span_sums(self.kept(values_N), self.offsets).sum()

    @property
    def num_responses(self) -> int:
        return max(1, self.count_R.numel())

    @property
    def num_tokens(self) -> Tensor:
        return self.kept_N.sum().clamp(min=1)


# --- Objectives ----------------------------------------------------------------------------------------------------


def grpo(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    layout: Layout,
    *,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    eps: float = 0.2,
    eps_high: float | None = None,
    delta: float | None = None,
    level: Level = "token",
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    weight_kl: bool = False,
) -> PolicyOutput:
    """Group relative policy optimization: clipped surrogate, averaged over each response, then over responses.

        loss = sum_r (1 / n_r) sum_{t in r} (clipped_t + beta * k3_t) / normalizer,   normalizer: responses

    A response in which no token counts adds 0, but is counted.

    Args:
        logps, old_logps, advantages, layout, mask, normalizer, level, ref_logps, beta, weight_kl: see the module.
        eps, eps_high, delta: of `clipped_surrogate`.
    Returns:
        PolicyOutput.
    Raises:
        ValueError: shapes disagree with the layout, a value is out of range, or beta > 0 without ref_logps.
    Source:
        Shao et al. 2024, arXiv:2402.03300, which has beta = 0.04; TRL's default is 0. As in TRL's code.
    """
    rows = _rows(logps, old_logps, advantages, layout, mask, level, ref_logps)
    value_N, metrics = _clipped(rows, eps, eps_high, delta, beta, weight_kl)
    return _output(rows, rows.response_means(value_N), _or(normalizer, rows.num_responses), metrics)


def bnpo(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    layout: Layout,
    *,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    eps: float = 0.2,
    eps_high: float | None = None,
    delta: float | None = None,
    level: Level = "token",
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    weight_kl: bool = False,
) -> PolicyOutput:
    """Clipped surrogate averaged over the counted tokens of this call ("batch-normalised").

        loss = (sum_t (clipped_t + beta * k3_t) / tokens of this call) / normalizer,   normalizer: calls, default 1

    The mean is local, so splitting a batch changes the weight of its tokens; `dapo` does not have that.

    Args, Raises:
        As `grpo`.
    Returns:
        PolicyOutput.
    Source:
        The name and the formula are those of TRL's `loss_type="bnpo"`, as in its code.
    """
    rows = _rows(logps, old_logps, advantages, layout, mask, level, ref_logps)
    value_N, metrics = _clipped(rows, eps, eps_high, delta, beta, weight_kl)
    return _output(rows, rows.token_sum(value_N) / rows.num_tokens, _or(normalizer, 1.0), metrics)


def dr_grpo(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    layout: Layout,
    max_length: float,
    *,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    eps: float = 0.2,
    eps_high: float | None = None,
    delta: float | None = None,
    level: Level = "token",
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    weight_kl: bool = False,
) -> PolicyOutput:
    """GRPO done right: clipped surrogate summed over tokens, divided by a constant instead of by lengths.

        loss = sum_t (clipped_t + beta * k3_t) / (normalizer * max_length),   normalizer: responses

    It goes with advantages that are centred but not scaled: `group_advantages(..., scale="none")`.

    Args:
        max_length: longest response that generation allows, in tokens, whatever lengths it gave.
        others: as in `grpo`.
    Returns:
        PolicyOutput.
    Raises:
        As `grpo`.
    Source:
        Liu et al. 2025, arXiv:2503.20783; the constant as in TRL's code.
    """
    _at_least("max_length", max_length, 1)
    rows = _rows(logps, old_logps, advantages, layout, mask, level, ref_logps)
    value_N, metrics = _clipped(rows, eps, eps_high, delta, beta, weight_kl)
    return _output(rows, rows.token_sum(value_N) / max_length, _or(normalizer, rows.num_responses), metrics)


def dapo(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    layout: Layout,
    *,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    eps: float = 0.2,
    eps_high: float | None = 0.28,
    delta: float | None = None,
    level: Level = "token",
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    weight_kl: bool = False,
) -> PolicyOutput:
    """Decoupled clip, token-level loss: every token of the whole batch weighs the same.

        loss = sum_t (clipped_t + beta * k3_t) / normalizer,   normalizer: counted tokens of the whole batch

    Args:
        eps_high: 0.28 as in the paper; TRL's default is eps.
        others: as in `grpo`.
    Returns:
        PolicyOutput.
    Raises:
        As `grpo`.
    Source:
        Yu et al. 2025, arXiv:2503.14476; as in TRL's code. Dynamic sampling and overlong shaping are the caller's.
    """
    rows = _rows(logps, old_logps, advantages, layout, mask, level, ref_logps)
    value_N, metrics = _clipped(rows, eps, eps_high, delta, beta, weight_kl)
    return _output(rows, rows.token_sum(value_N), _or(normalizer, rows.num_tokens), metrics)


def gspo(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    layout: Layout,
    *,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    eps: float = 3e-4,
    eps_high: float | None = 4e-4,
    delta: float | None = None,
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    weight_kl: bool = False,
) -> PolicyOutput:
    """Group sequence policy optimization: `grpo` with one ratio, and one clip, for the whole response.

        s_r  = exp((1 / n_r) sum_{t in r} (logp_t - old_logp_t))
        loss = sum_r (clipped(s_r, A_r) + beta * mean_{t in r} k3_t) / normalizer,   normalizer: responses

    Args:
        eps, eps_high: the paper's; means of log-ratios move little, so they are a thousand times below grpo's. TRL
            keeps 0.2 unless told otherwise.
        others: as in `grpo`, whose level is "sequence" here.
    Returns:
        PolicyOutput.
    Raises:
        As `grpo`.
    Source:
        Zheng et al. 2025, arXiv:2507.18071; as in TRL's code (`importance_sampling_level="sequence"`).
    """
    return grpo(
        logps, old_logps, advantages, layout, mask=mask, normalizer=normalizer, eps=eps, eps_high=eps_high,
        delta=delta, level="sequence", ref_logps=ref_logps, beta=beta, weight_kl=weight_kl,
    )  # fmt: skip


def gspo_token(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    layout: Layout,
    *,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    eps: float = 3e-4,
    eps_high: float | None = 4e-4,
    delta: float | None = None,
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    weight_kl: bool = False,
) -> PolicyOutput:
    """`gspo` for advantages that differ within a response: the response's ratio, the token's own gradient.

        s_t = sg[s_r] * exp(logp_t - sg[logp_t])

    With one advantage for each response, value and gradient are gspo's.

    Args, Raises:
        As `gspo`; advantages (N,).
    Returns:
        PolicyOutput.
    Source:
        Zheng et al. 2025, arXiv:2507.18071; as in TRL's code ("sequence_token").
    """
    return grpo(
        logps, old_logps, advantages, layout, mask=mask, normalizer=normalizer, eps=eps, eps_high=eps_high,
        delta=delta, level="sequence_token", ref_logps=ref_logps, beta=beta, weight_kl=weight_kl,
    )  # fmt: skip


def cispo(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    layout: Layout,
    *,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    eps_high: float = 5.0,
    level: Level = "token",
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    weight_kl: bool = False,
) -> PolicyOutput:
    """Clipped importance weights: REINFORCE with a capped, constant weight, so that no token loses its gradient.

        loss = sum_t (-sg[min(w_t, eps_high)] * A_t * logp_t + beta * k3_t) / normalizer,   normalizer: counted tokens

    Args:
        eps_high: the cap itself, not a distance from 1: 5 caps a weight at 5, and 0.2 (what TRL takes when nothing is
            set) would cap every weight far below 1. The original paper writes the cap as 1 + eps_high.
        others: as in `grpo`.
    Returns:
        PolicyOutput. The value is no estimate of the objective: it moves with the log-probabilities themselves.
    Raises:
        As `grpo`.
    Source:
        MiniMax-M1, arXiv:2506.13585; the cap as in TRL's code and, as summarised there, ScaleRL, arXiv:2510.13786.
    """
    _at_least("eps_high", eps_high, 0)
    rows = _rows(logps, old_logps, advantages, layout, mask, level, ref_logps)
    value_N = -rows.ratio_N.detach().clamp(max=eps_high) * rows.advantage_N * rows.logps_N
    value_N = value_N + _penalty(rows, beta, weight_kl)
    metrics = {"clip_ratio/high": _mean(rows, rows.ratio_N > eps_high)}
    return _output(rows, rows.token_sum(value_N), _or(normalizer, rows.num_tokens), metrics)


def sapo(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    layout: Layout,
    *,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    temperature_pos: float = 1.0,
    temperature_neg: float = 1.05,
    level: Level = "token",
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    weight_kl: bool = False,
) -> PolicyOutput:
    """Soft adaptive policy optimization: a smooth gate in place of the clip, averaged as in `grpo`.

        loss = sum_r (1 / n_r) sum_{t in r} (soft_t + beta * k3_t) / normalizer,   normalizer: responses

    Args:
        temperature_pos, temperature_neg: of `soft_surrogate`.
        others: as in `grpo`.
    Returns:
        PolicyOutput. On-policy the gradient is grpo's; the value has an offset of (1 - 2 / temperature) A.
    Raises:
        As `grpo`.
    Source:
        Gao et al. 2025, arXiv:2511.20347; as in TRL's code.
    """
    rows = _rows(logps, old_logps, advantages, layout, mask, level, ref_logps)
    value_N = soft_surrogate(rows.ratio_N, rows.advantage_N, temperature_pos, temperature_neg)
    value_N = value_N + _penalty(rows, beta, weight_kl)
    return _output(rows, rows.response_means(value_N), _or(normalizer, rows.num_responses), {})


# --- What they are made of -----------------------------------------------------------------------------------------


def group_advantages(
    rewards: Tensor, layout: Layout, scale: Literal["group", "batch", "none"] = "group", eps: float = 1e-4
) -> Tensor:
    """Rewards relative to those of the same prompt's other responses.

        A_r = (reward_r - mean of its prompt) / (std + eps)

    Args:
        rewards: (R,).
        layout: uncut; its groups are the prompts.
        scale: "group" divides by the standard deviation within the prompt, "batch" by that of all rewards, "none" does
            not divide. Deviations are unbiased (over n - 1), and 0 for a single response.
        eps: keeps a prompt whose rewards are equal at 0.
    Returns:
        (R,) fp32 (float64 for float64), without gradient.
    Raises:
        ValueError: the shape disagrees with the layout, the layout is cut, or scale is another word.
    Source:
        Shao et al. 2024, arXiv:2402.03300 ("group"); Liu et al. 2025, arXiv:2503.20783 ("none"); unbiasedness, eps and
        "batch" as in TRL's code.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale={scale!r} must be one of group, batch, none")
    if layout.is_cut:
        raise ValueError("group_advantages compares whole responses, but the layout is cut; pass the uncut layout")
    _check_shape("rewards", rewards, (layout.num_responses,), layout)
    with torch.no_grad():
        reward_R = rewards.to(reference.accumulator(rewards.dtype))
        offsets = layout.index(rewards.device).group_offsets
        size_P = offsets.diff()
        mean_P = reference.span_sums(reward_R, offsets) / size_P
        advantage_R = reward_R - _expand(mean_P, size_P, len(reward_R))
        if scale == "none" or len(reward_R) == 0:
            return advantage_R
        if scale == "batch":
            squares = (reward_R - reward_R.mean()).square().sum()
            return advantage_R / ((squares / max(1, len(reward_R) - 1)).sqrt() + eps)
        variance_P = reference.span_sums(advantage_R.square(), offsets) / (size_P - 1).clamp(min=1)
        return advantage_R / (_expand(variance_P.sqrt(), size_P, len(reward_R)) + eps)


def k3_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) at each sampled token: unbiased on-policy, never negative.

        k3 = exp(d) - d - 1,   d = ref_logp - logp

    Args:
        logps: (N,) under the policy, in nats. ref_logps: (N,) under the reference, a constant.
    Returns:
        (N,) fp32, nats.
    Gradient:
        1 - exp(d) with respect to logps.
    Source:
        Schulman 2020, "Approximating KL divergence"; Shao et al. 2024, arXiv:2402.03300, eq. 4.
    """
    wide = reference.accumulator(logps.dtype)
    d = ref_logps.detach().to(wide) - logps.to(wide)
    return _exp(d) - d - 1


def importance_ratio(
    log_ratio_N: Tensor, logps_N: Tensor, layout: Layout, mask: Tensor | None = None, level: Level = "token"
) -> Tensor:
    """(N,) ratios exp(log-ratio) of policy to old policy, of the token or of its response; see the module's `level`.

    Args:
        log_ratio_N: logp - old_logp, finite where a token does not count. logps_N: the policy's log-probabilities.
    """
    if level == "token":
        return _exp(log_ratio_N)
    if level not in ("sequence", "sequence_token"):
        raise ValueError(f"level={level!r} must be one of token, sequence, sequence_token")
    offsets = layout.index(log_ratio_N.device).response_offsets
    kept_N = torch.ones_like(log_ratio_N) if mask is None else mask.to(log_ratio_N.dtype)
    count_R = reference.span_sums(kept_N, offsets).clamp(min=1)
    mean_R = reference.span_sums(log_ratio_N * kept_N, offsets) / count_R
    mean_N = _expand(mean_R, offsets.diff(), len(log_ratio_N))
    return _exp(mean_N if level == "sequence" else logps_N - logps_N.detach() + mean_N.detach())


def clipped_surrogate(
    ratio_N: Tensor, advantage_N: Tensor, eps: float = 0.2, eps_high: float | None = None, delta: float | None = None
) -> Tensor:
    """(N,) losses of the proximal objective: nothing is gained by moving a ratio further than the clip.

        clipped = -min(min(w, delta) * A, clamp(w, 1 - eps, 1 + eps_high) * A)

    Args:
        eps: in [0, 1]. eps_high: at least 0; None: eps.
        delta: caps the ratio also where A < 0, where it is unbounded otherwise (two-sided clipping); above
            1 + eps_high to have a meaning of its own. None: no cap.
    Source:
        Schulman et al. 2017, arXiv:1707.06347, eq. 7; eps_high: arXiv:2503.14476; delta: INTELLECT-2,
        arXiv:2505.07291, as in TRL's code.
    """
    _at_least("eps", eps, 0, 1)
    high = eps if eps_high is None else _at_least("eps_high", eps_high, 0)
    near_N = ratio_N.clamp(1 - eps, 1 + high)
    far_N = ratio_N if delta is None else ratio_N.clamp(max=_at_least("delta", delta, 0))
    return -torch.minimum(far_N * advantage_N, near_N * advantage_N)


def soft_surrogate(
    ratio_N: Tensor, advantage_N: Tensor, temperature_pos: float = 1.0, temperature_neg: float = 1.05
) -> Tensor:
    """(N,) losses whose gradient fades smoothly as a ratio leaves 1.

        soft = -(4 / tau) * sigma(tau * (w - 1)) * A,   tau = temperature_pos where A > 0, else temperature_neg

    Its derivative in w is -4 sigma (1 - sigma) A: that of w * A at w = 1, fading faster the greater tau is.
    """
    pos, neg = _at_least("temperature_pos", temperature_pos, 1e-6), _at_least("temperature_neg", temperature_neg, 1e-6)
    tau_N = torch.full_like(advantage_N, neg).masked_fill(advantage_N > 0, pos)
    return -(4 / tau_N) * torch.sigmoid(tau_N * (ratio_N - 1)) * advantage_N


def _rows(logps, old_logps, advantages, layout: Layout, mask, level: Level, ref_logps) -> _Rows:
    for name, t in (("logps", logps), ("old_logps", old_logps), ("mask", mask), ("ref_logps", ref_logps)):
        if t is not None:
            _check_shape(name, t, (layout.num_tokens,), layout)
    wide, offsets = reference.accumulator(logps.dtype), layout.index(logps.device).response_offsets
    kept_N = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask.bool()

    def counted(t: Tensor) -> Tensor:
        return torch.where(kept_N, t.to(wide), 0.0)  # before any product: 0 times an infinity is NaN, in backward too

    logps_N = counted(logps)
    old_N = logps_N.detach() if old_logps is None else counted(old_logps.detach())
    advantage_N = advantages.detach().to(wide)
    if advantages.shape == (layout.num_responses,):
        advantage_N = _expand(advantage_N, offsets.diff(), layout.num_tokens)
    _check_shape("advantages", advantage_N, (layout.num_tokens,), layout)
    log_ratio_N = logps_N - old_N
    return _Rows(
        logps_N,
        None if ref_logps is None else counted(ref_logps.detach()),
        log_ratio_N,
        importance_ratio(log_ratio_N, logps_N, layout, kept_N, level),
        counted(advantage_N),
        kept_N,
        offsets,
        reference.span_sums(kept_N.to(wide), offsets).clamp(min=1),
    )


def _penalty(rows: _Rows, beta: float, weight_kl: bool) -> Tensor | float:
    if _at_least("beta", beta, 0) == 0:
        return 0.0
    if rows.ref_logps_N is None:
        raise ValueError(f"beta={beta!r} weighs the divergence from a reference: pass ref_logps, (N,)")
    kl_N = k3_kl(rows.logps_N, rows.ref_logps_N)
    return beta * (kl_N * rows.ratio_N if weight_kl else kl_N)


def _clipped(rows: _Rows, eps, eps_high, delta, beta, weight_kl) -> tuple[Tensor, dict[str, Tensor]]:
    """Values of the tokens, and how many are clipped."""
    value_N = clipped_surrogate(rows.ratio_N, rows.advantage_N, eps, eps_high, delta)
    high = 1 + (eps if eps_high is None else eps_high)
    metrics = {
        "clip_ratio/low": _mean(rows, (rows.ratio_N < 1 - eps) & (rows.advantage_N < 0)),
        "clip_ratio/high": _mean(rows, (rows.ratio_N > high) & (rows.advantage_N > 0)),
    }
    return value_N + _penalty(rows, beta, weight_kl), metrics


@torch.no_grad()
def _mean(rows: _Rows, values_N: Tensor) -> Tensor:
    return rows.token_sum(values_N.detach().to(rows.logps_N.dtype)) / rows.num_tokens


def _output(rows: _Rows, summed: Tensor, normalizer: float | Tensor, metrics: dict[str, Tensor]) -> PolicyOutput:
    metrics["approx_kl"] = _mean(rows, k3_kl(-rows.log_ratio_N.detach(), torch.zeros_like(rows.log_ratio_N)))
    if rows.ref_logps_N is not None:
        metrics["kl"] = _mean(rows, k3_kl(rows.logps_N.detach(), rows.ref_logps_N))
    return PolicyOutput(summed / normalizer, metrics)


def _or(normalizer: float | Tensor | None, counted: float | Tensor) -> float | Tensor:
    return counted if normalizer is None else normalizer


def _exp(x: Tensor) -> Tensor:
    """exp up to EXP_LIMIT, its tangent beyond."""
    return x.clamp(max=EXP_LIMIT).exp() * (1 + (x - EXP_LIMIT).clamp(min=0))


def _expand(values: Tensor, counts: Tensor, total: int) -> Tensor:
    return values.repeat_interleave(counts, output_size=total)


def _check_shape(name: str, t: Tensor, shape: tuple[int, ...], layout: Layout) -> None:
    if t.shape != shape:
        holds = f"{layout.num_tokens} tokens in {layout.num_responses} responses"
        raise ValueError(f"{name} has shape {tuple(t.shape)}, but the layout holds {holds}")


def _at_least(name: str, value: float, low: float, high: float = float("inf")) -> float:
    if not low <= value <= high:
        raise ValueError(f"{name}={value!r} must be a number in [{low:g}, {high:g}]")
    return value
