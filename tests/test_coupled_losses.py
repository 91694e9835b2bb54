"""Losses whose constants come from the batch: golden numbers, re-derivations, limits, states, several processes."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import logsigmoid

import prefkern as pk
from conftest import DEVICE
from prefkern.diagnostics import gradient_ratios
from prefkern.losses import AOT, CPO, DPO, IPO, KTO, ORPO, RDPO, AdaDPO, AlphaDPO, AOTUnpaired, Hinge, SimPO
from prefkern.losses.statistics import RunningAverage, global_mean, global_moments

EXACT = {torch.float32: 1e-6, torch.float64: 1e-9}
IMPLS = ["eager", "triton"]
CHOSEN, REJECTED = [5, 1, 8, 3, 4], [2, 4, 8, 6, 4]
LAYOUT = pk.Layout.pairs(CHOSEN, REJECTED)
NO_LIMIT = math.inf


def draw(n=LAYOUT.num_tokens, seed=0, dtype=torch.float64, device="cpu") -> tuple[Tensor, Tensor]:
    """Log-probabilities of the policy, a leaf that wants a gradient, and of the reference."""
    generator = torch.Generator().manual_seed(seed)
    logps, ref = -2 * torch.rand(2, n, generator=generator, dtype=torch.float64).to(device, dtype)
    return logps.requires_grad_(), ref


def sums(x: Tensor, layout=LAYOUT) -> tuple[Tensor, Tensor]:
    """Sums over the chosen and over the rejected responses."""
    return torch.stack([part.sum() for part in x.split(list(layout.lengths))]).view(-1, 2).unbind(1)


def lengths(layout=LAYOUT) -> tuple[Tensor, Tensor]:
    return torch.tensor(layout.lengths, dtype=torch.float64).view(-1, 2).unbind(1)


def close_in_loss_and_gradient(out, logps: Tensor, want: Tensor, want_logps: Tensor, **tolerance) -> None:
    got, expected = torch.autograd.grad(out.loss, logps)[0], torch.autograd.grad(want, want_logps)[0]
    torch.testing.assert_close(out.loss.detach().cpu().double(), want.detach(), **tolerance)
    torch.testing.assert_close(got.cpu().double(), expected, **tolerance)


def spread(*values_and_counts, dtype) -> Tensor:
    return torch.cat([torch.full((n,), x / n, dtype=torch.float64) for x, n in values_and_counts]).to(dtype)


# Golden numbers: one pair of 6 and 9 tokens (adadpo, kto), three pairs of one token (alphadpo).


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize(
    "space, value, beta_w",
    [("reference", 0.6160071492384154, 0.12146360012327242), ("policy", 0.627538234250952, 0.07165313105737893)],
)
def test_golden_adadpo(space, value, beta_w, dtype):
    logps, ref = spread((-12.0, 6), (-15.0, 9), dtype=dtype), spread((-12.5, 6), (-14.0, 9), dtype=dtype)
    out = pk.preference_loss(logps, pk.Layout.pairs([6], [9]), AdaDPO(beta=0.1, space=space), ref_logps=ref)
    assert out.loss.item() == pytest.approx(value, rel=EXACT[dtype])
    assert 0.1 * out.metrics["adadpo/coefficient"].item() == pytest.approx(beta_w, rel=EXACT[dtype])
    assert out.metrics["rewards/chosen"].item() == pytest.approx(0.5 * beta_w, rel=2 * EXACT[dtype])
    assert out.metrics["rewards/rejected"].item() == pytest.approx(-0.1, rel=2 * EXACT[dtype])


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("stats, value", [("batch", 1.7038912928671914), ("ema_uncorrected", 16.545214217134106)])
def test_golden_alphadpo(stats, value, dtype):
    logps = torch.tensor([-1.2, -1.5, -1.0, -0.9, -2.0, -2.6], dtype=dtype)
    ref = torch.tensor([-1.25, -1.4, -1.1, -1.0, -2.1, -2.2], dtype=dtype)
    loss = AlphaDPO(beta=10.0, gamma=0.4, alpha=0.2, stats=stats)
    out = pk.preference_loss(logps, pk.Layout.pairs([1] * 3, [1] * 3), loss, ref_logps=ref)
    assert out.loss.item() == pytest.approx(value, rel=EXACT[dtype])


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize(
    "label, policy, ref, n, value",
    [(1, -12.0, -12.5, 6, 0.4925005624493797), (0, -15.0, -14.0, 9, 0.47003594823542827)],
    ids=["desirable", "undesirable"],
)
def test_golden_kto(label, policy, ref, n, value, dtype):
    out = pk.preference_loss(
        spread((policy, n), dtype=dtype), pk.Layout.sequences([n]), KTO(beta=0.1), spread((ref, n), dtype=dtype),
        targets=torch.tensor([label]), mismatched=torch.tensor([0.1, 0.3], dtype=torch.float64),
    )  # fmt: skip
    assert out.loss.item() == pytest.approx(value, rel=EXACT[dtype])
    assert out.metrics["kl"].item() == pytest.approx(0.2, rel=EXACT[dtype])


def coefficient(logps, ref, *, space="reference", normalized=True, clip=2.0, k=1.0) -> Tensor:
    (pw, pl), (rw, rl), (nw, nl) = sums(logps.detach()), sums(ref), lengths()
    qw, ql = (pw - rw, pl - rl) if space == "reference" else (pw, pl)
    qw, ql = (qw / nw, ql / nl) if normalized else (qw, ql)
    return torch.minimum(k * torch.exp(qw - ql), torch.tensor(clip, dtype=torch.float64))


def derived_adadpo(base, logps, ref, c) -> Tensor:
    """Losses of the bases with a coefficient, written out."""
    (pw, pl), (nw, nl), beta = sums(logps), lengths(), base.beta
    aw, al = sums(logps - ref)
    match base.name:
        case "dpo":
            x = beta * (c * aw - al)
            pairs = -(1 - base.label_smoothing) * logsigmoid(x) - base.label_smoothing * logsigmoid(-x)
        case "hinge":
            pairs = torch.relu(1 - beta * (c * aw - al))
        case "simpo":
            pairs = -logsigmoid(beta * (c * pw / nw - pl / nl) - base.gamma)
        case "rdpo":
            pairs = -logsigmoid(beta * (c * aw - al) + (1 if base.sign == "+" else -1) * base.alpha * (nw - nl))
        case "ipo" if base.normalize == "sum":
            pairs = (c * aw - al - 1 / (2 * beta)) ** 2
        case "ipo":
            pairs = (c * aw / nw - al / nl - 1 / (2 * beta)) ** 2
        case "cpo":
            pairs = -logsigmoid(beta * (c * pw - pl))
        case "orpo":
            odds = [lp - torch.log(1 - lp.exp()) for lp in (pw / nw, pl / nl)]
            pairs = -beta * logsigmoid(c * odds[0] - odds[1])
    return pairs.mean() - base.nll_weight * pw.sum() / nw.sum()


BASES = [
    DPO(beta=0.3), DPO(beta=0.3, label_smoothing=0.1), SimPO(), RDPO(alpha=0.05), RDPO(alpha=0.05, sign="-"), IPO(),
    IPO(normalize="sum"), CPO(beta=0.3), CPO(nll_weight=0.0), ORPO(), Hinge(beta=0.3),
]  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("base", BASES, ids=repr)
def test_adadpo_of_every_base(base, impl):
    dtype, device = (torch.float32, DEVICE) if impl == "triton" else (torch.float64, "cpu")
    tolerance = dict(rtol=1e-5, atol=1e-6) if impl == "triton" else dict(rtol=1e-9, atol=1e-12)
    spaces = ("reference", "policy") if base.needs_reference else ("policy",)
    for space in spaces:
        wide, wide_ref = draw()
        logps, ref = draw(dtype=dtype, device=device)
        loss = AdaDPO(base=base, space=space, clip=0.9, k=1.1)
        out = pk.preference_loss(logps, LAYOUT, loss, ref_logps=ref if base.needs_reference else None, impl=impl)
        c = coefficient(wide, wide_ref, space=space, clip=NO_LIMIT, k=1.1)
        if base.name == "orpo":
            p = [torch.exp(s / n) for s, n in zip(sums(wide.detach()), lengths())]
            c = c * (1 - p[0]) / (1 - p[1])
        assert 0 < (c > 0.9).sum() < len(CHOSEN)
        close_in_loss_and_gradient(
            out, logps, derived_adadpo(base, wide, wide_ref, c.clamp(max=0.9)), wide, **tolerance
        )
        assert out.metrics["adadpo/clipped"].item() == pytest.approx((c > 0.9).double().mean())
        assert out.metrics["adadpo/coefficient"].item() == pytest.approx(c.clamp(max=0.9).mean().item(), rel=1e-5)


@pytest.mark.parametrize("normalized", [True, False], ids=["stable", "sums"])
@pytest.mark.parametrize("space", ["reference", "policy"])
def test_adadpo_coefficient(space, normalized):
    logps, ref = draw(seed=3)
    loss = AdaDPO(beta=0.3, space=space, length_normalized=normalized)
    out = pk.preference_loss(logps, LAYOUT, loss, ref_logps=ref)
    c = coefficient(logps, ref, space=space, normalized=normalized)
    close_in_loss_and_gradient(out, logps, derived_adadpo(DPO(beta=0.3), logps, ref, c), logps)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("base", [DPO(), DPO(label_smoothing=0.2), RDPO(), IPO(), Hinge(beta=0.7)], ids=repr)
def test_adadpo_at_the_reference_is_its_base_to_the_last_bit(base, impl):
    logps, _ = draw(dtype=torch.float32, device=DEVICE)
    ref = logps.detach().clone()
    runs = []
    for loss in (base, AdaDPO(base=base), AdaDPO(base=base, length_normalized=False)):
        out = pk.preference_loss(logps, LAYOUT, loss, ref_logps=ref, impl=impl)
        runs.append((out.loss.detach(), torch.autograd.grad(out.loss, logps)[0]))
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other))


def test_adadpo_takes_names_betas_and_what_every_pair_loss_takes():
    assert AdaDPO(base="simpo", beta=3.0).inner == SimPO(beta=3.0)
    assert AdaDPO(base="cpo", nll_weight=0.5, ld_alpha=0.2, wpo=True).inner == CPO(
        nll_weight=1.5, ld_alpha=0.2, wpo=True
    )
    assert AdaDPO().inner == DPO(beta=0.1)
    logps, _ = draw()
    out = pk.preference_loss(logps, LAYOUT, AdaDPO(base=CPO(nll_weight=0.5)))
    chosen = -sums(logps.detach())[0].sum() / sum(CHOSEN)
    torch.testing.assert_close(out.metrics["loss/nll"], chosen)
    torch.testing.assert_close(out.loss.detach(), out.metrics["loss/adadpo"] + 0.5 * chosen)


def test_adadpo_of_segments_scales_all_segments_of_the_chosen_response():
    logps, ref = draw()
    loss = AdaDPO(base=pk.losses.AutoregressiveDPO(beta=0.3, granularity=pk.Adaptive(2)), clip=NO_LIMIT)
    out = pk.preference_loss(logps, LAYOUT, loss, ref_logps=ref)
    c = coefficient(logps, ref, clip=NO_LIMIT)
    parts = [d.split([len(d) // 2, len(d) - len(d) // 2]) for d in (logps - ref).split(list(LAYOUT.lengths))]
    want = 0.0
    for i, (chosen, rejected) in enumerate(zip(parts[::2], parts[1::2])):
        if min(CHOSEN[i], REJECTED[i]) < 2:  # too short to be cut
            chosen, rejected = [torch.cat(chosen)], [torch.cat(rejected)]
        want = want - sum(logsigmoid(0.3 * (c[i] * w.sum() - u.sum())) for w, u in zip(chosen, rejected))
    close_in_loss_and_gradient(out, logps, want / len(CHOSEN), logps)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: AdaDPO(base="dppo"), "did you mean 'dpo'?"),
        (lambda: AdaDPO(base=KTO()), "must be another pair loss"),
        (lambda: AdaDPO(base=AdaDPO()), "must be another pair loss"),
        (lambda: AdaDPO(base=DPO(f_divergence="js")), "f_divergence='reverse_kl'"),
        (lambda: AdaDPO(base="alphadpo"), "base='alphadpo' takes the reference out of its scores again"),
        (lambda: AdaDPO(base="simpo", space="reference"), "simpo has no reference; use 'policy'"),
        (lambda: AdaDPO(beta=0.0), "beta=0.0 must be a number in (0, 100]"),
        (lambda: AdaDPO(clip=0.0), "clip=0.0 must be a number in (0, inf] (1.5 to 2.5"),
        (lambda: AlphaDPO(stats="median"), "stats='median' must be one of 'ema'"),
        (lambda: AlphaDPO(decay=1.0), "decay=1.0 must be a number in [0, 1)"),
        (lambda: KTO(baseline="mean"), "'mismatched', 'zero'"),
        (
            lambda: pk.preference_loss(
                *(torch.zeros(3), pk.Layout.sequences([3]), KTO(), torch.zeros(3)), targets=torch.ones(1)
            ),
            "pass mismatched",
        ),
        (
            lambda: pk.preference_loss(
                *(torch.zeros(3), pk.Layout.sequences([3]), KTO(baseline="zero"), torch.zeros(3)),
                targets=torch.ones(1), diagnostics=True,
            ),
            "diagnostics compare the responses of a pair, but kto is not of pairs",
        ),
    ],
)  # fmt: skip
def test_bad_options_are_named(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value)


def gradients(loss, logps, ref, layout=LAYOUT, **options) -> dict[str, float]:
    out = pk.preference_loss(
        logps, layout, loss, ref_logps=ref if loss.needs_reference else None, diagnostics=True, **options
    )
    return {k.removeprefix("gradients/log_ratio_"): v.item() for k, v in out.metrics.items() if "gradients" in k}


@pytest.mark.parametrize("space, balanced", [("reference", "relative_prob"), ("policy", "prob")])
def test_adadpo_balances_the_gradients_of_probabilities(space, balanced):
    """Pair by pair, and against gradients taken with respect to the probabilities themselves."""
    loss = AdaDPO(beta=0.3, space=space, length_normalized=False, clip=NO_LIMIT)
    for seed, (n, m) in enumerate([(3, 5), (4, 1), (6, 6)]):
        layout, (logps, ref) = pk.Layout.pairs([n], [m]), draw(n + m, seed)
        got = gradients(loss, logps, ref, layout)
        (pw, pl), (rw, rl) = sums(logps.detach(), layout), sums(ref, layout)
        assert got[balanced] == pytest.approx(0, abs=1e-12)
        gap = (pw - pl - (rw - rl if space == "reference" else 0)).item()
        assert got["logp"] == pytest.approx(gap)  # the coefficient is what reaches the logits
        assert got["logp_before"] == pytest.approx(0, abs=1e-12)
        assert got[f"{balanced}_before"] == pytest.approx(-gap)

        probs = [p.exp().requires_grad_() for p in (pw, pl)]
        aw, al = (p.log() - r for p, r in zip(probs, (rw, rl)))
        gw, gl = torch.autograd.grad(-logsigmoid(0.3 * (math.exp(gap) * aw - al)).sum(), probs)
        assert got["prob"] == pytest.approx((gw / -gl).log().item(), abs=1e-12)


@pytest.mark.parametrize(
    "loss, tokens, near",
    [
        (AdaDPO(length_normalized=False), [30_000, 9_000, 8_000, 31_000], 1e-3),
        (AlphaDPO(stats="batch"), [40] * 12, 1e-6),
    ],
    ids=["adadpo of long responses", "alphadpo near the reference"],
)
def test_constants_are_made_of_differences_token_by_token(loss, tokens, near):
    """Not of sums of many nats that differ by little, which in fp32 would keep few digits of it."""
    layout = pk.Layout.groups(tokens, [2] * (len(tokens) // 2))
    logps, ref = (x.detach() for x in draw(layout.num_tokens, dtype=torch.float32))
    ref = logps + near * (ref + 1)
    got = pk.preference_loss(logps, layout, loss, ref_logps=ref).loss
    want = pk.preference_loss(logps.double(), layout, loss, ref_logps=ref.double()).loss
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize("base", [SimPO(), IPO(), ORPO()], ids=repr)
def test_stable_adadpo_balances_losses_of_means(base):
    logps, ref = draw(9)
    layout = pk.Layout.pairs([3], [6])
    loss = AdaDPO(base=base, space="policy", clip=NO_LIMIT)
    assert gradients(loss, logps, ref, layout)["token_prob"] == pytest.approx(0, abs=1e-12)


def test_stable_adadpo_balances_dpo_up_to_the_lengths():
    logps, ref = draw(9)
    got = gradients(AdaDPO(space="policy", clip=NO_LIMIT), logps, ref, pk.Layout.pairs([3], [6]))
    assert got["token_prob"] == pytest.approx(math.log(3 / 6))


def test_diagnostics_are_means_over_the_pairs_that_pull():
    grad = torch.tensor([-2.0, 1.0, 0.0, 0.0, -1.0, 4.0], dtype=torch.float64)
    logp = torch.tensor([-1.0, -3.0, 0.0, -9.0, -2.0, -1.0], dtype=torch.float64)
    got = gradient_ratios(grad, logp, torch.tensor([1.0, 2, 0, 3, 4, 1], dtype=torch.float64))
    assert got["gradients/log_ratio_logp"].item() == pytest.approx((math.log(2) - math.log(4)) / 2)
    assert got["gradients/log_ratio_prob"].item() == pytest.approx((math.log(2) - 2 - math.log(4) + 1) / 2)
    assert set(got) == {"gradients/log_ratio_logp", "gradients/log_ratio_prob", "gradients/log_ratio_token_prob"}
    assert all(v.item() == 0 for v in gradient_ratios(0 * grad, logp, grad).values())


@pytest.mark.parametrize(
    "loss",
    [DPO(), pk.losses.NCA(), ORPO(), AlphaDPO(), AOTUnpaired(), pk.losses.AutoregressiveDPO(granularity=pk.Static(2)),
     pk.losses.AutoregressiveDPO(granularity=pk.Static(2), accumulate="prefix")],
    ids=repr,
)  # fmt: skip
def test_diagnostics_agree_with_the_gradient_that_backward_gives(loss):
    """Of segments: the mean over a response's tokens. Masked tokens are no tokens."""
    logps, ref = draw()
    mask = torch.arange(len(logps)) % 5 != 4
    got = gradients(loss, logps, ref, mask=mask)
    out = pk.preference_loss(logps, LAYOUT, loss, ref_logps=ref if loss.needs_reference else None, mask=mask)
    if isinstance(loss, ORPO):  # the likelihood is another part
        out = pk.preference_loss(logps, LAYOUT, ORPO(nll_weight=0.0), mask=mask)
    g = torch.autograd.grad(out.loss, logps)[0]
    counts = sums(mask.double())
    gw, gl = (s / n for s, n in zip(sums(g), counts))
    ratio = (gw.abs() / gl.abs()).log()
    pw, pl = sums(logps.detach() * mask)
    assert got["logp"] == pytest.approx(ratio.mean().item(), abs=1e-9)
    assert got["prob"] == pytest.approx((ratio - (pw - pl)).mean().item(), abs=1e-9)


def test_diagnostics_change_nothing_and_work_from_everywhere():
    torch.manual_seed(0)
    layout = pk.Layout.pairs([3, 2], [2, 4])
    hidden, weight, labels = torch.randn(11, 8), torch.randn(32, 8), torch.randint(32, (11,))
    labels[4] = -100
    ref = -torch.rand(11)
    for loss in (DPO(), AdaDPO(), pk.losses.CPO()):
        given = dict(layout=layout, loss=loss, ref_logps=ref if loss.needs_reference else None)
        plain = pk.linear_preference_loss(hidden, weight, labels, **given)
        logits = hidden @ weight.T
        outs = [
            pk.linear_preference_loss(hidden, weight, labels, **given, diagnostics=True),
            pk.logits_preference_loss(logits, labels, **given, impl="eager", diagnostics=True),
            pk.logits_preference_loss(logits.to(DEVICE), labels.to(DEVICE), layout, loss,
                                      None if given["ref_logps"] is None else ref.to(DEVICE),
                                      impl="triton", keep_logits=True, diagnostics=True),
        ]  # fmt: skip
        want = {"gradients/log_ratio_" + name for name in ("logp", "prob", "token_prob")}
        want |= {"gradients/log_ratio_relative_prob"} if loss.needs_reference else set()
        want |= {name + "_before" for name in want} if isinstance(loss, AdaDPO) else set()
        assert set(outs[0].metrics) - set(plain.metrics) == want
        assert torch.equal(outs[0].loss, plain.loss)
        for out in outs[1:]:
            for name in want:
                torch.testing.assert_close(out.metrics[name].cpu(), outs[0].metrics[name], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not pk.linear_preference_loss(hidden, weight, labels, **given, diagnostics=True).loss.requires_grad


def derived_alphadpo(loss, logps, ref, moments=None) -> Tensor:
    (pw, pl), (rw, rl), (nw, nl) = sums(logps), sums(ref), lengths()
    g = (pw - pl) - (rw - rl)
    if loss.normalize == "mean":
        g = (pw - rw) / nw - (pl - rl) / nl
    g = g.detach()
    mean, std = moments or (g.mean(), g.std())
    z = (g - mean) / std
    u = pw - pl if loss.normalize == "sum" else pw / nw - pl / nl
    margin = loss.gamma + loss.alpha * z
    x = loss.beta * (u - margin) if loss.convention == "code" else loss.beta * u - margin
    return (-(1 - loss.label_smoothing) * logsigmoid(x) - loss.label_smoothing * logsigmoid(-x)).mean()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("convention", ["code", "paper"])
@pytest.mark.parametrize("normalize", ["mean", "sum", "mixed"])
def test_alphadpo(normalize, convention, smoothing, impl):
    dtype, device = (torch.float32, DEVICE) if impl == "triton" else (torch.float64, "cpu")
    tolerance = dict(rtol=1e-5, atol=1e-5) if impl == "triton" else {}
    loss = AlphaDPO(convention=convention, normalize=normalize, stats="batch", label_smoothing=smoothing, alpha=0.3)
    (wide, wide_ref), (logps, ref) = draw(), draw(dtype=dtype, device=device)
    out = pk.preference_loss(logps, LAYOUT, loss, ref_logps=ref, impl=impl)
    close_in_loss_and_gradient(out, logps, derived_alphadpo(loss, wide, wide_ref), wide, **tolerance)


def test_alphadpo_conventions_convert():
    logps, ref = draw()
    code = AlphaDPO(beta=2.5, gamma=0.15, alpha=0.05)
    paper = AlphaDPO(beta=2.5, gamma=2.5 * 0.15, alpha=2.5 * 0.05, convention="paper")
    a, b = (pk.preference_loss(logps, LAYOUT, loss, ref_logps=ref) for loss in (code, paper))
    torch.testing.assert_close(a.loss, b.loss)
    for name in a.metrics:
        torch.testing.assert_close(a.metrics[name], b.metrics[name])
    (pw, _), (rw, _), (nw, _) = sums(logps.detach()), sums(ref), lengths()
    want = 2.5 * (pw / nw - 0.05 * (pw - rw) / nw)  # as the authors log it
    torch.testing.assert_close(a.metrics["rewards/chosen"], want.mean())


def test_alphadpo_without_alpha_is_simpo():
    logps, ref = draw()
    loss = AlphaDPO(beta=2.5, gamma=0.3, alpha=0.0)
    out = pk.preference_loss(logps, LAYOUT, loss, ref_logps=ref)
    simpo = pk.preference_loss(logps, LAYOUT, SimPO(beta=2.5, gamma=2.5 * 0.3))
    close_in_loss_and_gradient(out, logps, simpo.loss, logps, rtol=1e-12, atol=1e-14)


def test_alphadpo_with_fixed_statistics():
    logps, ref = draw()
    loss = AlphaDPO(stats="fixed", mean=0.2, std=0.5)
    assert not loss.couples_batch and loss.new_state() is None
    out = pk.preference_loss(logps, LAYOUT, loss, ref_logps=ref)
    close_in_loss_and_gradient(out, logps, derived_alphadpo(loss, logps, ref, (0.2, 0.5)), logps)


@pytest.mark.parametrize("stats", ["ema", "ema_uncorrected", "batch"])
def test_alphadpo_is_finite_where_the_policy_is_the_reference(stats):
    logps, _ = draw(dtype=torch.float32)
    loss = AlphaDPO(stats=stats)
    out = pk.preference_loss(logps, LAYOUT, loss, ref_logps=logps.detach().clone(), state=loss.new_state())
    simpo = pk.preference_loss(logps, LAYOUT, SimPO(beta=2.0, gamma=0.5))
    torch.testing.assert_close(out.loss, simpo.loss)
    assert torch.autograd.grad(out.loss, logps)[0].isfinite().all()


@pytest.mark.parametrize("stats", ["ema", "ema_uncorrected"])
def test_alphadpo_moving_averages(stats):
    """Two steps by hand, then evaluation that changes nothing, then a copy by state_dict that goes on the same."""
    loss = AlphaDPO(stats=stats, decay=0.8, alpha=0.5)
    state = loss.new_state()
    mean = std = weight = 0.0

    def gaps(logps, ref):
        (pw, pl), (rw, rl), (nw, nl) = sums(logps.detach()), sums(ref), lengths()
        return (pw - rw) / nw - (pl - rl) / nl

    def run(seed, state):
        logps, ref = draw(seed=seed)
        return pk.preference_loss(logps, LAYOUT, loss, ref_logps=ref, state=state).loss.item()

    for seed in (1, 2):
        g = gaps(*draw(seed=seed))
        mean, std, weight = 0.8 * mean + 0.2 * g.mean(), 0.8 * std + 0.2 * g.std(), 0.8 * weight + 0.2
        moments = (mean / weight, std / weight) if stats == "ema" else (mean, std)
        assert run(seed, state) == pytest.approx(derived_alphadpo(loss, *draw(seed=seed), moments).item(), rel=1e-6)
    before = {name: t.clone() for name, t in state.state_dict().items()}
    state.eval()
    assert run(3, state) == pytest.approx(derived_alphadpo(loss, *draw(seed=3), moments).item(), rel=1e-6)
    assert all(torch.equal(before[name], t) for name, t in state.state_dict().items())

    other = loss.new_state()
    other.load_state_dict(state.state_dict())
    assert run(4, other.train()) == run(4, state.train())


def test_alphadpo_first_evaluation_sees_its_own_statistics():
    loss, (logps, ref) = AlphaDPO(alpha=0.5), draw()
    state = loss.new_state().eval()
    out = pk.preference_loss(logps, LAYOUT, loss, ref_logps=ref, state=state)
    assert out.loss.item() == pytest.approx(derived_alphadpo(loss, logps, ref).item(), rel=1e-6)
    assert state.weight.tolist() == [0, 0]


def test_alphadpo_single_pairs_have_no_deviation():
    """Until two pairs meet in a batch Z is 0; the mean goes on meanwhile."""
    loss = AlphaDPO(alpha=0.5)
    state = loss.new_state()
    one = pk.Layout.pairs([4], [5])
    for seed in (1, 2):
        logps, ref = draw(9, seed)
        out = pk.preference_loss(logps, one, loss, ref_logps=ref, state=state)
        torch.testing.assert_close(out.loss, pk.preference_loss(logps, one, SimPO(beta=2.0, gamma=0.5)).loss)
    assert state.weight.tolist() == pytest.approx([0.19, 0.0])
    two, (logps, ref) = pk.Layout.pairs([4, 2], [5, 2]), draw(13)
    pk.preference_loss(logps, two, loss, ref_logps=ref, state=state)
    assert state.weight.tolist() == pytest.approx([0.271, 0.1])
    (pw, pl), (rw, rl) = sums(logps.detach(), two), sums(ref, two)
    (nw, nl) = lengths(two)
    assert state.average[1].item() == pytest.approx(((pw - rw) / nw - (pl - rl) / nl).std().item(), rel=1e-6)


@pytest.mark.parametrize("loss", [AlphaDPO(stats="batch", alpha=0.5), AOT(), AOTUnpaired()], ids=lambda x: x.name)
def test_pairs_in_which_nothing_counts_do_not_count(loss):
    (logps, ref), n = draw(), LAYOUT.num_tokens
    for prompt in range(len(CHOSEN)):
        first = sum(CHOSEN[:prompt] + REJECTED[:prompt])
        gone = torch.zeros(n, dtype=torch.bool)
        gone[first : first + CHOSEN[prompt] + REJECTED[prompt]] = True
        rest = [[x for i, x in enumerate(side) if i != prompt] for side in (CHOSEN, REJECTED)]
        out = pk.preference_loss(logps, LAYOUT, loss, ref_logps=ref, mask=~gone, normalizer=1.0)
        want = pk.preference_loss(logps[~gone], pk.Layout.pairs(*rest), loss, ref_logps=ref[~gone], normalizer=1.0)
        close_in_loss_and_gradient(out, logps, want.loss, logps)


def derived_aot(loss, logps, ref) -> Tensor:
    (pw, pl), (rw, rl) = sums(logps), sums(ref)
    if loss.name == "aot":
        delta = (pw - pl).sort().values - (rw - rl).sort().values
    else:
        delta = (pw - rw).sort().values - (pl - rl).sort().values
    x, e = loss.beta * delta, loss.label_smoothing
    return (-(1 - e) * logsigmoid(x) - e * logsigmoid(-x)).mean()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("cls", [AOT, AOTUnpaired])
def test_aot(cls, smoothing, impl):
    dtype, device = (torch.float32, DEVICE) if impl == "triton" else (torch.float64, "cpu")
    tolerance = dict(rtol=1e-5, atol=1e-6) if impl == "triton" else {}
    loss = cls(beta=0.3, label_smoothing=smoothing)
    for seed in range(3):
        (wide, wide_ref), (logps, ref) = draw(seed=seed), draw(seed=seed, dtype=dtype, device=device)
        out = pk.preference_loss(logps, LAYOUT, loss, ref_logps=ref, impl=impl)
        close_in_loss_and_gradient(out, logps, derived_aot(loss, wide, wide_ref), wide, **tolerance)


@pytest.mark.parametrize("cls", [AOT, AOTUnpaired])
def test_aot_of_one_pair_is_dpo(cls):
    logps, ref = draw(9)
    one = pk.Layout.pairs([5], [4])
    out, dpo = (pk.preference_loss(logps, one, loss, ref_logps=ref) for loss in (cls(), DPO()))
    close_in_loss_and_gradient(out, logps, dpo.loss, logps)


def test_aot_where_both_models_rank_alike_is_dpo():
    logps, _ = draw()
    ref = 0.5 * logps.detach()
    out, dpo = (pk.preference_loss(logps, LAYOUT, loss, ref_logps=ref) for loss in (AOT(), DPO()))
    close_in_loss_and_gradient(out, logps, dpo.loss, logps)


@pytest.mark.parametrize("cls", [AOT, AOTUnpaired])
def test_aot_ties_keep_the_batches_order(cls):
    """At equal values every pair meets itself, which is dpo."""
    layout = pk.Layout.pairs([2] * 40, [3] * 40)
    logps = torch.full((200,), -0.5, dtype=torch.float64).requires_grad_()
    ref = torch.full((200,), -0.25, dtype=torch.float64)
    out, dpo = (pk.preference_loss(logps, layout, loss, ref_logps=ref) for loss in (cls(), DPO()))
    close_in_loss_and_gradient(out, logps, dpo.loss, logps)
    assert out.scores.tolist() == dpo.scores.tolist()


def test_aot_unpaired_metrics_and_weights_follow_the_responses():
    logps, ref = draw()
    stats = {"log_collision": logps.detach() - 0.1}  # every token's weight is exp(0.1), every pair's exp(0.2)
    out, dpo = (
        pk.preference_loss(logps, LAYOUT, loss, ref_logps=ref, stats=stats) for loss in (AOTUnpaired(wpo=True), DPO())
    )
    assert all(torch.equal(out.metrics[name], dpo.metrics[name]) for name in dpo.metrics)
    torch.testing.assert_close(out.loss, math.exp(0.2) * derived_aot(AOTUnpaired(), logps, ref))
    certain = torch.zeros(LAYOUT.num_tokens, dtype=torch.float64)
    certain[: CHOSEN[0]] = math.log(2)
    stats = {"log_collision": logps.detach() - certain}
    got = pk.preference_loss(logps, LAYOUT, AOTUnpaired(wpo=True), ref_logps=ref, stats=stats).loss
    (pw, pl), (rw, rl) = sums(logps.detach()), sums(ref)
    values = -logsigmoid(0.1 * ((pw - rw).sort().values - (pl - rl).sort().values))
    values[(pw - rw).argsort() == 0] *= 2
    torch.testing.assert_close(got.detach(), values.mean())


def test_aot_unpaired_empty_meets_empty():
    """An empty chosen and an empty rejected response of different pairs may meet: nothing is compared there."""
    layout = pk.Layout.pairs([0, 2], [1, 0])
    ratios = torch.tensor([-1.0, 2.0, 2.0])  # chosen 0 and 4, rejected -1 and 0
    want = -logsigmoid(torch.tensor([0.1 * (0 + 1), 0.1 * (4 - 0)])).sum()
    out = pk.preference_loss(ratios, layout, AOTUnpaired(), ref_logps=torch.zeros(3), normalizer=1.0)
    torch.testing.assert_close(out.loss, want)
    ratios = torch.tensor([1.0, 2.0, 2.0])  # chosen 0 and 4, rejected 0 and 1: ranks 0 are both empty
    want = -logsigmoid(torch.tensor(0.1 * (4 - 1)))
    for impl in IMPLS:
        out = pk.preference_loss(
            ratios.to(DEVICE), layout, AOTUnpaired(), torch.zeros(3, device=DEVICE), normalizer=1.0, impl=impl
        )
        torch.testing.assert_close(out.loss.cpu(), want)


SINGLE = [5, 2, 9, 4, 1, 3]
LABELS = torch.tensor([1, 0, 0, 1, 1, 0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "baseline, mismatched", [("mismatched", [0.4, 0.9]), ("mismatched", [-2.0, 1.0]), ("zero", None)]
)
def test_kto(baseline, mismatched, impl):
    dtype, device = (torch.float32, DEVICE) if impl == "triton" else (torch.float64, "cpu")
    tolerance = dict(rtol=1e-5, atol=1e-6) if impl == "triton" else {}
    (wide, wide_ref), (logps, ref) = draw(sum(SINGLE)), draw(sum(SINGLE), dtype=dtype, device=device)
    loss = KTO(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7, baseline=baseline)
    given = None if mismatched is None else torch.tensor(mismatched, dtype=dtype, device=device)
    out = pk.preference_loss(
        logps, pk.Layout.sequences(SINGLE), loss, ref_logps=ref, targets=LABELS.to(device), mismatched=given, impl=impl
    )
    kl = max(0.0, sum(mismatched or [0]) / 2)
    a = torch.stack([x.sum() for x in (wide - wide_ref).split(SINGLE)])
    desirable, undesirable = 1 - torch.sigmoid(0.3 * (a - kl)), 1 - torch.sigmoid(0.3 * (kl - a))
    want = torch.where(LABELS == 1, 1.5 * desirable, 0.7 * undesirable).mean()
    close_in_loss_and_gradient(out, logps, want, wide, **tolerance)
    assert out.metrics["rewards/chosen"].item() == pytest.approx(0.3 * a[LABELS == 1].mean().item(), rel=1e-5)
    assert out.metrics["rewards/rejected"].item() == pytest.approx(0.3 * a[LABELS == 0].mean().item(), rel=1e-5)
    assert out.metrics["rewards/desirable"].item() == 0.5
    assert ("kl" in out.metrics) == (baseline == "mismatched")


@pytest.mark.parametrize("label", [0, 1])
def test_kto_of_one_kind_alone_has_no_nan(label):
    logps, ref = draw(sum(SINGLE), dtype=torch.float32)
    out = pk.preference_loss(
        logps, pk.Layout.sequences(SINGLE), KTO(), ref_logps=ref, targets=torch.full((6,), label),
        mismatched=torch.zeros(0),
    )  # fmt: skip
    assert out.loss.isfinite() and all(v.isfinite() for v in out.metrics.values())
    assert out.metrics["rewards/chosen" if label == 0 else "rewards/rejected"].item() == 0
    assert out.metrics["kl"].item() == 0


def test_kto_link_of_many_scores():
    score = torch.cat([torch.linspace(-60, 60, 41), torch.tensor([0.0, 1e4, -1e4, 1e-4])]).to(DEVICE)
    layout = pk.Layout.sequences([1] * len(score))
    for label in (0, 1):
        targets, runs = torch.full((len(score),), label, device=DEVICE), []
        for impl in IMPLS:
            x = (score if impl == "triton" else score.double()).clone().requires_grad_()  # torch's 1 - sigmoid cancels
            out = pk.preference_loss(
                x, layout, KTO(beta=0.7), torch.zeros_like(x), targets=targets, impl=impl,
                mismatched=torch.tensor([0.3], device=DEVICE), normalizer=1.0,
            )  # fmt: skip
            runs.append(torch.autograd.grad(out.loss, x)[0])
        torch.testing.assert_close(runs[1], runs[0].float(), rtol=1e-5, atol=1e-12)
        assert ((runs[1] <= 0) if label else (runs[1] >= 0)).all()


def test_moments():
    x = torch.randn(1000) + 3e3
    mean, std, count = global_moments(x)
    assert mean.item() == pytest.approx(x.double().mean().item(), rel=1e-7)
    assert std.item() == pytest.approx(x.double().std().item(), rel=1e-5)
    assert count.item() == 1000
    keep = torch.arange(1000) % 3 == 0
    mean, std, count = global_moments(x.masked_fill(~keep, torch.nan).bfloat16().float(), keep)
    kept = x[keep].bfloat16().double()
    assert (mean.item(), std.item(), count.item()) == pytest.approx(
        (kept.mean().item(), kept.std().item(), 334), rel=1e-5
    )
    assert global_moments(x.bfloat16())[1].dtype == torch.float32
    assert [v.item() for v in global_moments(x[:1])] == pytest.approx([x[0].item(), 0, 1])
    assert [v.item() for v in global_moments(x[:0])] == [0, 0, 0]
    assert [v.item() for v in global_mean(torch.tensor([1.0, 2.0, 6.0]))] == [3, 3]


def test_running_average_of_everything_seen():
    state = RunningAverage()
    for values in ([1.0, 2.0], [3.0], [4.0, 5.0, 6.0]):
        mean, count = global_mean(torch.tensor(values))
        average, weight = state(mean[None], count)
    assert average.item() == pytest.approx(3.5) and weight.item() == 6
    average, _ = state(torch.tensor([100.0]), 0.0)
    assert average.item() == pytest.approx(3.5)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: there is no stream to wait for on a CPU")
@pytest.mark.parametrize(
    "loss", [AdaDPO(), AdaDPO(base="orpo"), AlphaDPO(), AlphaDPO(stats="batch"), AOT(), AOTUnpaired(), KTO()], ids=repr
)
def test_no_host_sync(loss):
    single = loss.arity == "single"
    layout = pk.Layout.sequences(LAYOUT.lengths) if single else LAYOUT
    (logps, ref), state = draw(dtype=torch.float32, device=DEVICE), loss.new_state()
    given = dict(
        ref_logps=ref if loss.needs_reference else None, state=None if state is None else state.to(DEVICE),
        targets=torch.ones(layout.num_responses, device=DEVICE) if single else None,
        mismatched=ref if single else None, diagnostics=not single,
    )  # fmt: skip
    for attempt in range(2):  # the first call compiles kernels and copies the layout
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")
        try:
            pk.preference_loss(logps, layout, loss, **given).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _rank(rank: int, file: str, layouts) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    values = torch.arange(5, dtype=torch.float64) if rank == 0 else torch.zeros(0, dtype=torch.float64)
    got = global_moments(values)
    torch.testing.assert_close(torch.stack(got), torch.tensor([2.0, 2.5**0.5, 5.0], dtype=torch.float64))
    mean, count = global_mean(torch.full((1 + 2 * rank,), float(rank)))
    assert (mean.item(), count.item()) == (0.75, 4)

    loss, layout = AlphaDPO(alpha=0.5), pk.Layout.pairs(*layouts[rank])
    logps, ref = draw()
    begin = 0 if rank == 0 else LAYOUT.num_tokens - layout.num_tokens
    rows = slice(begin, begin + layout.num_tokens)
    state = loss.new_state()
    mine = pk.preference_loss(
        logps[rows], layout, loss, ref_logps=ref[rows], normalizer=float(len(CHOSEN)), state=state
    ).loss.detach()
    weight = state.state_dict()
    kto = pk.preference_loss(
        torch.ones(1), pk.Layout.sequences([1]), KTO(), ref_logps=torch.zeros(1), targets=torch.ones(1),
        mismatched=torch.full((1 + 2 * rank,), float(rank)),
    )  # fmt: skip
    assert kto.metrics["kl"].item() == 0.75
    dist.all_reduce(mine)
    everywhere = [torch.zeros(2), torch.zeros(2)]
    dist.all_gather(everywhere, weight["average"])
    assert torch.equal(*everywhere)
    dist.destroy_process_group()
    whole = pk.preference_loss(logps, LAYOUT, loss, ref_logps=ref).loss.detach()
    torch.testing.assert_close(mine, whole)


@pytest.mark.slow
def test_statistics_over_two_processes(tmp_path):
    layouts = [(CHOSEN[:2], REJECTED[:2]), (CHOSEN[2:], REJECTED[2:])]
    mp.spawn(_rank, (str(tmp_path / "rendezvous"), layouts), nprocs=2)
