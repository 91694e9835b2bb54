"""AlphaDPO's margin: distance from the reference and reward margin by alpha, with and without its stop-gradient."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import prefkern as pk
from bench.studies import common, language
from bench.studies.common import COLOURS, MARKERS, Claim, Row, mean, pick
from prefkern.token_kl import token_kl

NAME = "alphadpo"
TITLE = "AlphaDPO by alpha, and without its stop-gradient"
ABOUT = """
The demo's small Llama and word problems; 60 steps of 16 pairs from one start, learning rate 1e-4, beta 10, target
margin gamma / beta = 0.1 nats a token, not tuned. `simpo` has no reference; `alphadpo` adds alpha Z to the target
margin (in units of gamma / beta, as in the authors' code), Z the standardised difference of per-token log-ratios,
without gradient; alpha = 0 must be `simpo`. `leaky` is the same loss in plain torch whose Z carries its gradient (the
running mean and standard deviation still do not).

- kl: sequential KL(reference || policy), summed over a response's positions, in nats, a mean over 240 held-out chosen
  responses; kl_rejected the same over rejected ones.
- margin: beta (logp_w / |y_w| - logp_l / |y_l|), mean over held-out pairs; margin_std its standard deviation.
- preference: share of held-out pairs whose right solution is likelier than the slipped one; exact: share of held-out
  problems whose greedy solution ends in the right number; logp_chosen: change of the chosen response's
  log-probability since the start, in nats.

A repeat is another set of pairs and problems, the same for every setting; intervals are 95 % (Student's t over
repeats).
"""
READING = """
alpha = 0 is SimPO to within rounding. From there every claim about a larger alpha fails on this task: the policy
moves farther from the reference, margins become less even, and fewer problems are answered, steadily with alpha. The
margin grows where the policy has already moved most, so those pairs go on being pushed and the others are let go;
that is the formula at work. How much it matters depends on scale: alpha is in nats a token, and two solutions that
differ in a few digits differ by little a token (margin / beta), so the authors' values are large here. Nothing was
tuned, and these results say nothing about their tasks.

Without the stop-gradient training does collapse, as the authors report: margins stay far below, the chosen response
becomes less likely than at the start, and fewer problems are answered than the start itself answers (see
[granularity](granularity.md): same start, same held-out problems). The reason is in the derivative of the score,
which is multiplied by 1 - alpha / std: where the log-ratio differences spread less than alpha, as they do at first,
it points the wrong way. That this policy is near its reference is no merit.
"""
BETA, GAMMA_RATIO = 10.0, 0.1
ALPHAS = (0.0, 0.05, 0.1, 0.2, 0.3)
LEAKY = (0.05, 0.1, 0.3)
EPS = 1e-6


class LeakyAlphaDPO:
    """AlphaDPO whose margin carries its gradient: what the stop-gradient is for.

    -log sigma( beta ((lw - ll) - gamma - alpha Z) ),    Z = (g - m) / s,    g = (lw - ll) - (rw - rl)

    m and s are bias-corrected exponential averages of the batches' means and standard deviations, as in `alphadpo`.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha, self.calls, self.m, self.s = alpha, 0, 0.0, 0.0

    def __call__(self, batch: language.Packed, logps_N: Tensor, ref_N: Tensor) -> Tensor:
        lengths = torch.tensor(batch.layout.lengths)
        lw, ll = (batch.response_sums(logps_N) / lengths).view(-1, 2).unbind(-1)
        rw, rl = (batch.response_sums(ref_N) / lengths).view(-1, 2).unbind(-1)
        g = (lw - ll) - (rw - rl)
        self.calls += 1
        self.m = 0.9 * self.m + 0.1 * g.detach().mean().item()
        self.s = 0.9 * self.s + 0.1 * g.detach().std().item()
        seen = 1 - 0.9**self.calls
        z = (g - self.m / seen) / max(self.s / seen, EPS)
        return -F.logsigmoid(BETA * ((lw - ll) - GAMMA_RATIO - self.alpha * z)).mean()


def objectives(
    leaky: Sequence[float],
) -> dict[tuple[str, float], Callable[[], Callable[[language.Packed, Tensor, Tensor], Tensor]]]:
    """What makes a fresh loss, by method and alpha."""
    get = pk.losses.get

    def ours(loss: pk.losses.Loss):
        def make():
            state = loss.new_state()

            def value(batch: language.Packed, logps_N: Tensor, ref_N: Tensor) -> Tensor:
                ref = ref_N if loss.needs_reference else None
                return pk.preference_loss(logps_N, batch.layout, loss, ref_logps=ref, state=state).loss

            return value

        return make

    made = {("simpo", 0.0): ours(get("simpo", beta=BETA, gamma=BETA * GAMMA_RATIO))}
    for alpha in ALPHAS:
        made["alphadpo", alpha] = ours(get("alphadpo", beta=BETA, gamma=GAMMA_RATIO, alpha=alpha))
    for alpha in leaky:
        made["leaky", alpha] = lambda alpha=alpha: LeakyAlphaDPO(alpha)
    return made


def rows(quick: bool) -> list[dict]:
    """One row a method, alpha and repeat."""
    return language.over_repeats(one_repeat, quick)


def one_repeat(task: language.Task, setting: language.Setting) -> list[dict]:
    batches = task.batches(setting.recipe)
    refs = language.reference_logps(task.reference, batches)
    before = language.pair_sums(task.reference, task.test_batches)
    table = []
    for (method, alpha), make in objectives(LEAKY[::2] if setting.quick else LEAKY).items():
        value, model = make(), task.policy()
        language.train(model, setting.recipe, lambda m, i, v=value: v(batches[i], batches[i].logps(m), refs[i]))
        measured = measure(model, task, before)
        table.append({"method": method, "alpha": alpha, "repeat": task.repeat, **measured})
        print(f"[{NAME}] repeat {task.repeat}, {method} {alpha:g}: exact {measured['exact']:.3f}", flush=True)
    return table


def measure(model, task: language.Task, before: tuple[Tensor, Tensor]) -> dict[str, float]:
    right, _ = language.answers(model, task)
    chosen, rejected = language.pair_sums(model, task.test_batches)
    lengths = torch.tensor([n for batch in task.test_batches for n in batch.layout.lengths])
    margins = BETA * (chosen / lengths[0::2] - rejected / lengths[1::2])
    kl_chosen, kl_rejected = sequential_kl(model, task)
    return {
        "kl": kl_chosen.mean().item(),
        "kl_rejected": kl_rejected.mean().item(),
        "margin": margins.mean().item(),
        "margin_std": margins.std().item(),
        "preference": (chosen > rejected).double().mean().item(),
        "exact": sum(right) / len(right),
        "logp_chosen": (chosen - before[0]).mean().item(),
    }


@torch.no_grad()
def sequential_kl(model, task: language.Task) -> tuple[Tensor, Tensor]:
    """(P,) sums over positions of KL(reference || policy), of chosen and rejected responses, in nats."""
    model.eval()
    sums = []
    for batch in task.test_batches:
        policy, reference = (batch.forward(m, lambda hidden, weight: (hidden, weight)) for m in (model, task.reference))
        sums.append(batch.response_sums(token_kl(*policy, *reference)))
    sums_R = torch.cat(sums)
    return sums_R[0::2], sums_R[1::2]


def _values(table: Sequence[Row], measure: str, method: str, alpha: float) -> list[float]:
    return [row[measure] for row in pick(table, method=method, alpha=alpha)]


def _gap(table: Sequence[Row], measure: str, one: tuple[str, float], other: tuple[str, float]) -> common.Mean:
    return mean(x - y for x, y in zip(_values(table, measure, *one), _values(table, measure, *other)))


def _alphas(table: Sequence[Row], method: str) -> list[float]:
    return sorted({row["alpha"] for row in pick(table, method=method)})


def claims(table: Sequence[Row]) -> list[Claim]:
    simpo, top = ("simpo", 0.0), ("alphadpo", max(_alphas(table, "alphadpo")))
    same = max(abs(_gap(table, m, ("alphadpo", 0.0), simpo).value) for m in ("kl", "margin", "exact", "logp_chosen"))

    def below(x: common.Mean) -> bool | None:
        return None if x.above() is None else not x.above()

    def by_alpha(measure: str, method: str = "alphadpo") -> str:
        return ", ".join(f"{mean(_values(table, measure, method, a)).value:.3g} (alpha {a:g})"
                         for a in _alphas(table, method))  # fmt: skip

    kl, spread, exact = (_gap(table, m, top, simpo) for m in ("kl", "margin_std", "exact"))
    leaks = {a: _gap(table, "exact", ("leaky", a), ("alphadpo", a)) for a in _alphas(table, "leaky")}
    margins = {a: _gap(table, "margin", ("leaky", a), ("alphadpo", a)) for a in leaks}
    worse, smaller = [below(g) for g in leaks.values()], [below(g) for g in margins.values()]
    return [
        Claim("alpha = 0 is SimPO", same < 1e-3, f"largest difference of kl, margin, exact, logp_chosen {same:.2g}"),
        Claim(f"alpha = {top[1]:g} stays nearer to the reference than SimPO", below(kl),
              f"difference {kl} nats; kl {by_alpha('kl')}"),
        Claim(f"alpha = {top[1]:g} makes reward margins more even than SimPO", below(spread),
              f"difference of margin_std {spread}; margin {by_alpha('margin')}"),
        Claim(f"alpha = {top[1]:g} answers more problems than SimPO", exact.above(),
              f"difference {exact}; exact {by_alpha('exact')}"),
        Claim("Without the stop-gradient the reward margin is smaller, for every alpha",
              True if all(smaller) else False if False in smaller else None,
              f"margin {by_alpha('margin', 'leaky')}; differences " + ", ".join(map(str, margins.values()))),
        Claim("Without the stop-gradient fewer problems are answered, for every alpha",
              True if all(worse) else False if False in worse else None,
              f"exact {by_alpha('exact', 'leaky')}; differences " + ", ".join(map(str, leaks.values()))),
    ]  # fmt: skip


def summary(table: Sequence[Row]) -> str:
    measures = [name for name in table[0] if name not in ("method", "alpha", "repeat")]
    settings = dict.fromkeys((row["method"], row["alpha"]) for row in table)
    return common.markdown(
        [
            {"method": m, "alpha": f"{a:g}", **{name: str(mean(_values(table, name, m, a))) for name in measures}}
            for m, a in settings
        ]
    )


def draw(table: Sequence[Row], path: Path) -> None:
    made, axes = common.figure(2, 2)
    panels = {
        "kl": ("Distance from the reference", "sequential KL(ref || policy) (nats)"),
        "margin": ("Reward margin", "margin, beta x nats a token"),
        "exact": ("Exact answers", "share of held-out problems"),
        "logp_chosen": ("Chosen response", "change of log-probability (nats)"),
    }
    for axis, (measure_, (title, unit)) in zip(axes, panels.items()):
        axis.axhline(mean(_values(table, measure_, "simpo", 0.0)).value, color="#777777", linestyle="--", linewidth=1.2,
                     label="simpo")  # fmt: skip
        for i, (method, label) in enumerate({"alphadpo": "alphadpo", "leaky": "no stop-gradient"}.items()):
            alphas = _alphas(table, method)
            means = [mean(_values(table, measure_, method, a)) for a in alphas]
            axis.errorbar(alphas, [m.value for m in means], [m.half for m in means], color=COLOURS[i],
                          marker=MARKERS[i], capsize=3, linewidth=1.5, label=label)  # fmt: skip
        common.style(axis, title, "alpha", unit, legend=measure_ == "kl")
    common.save(made, path, "AlphaDPO by alpha, 95 % intervals over repeats")


if __name__ == "__main__":
    sys.exit(common.main(sys.modules[__name__]))
