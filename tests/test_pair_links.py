"""Links of pairs, and the arithmetic that they share, against float64: at random and at extreme scores."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
import triton
import triton.language as tl

import prefkern as pk
from conftest import DEVICE
from prefkern.kernels import link_math, links
from prefkern.kernels.tail import tail
from prefkern.losses.orpo import log1mexp, log_odds

POINTS = torch.tensor([-1e4, -20.0, -0.75, -1e-4, 0.0, 0.6, 4.0, 1e4])
DIVERGENCES = [
    {}, {"f_divergence": "forward_kl"}, {"f_divergence": "js"}, {"f_divergence": "alpha"},
    {"f_divergence": "alpha", "f_alpha": 1.5}, {"f_divergence": "alpha", "f_alpha": 0.999},
]  # fmt: skip
LOSSES = [
    *(make(**divergence) for make in (pk.losses.DPO, pk.losses.IPO) for divergence in DIVERGENCES),
    *(
        make(**divergence)
        for make in (pk.losses.Hinge, pk.losses.Robust, pk.losses.EXO, pk.losses.DiscoPOP)
        for divergence in DIVERGENCES[:2]
    ),
    pk.losses.DPO(beta=2.0, label_smoothing=0.2), pk.losses.Robust(beta=2.0, label_smoothing=0.4),
    pk.losses.Hinge(beta=2.0), pk.losses.EXO(beta=2.0, label_smoothing=0.3), pk.losses.DiscoPOP(beta=2.0),
    pk.losses.DiscoPOP(tau=1.0), pk.losses.NCA(), pk.losses.NCA(beta=2.0), pk.losses.BCO(), pk.losses.BCO(beta=2.0),
    pk.losses.SPPO(), pk.losses.SPPO(beta=2.0), pk.losses.APOZero(), pk.losses.APOZero(beta=2.0),
    pk.losses.APODown(), pk.losses.APODown(beta=2.0), pk.losses.ORPO(), pk.losses.ORPO(beta=2.0),
]  # fmt: skip


@triton.jit
def apply_link(
    score_ptr, target_ptr, margin_ptr, value_ptr, dscore_ptr, num_groups, p0, p1, p2, p3, p4, p5, LINK: tl.constexpr
):  # fmt: skip
    """One program takes one pair after the other."""
    offs_k = tl.arange(0, 2)
    for g in range(0, num_groups):
        score_K, target_K = tl.load(score_ptr + 2 * g + offs_k), tl.load(target_ptr + 2 * g + offs_k)
        value, dscore_K = LINK(score_K, offs_k < 2, target_K, tl.load(margin_ptr + g), p0, p1, p2, p3, p4, p5)
        tl.store(value_ptr + g, value)
        tl.store(dscore_ptr + 2 * g + offs_k, dscore_K)


def link_and_definition(loss, score_G2, margin_G=None):
    """Values and derivatives by the link in fp32 and by `eager` in float64."""
    margin_G = torch.zeros(len(score_G2)) if margin_G is None else margin_G
    target_G2 = torch.rand_like(score_G2) + 0.2
    value, g = torch.empty(len(score_G2), device=DEVICE), torch.empty(len(score_G2), 2, device=DEVICE)
    params = (*loss.link_params(), *[0.0] * 6)[:6]
    given = (x.to(DEVICE).contiguous() for x in (score_G2, target_G2, margin_G))
    apply_link[(1,)](*given, value, g, len(score_G2), *map(float, params), LINK=links.find(loss.link))
    x = score_G2.double().requires_grad_()
    targets = (target_G2.double(), torch.ones_like(x, dtype=torch.bool)) if loss.link_targets else ()
    want = loss.eager(x, margin_G.double(), *targets)
    return value.cpu(), g.cpu(), want.detach(), torch.autograd.grad(want.sum(), x)[0]


def scores_for(loss, *scores):
    """As they are; for ORPO, whose scores are log-probabilities, none above 0."""
    return -torch.cat(scores).abs() if loss.name == "orpo" else torch.cat(scores)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_random_and_extreme_scores(loss):
    """Values and derivatives stay finite, and exact to what rounding x = beta (s_w - s_l) in fp32 leaves."""
    torch.manual_seed(0)
    extreme = torch.cartesian_prod(POINTS, POINTS)[::3]  # the interpreter takes its time; each point meets most others
    scores = scores_for(loss, extreme, 4 * torch.randn(10, 2))
    value, g, want, want_g = link_and_definition(loss, scores)
    assert value.isfinite().all() and g.isfinite().all()
    torch.testing.assert_close(value.double(), want, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(g.double(), want_g, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    "loss",
    [pk.losses.DPO(), pk.losses.Hinge(), pk.losses.EXO(), pk.losses.DiscoPOP(), pk.losses.IPO(), pk.losses.BCO(),
     pk.losses.NCA(), pk.losses.ORPO()],
    ids=lambda loss: loss.name,
)  # fmt: skip
def test_margin_is_subtracted(loss):
    torch.manual_seed(0)
    scores = scores_for(loss, 3 * torch.randn(12, 2))
    value, g, want, want_g = link_and_definition(loss, scores, torch.randn(12))
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(g.double(), want_g, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", {loss.link: loss for loss in LOSSES}.values(), ids=lambda loss: loss.link)
def test_padding_gets_no_derivative(loss):
    """A pair among longer groups is padded to their width."""
    layout, scores, ones = pk.Layout.groups([1] * 6, [2, 4]), -torch.rand(6) - 0.1, torch.ones(6)
    _, _, g = tail(
        scores.to(DEVICE), layout.index(DEVICE), links.find(loss.link), loss.link_params(), target_S=ones.to(DEVICE)
    )
    assert g.isfinite().all() and (g[4:] == 0).all() and (g[:4] != 0).all()


@triton.jit
def apply_all(x_ptr, y_ptr, N: tl.constexpr):
    """Row i of y is function i of x; x < 0 for the last three."""
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    negative = -tl.abs(x)
    odds, slope = link_math.log_odds(negative)
    tl.store(y_ptr + offs, link_math.expm1(x))
    tl.store(y_ptr + N + offs, link_math.sigmoid(x))
    tl.store(y_ptr + 2 * N + offs, link_math.softplus(x))
    tl.store(y_ptr + 3 * N + offs, link_math.log1mexp(tl.minimum(negative, -1e-30)))
    tl.store(y_ptr + 4 * N + offs, odds)
    tl.store(y_ptr + 5 * N + offs, slope)


def test_shared_arithmetic_is_exact_to_a_few_ulps():
    torch.manual_seed(0)
    x = torch.cat([POINTS[(POINTS.abs() < 100) & (POINTS != 0)], torch.randn(250) * torch.logspace(-6, 1.4, 250)])
    x = F.pad(x, (0, 256 - len(x)), value=1.0)
    y = torch.empty(6, 256, device=DEVICE)
    apply_all[(1,)](x.to(DEVICE), y, N=256)
    wide = x.double()
    negative = -wide.abs()
    want = torch.stack([
        torch.expm1(wide), wide.sigmoid(), F.softplus(wide, threshold=1e9), log1mexp(negative), log_odds(negative),
        -1 / torch.expm1(negative.clamp(max=-1e-6)),
    ])  # fmt: skip
    error = (y.cpu().double() - want).abs() / want.abs().clamp(min=1e-3)  # log-odds cross 0
    assert error.amax(1).max() < 2e-6, error.amax(1)
