"""AdaDPO's coefficient: which gradients of chosen and rejected it balances, and which it does not."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import prefkern as pk
from bench.studies import common, language
from bench.studies.common import COLOURS, MARKERS, Claim, Row, mean, pick

NAME = "adadpo"
TITLE = "Gradient balance of AdaDPO"
ABOUT = """
The demo's small Llama and word problems; 60 steps of 16 pairs from one start, learning rate 1e-4, beta 1, not tuned.
Every 10 steps the gradient of the loss is taken by autograd for 96 held-out pairs, with respect to four descriptions
of each response's probability P (R is the reference's, |y| the length):

- log_prob: log P, what reaches the logits;
- prob: P itself;
- relative: P / R;
- token_relative: the geometric mean per token, (P / R)^(1/|y|).

The table holds log( |gradient of chosen| / |gradient of rejected| ), `..._signed` as a mean over pairs and `..._size`
as a mean of absolute values: 0 is balance, below 0 the rejected response is pushed harder.

Methods: `dpo`; `adadpo`, the default (reference space, per-token averages in the coefficient, clipped at 2);
`adadpo_policy`, the same in policy space; `adadpo_raw`, reference space with sums and without a clip that binds.
`diagnostics_error` is the largest difference of the signed values from what `diagnostics=True` of
`prefkern.preference_loss` reports for log_prob, prob and relative. `saturated` is the share of pairs whose loss is so
small that its gradient is 0; they are left out of the ratios. `clipped` is the share of pairs whose coefficient is at
the clip; `logp_chosen` and `logp_rejected` are changes since the start in nats, `exact` (at the end) the share of 240
held-out problems answered rightly.

A repeat is another set of pairs and problems, the same for every method; intervals are 95 % (Student's t over
repeats).
"""
READING = """
The derivation holds where it is exact: DPO's gradients are equal in log-probability space, drift towards the rejected
response in probability space as training parts the two, and without clip and averages (`adadpo_raw`) stay equal in
relative probability, at the price of ever harder pushes on the chosen response in log-probability space.

The default does far less. Its coefficient is made of per-token averages, which here differ by hundredths of a nat, so
it never comes near the clip and hardly changes the balance of whole responses. It does what it is made for, balancing
relative probabilities per token, up to the ratio of the lengths. In policy space the coefficient differs from 1 from
the first step on, and per token overshoots.

In the end the chosen response is likelier than under DPO, beyond doubt but by next to nothing with the default, and
exact answers do not differ beyond chance. `adadpo_raw` is ahead of DPO in both, the latter by a margin that barely
clears 0 and was not a claim made beforehand. One model, one learning rate, short responses: no advice against a clip.
"""
BETA = 1.0
SPACES = ("log_prob", "prob", "relative", "token_relative")
HELD_OUT = 96


def methods() -> dict[str, pk.losses.Loss]:
    get = pk.losses.get
    return {
        "dpo": get("dpo", beta=BETA),
        "adadpo": get("adadpo", beta=BETA),
        "adadpo_policy": get("adadpo", beta=BETA, space="policy"),
        "adadpo_raw": get("adadpo", beta=BETA, length_normalized=False, clip=math.inf),
    }


def rows(quick: bool) -> list[dict]:
    """One row a method, repeat and measured step."""
    return language.over_repeats(one_repeat, quick)


def one_repeat(task: language.Task, setting: language.Setting) -> list[dict]:
    every = 2 if setting.quick else 10
    batches = task.batches(setting.recipe)
    refs = language.reference_logps(task.reference, batches)
    [held_out] = language.chunks(task.pack, task.test[:HELD_OUT], HELD_OUT)
    [ref] = language.reference_logps(task.reference, [held_out])
    table = []
    for name, loss in methods().items():
        model = task.policy()

        def objective(model, i, loss=loss):
            return pk.preference_loss(batches[i].logps(model), batches[i].layout, loss, ref_logps=refs[i]).loss

        def look(step, model=model, name=name, loss=loss):
            if step % every == 0:
                measured = balance(model, held_out, ref, loss)
                table.append({"method": name, "repeat": task.repeat, "step": step, **measured, "exact": ""})

        look(0)
        language.train(model, setting.recipe, objective, look)
        right, _ = language.answers(model, task)
        table[-1]["exact"] = sum(right) / len(right)
        print(f"[{NAME}] repeat {task.repeat}, {name}: exact {table[-1]['exact']:.3f}", flush=True)
    return table


def balance(model, held_out: language.Packed, ref_N: Tensor, loss: pk.losses.Loss) -> dict[str, float]:
    """Gradient ratios of every held-out pair in four spaces, from autograd alone, and how likely responses are."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logps = held_out.logps(model)
    model.train(training)
    logps, ref_N = logps.double().requires_grad_(), ref_N.double()
    out = pk.preference_loss(logps, held_out.layout, loss, ref_logps=ref_N, diagnostics=True)
    [g_N] = torch.autograd.grad(out.loss, logps)
    lengths = torch.tensor(held_out.layout.lengths, dtype=torch.float64)
    # Every token of a response has the same gradient: that of the response's log-probability.
    g = held_out.response_sums(g_N).abs().double() / lengths
    a = held_out.response_sums(logps.detach() - ref_N).double()
    p = held_out.response_sums(logps.detach()).double()

    def gap(x_R: Tensor) -> Tensor:
        return x_R[0::2] - x_R[1::2]

    by_space = {
        "log_prob": g.log(),
        "prob": g.log() - p,
        "relative": g.log() - a,
        "token_relative": g.log() + lengths.log() - a / lengths,
    }
    known = (g[0::2] > 0) & (g[1::2] > 0)
    found = {}
    for space, logs in by_space.items():
        gaps = gap(logs)[known]
        found |= {f"{space}_signed": gaps.mean().item(), f"{space}_size": gaps.abs().mean().item()}
    reported = {"log_prob": "logp", "prob": "prob", "relative": "relative_prob"}
    errors = [abs(found[f"{ours}_signed"] - float(out.metrics[f"gradients/log_ratio_{theirs}"]))
              for ours, theirs in reported.items()]  # fmt: skip
    return found | {
        "diagnostics_error": max(errors),
        "saturated": 1 - known.double().mean().item(),
        "clipped": float(out.metrics.get("adadpo/clipped", 0.0)),
        "logp_chosen": a[0::2].mean().item(),
        "logp_rejected": a[1::2].mean().item(),
        "preference": (gap(p) > 0).double().mean().item(),
    }


def _last(table: Sequence[Row], method: str, measure: str) -> list[float]:
    step = max(row["step"] for row in table)
    return [row[measure] for row in pick(table, method=method, step=step)]


def _versus_dpo(table: Sequence[Row], method: str, measure: str) -> common.Mean:
    return mean(x - y for x, y in zip(_last(table, method, measure), _last(table, "dpo", measure)))


def claims(table: Sequence[Row]) -> list[Claim]:
    def below(x: common.Mean) -> bool | None:
        return None if x.above() is None else not x.above()

    even = max(row["log_prob_size"] for row in pick(table, method="dpo"))
    dpo_relative = mean(_last(table, "dpo", "relative_signed"))
    dpo_prob = mean(_last(table, "dpo", "prob_signed"))
    raw = max(row["relative_size"] for row in pick(table, method="adadpo_raw"))
    stable = _versus_dpo(table, "adadpo", "relative_size")
    token = mean(_last(table, "adadpo", "token_relative_size"))
    token_gap = _versus_dpo(table, "adadpo", "token_relative_size")
    skew = {m: mean(_last(table, m, "log_prob_signed")) for m in ("adadpo", "adadpo_raw")}
    chosen, exact = (_versus_dpo(table, "adadpo", m) for m in ("logp_chosen", "exact"))
    others = [_versus_dpo(table, method, "exact") for method in ("adadpo_policy", "adadpo_raw")]
    raw_chosen = _versus_dpo(table, "adadpo_raw", "logp_chosen")
    off = max(row["diagnostics_error"] for row in table)
    return [
        Claim("`diagnostics=True` reports what autograd finds", off < 1e-3, f"largest difference {off:.2g} nats"),
        Claim("DPO's gradients are equal in log-prob space, for every pair at every step", even < 1e-4,
              f"largest mean size {even:.2g}"),
        Claim("In probability space DPO pushes the rejected response harder in the end",
              below(dpo_prob) if below(dpo_prob) == below(dpo_relative) else None,
              f"prob {dpo_prob}, relative {dpo_relative}"),
        Claim("Without clip and averages, AdaDPO balances relative probabilities exactly", raw < 1e-3,
              f"largest mean size {raw:.2g}"),
        Claim("The default AdaDPO brings relative probabilities nearer to balance than DPO", below(stable),
              f"difference of sizes in the end {stable}"),
        Claim("The default AdaDPO brings per-token relative probabilities nearer to balance than DPO", below(token_gap),
              f"size in the end {token}, difference to DPO {token_gap}; what is left is the ratio of lengths"),
        Claim("Balance in probability space costs balance in log-prob space: AdaDPO pushes the chosen harder there",
              True if all(s.above() for s in skew.values()) else None if None in [s.above() for s in skew.values()]
              else False, "; ".join(f"{m} {s}" for m, s in skew.items())),
        Claim("AdaDPO leaves the chosen response likelier than DPO does", chosen.above(),
              f"difference {chosen} nats; adadpo_raw {raw_chosen}"),
        Claim("AdaDPO answers more problems than DPO", exact.above(),
              f"difference {exact}; adadpo_policy {others[0]}, adadpo_raw {others[1]}"),
    ]  # fmt: skip


def summary(table: Sequence[Row]) -> str:
    names = list(dict.fromkeys(row["method"] for row in table))
    measures = [f"{space}_{kind}" for space in SPACES for kind in ("signed", "size")]
    others = ["saturated", "clipped", "logp_chosen", "logp_rejected", "preference", "exact"]
    lines = [{"after training": m, **{n: str(mean(_last(table, n, m))) for n in names}} for m in measures + others]
    return common.markdown(lines)


def draw(table: Sequence[Row], path: Path) -> None:
    names = list(dict.fromkeys(row["method"] for row in table))
    steps = sorted({row["step"] for row in table})
    made, axes = common.figure(3, 2)
    ratio = "log |g chosen| / |g rejected| (nats)"
    panels = {
        "log_prob_signed": ("Log-probability space", ratio),
        "prob_signed": ("Probability space", ratio),
        "relative_signed": ("Probability relative to reference", ratio),
        "token_relative_signed": ("Per-token relative probability", ratio),
        "logp_chosen": ("Chosen response", "change of log-probability (nats)"),
        "logp_rejected": ("Rejected response", "change of log-probability (nats)"),
    }
    for axis, (measure, (title, unit)) in zip(axes, panels.items()):
        axis.axhline(0, color="#777777", linewidth=1, linestyle="--")
        for i, name in enumerate(names):
            means = [mean(row[measure] for row in pick(table, method=name, step=step)) for step in steps]
            at = [step + 0.6 * (i - 1.5) for step in steps]
            axis.errorbar(at, [m.value for m in means], [m.half for m in means], color=COLOURS[i], marker=MARKERS[i],
                          markersize=4.5, capsize=2, linewidth=1.3, label=name)  # fmt: skip
        common.style(axis, title, "optimizer step", unit, legend=False)
    handles, labels = axes[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    common.save(made, path, "Gradient of the chosen over that of the rejected response, 95 % intervals over repeats")


if __name__ == "__main__":
    sys.exit(common.main(sys.modules[__name__]))
