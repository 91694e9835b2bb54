"""Where one loss turns into another: value and gradient agree, on the eager and on the Triton tail."""

import pytest
import torch

import prefkern as pk
from conftest import DEVICE

PAIRS = pk.Layout.pairs([7, 12, 1], [4, 9, 5])
L = pk.losses


def run(loss, layout, impl, *, at_reference=False, dtype=torch.float32, **options):
    """Loss and gradient of random log-probabilities; those of the policy are the reference's where asked for."""
    generator = torch.Generator().manual_seed(0)
    logps, ref = (-4 * torch.rand(layout.num_tokens, generator=generator, dtype=dtype).to(DEVICE) for _ in range(2))
    x = (ref if at_reference else logps).clone().requires_grad_()
    out = pk.preference_loss(
        x, layout, loss, ref_logps=ref if loss.needs_reference else None, impl=impl,
        **{k: v.to(DEVICE) for k, v in options.items()},
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out.loss, x)
    return out.loss.detach(), grad


def same(one, other):
    for got, want in zip(one, other):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-7)


IMPLS = pytest.mark.parametrize("impl", ["eager", "triton"])


@IMPLS
@pytest.mark.parametrize("stats", ["ema", "batch", "fixed", "ema_uncorrected"])
def test_alphadpo_at_alpha_0_is_simpo(impl, stats):
    """AlphaDPO's gamma is a share of beta where its margin stands inside beta."""
    alpha = L.AlphaDPO(beta=2.0, gamma=0.25, alpha=0.0, stats=stats)
    same(run(alpha, PAIRS, impl), run(L.SimPO(beta=2.0, gamma=0.5), PAIRS, impl))


@IMPLS
@pytest.mark.parametrize("length_normalized", [True, False])
def test_adadpo_at_policy_equal_to_reference_is_dpo(impl, length_normalized):
    ada = L.AdaDPO(beta=0.3, space="reference", length_normalized=length_normalized)
    same(run(ada, PAIRS, impl, at_reference=True), run(L.DPO(beta=0.3), PAIRS, impl, at_reference=True))


@IMPLS
def test_anchored_listwise_of_two_is_anchored_pairwise(impl):
    """tau is 1 / beta."""
    q = torch.tensor([0.9, 0.1, 0.5, 0.5, 0.2, 0.8])
    listwise = L.AnchoredListwise(tau=1 / 0.4, targets=L.Given())
    same(run(listwise, PAIRS, impl, targets=q), run(L.AnchoredPairwise(beta=0.4), PAIRS, impl, targets=q))


@IMPLS
def test_anchored_pairwise_with_certain_preferences_is_dpo(impl):
    q = torch.tensor([1.0, 0.0] * 3)
    same(run(L.AnchoredPairwise(beta=0.4), PAIRS, impl, targets=q), run(L.DPO(beta=0.4), PAIRS, impl))


LISTS = pk.Layout.groups([3, 5, 2, 6, 1, 4, 4], [3, 4])
Q = torch.tensor([0.2, 0.5, 0.3, 0.1, 0.2, 0.3, 0.4])


@IMPLS
def test_alpha_divergence_at_1_is_anchored_listwise(impl):
    """KL(q || p~) is the cross-entropy less the entropy of q."""
    value, grad = run(L.AlphaDivergence(alpha=1.0, tau=2.0, targets=L.Given()), LISTS, impl, targets=Q)
    listwise, listwise_grad = run(L.AnchoredListwise(tau=2.0, targets=L.Given()), LISTS, impl, targets=Q)
    entropy = torch.stack([-(q * q.log()).sum() for q in Q.split([3, 4])]).mean().to(DEVICE)
    same((value, grad), (listwise - entropy, listwise_grad))


@IMPLS
def test_alpha_divergence_at_0_is_reverse_kl(impl):
    generator = torch.Generator().manual_seed(0)
    logps, ref = (-4 * torch.rand(LISTS.num_tokens, generator=generator) for _ in range(2))
    x = logps.double().requires_grad_()
    u = torch.stack([d.sum() for d in (x - ref.double()).split(list(LISTS.lengths))]) / 2.0
    kl = [
        (p * (p.log() - q.log())).sum()
        for p, q in zip((part.softmax(0) for part in u.split([3, 4])), Q.double().split([3, 4]))
    ]
    want = torch.stack(kl).mean()
    (grad,) = torch.autograd.grad(want, x)
    got = run(L.AlphaDivergence(alpha=0.0, tau=2.0, targets=L.Given()), LISTS, impl, targets=Q)
    same(got, (want.detach().float().to(DEVICE), grad.float().to(DEVICE)))


@IMPLS
@pytest.mark.parametrize("granularity", [None, pk.Static(2), pk.Adaptive(3)], ids=repr)
def test_critical_token_dpo_with_weights_1_is_autoregressive_dpo(impl, granularity):
    ones = torch.ones(PAIRS.num_tokens)
    critical = L.CriticalTokenDPO(beta=0.3, granularity=granularity)
    plain = L.AutoregressiveDPO(beta=0.3, granularity=granularity)
    same(run(critical, PAIRS, impl, token_weights=ones), run(plain, PAIRS, impl))


@IMPLS
@pytest.mark.parametrize("loss, other, options", [
    (L.RDPO(beta=0.3, alpha=0.0), L.DPO(beta=0.3), {}),
    (L.TDPO2(beta=0.3, alpha=0.0), L.DPO(beta=0.3), {"token_kl": torch.rand(PAIRS.num_tokens)}),
    (L.Robust(beta=0.3, label_smoothing=0.0), L.DPO(beta=0.3), {}),
    (L.AutoregressiveDPO(beta=0.3, granularity=pk.Adaptive(1)), L.DPO(beta=0.3), {}),
    (L.AutoregressiveDPO(beta=0.3, granularity=pk.Static(12)), L.DPO(beta=0.3), {}),
    (L.DPO(beta=0.3, ld_alpha=1.0), L.DPO(beta=0.3), {}),
], ids=["rdpo", "tdpo2", "robust", "adaptive(1)", "static(longest)", "ld_alpha 1"])  # fmt: skip
def test_neutral_option_gives_dpo(impl, loss, other, options):
    same(run(loss, PAIRS, impl, **options), run(other, PAIRS, impl))
