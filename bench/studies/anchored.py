"""Anchored losses on noisy rewards: a contextual bandit whose logged rewards are wrong in four ways."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import prefkern as pk
from bench.studies import common
from bench.studies.common import COLOURS, MARKERS, Claim, Row, generator, mean

NAME = "anchored"
TITLE = "Anchored losses on noisy rewards"
ABOUT = """
A contextual bandit. The true reward of an action is linear in the context's 8 features, standardised over its 8
actions; rewards are logged once for 256 contexts, with noise. The policy is a softmax over linear logits that starts
at the anchor (a policy with some idea of the rewards) and takes 200 Adam steps of 64 contexts. Each action is a
response of one token; list losses see all 8 actions of a context, pair losses 4 disjoint pairs, drawn anew at each
step.

**WinMass** is the probability that the policy gives to the action of highest true reward, averaged over 256 new
contexts; `top2` the same for the two highest. `kl` is KL(policy || anchor) in nats, `reward` the expected true reward
in its standard deviations. 10 seeds, each with its own rewards, anchor, contexts and noise, the same for every
method; intervals are 95 % (Student's t over the seeds).

| noise | what is logged for a reward r | severities |
| --- | --- | --- |
| gaussian | r + s e, e standard normal | s = 0.5, 1, 2 |
| heavy_tailed | r + s c, c standard Cauchy | s = 0.1, 0.3, 1 |
| outliers | with probability s, +10 or -10 in place of r | s = 0.05, 0.15, 0.3 |
| flipped | in a share s of the contexts, -r for every action | s = 0.1, 0.25, 0.4 |

Every method runs at every temperature tau of 0.25, 1, 4, 16 (beta = 1 / tau for the pair losses) and otherwise at its
defaults. Methods differ in how sharp a target they make of the same rewards, so at one temperature they also differ in
how far they move; "at its best tau" takes for each method and cell the temperature with the most WinMass, an oracle's
choice, the same for all. `unanchored` is `anchored_listwise` with a uniform anchor: raw coordinates, no reference.
"""
READING = """
At one temperature the losses go different distances: a ranking or a hard label asks for more than a soft target, so
the columns at tau = 1 compare strength more than robustness, and DPO leads most of them. Each at its best
temperature, what counts is how a wrong reward reaches the loss. Losses that see the order alone (`dpo`,
`plackett_luce`), or bounded probabilities of pairs (`anchored_pairwise`), stand up to tails and outliers;
`anchored_listwise` with its default targets does not, for one outlier takes the group's standard deviation and nearly
all of q. KDE smoothing mends a part of that, and is no match for ranks. Where whole contexts are flipped, which order
does not see either, `plackett_luce` is ahead and the others are close together. That anchored losses beat DPO on
noisy rewards, the claim this study started from, is thus not what it found: `anchored_pairwise` is about level with
DPO, the ranking variant ahead more often than behind, the default one behind.

The anchor itself helps: without it the same loss is clearly worse at tau = 1 and never surely better at its best tau.
Larger temperatures end farther from the anchor. The best temperature is often the largest one tried: 200 steps stop
the policy where the objective would not.
"""
ACTIONS, FEATURES = 8, 8
NOISES = {
    "gaussian": (0.5, 1.0, 2.0),
    "heavy_tailed": (0.1, 0.3, 1.0),
    "outliers": (0.05, 0.15, 0.3),
    "flipped": (0.1, 0.25, 0.4),
}
TAUS = (0.25, 1.0, 4.0, 16.0)
SEVERITIES = ("light", "medium", "heavy")
SHOWN = ("gaussian", "medium")


@dataclass(frozen=True)
class Sizes:
    seeds: int = 10
    contexts: int = 256
    batch: int = 64
    steps: int = 200
    learning_rate: float = 0.05


QUICK = Sizes(seeds=2, contexts=16, batch=8, steps=3)


@dataclass(frozen=True)
class Method:
    """A loss and how it is fed: in pairs or lists, with the anchor or a uniform one."""

    loss: pk.losses.Loss
    anchored: bool = True


def methods(tau: float = 1.0) -> dict[str, Method]:
    """Every method at one temperature."""
    get = pk.losses.get
    listwise = get("anchored_listwise", tau=tau)
    return {
        "dpo": Method(get("dpo", beta=1 / tau)),
        "anchored_pairwise": Method(get("anchored_pairwise", beta=1 / tau)),
        "anchored_listwise": Method(listwise),
        "plackett_luce": Method(get("anchored_listwise", tau=tau, targets=pk.losses.PlackettLuce())),
        "kde": Method(get("anchored_listwise", tau=tau, targets=pk.losses.KDE())),
        "unanchored": Method(listwise, anchored=False),
    }


@dataclass(frozen=True)
class Bandits:
    """B independent bandits at once: contexts, true rewards, logged rewards and anchors."""

    x_BCD: Tensor  # training contexts; x_test of the same shape
    logged_BCA: Tensor
    anchor_BDA: Tensor
    x_test_BCD: Tensor
    true_test_BCA: Tensor


def make_bandits(cells: Sequence[tuple[str, float]], sizes: Sizes) -> Bandits:
    """One bandit for every cell and seed, cells outside; what a seed draws is the same in every cell."""
    parts = [_one(noise, level, seed, sizes) for noise, level in cells for seed in range(sizes.seeds)]
    return Bandits(*(torch.stack(tensors) for tensors in zip(*parts)))


def _one(noise: str, level: float, seed: int, sizes: Sizes) -> tuple[Tensor, ...]:
    made = generator("bandit", seed)
    weights_DA = torch.randn(FEATURES, ACTIONS, generator=made)
    anchor_DA = 0.15 * weights_DA + 0.15 * torch.randn(FEATURES, ACTIONS, generator=made)
    x_CD = torch.randn(2 * sizes.contexts, FEATURES, generator=made)
    true_CA = x_CD @ weights_DA
    true_CA = (true_CA - true_CA.mean(-1, keepdim=True)) / true_CA.std(-1, keepdim=True)
    (x, x_test), (true, true_test) = x_CD.chunk(2), true_CA.chunk(2)
    return x, _log(true, noise, level, generator("noise", noise, seed)), anchor_DA, x_test, true_test


def _log(true_CA: Tensor, noise: str, level: float, made: torch.Generator) -> Tensor:
    uniform = torch.rand(true_CA.shape, generator=made)
    if noise == "gaussian":
        return true_CA + level * torch.randn(true_CA.shape, generator=made)
    if noise == "heavy_tailed":
        return true_CA + level * torch.tan(torch.pi * (uniform - 0.5))
    if noise == "outliers":
        sign = torch.randint(0, 2, true_CA.shape, generator=made) * 20.0 - 10.0
        return torch.where(uniform < level, sign, true_CA)
    return torch.where(uniform[:, :1] < level, -true_CA, true_CA)


@cache
def _layout(prompts: int, arity: str) -> pk.Layout:
    size = 2 if arity == "pair" else ACTIONS
    return pk.Layout.groups([1] * (prompts * size), [size] * prompts)


def fit(method: Method, bandits: Bandits, sizes: Sizes) -> Tensor:
    """(B, D, A) logit weights of the policy after training."""
    theta_BDA = bandits.anchor_BDA.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta_BDA], lr=sizes.learning_rate)
    count = len(bandits.x_BCD) // sizes.seeds
    made = [generator("batches", seed) for seed in range(sizes.seeds)]
    for _ in range(sizes.steps):
        chosen, orders = [], []
        for g in made:
            chosen.append(torch.randperm(sizes.contexts, generator=g)[: sizes.batch])
            orders.append(torch.rand(sizes.batch, ACTIONS, generator=g).argsort(-1))
        index_BC, order_BCA = torch.stack(chosen).repeat(count, 1), torch.stack(orders).repeat(count, 1, 1)
        x = bandits.x_BCD.gather(1, index_BC[..., None].expand(-1, -1, FEATURES))
        logged = bandits.logged_BCA.gather(1, index_BC[..., None].expand(-1, -1, ACTIONS))
        optimizer.zero_grad()
        logps, anchor = (x @ theta_BDA).log_softmax(-1), (x @ bandits.anchor_BDA).log_softmax(-1)
        _loss(method, logps, anchor, logged, order_BCA, sizes.batch).backward()
        optimizer.step()
    return theta_BDA.detach()


def _loss(method: Method, logps: Tensor, anchor: Tensor, logged: Tensor, order: Tensor, contexts: int) -> Tensor:
    """The sum over bandits of each one's mean loss over its contexts."""
    loss = method.loss
    if not method.anchored:
        anchor = torch.zeros_like(anchor)
    if loss.arity == "pair":  # neighbours of a random order, the one with the higher logged reward first
        better = (logged.gather(-1, order).unflatten(-1, (-1, 2)).diff(dim=-1) > 0).long()  # 1: the second is better
        first = order.unflatten(-1, (-1, 2))
        order = torch.cat([first.gather(-1, better), first.gather(-1, 1 - better)], -1).flatten(-2)
        logps, anchor, logged = (t.gather(-1, order) for t in (logps, anchor, logged))
        contexts *= ACTIONS // 2
    flat = logps.flatten()
    targets = {} if loss.target_kind is None else {"targets": _targets(loss, logged)}
    layout = _layout(len(flat) // (2 if loss.arity == "pair" else ACTIONS), loss.arity)
    out = pk.preference_loss(flat, layout, loss, ref_logps=anchor.flatten(), normalizer=float(contexts), **targets)
    return out.loss


def _targets(loss: pk.losses.Loss, logged: Tensor) -> Tensor:
    """Logged rewards, or for a loss that wants them the teacher's probabilities that one beats the other."""
    if loss.target_kind == "score":
        return logged.flatten()
    first, second = logged.flatten().view(-1, 2).unbind(-1)
    beats = torch.sigmoid(first - second)
    return torch.stack([beats, 1 - beats], -1).flatten()


def measure(theta_BDA: Tensor, bandits: Bandits) -> list[dict[str, float]]:
    """WinMass and its companions of every bandit, over the new contexts."""
    log_p = (bandits.x_test_BCD @ theta_BDA).log_softmax(-1)
    log_anchor = (bandits.x_test_BCD @ bandits.anchor_BDA).log_softmax(-1)
    p, rank = log_p.exp(), bandits.true_test_BCA.argsort(-1, descending=True)
    columns = {
        "win_mass": p.gather(-1, rank[..., :1]).sum(-1),
        "top2": p.gather(-1, rank[..., :2]).sum(-1),
        "reward": (p * bandits.true_test_BCA).sum(-1),
        "kl": (p * (log_p - log_anchor)).sum(-1),
    }
    means = {name: values.mean(-1).tolist() for name, values in columns.items()}
    return [dict(zip(means, values)) for values in zip(*means.values())]


def rows(quick: bool) -> list[dict]:
    """One row a cell, method, temperature and seed."""
    taus = TAUS[1:3] if quick else TAUS
    calls = [("anchor", 1.0, quick)] + [(name, tau, quick) for name in methods() for tau in taus]
    return common.in_parallel(one_method, calls, quick)


def one_method(name: str, tau: float, quick: bool) -> list[dict]:
    """The rows of one method in every cell; "anchor" is the policy that all start from."""
    sizes = QUICK if quick else Sizes()
    bandits = make_bandits([(noise, level) for noise, levels in NOISES.items() for level in levels], sizes)
    theta = bandits.anchor_BDA if name == "anchor" else fit(methods(tau)[name], bandits, sizes)
    keys = itertools.product(NOISES, SEVERITIES, range(sizes.seeds))
    print(f"[{NAME}] {name}, tau {tau:g}", flush=True)
    return [{"noise": noise, "severity": severity, "method": name, "tau": tau, "seed": seed, **measured}
            for (noise, severity, seed), measured in zip(keys, measure(theta, bandits), strict=True)]  # fmt: skip


@dataclass(frozen=True)
class Cells:
    """The table by noise, severity, method and temperature: values of the seeds, in order."""

    by_key: dict[tuple[str, str, str, float], list[Row]]

    @classmethod
    def of(cls, table: Sequence[Row]) -> Cells:
        by_key: dict[tuple[str, str, str, float], list[Row]] = {}
        for row in table:
            by_key.setdefault((row["noise"], row["severity"], row["method"], row["tau"]), []).append(row)
        return cls(by_key)

    @property
    def cells(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys(key[:2] for key in self.by_key))

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(key[2] for key in self.by_key if key[2] != "anchor"))

    def taus(self, method: str) -> list[float]:
        return sorted({key[3] for key in self.by_key if key[2] == method})

    def values(self, cell: tuple[str, str], method: str, tau: float, measure: str = "win_mass") -> list[float]:
        return [row[measure] for row in self.by_key[(*cell, method, tau)]]

    def best_tau(self, cell: tuple[str, str], method: str) -> float:
        return max(self.taus(method), key=lambda tau: sum(self.values(cell, method, tau)))

    def best(self, cell: tuple[str, str], method: str) -> list[float]:
        return self.values(cell, method, self.best_tau(cell, method))


def claims(table: Sequence[Row]) -> list[Claim]:
    data = Cells.of(table)

    def everywhere(better: str, worse: str, tau: float | None) -> Claim:
        gaps = {}
        for cell in data.cells:
            pair = [data.best(cell, m) if tau is None else data.values(cell, m, tau) for m in (better, worse)]
            gaps[cell] = mean(x - y for x, y in zip(*pair))
        signs = [gap.above() for gap in gaps.values()]
        low, high = min(gaps, key=lambda c: gaps[c].value), max(gaps, key=lambda c: gaps[c].value)
        return Claim(
            f"{better} has more WinMass than {worse} in every cell, "
            + ("each at its best tau" if tau is None else f"at tau = {tau:g}"),
            True if all(signs) else False if False in signs else None,
            f"more in {signs.count(True)}, less in {signs.count(False)}, undecided in {signs.count(None)} of"
            f" {len(signs)} cells; from {gaps[low]} ({', '.join(low)}) to {gaps[high]} ({', '.join(high)})",
        )

    judged = [everywhere(m, "dpo", tau) for m in ("anchored_pairwise", "anchored_listwise", "plackett_luce")
              for tau in (1.0, None)]  # fmt: skip
    judged += [everywhere("anchored_listwise", "unanchored", tau) for tau in (1.0, None)]
    tails = ("heavy_tailed", SEVERITIES[-1])
    for other in ("anchored_listwise", "plackett_luce"):
        gap = mean(x - y for x, y in zip(data.best(tails, "kde"), data.best(tails, other)))
        judged.append(Claim(f"Under the heaviest tails kde has more WinMass than {other}, each at its best tau",
                            gap.above(), f"difference {gap}"))  # fmt: skip
    taus = data.taus("anchored_listwise")
    steps = []
    for cell in data.cells:
        kls = [data.values(cell, "anchored_listwise", tau, "kl") for tau in taus]
        steps += [mean(y - x for x, y in zip(near, far)).above() for near, far in zip(kls, kls[1:])]
    shown = ", ".join(f"{mean(data.values(SHOWN, 'anchored_listwise', tau, 'kl')).value:.3g} (tau {tau:g})"
                      for tau in taus)  # fmt: skip
    judged.append(Claim("A larger tau ends farther from the anchor, in every cell (anchored_listwise)",
                        True if all(steps) else False if False in steps else None,
                        f"KL in nats, {', '.join(SHOWN)}: {shown}"))  # fmt: skip
    return judged


def summary(table: Sequence[Row]) -> str:
    data = Cells.of(table)
    plain, best = [], []
    for cell in data.cells:
        name = ", ".join(cell)
        anchor = str(mean(data.values(cell, "anchor", 1.0)))
        plain.append({"WinMass at tau = 1": name, "anchor": anchor}
                     | {m: str(mean(data.values(cell, m, 1.0))) for m in data.methods})  # fmt: skip
        best.append({"WinMass at the best tau (tau)": name}
                    | {m: f"{mean(data.best(cell, m))} ({data.best_tau(cell, m):g})"
                       for m in data.methods})  # fmt: skip
    sweep = [
        {f"{', '.join(SHOWN)}: tau": f"{tau:g}", "method": m}
        | {name: str(mean(data.values(SHOWN, m, tau, name))) for name in ("win_mass", "top2", "reward", "kl")}
        for m in ("anchored_listwise", "unanchored")
        for tau in data.taus(m)
    ]
    return "\n\n".join(map(common.markdown, (plain, best, sweep)))


def draw(table: Sequence[Row], path: Path) -> None:
    data = Cells.of(table)
    made, axes = common.figure(3, 2)
    for axis, kind in zip(axes, NOISES):
        anchor = mean(data.values((kind, SEVERITIES[0]), "anchor", 1.0))
        axis.axhline(anchor.value, color="#777777", linestyle="--", linewidth=1.2, label="anchor (start)")
        for i, name in enumerate(data.methods):
            means = [mean(data.best((kind, severity), name)) for severity in SEVERITIES]
            at = [j + 0.07 * (i - (len(data.methods) - 1) / 2) for j in range(len(SEVERITIES))]
            _line(axis, at, means, i, name)
        axis.set_xticks(range(3), [f"{s}\n({level:g})" for s, level in zip(SEVERITIES, NOISES[kind])])
        axis.set_ylim(0, 1)
        common.style(axis, f"{kind} noise, each at its best tau", "severity", "WinMass (probability)", legend=False)
    for i, name in enumerate(data.methods):
        taus = data.taus(name)
        kls, wins = ([mean(data.values(SHOWN, name, tau, m)) for tau in taus] for m in ("kl", "win_mass"))
        _line(axes[4], taus, kls, i, name)
        axes[5].plot([kl.value for kl in kls], [win.value for win in wins], color=COLOURS[i], marker=MARKERS[i],
                     markersize=5, linewidth=1.2)  # fmt: skip
    axes[4].set_xscale("log")
    axes[4].set_xticks(TAUS, [f"{tau:g}" for tau in TAUS])
    axes[4].minorticks_off()
    where = f"({', '.join(SHOWN)})"
    common.style(axes[4], f"Distance from the anchor {where}", "temperature tau", "KL(policy || anchor) (nats)", False)
    common.style(axes[5], f"WinMass by distance {where}", "KL(policy || anchor) (nats), along tau",
                 "WinMass (probability)", False)  # fmt: skip
    handles, labels = axes[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9.5)
    common.save(made, path, "WinMass on noisy rewards, 95 % intervals over seeds")


def _line(axis, at: Sequence[float], means: Sequence[common.Mean], i: int, label: str) -> None:
    axis.errorbar(at, [m.value for m in means], [m.half for m in means], color=COLOURS[i], marker=MARKERS[i],
                  markersize=5, capsize=2.5, linewidth=1.2, label=label)  # fmt: skip


if __name__ == "__main__":
    sys.exit(common.main(sys.modules[__name__]))
