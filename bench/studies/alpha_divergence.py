"""Alpha of the alpha-divergence: from mode seeking to coverage, on a target that the policy cannot match."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import prefkern as pk
from bench.studies import common
from bench.studies.common import COLOURS, MARKERS, Claim, Row, generator, mean, pick

NAME = "alpha_divergence"
TITLE = "Alpha of the alpha-divergence, from mode seeking to coverage"
ABOUT = """
41 actions x = -2 .. 2. The target q has two bumps, 65 % around -0.8 and 35 % around +0.8, each of width 0.25; the
policy p is one bump, softmax(-(x - mu)^2 / 2 s^2), so it has to choose what to miss. (A policy that can match q ends
at q for every alpha: there is nothing to see.) `alpha_divergence` with a uniform anchor and tau = 1 is minimised over
mu and log s with Adam, 300 steps of 0.04 then 100 of 0.004, from 10 starts (mu uniform in -0.8 .. 0.8, s = 0.3).
alpha = 0 is KL(p || q), alpha = 1 is KL(q || p).

- coverage: smaller of p(bump) / q(bump) over the two bumps (x < 0, x > 0), at most 1.
- entropy: of p, in nats; width: s.
- ess_fit: effective sample size of p as a proposal for q, 1 / sum(q^2 / p), a share of the samples.
- ess_weights: effective number of the weights w ~ q^a p^(1-a) that the gradient is made of, 1 / sum(w^2), in groups
  of 8.
- grad_noise: variance of the gradient of groups of 8 over the squared length of its mean. The groups are drawn from
  the uniform anchor, 4000 of them a seed; the gradient is that of (mu, log s) at mu = 0, s = 0.8, the same point for
  all.
- grad_cosine: of that mean with the gradient over all 41 actions: what a group's own softmax leaves of the direction.

Intervals are 95 % (Student's t over the starts, and over 10 seeds of groups).
"""
READING = """
alpha does what its name promises, but not gradually: near 0 the policy ends on whichever bump its start was near, and
as a proposal for the target it is worthless; in between the start decides between one bump and both; from about three
quarters on nothing changes any more. What was expected of the price did not come. The weights of a small group are
spread over fewer responses the larger alpha is, as expected (but for a hair at the very low end), yet the gradient is
the least noisy there, and the nearest to the gradient over all actions. At small alpha a group's own softmax, which
knows nothing of the actions that were not drawn, turns the gradient well away from the exact one.
"""
ALPHAS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
GRID = torch.linspace(-2, 2, 41, dtype=torch.float64)
GROUP = 8
POINT = torch.tensor([[0.0, math.log(0.8)]], dtype=torch.float64)  # mu and log s where gradients are measured


def target_log_probs() -> Tensor:
    """(41,) log q."""
    bumps = torch.stack([torch.exp(-((GRID - at) ** 2) / (2 * 0.25**2)) for at in (-0.8, 0.8)])
    q = (torch.tensor([[0.65], [0.35]]) * bumps / bumps.sum(-1, keepdim=True)).sum(0)
    return q.log()


def policy_log_probs(theta_S2: Tensor) -> Tensor:
    """(S, 41) log p of policies (mu, log s)."""
    mu, log_s = theta_S2[:, :1], theta_S2[:, 1:]
    return (-((GRID - mu) ** 2) / (2 * (2 * log_s).exp())).log_softmax(-1)


def divergence(alpha: float) -> pk.losses.Loss:
    return pk.losses.get("alpha_divergence", alpha=alpha, tau=1.0, targets=pk.losses.Given())


def total(loss: pk.losses.Loss, log_p_GK: Tensor, log_q_GK: Tensor) -> Tensor:
    """The sum over groups of D_alpha(q || p), with q and p normalised in each group by the loss and by hand."""
    groups, size = log_p_GK.shape
    layout = pk.Layout.groups([1] * (groups * size), [size] * groups)
    q = log_q_GK.softmax(-1).flatten()
    anchor = torch.zeros_like(q)  # uniform: a constant drops out
    return pk.preference_loss(log_p_GK.flatten(), layout, loss, anchor, targets=q, normalizer=1.0).loss


def fit(alpha: float, starts: int, steps: tuple[int, int]) -> Tensor:
    """(S, 2) parameters after training from every start."""
    mu = torch.rand(starts, generator=generator("starts"), dtype=torch.float64) * 1.6 - 0.8
    theta = torch.stack([mu, torch.full_like(mu, 0.3).log()], -1).requires_grad_()
    log_q = target_log_probs().expand(starts, -1)
    optimizer = torch.optim.Adam([theta], lr=0.04)
    loss = divergence(alpha)
    for step in range(sum(steps)):
        optimizer.param_groups[0]["lr"] = 0.04 if step < steps[0] else 0.004
        optimizer.zero_grad()
        total(loss, policy_log_probs(theta), log_q).backward()
        optimizer.step()
    return theta.detach()


def group_gradients(alpha: float, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Gradients in (mu, log s) of groups drawn from the anchor, (count, 2), and of the whole set of actions, (2,)."""
    jacobian_K2 = torch.autograd.functional.jacobian(lambda t: policy_log_probs(t)[0], POINT)[:, 0]
    log_p, log_q = policy_log_probs(POINT)[0], target_log_probs()
    drawn = torch.randint(0, len(GRID), (count, GROUP), generator=generator("groups", seed))
    loss = divergence(alpha)

    def gradient(actions_GK: Tensor) -> Tensor:
        x = log_p[actions_GK].requires_grad_()
        [g] = torch.autograd.grad(total(loss, x, log_q[actions_GK]), x)
        return (g[..., None] * jacobian_K2[actions_GK]).sum(1)

    return gradient(drawn), gradient(torch.arange(len(GRID))[None])[0]


def effective_weights(alpha: float, seed: int, count: int) -> float:
    """Mean over groups of 1 / sum(w^2), w ~ q^alpha p^(1 - alpha), at the point where gradients are measured."""
    log_p, log_q = policy_log_probs(POINT)[0], target_log_probs()
    drawn = torch.randint(0, len(GRID), (count, GROUP), generator=generator("groups", seed))
    weights = (alpha * log_q[drawn] + (1 - alpha) * log_p[drawn]).softmax(-1)
    return (1 / weights.square().sum(-1)).mean().item()


def rows(quick: bool) -> list[dict]:
    """One row an alpha and seed; a seed is a start of the fit and a draw of groups."""
    seeds, steps, count = (3, (5, 2), 50) if quick else (10, (300, 100), 4000)
    log_q = target_log_probs()
    q, left = log_q.exp(), GRID < 0
    table = []
    for alpha in ALPHAS[::3] if quick else ALPHAS:
        theta = fit(alpha, seeds, steps)
        p = policy_log_probs(theta).exp()
        for seed in range(seeds):
            gradients, whole = group_gradients(alpha, seed, count)
            average = gradients.mean(0)
            bumps = [(p[seed][side].sum() / q[side].sum()).item() for side in (left, ~left)]
            table.append({
                "alpha": alpha, "seed": seed, "mu": theta[seed, 0].item(), "width": theta[seed, 1].exp().item(),
                "coverage": min(1.0, *bumps),
                "entropy": torch.special.entr(p[seed]).sum().item(),
                "ess_fit": (1 / (q.square() / p[seed]).sum()).item(),
                "ess_weights": effective_weights(alpha, seed, count),
                "grad_noise": (gradients.var(0).sum() / average.square().sum()).item(),
                "grad_cosine": torch.cosine_similarity(average, whole, dim=0).item(),
            })  # fmt: skip
    return table


def _means(table: Sequence[Row], measure: str) -> dict[float, common.Mean]:
    alphas = sorted({row["alpha"] for row in table})
    return {a: mean(row[measure] for row in pick(table, alpha=a)) for a in alphas}


def _monotone(means: dict[float, common.Mean], slack: float = 1e-3) -> bool:
    values = [m.value for m in means.values()]
    return all(b >= a - slack * max(map(abs, values)) for a, b in zip(values, values[1:]))


def _ends(means: dict[float, common.Mean]) -> str:
    return ", ".join(f"{m.value:.3g} (alpha {a:g})" for a, m in means.items())


def claims(table: Sequence[Row]) -> list[Claim]:
    cover, entropy, fit_, weights, noise, cosine = (
        _means(table, m) for m in ("coverage", "entropy", "ess_fit", "ess_weights", "grad_noise", "grad_cosine")
    )
    alphas = list(cover)
    seeking = [row for row in pick(table, alpha=alphas[0])]
    sides = {row["mu"] > 0 for row in seeking}
    least = min(row["coverage"] for row in pick(table, alpha=alphas[-1]))
    noise_values = {a: m.value for a, m in noise.items()}
    return [
        Claim("Coverage and entropy rise with alpha", _monotone(cover) and _monotone(entropy),
              f"coverage {_ends(cover)}; entropy {_ends(entropy)} nats"),
        Claim("At alpha = 0 every start ends on one bump alone, and the start decides on which", len(sides) == 2
              and max(row["coverage"] for row in seeking) < 0.1,
              f"{sum(row['mu'] > 0 for row in seeking)} of {len(seeking)} starts end on the smaller bump;"
              f" largest coverage {max(row['coverage'] for row in seeking):.2g}"),
        Claim("At alpha = 1 every start covers both bumps", least > 0.9, f"smallest coverage {least:.2g}"),
        Claim("The fitted policy is a better proposal for the target the larger alpha is", _monotone(fit_),
              f"effective share of samples {_ends(fit_)}"),
        Claim("The weights of the gradient are spread over fewer responses the larger alpha is",
              _monotone({-a: weights[a] for a in reversed(alphas)}),
              f"effective responses of {GROUP}: {_ends(weights)}"),
        Claim("Gradients of groups are noisier the larger alpha is", _monotone(noise),
              f"smallest at alpha {min(noise_values, key=noise_values.get):g}: {_ends(noise)}"),
        Claim("Groups of 8 leave the gradient's direction as it is (cosine above 0.99 for every alpha)",
              min(m.value for m in cosine.values()) > 0.99, f"cosine {_ends(cosine)}"),
    ]  # fmt: skip


def summary(table: Sequence[Row]) -> str:
    names = [name for name in table[0] if name not in ("alpha", "seed", "mu")]
    columns = {name: _means(table, name) for name in names}
    return common.markdown([{"alpha": f"{a:g}", **{n: str(columns[n][a]) for n in names}} for a in columns[names[0]]])


def draw(table: Sequence[Row], path: Path) -> None:
    alphas = sorted({row["alpha"] for row in table})
    made, axes = common.figure(2, 2)
    q = target_log_probs().exp()
    axes[0].fill_between(GRID.numpy(), q.numpy(), color="#cccccc", label="target q", linewidth=0)
    shown = [alphas[0], alphas[len(alphas) // 2], alphas[-1]]
    for i, alpha in enumerate(shown):
        row = pick(table, alpha=alpha)[0]
        theta = torch.tensor([[row["mu"], row["width"]]], dtype=torch.float64)
        theta[:, 1] = theta[:, 1].log()
        p = policy_log_probs(theta)[0].exp()
        axes[0].plot(GRID.numpy(), p.numpy(), color=COLOURS[i], marker=MARKERS[i], markevery=5, markersize=4,
                     linewidth=1.5, label=f"alpha = {alpha:g}")  # fmt: skip
    common.style(axes[0], "Fitted policies (first start)", "action x", "probability")
    panels = (
        ("Coverage to mode seeking", "share, or nats", {"coverage": "coverage (share)", "entropy": "entropy (nats)"}),
        ("Effective sample size", "share", {"ess_fit": "fitted p for q", "ess_weights": "gradient weights, of 8"}),
        (
            "Gradients of groups of 8",
            "variance / |mean|^2, or cosine",
            {"grad_noise": "noise: variance / |mean|^2", "grad_cosine": "cosine with exact"},
        ),
    )
    for axis, (title, unit, series) in zip(axes[1:], panels):
        for i, (name, label) in enumerate(series.items()):
            means = _means(table, name)
            share = GROUP if name == "ess_weights" else 1
            axis.errorbar(alphas, [m.value / share for m in means.values()], [m.half / share for m in means.values()],
                          color=COLOURS[i], marker=MARKERS[i], capsize=3, linewidth=1.5, label=label)  # fmt: skip
        if "coverage" in series:
            axis.scatter([row["alpha"] for row in table], [row["coverage"] for row in table], color=COLOURS[0], s=9,
                         alpha=0.5, label="coverage of each start")  # fmt: skip
        common.style(axis, title, "alpha", unit)
    axes[3].set_ylim(bottom=0)
    common.save(made, path, "alpha_divergence on a two-bump target, 95 % intervals over seeds")


if __name__ == "__main__":
    sys.exit(common.main(sys.modules[__name__]))
