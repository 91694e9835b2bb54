"""The pairwise baselines: golden values, their formulas written again, limits, f-divergences, sums of losses."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import prefkern as pk
from conftest import DEVICE
from prefkern.losses.f_divergence import MAX_EXPONENT
from prefkern.losses.orpo import MAX_MEAN_LOGP

IMPLS = ["eager", "triton"]
EXACT = {torch.float32: 1e-6, torch.float64: 1e-9}

# One pair: log-prob sums of policy and reference, response lengths 6 and 9; values from closed forms in float64.
POLICY, REFERENCE, LENGTHS = (-12.0, -15.0), (-12.5, -14.0), (6, 9)
GOLDEN = [
    (pk.losses.Hinge(), 0.85),
    (pk.losses.EXO(label_smoothing=0.1), 0.43138845722278607),
    (pk.losses.NCA(), 1.3498878020567149),
    (pk.losses.Robust(label_smoothing=0.1), 0.602207047789532),
    (pk.losses.BCO(), 1.3128563080868572),
    (pk.losses.SPPO(), 36.25),
    (pk.losses.APOZero(), 0.9625234160368497),
    (pk.losses.APODown(), 0.9750675511404607),
    (pk.losses.DiscoPOP(), 0.8493375792893855),
    (pk.losses.SigmoidNorm(), 0.6834722183956832),
    (pk.losses.CPO(nll_weight=0.0), 0.5543552444685271),
    (pk.losses.ORPO(nll_weight=0.0), 0.09113719974669592),
    (pk.losses.RDPO(alpha=0.05), 0.6931471805599453),
    (pk.losses.RDPO(alpha=0.05, sign="-"), 0.5543552444685271),
]


@pytest.mark.parametrize(
    "impl, dtype", [("eager", torch.float64), ("eager", torch.float32), ("triton", torch.float32)], ids=str
)
@pytest.mark.parametrize("loss, value", GOLDEN, ids=lambda x: getattr(x, "name", None))
def test_golden_pair(loss, value, impl, dtype):
    def spread(sums):
        parts = [torch.full((n,), x / n, dtype=torch.float64) for x, n in zip(sums, LENGTHS)]
        return torch.cat(parts).to(DEVICE, dtype)

    ref = spread(REFERENCE) if loss.needs_reference else None
    out = pk.preference_loss(spread(POLICY), pk.Layout.pairs([6], [9]), loss, ref_logps=ref, impl=impl)
    assert out.loss.item() == pytest.approx(value, rel=EXACT[dtype], abs=EXACT[dtype])


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


def score(kind, a, alpha=0.5):
    """The derivative of the divergence's generator at the ratio t = exp(a)."""
    t = torch.exp(a)
    return {
        "reverse_kl": lambda: torch.log(t),
        "forward_kl": lambda: 1 - 1 / t,
        "js": lambda: torch.log(2 * t / (t + 1)),
        "alpha": lambda: (t ** (alpha - 1) - 1) / (alpha - 1),
    }[kind]()


def exo(x, e):
    q = sigmoid(x)
    return q * torch.log(q / (1 - e)) + (1 - q) * torch.log((1 - q) / e)


def discopop(x, tau):
    m = sigmoid(x / tau)
    return -log_sigmoid(x) * (1 - m) + torch.exp(-x) * m


def odds(p):
    return p / (1 - p)


# Each formula takes sums a, b of log-ratios, log-probabilities p, q and lengths n, k of chosen and rejected responses.
FORMULAS = [
    (pk.losses.Hinge(beta=0.3), lambda a, b, **_: (1 - 0.3 * (a - b)).clamp(min=0)),
    (
        pk.losses.Robust(beta=0.3, label_smoothing=0.2),
        lambda a, b, **_: (-0.8 * log_sigmoid(0.3 * (a - b)) + 0.2 * log_sigmoid(0.3 * (b - a))) / 0.6,
    ),
    (pk.losses.EXO(beta=0.3), lambda a, b, **_: exo(0.3 * (a - b), 1e-3)),
    (pk.losses.EXO(beta=0.3, label_smoothing=0.3), lambda a, b, **_: exo(0.3 * (a - b), 0.3)),
    (
        pk.losses.NCA(beta=0.3),
        lambda a, b, **_: -log_sigmoid(0.3 * a) - 0.5 * log_sigmoid(-0.3 * a) - 0.5 * log_sigmoid(-0.3 * b),
    ),
    (pk.losses.BCO(beta=0.3), lambda a, b, **_: -log_sigmoid(0.3 * a) - log_sigmoid(-0.3 * b)),
    (
        pk.losses.BCO(beta=0.3, shift="running_mean"),
        lambda a, b, **_: (
            -log_sigmoid(0.3 * (a - torch.cat([a, b]).mean().detach()))
            - log_sigmoid(-0.3 * (b - torch.cat([a, b]).mean().detach()))
        ),
    ),
    (pk.losses.SPPO(beta=0.3), lambda a, b, **_: (a - 1 / 0.6) ** 2 + (b + 1 / 0.6) ** 2),
    (pk.losses.APOZero(beta=0.3), lambda a, b, **_: 1 - sigmoid(0.3 * a) + sigmoid(0.3 * b)),
    (pk.losses.APODown(beta=0.3), lambda a, b, **_: sigmoid(0.3 * a) + 1 - sigmoid(0.3 * (a - b))),
    (pk.losses.DiscoPOP(beta=0.3), lambda a, b, **_: discopop(0.3 * (a - b), 0.05)),
    (pk.losses.DiscoPOP(beta=0.3, tau=1.0), lambda a, b, **_: discopop(0.3 * (a - b), 1.0)),
    (pk.losses.SigmoidNorm(beta=3.0), lambda a, b, n, k, **_: -log_sigmoid(3 * (a / n - b / k))),
    (pk.losses.RDPO(beta=0.3, alpha=0.2), lambda a, b, n, k, **_: -log_sigmoid(0.3 * (a - b) + 0.2 * (n - k))),
    (
        pk.losses.RDPO(beta=0.3, alpha=0.2, sign="-", label_smoothing=0.1),
        lambda a, b, n, k, **_: (
            -0.9 * log_sigmoid(0.3 * (a - b) - 0.2 * (n - k)) - 0.1 * log_sigmoid(-0.3 * (a - b) + 0.2 * (n - k))
        ),
    ),
    (
        pk.losses.CPO(beta=0.3, label_smoothing=0.1),
        lambda p, q, n, **_: (
            -0.9 * log_sigmoid(0.3 * (p - q)) - 0.1 * log_sigmoid(0.3 * (q - p)) - p.sum() / n.sum()
        ),
    ),
    (pk.losses.CPO(beta=0.3, nll_weight=0.0), lambda p, q, **_: -log_sigmoid(0.3 * (p - q))),
    (
        pk.losses.ORPO(beta=0.3, nll_weight=0.5),
        lambda p, q, n, k, **_: (
            -0.3 * log_sigmoid(torch.log(odds(torch.exp(p / n)) / odds(torch.exp(q / k)))) - 0.5 * p.sum() / n.sum()
        ),
    ),
    *(
        (make(beta=0.3, f_divergence=kind, f_alpha=alpha), lambda a, b, kind=kind, alpha=alpha, f=f, **_: f(
            0.3 * (score(kind, a, alpha) - score(kind, b, alpha))
        ))
        for make, f in [
            (pk.losses.DPO, lambda x: -log_sigmoid(x)),
            (pk.losses.Hinge, lambda x: (1 - x).clamp(min=0)),
            (pk.losses.Robust, lambda x: -log_sigmoid(x)),
            (pk.losses.EXO, lambda x: exo(x, 1e-3)),
            (pk.losses.DiscoPOP, lambda x: discopop(x, 0.05)),
        ]
        for kind, alpha in [("forward_kl", 0.5), ("js", 0.5), ("alpha", 0.5), ("alpha", 1.4)]
    ),
    *(
        (pk.losses.IPO(beta=0.3, f_divergence=kind), lambda a, b, n, k, kind=kind, **_: (
            score(kind, a) / n - score(kind, b) / k - 1 / 0.6
        ) ** 2)
        for kind in ("forward_kl", "js", "alpha")
    ),
    (
        pk.losses.IPO(beta=0.3, f_divergence="js", normalize="sum"),
        lambda a, b, **_: (score("js", a) - score("js", b) - 1 / 0.6) ** 2,
    ),
    *(
        (pk.losses.SigmoidNorm(beta=3.0, f_divergence=kind), lambda a, b, n, k, kind=kind, **_: -log_sigmoid(
            3 * (score(kind, a) / n - score(kind, b) / k)
        ))
        for kind in ("reverse_kl", "forward_kl", "js", "alpha")
    ),
]  # fmt: skip

LAYOUT = pk.Layout.pairs([5, 1, 8, 3], [2, 4, 8, 6])


def batch(seed=0):
    """Log-probabilities of policy and reference in float64; sums of log-ratios within about 4 nats."""
    generator = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(LAYOUT.num_tokens, generator=generator, dtype=torch.float64) - 0.01
    return logps, logps + torch.randn(LAYOUT.num_tokens, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("loss, formula", FORMULAS, ids=lambda x: repr(x) if isinstance(x, pk.losses.Loss) else "")
def test_the_formula_written_again(loss, formula):
    logps, ref = batch()
    x = logps.clone().requires_grad_()

    def sums(values):
        return torch.stack([part.sum() for part in values.split(list(LAYOUT.lengths))]).view(-1, 2).unbind(1)

    (p, q), (a, b) = sums(x), sums(x - ref)
    n, k = torch.tensor(LAYOUT.lengths, dtype=torch.float64).view(-1, 2).unbind(1)
    want = formula(a=a, b=b, p=p, q=q, n=n, k=k).mean()
    (want_grad,) = torch.autograd.grad(want, x)
    out = pk.preference_loss(x, LAYOUT, loss, ref_logps=ref if loss.needs_reference else None)
    torch.testing.assert_close(out.loss, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(out.loss, x)[0], want_grad, rtol=1e-11, atol=1e-12)


def run(loss, impl="eager", layout=LAYOUT, ref=None, dtype=torch.float32, **options):
    logps, reference = batch()
    x = logps.to(DEVICE, dtype).requires_grad_()
    reference = reference if ref is None else ref
    ref_logps = reference.to(DEVICE, dtype) if loss.needs_reference else None
    out = pk.preference_loss(x, layout, loss, ref_logps=ref_logps, impl=impl, **options)
    return out.loss.detach(), torch.autograd.grad(out.loss, x)[0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "loss",
    [
        pk.losses.Robust(beta=0.4),
        pk.losses.RDPO(beta=0.4, alpha=0.0),
        pk.losses.RDPO(beta=0.4, alpha=0.0, sign="-"),
        pk.losses.DPO(beta=0.4, f_divergence="alpha", f_alpha=1.0),
        pk.losses.AutoregressiveDPO(beta=0.4, granularity=None),
    ],
    ids=repr,
)
def test_is_dpo(loss, impl):
    for got, want in zip(run(loss, impl), run(pk.losses.DPO(beta=0.4), impl)):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_cpo_is_dpo_without_a_reference():
    none = torch.zeros(LAYOUT.num_tokens)
    for got, want in zip(run(pk.losses.CPO(nll_weight=0.0)), run(pk.losses.DPO(), ref=none)):
        torch.testing.assert_close(got, want)


def test_sigmoid_norm_of_equal_lengths_is_dpo():
    layout = pk.Layout.pairs([8], [8])
    logps, ref = (x[:16].clone() for x in batch())
    norm = pk.preference_loss(logps, layout, pk.losses.SigmoidNorm(beta=2.0), ref_logps=ref)
    dpo = pk.preference_loss(logps, layout, pk.losses.DPO(beta=0.25), ref_logps=ref)
    torch.testing.assert_close(norm.loss, dpo.loss)


def test_masked_tokens_do_not_count_in_lengths():
    logps, ref = (x[:7] for x in batch())
    mask = torch.tensor([1, 1, 0, 0, 1, 1, 1], dtype=torch.bool)
    kept = pk.Layout.pairs([2], [3])
    for loss in (pk.losses.SigmoidNorm(f_divergence="js"), pk.losses.RDPO(alpha=0.3), pk.losses.IPO()):
        got = pk.preference_loss(logps, pk.Layout.pairs([4], [3]), loss, ref_logps=ref, mask=mask).loss
        torch.testing.assert_close(got, pk.preference_loss(logps[mask], kept, loss, ref_logps=ref[mask]).loss)


def test_exo_ends_where_the_policy_agrees_with_the_label():
    loss = pk.losses.EXO(beta=0.5, label_smoothing=0.1)
    gap = math.log(0.9 / 0.1) / 0.5
    best = torch.tensor([[gap, 0.0]], dtype=torch.float64, requires_grad=True)
    value = loss.eager(best)
    assert value.item() == pytest.approx(0, abs=1e-15)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), best)[0], torch.zeros_like(best))
    assert loss.eager(best + torch.tensor([0.5, 0.0])) > 0 and loss.eager(best - torch.tensor([0.5, 0.0])) > 0


def test_robust_is_unbiased_under_flipped_labels():
    e, scores = 0.3, torch.randn(9, 2, dtype=torch.float64)
    loss = pk.losses.Robust(label_smoothing=e)
    expected = (1 - e) * loss.eager(scores) + e * loss.eager(scores.flip(1))
    torch.testing.assert_close(expected, pk.losses.DPO().eager(scores))


DIVERGENCES = ["reverse_kl", "forward_kl", "js", "alpha"]


def test_which_losses_take_a_divergence():
    """Those of a difference of scores; the others have no such form."""
    with_one = {"dpo", "autoregressive_dpo", "rdpo", "hinge", "ipo", "exo", "robust", "discopop", "sigmoid_norm"}
    without = {"nca", "bco", "sppo", "apo_zero", "apo_down", "cpo", "orpo", "simpo", "nll", "combination"}
    assert {name for name in with_one | without if "f_divergence" in pk.losses.options(name)} == with_one


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_scores_start_at_the_reference(kind):
    """At ratio 1 the score is 0 and its slope f''(1): 1, or 1/2 for Jensen-Shannon."""
    loss, a = pk.losses.DPO(f_divergence=kind), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    s = loss.mapped(a, None)
    assert s.item() == 0 and torch.autograd.grad(s.sum(), a)[0].item() == (0.5 if kind == "js" else 1.0)


def test_alpha_runs_from_forward_to_reverse_kl():
    a = torch.linspace(-6, 6, 41, dtype=torch.float64)
    mapped = {
        alpha: pk.losses.DPO(f_divergence="alpha", f_alpha=alpha).mapped(a, None) for alpha in (0.0, 1 - 1e-7, 1.0)
    }
    assert torch.equal(mapped[0.0], pk.losses.DPO(f_divergence="forward_kl").mapped(a, None))
    torch.testing.assert_close(mapped[1 - 1e-7], a, rtol=1e-6, atol=0)
    assert torch.equal(mapped[1.0], a)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_exponents_beyond_the_largest_continue_as_a_tangent(alpha):
    loss = pk.losses.DPO(f_divergence="alpha", f_alpha=alpha)
    edge = MAX_EXPONENT / (alpha - 1)
    a = torch.tensor([edge, 1.5 * edge, 3 * edge], dtype=torch.float64, requires_grad=True)
    s = loss.mapped(a, None)
    (slope,) = torch.autograd.grad(s.sum(), a)
    torch.testing.assert_close(slope, torch.full_like(slope, math.exp(MAX_EXPONENT)))
    torch.testing.assert_close(s[0], score("alpha", a[0], alpha))
    torch.testing.assert_close((s[2] - s[1]) / (a[2] - a[1]), slope[0])


def test_the_map_is_applied_to_each_segment():
    loss = pk.losses.AutoregressiveDPO(beta=0.3, granularity=pk.Static(1), f_divergence="forward_kl")
    logps, ref = (x[:7] for x in batch())
    d = F.pad(logps[:4] - ref[:4], (0, 0)), F.pad(logps[4:] - ref[4:], (0, 1))
    want = -log_sigmoid(0.3 * (score("forward_kl", d[0]) - score("forward_kl", d[1]))).sum()
    got = pk.preference_loss(logps, pk.Layout.pairs([4], [3]), loss, ref_logps=ref).loss
    torch.testing.assert_close(got, want)


def test_rewards_are_those_that_the_loss_compares():
    logps, ref = batch()
    a, b = torch.stack([p.sum() for p in (logps - ref).split(list(LAYOUT.lengths))]).view(-1, 2).unbind(1)
    n = torch.tensor(LAYOUT.lengths[::2])
    for loss, want in [
        (pk.losses.DPO(beta=0.3, f_divergence="js"), 0.3 * score("js", a)),
        (pk.losses.SigmoidNorm(beta=0.3, f_divergence="js"), 0.3 * score("js", a) / n),
        (pk.losses.SigmoidNorm(beta=0.3), 0.3 * a / n),
    ]:
        metrics = pk.preference_loss(logps, LAYOUT, loss, ref_logps=ref).metrics
        torch.testing.assert_close(metrics["rewards/chosen"], want.mean())


@pytest.mark.parametrize("impl", IMPLS)
def test_bco_threshold_is_the_mean_of_the_batches_means(impl):
    loss, pairs = pk.losses.BCO(beta=0.5, shift="running_mean"), [(1.0, -2.0), (3.0, 0.5), (-1.0, -4.0)]
    state, rewards = loss.new_state(), []
    for chosen, rejected in pairs:
        rewards.append(0.5 * (chosen + rejected) / 2)
        delta = sum(rewards) / len(rewards)
        want = math.log1p(math.exp(-(0.5 * chosen - delta))) + math.log1p(math.exp(0.5 * rejected - delta))
        logps = torch.tensor([chosen, rejected], device=DEVICE)
        out = pk.preference_loss(
            logps, pk.Layout.pairs([1], [1]), loss, ref_logps=torch.zeros_like(logps), impl=impl, state=state.to(DEVICE)
        )
        assert out.loss.item() == pytest.approx(want, rel=1e-6)


def test_bco_threshold_rests_in_evaluation():
    loss = pk.losses.BCO(beta=0.5, shift="running_mean")
    state = loss.new_state()

    def step(values, state):
        x, layout = torch.tensor(values), pk.Layout.pairs([1] * (len(values) // 2), [1] * (len(values) // 2))
        return pk.preference_loss(x, layout, loss, ref_logps=torch.zeros_like(x), state=state).loss.item()

    first = step([1.0, -2.0], state)
    step([], state)  # a batch without pairs changes nothing
    kept = {name: t.clone() for name, t in state.state_dict().items()}
    step([9.0, 7.0], state.eval())
    assert all(torch.equal(t, kept[name]) for name, t in state.state_dict().items())
    restored = loss.new_state()
    restored.load_state_dict(kept)
    assert step([1.0, -2.0], restored.eval()) == first
    assert step([9.0, 7.0], loss.new_state().eval()) == step([9.0, 7.0], None)


def test_bco_threshold_leaves_out_pairs_without_tokens():
    loss, logps = pk.losses.BCO(shift="running_mean"), torch.tensor([1.0, -2.0, 50.0, 60.0])
    mask = torch.tensor([True, True, False, False])
    padded = pk.preference_loss(
        logps, pk.Layout.pairs([1, 1], [1, 1]), loss, ref_logps=torch.zeros(4), mask=mask, normalizer=1.0
    )
    alone = pk.preference_loss(logps[:2], pk.Layout.pairs([1], [1]), loss, ref_logps=torch.zeros(2))
    torch.testing.assert_close(padded.loss, alone.loss)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coefficients(pk.losses.ORPO):
    """ORPO whose chosen log-odds are multiplied by a constant."""

    c: float = 1.7

    def target(self, batch):
        return torch.tensor([self.c, 1.0], device=batch.count_R.device).repeat(batch.layout.num_prompts)


@pytest.mark.parametrize("impl", IMPLS)
def test_orpo_takes_a_coefficient_per_member(impl):
    logps, n = batch()[0], torch.tensor(LAYOUT.lengths)
    o = torch.stack([p.mean() for p in logps.split(n.tolist())])
    o = (o - torch.log(1 - torch.exp(o))).view(-1, 2)
    want = -0.4 * log_sigmoid(1.7 * o[:, 0] - o[:, 1]).mean()
    assert run(Coefficients(beta=0.4, nll_weight=0.0), impl)[0].item() == pytest.approx(want.item(), rel=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("certain", ["chosen", "rejected", "both"])
def test_orpo_at_probability_one(certain, impl):
    """Finite, continuous, and a certain rejected response is still pushed down."""
    logps = torch.tensor([0.0 if certain != "rejected" else -1.0, 0.0 if certain != "chosen" else -1.0], device=DEVICE)
    x = logps.requires_grad_()
    loss = pk.losses.ORPO(beta=1.0, nll_weight=0.0)
    out = pk.preference_loss(x, pk.Layout.pairs([1], [1]), loss, impl=impl)
    (g,) = torch.autograd.grad(out.loss, x)
    assert out.loss.isfinite() and g.isfinite().all() and g[0] < 0 < g[1]
    near = pk.preference_loss(x.clamp(max=MAX_MEAN_LOGP), pk.Layout.pairs([1], [1]), loss, impl=impl).loss
    assert abs(out.loss - near) <= 1.001  # one unit of log-odds: the tangent's slope 1e6 times 1e-6


def test_log_odds_keep_their_digits():
    from prefkern.losses.orpo import log_odds

    logp = torch.tensor([-1e-5, -1e-3, -0.1, -0.69, -0.7, -5.0, -80.0], dtype=torch.float64)
    want = torch.log(torch.exp(logp) / -torch.expm1(logp))
    torch.testing.assert_close(log_odds(logp), want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(log_odds(logp.float()).double(), want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_combination_is_the_sum_by_hand(impl):
    parts = (
        (0.5, pk.losses.DPO(beta=0.3)), (2.0, pk.losses.SigmoidNorm(f_divergence="js")), (0.7, pk.losses.NLL()),
        (0.3, pk.losses.CPO()), (1.5, pk.losses.AutoregressiveDPO(granularity=pk.Static(2))),
    )  # fmt: skip
    value, grad = run(pk.losses.Combination(parts=parts), impl)
    each = [run(loss, impl) for _, loss in parts]
    torch.testing.assert_close(value, sum(w * v for (w, _), (v, _) in zip(parts, each)))
    torch.testing.assert_close(grad, sum(w * g for (w, _), (_, g) in zip(parts, each)))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_combination_of_one_is_that_loss_times_its_weight(impl):
    value, grad = run(pk.losses.Combination(parts=((0.5, pk.losses.Hinge()),)), impl)
    one, one_grad = run(pk.losses.Hinge(), impl)
    torch.testing.assert_close(value, 0.5 * one)
    torch.testing.assert_close(grad, 0.5 * one_grad)


def test_a_combination_names_equal_losses_apart():
    parts = ((1.0, pk.losses.DPO()), (2.0, pk.losses.DPO(beta=0.3)))
    layout, logps = pk.Layout.pairs([2], [2]), -torch.rand(4)
    out = pk.preference_loss(logps, layout, pk.losses.Combination(parts=parts), ref_logps=torch.zeros(4))
    first, second = (pk.preference_loss(logps, layout, loss, ref_logps=torch.zeros(4)).loss for _, loss in parts)
    torch.testing.assert_close(out.metrics["loss/dpo"], first)
    torch.testing.assert_close(out.metrics["loss/dpo#2"], second)


def test_a_combination_flattens_its_parts():
    inner = pk.losses.Combination(parts=((2.0, pk.losses.DPO(nll_weight=0.5)), (1.0, pk.losses.Hinge())))
    outer = pk.losses.Combination(parts=((1.0, pk.losses.NLL()), (3.0, inner), (0.5, pk.losses.Hinge())))
    assert [(p.weight, p.loss.name) for p in outer.addends()] == [(6.0, "dpo"), (3.5, "hinge"), (4.0, "nll")]
    value, grad = run(outer)
    by_hand = [run(loss) for loss in (pk.losses.DPO(), pk.losses.Hinge(), pk.losses.NLL())]
    torch.testing.assert_close(value, sum(w * v for w, (v, _) in zip((6.0, 3.5, 4.0), by_hand)))
    torch.testing.assert_close(grad, sum(w * g for w, (_, g) in zip((6.0, 3.5, 4.0), by_hand)))


def test_a_combination_needs_what_its_parts_need():
    make = lambda *losses: pk.losses.Combination(parts=[(1.0, loss) for loss in losses])  # noqa: E731
    free = make(pk.losses.SimPO(), pk.losses.NLL())
    assert (
        not free.needs_reference and not free.needs_first_pass and free.row_outputs == () and free.new_state() is None
    )
    wpo = make(pk.losses.NLL(), pk.losses.ORPO(), pk.losses.DPO(wpo=True))
    assert wpo.needs_reference and wpo.needs_first_pass and wpo.row_outputs == ("log_collision",)
    assert (wpo.arity, wpo.leading) == ("pair", pk.losses.ORPO()) and not wpo.couples_batch
    assert make(pk.losses.NLL(), pk.losses.BCO(shift="running_mean")).couples_batch
    assert pk.losses.get("combination", parts=[[1, pk.losses.DPO()], [0.2, pk.losses.NLL()]]).parts[1][0] == 0.2
    assert make(pk.losses.SimPO(), pk.losses.DPO()) == make(pk.losses.SimPO(), pk.losses.DPO())
    assert isinstance(hash(wpo), int)


def test_a_combination_hands_each_part_its_state():
    bco = pk.losses.BCO(beta=0.5, shift="running_mean")
    inner = pk.losses.Combination(parts=((1.0, pk.losses.Hinge()), (1.0, bco)))
    loss = pk.losses.Combination(parts=((1.0, pk.losses.DPO()), (1.0, inner), (0.5, bco)))
    state = loss.new_state()
    run(loss, state=state)
    run(loss, state=state)
    weights = {name: t.item() for name, t in state.state_dict().items() if name.endswith("weight")}
    assert weights == {"1.1.weight": 2, "2.weight": 2}


def test_a_combination_reports_its_leading_part():
    loss = pk.losses.Combination(parts=((1.0, pk.losses.NLL()), (1.0, pk.losses.DPO())))
    logps, ref = batch()
    out = pk.preference_loss(logps, LAYOUT, loss, ref_logps=ref)
    dpo = pk.preference_loss(logps, LAYOUT, pk.losses.DPO(), ref_logps=ref)
    assert {*out.metrics} == {*dpo.metrics, "loss/dpo", "loss/nll"}
    assert all(torch.equal(out.metrics[name], value) for name, value in dpo.metrics.items())
    torch.testing.assert_close(out.metrics["loss/dpo"] + out.metrics["loss/nll"], out.loss)


def test_accumulated_micro_batches_of_a_combination_add_up():
    loss, (logps, ref) = pk.losses.Combination(), batch()
    counts = torch.tensor(LAYOUT.lengths, dtype=torch.float64)
    whole = pk.preference_loss(logps, LAYOUT, loss, ref_logps=ref).loss
    normalizer, starts = loss.normalizers(LAYOUT, counts), [0, *itertools.accumulate(LAYOUT.lengths)][::2]
    total = sum(
        pk.preference_loss(logps[a:b], pk.Layout.pairs([n], [k]), loss, ref_logps=ref[a:b], normalizer=normalizer).loss
        for a, b, n, k in zip(starts, starts[1:], LAYOUT.lengths[::2], LAYOUT.lengths[1::2])
    )
    torch.testing.assert_close(total, whole)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: pk.losses.EXO(label_smoothing=0), "label_smoothing=0 must be a number in (0, 0.5)"),
        (lambda: pk.losses.Robust(label_smoothing=0.5), "[0, 0.5)"),
        (lambda: pk.losses.DiscoPOP(tau=2.0), "tau=2.0 must be a number in (0, 1]"),
        (lambda: pk.losses.RDPO(sign="plus"), "'+', '-'"),
        (lambda: pk.losses.BCO(shift="mean"), "'none', 'running_mean'"),
        (lambda: pk.losses.DPO(f_divergence="kl"), "'reverse_kl', 'forward_kl', 'js', 'alpha'"),
        (lambda: pk.losses.DPO(f_divergence="alpha", f_alpha=7), "f_alpha=7 must be a number in [-1, 2]"),
        (lambda: pk.losses.get("nca", f_divergence="js"), "nca has no option 'f_divergence'"),
        (lambda: pk.losses.Combination(parts=()), "parts is empty"),
        (lambda: pk.losses.Combination(parts=(pk.losses.DPO(), pk.losses.NLL())), "must be a (weight, loss) tuple"),
        (lambda: pk.losses.Combination(parts=((-1, pk.losses.DPO()), (1, pk.losses.NLL()))), "weight=-1 of dpo"),
    ],
)
def test_bad_options_are_named(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unpaired(pk.losses.Hinge):
    """A loss of single responses."""

    arity = "single"
    name = "unpaired"


def test_parts_of_different_arity_are_named():
    with pytest.raises(ValueError, match="dpo has arity 'pair', unpaired has 'single'; their parts must agree"):
        pk.losses.Combination(parts=((1.0, pk.losses.DPO()), (1.0, Unpaired())))
