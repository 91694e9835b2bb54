"""Losses over lists of responses against float64 loops written from the formulas, their limits, schedules and links."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import prefkern as pk
from conftest import DEVICE
from numerics import assert_as_good_as_torch

L = pk.losses
SIZES = (3, 1, 5, 2)
LENGTHS = (2, 5, 1, 4, 3, 3, 1, 2, 6, 2, 1)
VOCAB = 50


class Example:
    """A batch of groups with every number that a loss may read, in float64."""

    def __init__(self, sizes=SIZES, lengths=LENGTHS, seed=0, rewards=None):
        generator = torch.Generator().manual_seed(seed)
        self.layout = pk.Layout.groups(lengths, sizes)
        draw = lambda n: torch.rand(n, generator=generator, dtype=torch.float64)  # noqa: E731
        self.logps, self.ref = -3 * draw(sum(lengths)), -3 * draw(sum(lengths))
        self.entropy = 3 * draw(sum(lengths))
        self.rewards = draw(len(lengths)) * 2 - 1 if rewards is None else torch.tensor(rewards, dtype=torch.float64)

    def rows(self, x):
        """Per response, its tokens."""
        return x.split(list(self.layout.lengths))

    def prompts(self, x):
        """Per prompt, its responses."""
        return x.split(list(self.layout.group_sizes))

    def log_ratios(self, logps=None, normalize="sum"):
        """Per prompt, (K,) log-ratios of its responses."""
        rows = self.rows((self.logps if logps is None else logps) - self.ref)
        return self.prompts(torch.stack([x.sum() if normalize == "sum" else x.mean() for x in rows]))

    def run(self, loss, logps=None, dtype=torch.float64, impl="eager", **options):
        """Output, and the gradient with respect to logps."""
        x = (self.logps if logps is None else logps).to(DEVICE if impl == "triton" else "cpu", dtype, copy=True)
        targets = options.pop("targets", self.rewards)
        to = lambda t: t.to(x)  # noqa: E731
        stats = {"entropy": to(self.entropy)}
        out = pk.preference_loss(
            x.requires_grad_(), self.layout, loss, ref_logps=to(self.ref), targets=to(targets), impl=impl,
            vocab_size=VOCAB, stats=stats if "entropy" in loss.row_outputs else None, **options,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(out.loss, x)
        return out, grad

    def response_gradient(self, grad):
        """Per prompt, (K,) dL/dlog pi of each response; its tokens all have the same."""
        rows = self.rows(grad)
        assert all((row == row[0]).all() for row in rows)
        return self.prompts(torch.stack([row[0] for row in rows]))


def boltzmann(values):
    weights = [math.exp(v - max(values)) for v in values]
    return [w / sum(weights) for w in weights]


def standardized(rewards, unbiased, eps):
    n, mean = len(rewards), sum(rewards) / len(rewards)
    variance = sum((r - mean) ** 2 for r in rewards) / max(1, n - unbiased)
    return [(r - mean) / (math.sqrt(variance) + eps) for r in rewards]


def kernel_ranks(rewards, bandwidth):
    phi = lambda z: 0.5 * math.erfc(-z / math.sqrt(2))  # noqa: E731
    share = [sum(phi((r - other) / bandwidth) for other in rewards) / len(rewards) for r in rewards]
    return [math.log(f / (1 - f)) for f in share]


def silverman(rewards):
    n, mean = len(rewards), sum(rewards) / len(rewards)
    return 1.06 * math.sqrt(sum((r - mean) ** 2 for r in rewards) / max(1, n - 1)) * n**-0.2 or 1.0


TARGETS = [
    (L.Softmax(), lambda r: boltzmann([2 * a for a in standardized(r, 1, 1e-4)])),
    (L.Softmax(beta_r=0.3, std="biased", eps=1e-8), lambda r: boltzmann([a / 0.3 for a in standardized(r, 0, 1e-8)])),
    (L.Softmax(beta_r=0.3, standardize=False), lambda r: boltzmann([x / 0.3 for x in r])),
    (L.RawSoftmax(temperature=0.7), lambda r: boltzmann([x / 0.7 for x in r])),
    (L.KDE(bandwidth=0.4, temperature=2.0), lambda r: boltzmann([x / 2 for x in kernel_ranks(r, 0.4)])),
    (L.KDE(), lambda r: boltzmann(kernel_ranks(r, silverman(r)))),
    (L.Given(), lambda r: r),
]


def probabilities(example, make):
    """Per prompt, (K,) q; Given wants rewards that are probabilities."""
    return [torch.tensor(make(r.tolist()), dtype=torch.float64) for r in example.prompts(example.rewards)]


@pytest.mark.parametrize("normalize", ["sum", "mean"])
@pytest.mark.parametrize("targets, make", TARGETS, ids=[repr(t) for t, _ in TARGETS])
def test_listwise_is_the_cross_entropy_of_the_anchored_softmax(targets, make, normalize):
    batch, tau = Example(), 0.7
    if isinstance(targets, L.Given):
        batch.rewards = torch.cat([r.softmax(0) for r in batch.prompts(batch.rewards)])
    q = probabilities(batch, make)
    u = [a / tau for a in batch.log_ratios(normalize=normalize)]
    want = sum(-(t * F.log_softmax(x, 0)).sum() for t, x in zip(q, u)) / len(SIZES)
    out, grad = batch.run(L.AnchoredListwise(targets=targets, tau=tau, normalize=normalize))
    torch.testing.assert_close(out.loss, want)
    # dL/dlog pi = (p - q) / tau, over the length where the log-ratios are means
    for mine, x, t, n in zip(
        batch.response_gradient(grad), u, q, batch.prompts(torch.tensor(LENGTHS, dtype=torch.float64))
    ):
        own = (x.softmax(0) - t) / tau / len(SIZES)
        torch.testing.assert_close(mine, own if normalize == "sum" else own / n)


def ranking_loss(u, rewards, top_k=None, e=0.0, poly=0.0):
    """The mean over positions, position by position, in Python."""
    order = sorted(range(len(u)), key=lambda i: -rewards[i])  # stable: equal rewards stay as they stand
    positions = range(min(top_k or len(u), len(u) - 1))
    costs = []
    for k in positions:
        rest = u[order[k:]]
        nll = rest.logsumexp(0) - rest[0]
        x = (1 - e) * nll + e * (rest.logsumexp(0) - rest.mean())
        costs.append(x + poly * (1 - torch.exp(-x)))
    return sum(costs) / max(1, len(costs)) + 0 * u.sum()


PLACKETT_LUCE = [
    {}, {"top_k": 2}, {"label_smoothing": 0.1}, {"poly": 1.0}, {"top_k": 3, "label_smoothing": 0.1, "poly": 1.0},
]  # fmt: skip


@pytest.mark.parametrize("options", PLACKETT_LUCE, ids=str)
def test_plackett_luce_is_the_likelihood_of_the_ranking(options):
    batch = Example()
    short = {"top_k": options.get("top_k"), "e": options.get("label_smoothing", 0.0), "poly": options.get("poly", 0.0)}
    x = batch.logps.clone().requires_grad_()
    rewards = batch.prompts(batch.rewards)
    want = sum(ranking_loss(a / 0.7, r, **short) for a, r in zip(batch.log_ratios(x), rewards)) / len(SIZES)
    out, grad = batch.run(L.AnchoredListwise(targets=L.PlackettLuce(**options), tau=0.7))
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(grad, torch.autograd.grad(want, x)[0])


def test_plackett_luce_sums_to_one_over_all_rankings():
    batch, total = Example([4], [1, 2, 1, 3]), 0.0
    for ranking in itertools.permutations(range(4)):
        scores = torch.tensor(ranking, dtype=torch.float64)
        out, _ = batch.run(L.AnchoredListwise(targets=L.PlackettLuce()), targets=scores)
        total += math.exp(-3 * out.loss.item())  # a mean over three positions
    assert total == pytest.approx(1)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_equal_rewards_are_ranked_as_they_stand(impl):
    batch = Example([4], [1, 1, 1, 1])
    dtype = torch.float32 if impl == "triton" else torch.float64
    loss = L.AnchoredListwise(targets=L.PlackettLuce())
    tied, _ = batch.run(loss, targets=torch.tensor([0.0, 1, 1, 0]), impl=impl, dtype=dtype)
    strict, _ = batch.run(loss, targets=torch.tensor([1.0, 3, 2, 0]), impl=impl, dtype=dtype)
    assert tied.loss == strict.loss


def test_the_optimum_is_the_anchor_tilted_by_the_targets():
    """At log pi = log anchor + tau log q + c the gradient is 0 and the loss is H(q)."""
    tau = 0.7
    batch = Example(SIZES, [1] * sum(SIZES))
    q = torch.cat(probabilities(batch, TARGETS[0][1]))
    shift = torch.tensor([3.3, -1.0, 0.2, 5.0], dtype=torch.float64).repeat_interleave(torch.tensor(SIZES))
    best = batch.ref + tau * q.log() + shift
    out, grad = batch.run(L.AnchoredListwise(tau=tau), best)
    assert grad.abs().max() < 1e-15
    torch.testing.assert_close(out.loss, torch.special.entr(q).sum() / len(SIZES))
    for alpha in (0.0, 0.3, 0.5, 1.0):
        out, grad = batch.run(L.AlphaDivergence(tau=tau, alpha=alpha), best)
        assert abs(out.loss) < 1e-15 and grad.abs().max() < 1e-15


def test_the_hessian_is_that_of_the_anchored_softmax():
    batch, tau = Example([5], [1] * 5), 0.7
    loss = L.AnchoredListwise(tau=tau)

    def value(x):
        return pk.preference_loss(x, batch.layout, loss, ref_logps=batch.ref, targets=batch.rewards).loss

    p = ((batch.logps - batch.ref) / tau).softmax(0)
    want = (torch.diag(p) - torch.outer(p, p)) / tau**2
    torch.testing.assert_close(torch.autograd.functional.hessian(value, batch.logps), want)


@pytest.mark.parametrize("loss", [
    L.AnchoredListwise(), L.AnchoredListwise(targets=L.PlackettLuce(poly=1.0)), L.AnchoredListwise(targets=L.KDE()),
    L.AlphaDivergence(), L.AlphaDivergence(targets=L.RawSoftmax(), alpha=0.0),
], ids=repr)  # fmt: skip
def test_what_changes_nothing(loss):
    """A constant added to a group's log-probabilities, its anchor's or its rewards, and the order in the group."""
    batch = Example(SIZES, [1] * sum(SIZES))
    want, grad = batch.run(loss)
    shift = torch.tensor([2.0, -1.0, 0.5, 7.0], dtype=torch.float64).repeat_interleave(torch.tensor(SIZES))
    moved = Example(SIZES, [1] * sum(SIZES))
    moved.logps, moved.ref, moved.rewards = batch.logps + shift, batch.ref - 3 * shift, batch.rewards + 2 * shift
    out, moved_grad = moved.run(loss)
    torch.testing.assert_close(out.loss, want.loss)
    torch.testing.assert_close(moved_grad, grad)
    order = torch.tensor([2, 0, 1, 3, 8, 4, 6, 5, 7, 10, 9])
    moved.logps, moved.ref, moved.rewards = batch.logps[order], batch.ref[order], batch.rewards[order]
    out, moved_grad = moved.run(loss)
    torch.testing.assert_close(out.loss, want.loss)
    torch.testing.assert_close(moved_grad, grad[order])


PAIRS = ([2, 2, 2], [3, 1, 2, 4, 1, 1])


@pytest.mark.parametrize("impl, dtype", [("eager", torch.float64), ("triton", torch.float32)])
def test_a_list_of_two_is_a_pair(impl, dtype):
    batch, beta = Example(*PAIRS), 0.3
    q = torch.tensor([0.8, 0.35, 1.0], dtype=torch.float64)
    batch.rewards = torch.stack([q, 1 - q], 1).flatten()
    z = torch.stack([beta * (a[0] - a[1]) for a in batch.log_ratios()])
    want = (F.softplus(z) - q * z).mean()
    pair, pair_grad = batch.run(L.AnchoredPairwise(beta=beta), impl=impl, dtype=dtype)
    torch.testing.assert_close(pair.loss.cpu(), want.to(dtype))
    listed, list_grad = batch.run(L.AnchoredListwise(targets=L.Given(), tau=1 / beta), impl=impl, dtype=dtype)
    torch.testing.assert_close(listed.loss, pair.loss)
    torch.testing.assert_close(list_grad, pair_grad)
    own = (z.sigmoid() - q) * beta / 3
    first = torch.cat([row[:1] for row in batch.rows(pair_grad.cpu())])[::2]
    torch.testing.assert_close(first, own.to(dtype))


@pytest.mark.parametrize("impl, dtype", [("eager", torch.float64), ("triton", torch.float32)])
@pytest.mark.parametrize("e", [0.0, 0.2])
def test_a_sure_pair_is_dpo(e, impl, dtype):
    batch = Example(*PAIRS)
    batch.rewards = torch.tensor([1 - e, e] * 3, dtype=torch.float64)
    ours, grad = batch.run(L.AnchoredPairwise(beta=0.3), impl=impl, dtype=dtype)
    device = "cpu" if impl == "eager" else DEVICE
    logps = batch.logps.to(device, dtype).requires_grad_()
    dpo = pk.preference_loss(
        logps, batch.layout, L.DPO(beta=0.3, label_smoothing=e), ref_logps=batch.ref.to(logps), impl=impl
    )
    dpo.loss.backward()
    torch.testing.assert_close(ours.loss, dpo.loss)
    torch.testing.assert_close(grad, logps.grad)
    assert {k: v.item() for k, v in ours.metrics.items() if k != "rewards/accuracies"} == pytest.approx(
        {k: v.item() for k, v in dpo.metrics.items() if k != "rewards/accuracies"}
    )
    right = dpo.metrics["rewards/accuracies"].item()
    assert ours.metrics["rewards/accuracies"].item() == pytest.approx((1 - e) * right + e * (1 - right))


ALPHAS = (0.1, 0.35, 0.5, 0.9, 0.99)


def naive_divergence(q, p, a):
    return (1 - (q**a * p ** (1 - a)).sum()) / (a * (1 - a))


@pytest.mark.parametrize("a", ALPHAS)
def test_alpha_divergence_and_its_gradient(a):
    """The value is the divergence; the gradient is that of the surrogate -(1/a) sum sg[m] log p, and (p M - m) / a."""
    batch, tau = Example(), 0.7
    q = probabilities(batch, TARGETS[0][1])
    x = batch.logps.clone().requires_grad_()
    p = [(r / tau).softmax(0) for r in batch.log_ratios(x)]
    want = sum(naive_divergence(t, s, a) for t, s in zip(q, p)) / len(SIZES)
    m = [(t**a * s ** (1 - a)).detach() for t, s in zip(q, p)]
    surrogate = sum(-(k * s.log()).sum() / a for k, s in zip(m, p)) / len(SIZES)
    out, grad = batch.run(L.AlphaDivergence(alpha=a, tau=tau))
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(grad, torch.autograd.grad(surrogate, x)[0])
    torch.testing.assert_close(out.metrics["list/surrogate"], surrogate.detach())
    torch.testing.assert_close(out.metrics["list/divergence"], want.detach())
    for mine, s, k in zip(batch.response_gradient(grad), p, m):
        torch.testing.assert_close(mine, (s.detach() * k.sum() - k) / a / tau / len(SIZES))


def test_alpha_divergence_at_its_ends_and_middle():
    batch, tau = Example(), 0.7
    q = probabilities(batch, TARGETS[0][1])
    entropy = sum(torch.special.entr(t).sum() for t in q) / len(SIZES)
    cross, cross_grad = batch.run(L.AnchoredListwise(tau=tau))
    one, one_grad = batch.run(L.AlphaDivergence(alpha=1.0, tau=tau))
    torch.testing.assert_close(one.loss, cross.loss - entropy)
    torch.testing.assert_close(one_grad, cross_grad)

    x = batch.logps.clone().requires_grad_()
    p = [(r / tau).softmax(0) for r in batch.log_ratios(x)]
    reverse = sum((s * (s / t).log()).sum() for t, s in zip(q, p)) / len(SIZES)
    zero, zero_grad = batch.run(L.AlphaDivergence(alpha=0.0, tau=tau))
    torch.testing.assert_close(zero.loss, reverse)
    torch.testing.assert_close(zero_grad, torch.autograd.grad(reverse, x, retain_graph=True)[0])
    assert zero.metrics["list/surrogate"].isfinite()

    hellinger = sum(4 * (1 - (t * s).sqrt().sum()) for t, s in zip(q, p)) / len(SIZES)
    torch.testing.assert_close(batch.run(L.AlphaDivergence(alpha=0.5, tau=tau))[0].loss, hellinger)


@pytest.mark.parametrize("impl, dtype", [("eager", torch.float64), ("eager", torch.float32), ("triton", torch.float32)])
@pytest.mark.parametrize("end", [0.0, 0.5, 1.0])
def test_alpha_divergence_is_continuous(end, impl, dtype):
    """The change from a closed-form branch to 1e-3, 1e-5 or 1e-7 beside it shrinks in proportion."""
    batch = Example()
    value, grad = batch.run(L.AlphaDivergence(alpha=end), impl=impl, dtype=dtype)
    rounding = 1e-14 if dtype == torch.float64 else 2e-6
    for step in (1e-3, 1e-5, 1e-7):
        for a in {min(1.0, end + step), max(0.0, end - step)} - {end}:
            near, near_grad = batch.run(L.AlphaDivergence(alpha=a), impl=impl, dtype=dtype)
            assert abs(near.loss - value.loss) < 3 * step + rounding, (a, near.loss, value.loss)
            assert (near_grad - grad).abs().max() < 3 * step + rounding, a


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("a", [1e-6, 1e-3, 0.2, 0.499999, 0.5, 0.999, 1 - 1e-6])
def test_alpha_divergence_loses_nothing_near_the_optimum_in_fp32(a, impl):
    """p within 3e-2 of q, where 1 - sum m is of the size of fp32's rounding; the truth is expm1 in float64."""
    batch = Example([6], [1] * 6)
    q = probabilities(batch, TARGETS[0][1])[0]
    batch.logps = (batch.ref + q.log() + 1e-2 * batch.logps).float().double()
    batch.ref, batch.rewards = batch.ref.float().double(), batch.rewards.float().double()
    q = probabilities(batch, TARGETS[0][1])[0]
    p = (batch.logps - batch.ref).softmax(0)
    out, grad = batch.run(L.AlphaDivergence(alpha=a), dtype=torch.float32, impl=impl)
    d = torch.log(q / p)
    truth = -(p * torch.expm1(a * d)).sum() / (a * (1 - a))
    assert out.loss.item() == pytest.approx(truth.item(), abs=3e-7)
    exact = p * ((p * torch.expm1(a * d)).sum() - torch.expm1(a * d)) / a
    assert (grad.cpu().double() - exact).abs().max() < 2e-7


@pytest.mark.parametrize("a", [0.0, 0.2, 0.6])
def test_alpha_divergence_keeps_its_digits_where_one_response_is_nearly_certain(a):
    """1 - p of the first is 1e-4: its derivative is small too, and no difference of numbers near 1."""
    batch = Example([3], [1] * 3)
    batch.ref, batch.logps = torch.zeros_like(batch.ref), torch.tensor([-1.0, -10.25, -12.5]).double()
    truth = batch.run(L.AlphaDivergence(alpha=a))[1]
    got = batch.run(L.AlphaDivergence(alpha=a), impl="triton", dtype=torch.float32)[1].cpu().double()
    torch.testing.assert_close(got, truth, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("impl, dtype", [("eager", torch.float64), ("triton", torch.float32)])
@pytest.mark.parametrize("a", [0.0, 0.35, 0.5, 0.9, 1.0])
def test_targets_of_zero(a, impl, dtype):
    """0 log 0 is 0; KL(p || q) counts a q of 0 as smallest_target."""
    batch = Example([3, 3], [1] * 6, rewards=[0.0, 0.25, 0.75, 1.0, 0.0, 0.0])
    loss = L.AlphaDivergence(targets=L.Given(), alpha=a, smallest_target=1e-20)
    out, grad = batch.run(loss, impl=impl, dtype=dtype)
    assert out.loss.isfinite() and grad.isfinite().all()
    q = torch.stack(batch.prompts(batch.rewards)).clamp(min=1e-20)
    p = torch.stack(batch.log_ratios()).softmax(-1)
    if a == 0:
        want = (p * (p / q).log()).sum(-1).mean()
    elif a == 1:
        want = torch.xlogy(q, q / p).sum(-1).mean()
    else:
        want = torch.stack([naive_divergence(t, s, a) for t, s in zip(q, p)]).mean()
    torch.testing.assert_close(out.loss.cpu().double(), want, rtol=1e-5 if dtype == torch.float32 else 1e-9, atol=1e-7)


def test_equal_rewards_pull_back_to_the_anchor():
    """q is uniform, whatever makes it: the gradient is (p - 1/K) / tau."""
    batch = Example(rewards=[0.1] * 3 + [5.0] + [0.3] * 5 + [0.7] * 2)
    for targets in (L.Softmax(), L.Softmax(eps=1e-8, std="biased"), L.RawSoftmax(), L.KDE(), L.KDE(bandwidth=0.1)):
        _, grad = batch.run(L.AnchoredListwise(targets=targets, tau=0.5))
        for mine, a in zip(batch.response_gradient(grad), batch.log_ratios()):
            torch.testing.assert_close(mine, ((a / 0.5).softmax(0) - 1 / len(a)) / 0.5 / len(SIZES))


def test_equal_rewards_have_no_advantage_in_fp32_either():
    """Their mean may be rounded away from them by more than eps."""
    for size in range(2, 14):
        reward = torch.rand(50, 1, generator=torch.Generator().manual_seed(size)).expand(50, size)
        advantage = L.Softmax(eps=1e-8).advantages(reward, torch.ones(50, size, dtype=torch.bool))
        assert advantage.abs().max() < 1e-6


@pytest.mark.parametrize("impl, dtype", [("eager", torch.float64), ("triton", torch.float32)])
@pytest.mark.parametrize("loss", [
    L.AnchoredListwise(), L.AnchoredListwise(targets=L.PlackettLuce(label_smoothing=0.1, poly=1.0)),
    L.AnchoredListwise(targets=L.KDE(), tau=L.Entropy()), L.AlphaDivergence(alpha=0.0), L.AlphaDivergence(alpha=1.0),
    L.AlphaDivergence(tau=L.SmoothHybrid(), alpha=L.EffectiveSampleSize()),
    L.AlphaDivergence(tau=L.BatchGuarded(), alpha=L.RewardConfidenceGuarded()),
], ids=repr)  # fmt: skip
def test_groups_of_one_have_no_gradient(loss, impl, dtype):
    batch = Example([1, 1], [2, 3])
    out, grad = batch.run(loss, impl=impl, dtype=dtype)
    assert out.loss == 0 and (grad == 0).all()
    assert all(m.isfinite() for m in out.metrics.values())


# Two prompts, of two and one responses, two tokens each, and V = 50: every number below by hand.
HAND = dict(sizes=[2, 1], lengths=[2, 2, 2], rewards=[1.0, 0.0, 2.0])


def hand_example():
    batch = Example(**HAND)
    batch.entropy = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.5, 1.5], dtype=torch.float64)
    batch.logps = -torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0, 9.0], dtype=torch.float64)
    batch.ref = -torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0, 3.0], dtype=torch.float64)
    return batch


def taus(batch, tau, targets=None):
    """(K of prompt 0, prompt 1) temperatures, read off the scale of the scores."""
    targets = targets or L.Softmax()
    out, _ = batch.run(L.AnchoredListwise(tau=tau, targets=targets))
    ratio = torch.stack([x.sum() for x in batch.rows(batch.logps - batch.ref)])
    tau_R = ratio / out.scores
    assert torch.equal(tau_R[0], tau_R[1]) or (tau_R[0] - tau_R[1]).abs() < 1e-12
    assert out.metrics["list/tau"].item() == pytest.approx(((tau_R[0] + tau_R[2]) / 2).item())
    return [tau_R[0].item(), tau_R[2].item()]


LOG_V = math.log(VOCAB)


def test_smooth_hybrid():
    batch = hand_example()
    exact = [2.0 / LOG_V, 1.0 / LOG_V]  # group means of the mean entropies
    low, high = 0.0, 1.0  # rewards 0.5 and 2 between their extremes
    want = [1 + 0.5 * h + (1 - h) * (1 - r) for h, r in zip(exact, (low, high))]
    assert taus(batch, L.SmoothHybrid()) == pytest.approx(want)
    sampled = [2.5 / LOG_V, 1.0]  # the second is 9 nats a token: more than log V
    want = [0.8 * (1 + 0.2 * h + 0.3 * (1 - h) * (1 - r)) for h, r in zip(sampled, (low, high))]
    assert taus(batch, L.SmoothHybrid(tau=0.8, a=0.2, b=0.3, entropy="sampled")) == pytest.approx(want)
    assert taus(batch, L.SmoothHybrid(tau=4.0, tau_max=4.2)) == pytest.approx([4.2, 4.2])
    assert taus(batch, L.SmoothHybrid(tau=0.1, tau_min=0.3, tau_max=0.4)) == pytest.approx([0.3, 0.3])
    batch.rewards = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)  # equal means: R is 1/2
    assert taus(batch, L.SmoothHybrid()) == pytest.approx([1 + 0.5 * h + (1 - h) / 2 for h in exact])


def test_entropy_temperature():
    batch = hand_example()
    q = 1 / (1 + math.exp(-1 / 0.5))  # RawSoftmax at temperature 1/2 of rewards 1 and 0
    flat = -(q * math.log(q) + (1 - q) * math.log(1 - q)) / math.log(2)
    targets = L.RawSoftmax(temperature=0.5)
    assert taus(batch, L.Entropy(a=0.7, tau=2.0), targets) == pytest.approx([2 * (1 - 0.7 * flat), 2.0])
    rising = L.Entropy(form="rising", a=0.7, tau=2.0)
    assert taus(batch, rising, targets) == pytest.approx([2 * (1 - 0.7 * (1 - flat)), 2 * 0.3])
    assert taus(batch, L.Entropy(tau=1.0, tau_min=0.9), targets)[0] == pytest.approx(0.9)
    batch.rewards = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)
    assert taus(batch, L.Entropy(tau_min=0.1), targets) == pytest.approx([0.1, 1.0])


SURE = 1 - (1.5 / LOG_V + 3.5 / LOG_V + 1.0) / 3
UNSURE = (1 / LOG_V + 2 / LOG_V + 3 / LOG_V) / 3


def test_batch_guarded():
    batch, centred = hand_example(), L.Softmax(standardize=False)
    skew = 2 * (1 + 0 + 0.5) / 3 - 1  # advantages 0.5, -0.5, 0
    assert skew == 0
    assert taus(batch, L.BatchGuarded(), centred) == pytest.approx([0.5 * (1 + 0.2 * UNSURE)] * 2)
    batch = Example([3], [2, 2, 2], rewards=[0.0, 0.0, 3.0])  # advantages -1, -1, 2: skew -1/3
    batch.logps, batch.ref = hand_example().logps, hand_example().ref
    out, _ = batch.run(L.AnchoredListwise(tau=L.BatchGuarded(), targets=centred))
    assert out.metrics["list/tau"].item() == pytest.approx(0.5 * (1 + 0.2 * UNSURE + 0.5 * SURE / 3))
    batch.rewards = torch.full((3,), 0.3, dtype=torch.float64)  # all equal: as skewed as can be
    out, _ = batch.run(L.AnchoredListwise(tau=L.BatchGuarded(), targets=centred))
    assert out.metrics["list/tau"].item() == pytest.approx(0.5 * (1 + 0.2 * UNSURE + 0.5 * SURE))
    out, _ = batch.run(L.AnchoredListwise(tau=L.BatchGuarded(tau_max=0.5), targets=centred))
    assert out.metrics["list/tau"].item() == pytest.approx(0.5)
    out, _ = batch.run(L.AnchoredListwise(tau=L.BatchGuarded(tau=0.1), targets=centred))
    assert out.metrics["list/tau"].item() == pytest.approx(0.2)


def test_batch_guarded_takes_means_over_what_counts():
    batch = hand_example()
    mask = torch.tensor([1, 0, 1, 1, 1, 1], dtype=torch.bool)
    out, _ = batch.run(L.AnchoredListwise(tau=L.BatchGuarded(), targets=L.Softmax(standardize=False)), mask=mask)
    assert out.metrics["list/tau"].item() == pytest.approx(0.5 * (1 + 0.2 * UNSURE))


def test_reward_confidence_guarded():
    def alpha(rewards, schedule=None):
        batch = Example([3], [2, 2, 2], rewards=rewards)
        batch.logps = hand_example().logps
        loss = L.AlphaDivergence(targets=L.Softmax(standardize=False), alpha=schedule or L.RewardConfidenceGuarded())
        return batch.run(loss)[0].metrics["list/alpha"].item()

    assert alpha([3.0, 3.0, 0.0]) == pytest.approx(0.9 - 0.55 * SURE / 3)  # advantages 1, 1, -2: skew 1/3
    assert alpha([0.0, 0.0, 3.0]) == pytest.approx(0.9)  # skew -1/3 counts as 0
    assert alpha([0.3, 0.3, 0.3]) == pytest.approx(0.9)
    own = L.RewardConfidenceGuarded(alpha_max=0.8, alpha_min=0.2)
    assert alpha([3.0, 3.0, 0.0], own) == pytest.approx(0.8 - 0.6 * SURE / 3)


def best_alpha(batch, schedule):
    """The candidate with the effective sample size nearest to share * K, by loops."""
    q, p = probabilities(batch, TARGETS[0][1]), [r.softmax(0) for r in batch.log_ratios()]
    wanted = schedule.share * sum(map(len, q)) / len(q)
    misses = {}
    for k in range(11):
        a = schedule.alpha_min + (schedule.alpha_max - schedule.alpha_min) * k / 10
        weights = [(t**a * s ** (1 - a)) / (t**a * s ** (1 - a)).sum() for t, s in zip(q, p)]
        misses[a] = abs(sum(1 / (w * w).sum() for w in weights) / len(q) - wanted)
    return min(misses, key=misses.get)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.6, 1.0])
def test_effective_sample_size_without_a_state_is_this_calls(share):
    batch, schedule = Example(), L.EffectiveSampleSize(alpha_min=0.0, alpha_max=1.0, share=share)
    out, _ = batch.run(L.AlphaDivergence(alpha=schedule))
    assert out.metrics["list/alpha"].item() == pytest.approx(min(max(best_alpha(batch, schedule), 1e-3), 0.999))


def test_effective_sample_size_follows_slowly():
    batch = Example()
    schedule = L.EffectiveSampleSize(alpha_min=0.1, warm_up=2, decay=0.5, max_step=0.05, share=0.7)
    loss = L.AlphaDivergence(alpha=schedule)
    state, best = loss.new_state(), best_alpha(batch, schedule)
    seen = [batch.run(loss, state=state)[0].metrics["list/alpha"].item() for _ in range(4)]
    assert best < 0.8
    assert seen == pytest.approx([0.9, 0.9, 0.85, 0.8])  # steps of max_step
    state.eval()
    assert batch.run(loss, state=state)[0].metrics["list/alpha"].item() == pytest.approx(0.8)
    assert state.calls == 4
    state.train()
    state.alpha.fill_(best + 0.04)
    assert batch.run(loss, state=state)[0].metrics["list/alpha"].item() == pytest.approx(best + 0.02)
    resumed = loss.new_state()
    resumed.load_state_dict(state.state_dict())
    assert resumed.alpha == state.alpha and resumed.calls == 5


def test_effective_sample_size_is_that_of_all_ranks(monkeypatch):
    """Each of two ranks sees two of the four prompts; their sums are added, as all_reduce does."""
    batch, loss = Example(), L.AlphaDivergence(alpha=L.EffectiveSampleSize(alpha_min=0.0, alpha_max=1.0, share=0.7))
    whole = batch.run(loss)[0].metrics["list/alpha"]
    tokens, responses = sum(LENGTHS[:4]), 4
    ranks = [Example(SIZES[:2], LENGTHS[:4]), Example(SIZES[2:], LENGTHS[4:])]
    for rank, rows, members in zip(
        ranks, (slice(tokens), slice(tokens, None)), (slice(responses), slice(responses, None))
    ):
        rank.logps, rank.ref, rank.rewards = batch.logps[rows], batch.ref[rows], batch.rewards[members]
    seen = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: seen.append(sums.clone()))
    alone = ranks[1].run(loss)[0].metrics["list/alpha"]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.add_(seen[0]))
    together = ranks[0].run(loss)[0].metrics["list/alpha"]
    assert together == whole != alone


def test_effective_sample_size_is_the_alpha_of_the_loss():
    batch = Example()
    loss = L.AlphaDivergence(alpha=L.EffectiveSampleSize(warm_up=0))
    state = loss.new_state()
    out, grad = batch.run(loss, state=state)
    fixed, fixed_grad = batch.run(L.AlphaDivergence(alpha=state.alpha.item()))
    torch.testing.assert_close(out.loss, fixed.loss)
    torch.testing.assert_close(grad, fixed_grad)
    assert L.AlphaDivergence(alpha=0.5).new_state() is None


@pytest.mark.parametrize("impl, dtype", [("eager", torch.float64), ("triton", torch.float32)])
@pytest.mark.parametrize("loss", [
    L.AnchoredListwise(tau=L.BatchGuarded()), L.AlphaDivergence(alpha=L.RewardConfidenceGuarded()),
    L.AlphaDivergence(alpha=L.EffectiveSampleSize(alpha_min=0.05), normalize="mean"),
], ids=repr)  # fmt: skip
def test_no_gradient_flows_through_a_schedule(loss, impl, dtype):
    """Value and gradient are those of the same numbers, fixed."""
    batch = Example()
    out, grad = batch.run(loss, impl=impl, dtype=dtype)
    numbers = {"tau": out.metrics["list/tau"].item()}
    if isinstance(loss, L.AlphaDivergence):
        numbers["alpha"] = out.metrics["list/alpha"].item()
    fixed, fixed_grad = batch.run(type(loss)(normalize=loss.normalize, **numbers), impl=impl, dtype=dtype)
    torch.testing.assert_close(out.loss, fixed.loss)
    torch.testing.assert_close(grad, fixed_grad)


@pytest.mark.parametrize("tau", [L.SmoothHybrid(), L.SmoothHybrid(entropy="sampled"), L.Entropy()], ids=repr)
def test_no_gradient_flows_through_a_prompts_own_temperature(tau):
    batch = Example()
    out, grad = batch.run(L.AnchoredListwise(tau=tau))
    u = batch.prompts(out.scores)
    q = probabilities(batch, TARGETS[0][1])
    for mine, x, a, t in zip(batch.response_gradient(grad), u, batch.log_ratios(), q):
        torch.testing.assert_close(mine, (x.softmax(0) - t) * (x / a).mean() / len(SIZES))


def test_metrics_of_lists():
    batch = Example([2, 2], [1, 2, 1, 1], rewards=[0.0, 1.0, 2.0, 2.0])
    batch.logps = -torch.tensor([1.0, 2.0, 3.0, 1.5, 4.0], dtype=torch.float64)
    batch.ref = -torch.tensor([2.0, 3.0, 3.0, 1.0, 5.0], dtype=torch.float64)
    targets = L.RawSoftmax()
    out, _ = batch.run(L.AnchoredListwise(tau=0.5, targets=targets))
    got = {k: v.item() for k, v in out.metrics.items()}
    p, q = [0.5, 1 / (1 + math.exp(3))], [1 / (1 + math.e), 0.5]  # of the first member; log-ratios 1, 1 and -0.5, 1
    entropy = lambda x: -x * math.log(x) - (1 - x) * math.log(1 - x)  # noqa: E731
    assert got == pytest.approx({
        "rewards/best": (2.0 - 1.0) / 2,  # u of the second of the first prompt and the first of the second
        "rewards/accuracies": 1 / 2,  # equal p: the first stands for both, and its reward is the worse one
        "logps/best": (-5 - 1.5) / 2, "list/entropy": (entropy(p[0]) + entropy(p[1])) / 2,
        "list/target_entropy": (entropy(q[0]) + entropy(q[1])) / 2, "list/log_ratio": (1 + 1 - 0.5 + 1) / 4,
        "list/tau": 0.5,
    })  # fmt: skip
    ranked, _ = batch.run(L.AnchoredListwise(tau=0.5, targets=L.PlackettLuce()))
    assert "list/target_entropy" not in ranked.metrics


def test_a_number_stands_for_a_fixed_value():
    assert L.get("anchored_listwise", tau=0.3) == L.AnchoredListwise(tau=L.Fixed(tau=0.3))
    assert L.get("alpha_divergence", alpha=1) == L.AlphaDivergence(alpha=L.FixedAlpha(alpha=1))


COUPLED = [
    (L.AnchoredListwise(), False), (L.AnchoredListwise(tau=L.Entropy()), False),
    (L.AnchoredListwise(tau=L.SmoothHybrid()), True), (L.AnchoredListwise(tau=L.BatchGuarded()), True),
    (L.AlphaDivergence(alpha=0.3), False), (L.AlphaDivergence(alpha=L.RewardConfidenceGuarded()), True),
    (L.AlphaDivergence(alpha=L.EffectiveSampleSize()), True), (L.AlphaDivergence(tau=L.SmoothHybrid()), True),
]  # fmt: skip


@pytest.mark.parametrize("loss, coupled", COUPLED, ids=repr)
def test_schedules_of_the_batch_say_so(loss, coupled):
    assert loss.couples_batch == coupled
    outputs = ("entropy",) if isinstance(loss.tau, L.SmoothHybrid) else ()
    assert loss.row_outputs == outputs


LINKS = {
    "cross_entropy": L.AnchoredListwise(tau=0.7),
    "ranking": L.AnchoredListwise(targets=L.PlackettLuce()),
    "ranking top 3": L.AnchoredListwise(targets=L.PlackettLuce(top_k=3, label_smoothing=0.1, poly=1.0)),
    "ranking top 90": L.AnchoredListwise(targets=L.PlackettLuce(top_k=90, label_smoothing=0.3)),
    **{f"alpha {a}": L.AlphaDivergence(alpha=a) for a in (0.0, 1e-4, 0.35, 0.5, 0.9, 1.0)},
    "alpha ess": L.AlphaDivergence(tau=L.Entropy(), alpha=L.EffectiveSampleSize(), normalize="mean"),
}
MANY = (1, 2, 3, 7, 64, 70, 1, 16, 33)


@pytest.mark.parametrize("spread", [1.0, 30.0], ids=["near", "far"])
@pytest.mark.parametrize("loss", LINKS.values(), ids=LINKS)
def test_links_match_float64_for_any_group_size(loss, spread):
    lengths = [1 + i % 3 for i in range(sum(MANY))]
    batch = Example(MANY, lengths, seed=3)
    batch.logps, batch.ref = (spread * batch.logps).float().double(), batch.ref.float().double()
    batch.rewards = batch.rewards.float().double()
    (truth, grad), (same, same_grad), (mine, mine_grad) = (
        batch.run(loss, impl=impl, dtype=dtype)
        for impl, dtype in (("eager", torch.float64), ("eager", torch.float32), ("triton", torch.float32))
    )
    eps = 4e-7 + truth.scores.abs().max().item() * 2**-23  # a rounded exponent u is off by |u| ulps, and so is exp(u)
    assert_as_good_as_torch(mine.loss, same.loss, truth.loss, eps)
    assert_as_good_as_torch(mine_grad, same_grad, grad, eps)


@pytest.mark.parametrize("size", [1e4, 1e6])
@pytest.mark.parametrize("loss", LINKS.values(), ids=LINKS)
def test_links_are_finite_at_extreme_scores(loss, size):
    batch = Example([5, 1, 3, 64], [1] * 73, rewards=list(range(73)))
    generator = torch.Generator().manual_seed(0)
    batch.logps = size * (torch.randint(-1, 2, (73,), generator=generator).double())
    for impl in ("eager", "triton"):
        out, grad = batch.run(loss, impl=impl, dtype=torch.float32)
        assert out.loss.isfinite() and grad.isfinite().all(), impl
        assert all(m.isfinite() for m in out.metrics.values()), impl


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("sizes, lengths", [([], []), ([2, 1], [0, 0, 2]), ([3], [2, 0, 1])], ids=str)
@pytest.mark.parametrize("loss", [
    L.AnchoredListwise(tau=L.BatchGuarded(), targets=L.PlackettLuce(poly=1.0)),
    L.AnchoredListwise(tau=L.SmoothHybrid(), targets=L.KDE(), normalize="mean"),
    L.AlphaDivergence(tau=L.Entropy(), alpha=L.EffectiveSampleSize(), normalize="mean"),
    L.AlphaDivergence(alpha=L.RewardConfidenceGuarded()),
], ids=repr)  # fmt: skip
def test_empty_batches_groups_and_responses(loss, sizes, lengths, impl):
    batch = Example(sizes, lengths)
    out, grad = batch.run(loss, impl=impl, dtype=torch.float32)
    truth, want = batch.run(loss)
    torch.testing.assert_close(out.loss.cpu(), truth.loss.float())
    torch.testing.assert_close(grad.cpu(), want.float())
    assert out.loss.isfinite() and (lengths == [2, 0, 1] or out.loss == 0)


@pytest.mark.parametrize("q", [0.0, 0.3, 1.0])
def test_soft_pairs_are_exact_where_they_saturate(q):
    """z from -1e4 to 1e4: value and gradient of the kernel against float64."""
    z = torch.tensor([-1e4, -90, -20, -1, 0, 1e-3, 1, 20, 90, 1e4], dtype=torch.float64)
    batch = Example([2] * len(z), [1] * 2 * len(z), rewards=[q, 1 - q] * len(z))
    batch.ref = torch.zeros_like(batch.ref)
    batch.logps = torch.stack([z, torch.zeros_like(z)], 1).flatten().float().double()
    x = z.float().double().requires_grad_()
    want = q * F.softplus(-x) + (1 - q) * F.softplus(x)
    (slope,) = torch.autograd.grad(want.sum(), x)
    out, grad = batch.run(L.AnchoredPairwise(beta=1.0), impl="triton", dtype=torch.float32, normalizer=1.0)
    assert out.loss.item() == pytest.approx(want.sum().item(), rel=1e-6)
    torch.testing.assert_close(grad.cpu()[::2].double(), slope, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_response_of_a_million_tokens():
    """The sum of its log-ratios is exact enough for the softmax of a group."""
    batch = Example([2], [1_000_000, 3], rewards=[1.0, 0.0])
    batch.logps = (batch.ref + 1e-3 * (batch.logps + 1.5)).float().double()
    batch.ref = batch.ref.float().double()
    truth, grad = batch.run(L.AlphaDivergence(alpha=0.4))
    mine, mine_grad = batch.run(L.AlphaDivergence(alpha=0.4), impl="triton", dtype=torch.float32)
    assert mine.loss.item() == pytest.approx(truth.loss.item(), rel=1e-5)
    torch.testing.assert_close(mine_grad.cpu().double(), grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: L.AnchoredListwise(targets="softmax"), "targets='softmax' must be one of Softmax, RawSoftmax"),
        (lambda: L.AnchoredListwise(tau=0.0), "tau=0.0 must be a number in (0, 1000]"),
        (lambda: L.AnchoredListwise(tau="1"), "tau='1' must be one of a number, Fixed, SmoothHybrid"),
        (lambda: L.AnchoredListwise(tau=True), "tau=True must be one of a number"),
        (lambda: L.AlphaDivergence(alpha=1.5), "alpha=1.5 must be a number in [0, 1]"),
        (lambda: L.AlphaDivergence(targets=L.PlackettLuce()), "must be one of Softmax, RawSoftmax, KDE, Given"),
        (lambda: L.AnchoredListwise(targets=L.PlackettLuce(), tau=L.Entropy()), "PlackettLuce is a ranking"),
        (lambda: L.Softmax(std="sample"), "'unbiased', 'biased'"),
        (lambda: L.Softmax(eps=0), "eps=0"),
        (lambda: L.KDE(bandwidth=0), "bandwidth=0"),
        (lambda: L.PlackettLuce(top_k=1.5), "top_k=1.5"),
        (lambda: L.Entropy(form="up"), "'falling', 'rising'"),
        (lambda: L.SmoothHybrid(tau_min=2.0, tau_max=1.0), "tau_min=2.0 must not be above tau_max=1.0"),
        (lambda: L.RewardConfidenceGuarded(alpha_min=0.95), "alpha_min=0.95 must not be above alpha_max=0.9"),
        (lambda: L.AnchoredListwise(normalize="median"), "'sum', 'mean'"),
    ],
)
def test_bad_options_are_named(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value)


@pytest.mark.parametrize("tau", [L.SmoothHybrid(), L.BatchGuarded()], ids=repr)
def test_schedules_that_need_the_vocabulary_ask_for_it(tau):
    batch = Example()
    with pytest.raises(ValueError, match="pass vocab_size"):
        pk.preference_loss(
            batch.logps, batch.layout, L.AnchoredListwise(tau=tau), ref_logps=batch.ref, targets=batch.rewards,
            stats={"entropy": batch.entropy} if tau.row_outputs else None,
        )  # fmt: skip


def test_list_losses_ask_for_rewards():
    batch = Example()
    with pytest.raises(ValueError, match=r"reads targets: pass targets, \(R,\), a score of each response"):
        pk.preference_loss(batch.logps, batch.layout, L.AnchoredListwise(), ref_logps=batch.ref)


@pytest.mark.parametrize("impl", ["eager", "auto"])
def test_schedules_find_entropy_and_vocabulary_by_themselves(impl):
    """From hidden states and from logits, as from log-probabilities with the same statistics."""
    batch = Example()
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(batch.layout.num_tokens, 8, generator=generator)
    weight = torch.randn(VOCAB, 8, generator=generator)
    labels = torch.randint(0, VOCAB, (batch.layout.num_tokens,), generator=generator)
    loss = L.AlphaDivergence(tau=L.SmoothHybrid(), alpha=L.RewardConfidenceGuarded())
    given = {"ref_logps": batch.ref.float(), "targets": batch.rewards.float(), "impl": impl}
    rows = pk.token_logps(hidden, weight, labels, outputs=("entropy",))
    want = pk.preference_loss(
        rows.logps, batch.layout, loss, stats={"entropy": rows.entropy}, vocab_size=VOCAB, **given
    ).loss
    linear = pk.linear_preference_loss(hidden, weight, labels, batch.layout, loss, **given).loss
    logits = pk.logits_preference_loss(hidden @ weight.T, labels, batch.layout, loss, **given).loss
    torch.testing.assert_close(linear, want)
    torch.testing.assert_close(logits, want)
