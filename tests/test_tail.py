"""The tail kernel against its definition in plain torch: values, scores and token gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl

from conftest import DEVICE
from numerics import assert_as_good_as_torch, poison
from prefkern.kernels import link_math, links
from prefkern.kernels.tail import tail
from prefkern.layout import Layout
from tail_oracle import eager_tail, kernel_operands, listwise, logistic, negative, random_operands, rows, squared

EPS = 4e-7  # relative; three fp32 roundings


@triton.jit
def listwise_link(score_K, valid_K, target_K, margin, p0, p1, p2, p3, p4, p5):
    """Cross-entropy of softmax(p0 * score) against the targets: what a listwise loss will look like."""
    z = tl.where(valid_K, p0 * score_K, float("-inf"))
    z = z - tl.max(z, axis=0)
    logp = tl.where(valid_K, z - tl.log(tl.sum(tl.exp(z), axis=0)), 0.0)
    mass = tl.sum(target_K, axis=0)
    return margin - tl.sum(target_K * logp, axis=0), p0 * tl.where(valid_K, mass * tl.exp(logp) - target_K, 0.0)


def check(layout, link, params, loss, logps, **operands) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel on fp32 operands; compare with eager in fp32 and in float64 on the same numbers."""
    results = {}
    for dtype in (torch.float32, torch.float64):
        x = logps.detach().to(dtype, copy=True).requires_grad_()
        value, score = eager_tail(x, layout, loss, **{k: v.to(dtype) for k, v in operands.items()})
        (g,) = torch.autograd.grad(value.sum(), x) if layout.num_groups else (torch.zeros_like(x),)
        results[dtype] = value, score, g
    got = tail(logps.to(DEVICE), layout.index(DEVICE), link, params, **kernel_operands(operands))
    for mine, same, truth in zip(got, results[torch.float32], results[torch.float64]):
        assert_as_good_as_torch(mine, same, truth, EPS)
    return got


PAIRS = Layout.pairs([17, 0, 5, 300, 1], [9, 4, 0, 41, 1])
LISTS = Layout.groups([3, 7, 1, 0, 12, 5, 5, 9, 40, 2], [5, 1, 4])
LAYOUTS = {
    "pairs": PAIRS,
    "one_pair": Layout.pairs([1], [1]),
    "empty_responses": Layout.pairs([0, 0], [0, 3]),
    "static1": Layout.pairs([5, 3, 0], [2, 8, 1]).static(1),
    "static3": Layout.pairs([17, 0, 5], [9, 4, 0]).static(3),
    "adaptive4": Layout.pairs([17, 30], [9, 41]).adaptive(4),
    "boundaries": Layout.pairs([9, 6], [9, 7]).split_at([[3, 7], [0], [], [2, 2, 7]]),
    "prefix_static3": Layout.pairs([17, 0, 11], [9, 4, 2]).static(3, accumulate="prefix"),
    "prefix_adaptive4": Layout.pairs([17, 30], [9, 41]).adaptive(4, accumulate="prefix"),
    "prefix_uncut_groups": Layout.pairs([4, 6], [5, 3]).adaptive(1, accumulate="prefix"),
    "last_chain_empty": Layout.pairs([5, 0], [3, 0]),
}


@pytest.mark.parametrize("link, params, loss", [
    (links.logistic, (0.1, 0.0), logistic(0.1, 0.0)),
    (links.logistic, (2.0, 0.2), logistic(2.0, 0.2)),
    (links.squared, (), squared),
], ids=["logistic", "smoothed", "squared"])  # fmt: skip
@pytest.mark.parametrize("name", LAYOUTS)
def test_pairs(name, link, params, loss, monkeypatch):
    poison(monkeypatch)
    layout = LAYOUTS[name]
    logps, ref = rows(layout)
    check(layout, link, params, loss, logps, ref=ref, **random_operands(layout))


@pytest.mark.parametrize("operand", ["ref", "weights", "scale", "margin", "weight"])
def test_each_operand_alone(operand):
    layout = LAYOUTS["prefix_static3"] if operand == "scale" else LAYOUTS["adaptive4"]
    logps, ref = rows(layout)
    operands = dict(random_operands(layout), ref=ref)
    check(layout, links.logistic, (0.3,), logistic(0.3, 0.0), logps, **{operand: operands[operand]})


@pytest.mark.parametrize("layout", [
    Layout.sequences([4]), Layout.sequences([3, 0, 70, 1]), Layout.sequences([9, 5]).static(2),
], ids=["one_segment", "ragged", "static2"])  # fmt: skip
def test_single(layout):
    logps, _ = rows(layout)
    check(layout, links.negative, (), negative, logps, **random_operands(layout))


@pytest.mark.parametrize("layout", [
    LISTS,
    LISTS.static(4),
    LISTS.static(4, accumulate="prefix"),
    Layout.groups([i % 7 for i in range(64 + 3)], [64, 3]),
], ids=["k_5_1_4", "static", "prefix", "k_64_3"])  # fmt: skip
def test_lists_of_varying_length_with_targets(layout, monkeypatch):
    poison(monkeypatch)
    logps, ref = rows(layout)
    target = torch.rand(layout.num_segments, generator=torch.Generator().manual_seed(3))
    operands = dict(random_operands(layout), ref=ref, target=target)
    check(layout, listwise_link, (0.2,), listwise(0.2), logps, **operands)


def test_golden_values_of_autoregressive_dpo():
    chosen = [-0.3, -0.16666666666666666, -0.033333333333333326, 0.1, 0.23333333333333334, 0.3666666666666667, 0.5]
    rejected = [0.2, -0.06666666666666665, -0.3333333333333333, -0.6]
    layout = Layout.pairs([7], [4])
    golden = {
        layout.static(1): 4.778628669698406,
        layout.static(2): 2.700050534239139,
        layout.static(4): 1.313006085850457,
        layout.static(8): 0.6209570477895321,
        layout.adaptive(1): 0.6209570477895321,
        layout.adaptive(2): 1.3174737999226052,
        layout.adaptive(4): 2.7011653467543892,
    }
    logps = torch.tensor(chosen + rejected, device=DEVICE)
    for cut, expected in golden.items():
        value, _, _ = tail(logps, cut.index(DEVICE), links.logistic, (0.1, 0.0))
        assert value.sum().item() == pytest.approx(expected, rel=1e-6)


def test_one_segment_is_the_uncut_layout_to_the_bit():
    logps, ref = (x.to(DEVICE) for x in rows(PAIRS))
    uncut = tail(logps, PAIRS.index(DEVICE), links.logistic, (0.1,), ref_logps_N=ref)
    for layout in (PAIRS.adaptive(1), PAIRS.static(300), PAIRS.static(10**6), PAIRS.adaptive(1, accumulate="prefix")):
        cut = tail(logps, layout.index(DEVICE), links.logistic, (0.1,), ref_logps_N=ref)
        assert all(a.equal(b) for a, b in zip(cut, uncut))


def test_bitwise_repeatable():
    layout = LAYOUTS["prefix_static3"]
    logps, ref = (x.to(DEVICE) for x in rows(layout))
    once, again = (tail(logps, layout.index(DEVICE), links.logistic, (0.1,), ref_logps_N=ref) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(once, again))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("accumulate", ["segment", "prefix"])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_rows_of_weight_zero_take_no_part(bad, accumulate):
    layout = Layout.pairs([6, 4], [5, 3]).static(2, accumulate=accumulate)
    logps, ref = rows(layout)
    weights = torch.ones(layout.num_tokens)
    weights[[1, 7, 17]] = 0.0
    expected = check(layout, links.logistic, (0.1,), logistic(0.1, 0.0), logps, ref=ref, weights=weights)
    logps[weights == 0] = bad
    got = tail(
        logps.to(DEVICE), layout.index(DEVICE), links.logistic, (0.1,), ref_logps_N=ref.to(DEVICE),
        token_weights_N=weights.to(DEVICE),
    )  # fmt: skip
    assert all(a.equal(b) for a, b in zip(got, expected))
    assert (got[2][weights.to(DEVICE) == 0] == 0).all() and (got[2][weights.to(DEVICE) != 0] != 0).all()


def test_all_rows_ignored():
    logps, ref = (x.to(DEVICE) for x in rows(PAIRS))
    value, score, g = tail(
        logps, PAIRS.index(DEVICE), links.logistic, (0.1,), ref_logps_N=ref, token_weights_N=torch.zeros_like(logps)
    )
    torch.testing.assert_close(value, torch.full_like(value, 0.6931471805599453), rtol=1e-7, atol=0)
    assert (score == 0).all() and (g == 0).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
def test_group_of_weight_zero_takes_no_part_even_where_its_score_is_not_finite():
    layout = Layout.pairs([3, 2], [2, 4])
    logps, _ = rows(layout)
    logps[0] = float("-inf")
    weight = torch.tensor([0.0, 1.0], device=DEVICE)
    value, score, g = tail(logps.to(DEVICE), layout.index(DEVICE), links.squared, weight_G=weight)
    assert score[0] == float("-inf") and value[0] == 0 and (g[:5] == 0).all() and (g[5:] != 0).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_rows_of_weight_zero_have_gradient_zero_even_where_their_group_is_not_finite():
    logps = torch.tensor([float("-inf"), -1.0, -2.0], device=DEVICE)
    weights = torch.tensor([1.0, 0.0, 0.5], device=DEVICE)
    _, score, g = tail(logps, Layout.pairs([2], [1]).index(DEVICE), links.squared, token_weights_N=weights)
    assert score.tolist() == [float("-inf"), -1.0] and g.tolist() == [float("-inf"), 0.0, float("inf")]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
def test_infinite_scores_have_the_limits_of_the_logistic_loss():
    """A reference that forbids a token of the chosen response makes the pair certain, and not NaN."""
    layout = Layout.pairs([1, 1], [1, 1])
    ref = torch.tensor([float("-inf"), -1.0, -1.0, float("-inf")], device=DEVICE)
    logps = torch.full((4,), -1.0, device=DEVICE)
    value, _, g = tail(logps, layout.index(DEVICE), links.logistic, (0.5, 0.0), ref_logps_N=ref)
    assert value.tolist() == [0.0, float("inf")] and g.tolist() == [0.0, 0.0, -0.5, 0.5]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_finite_at_extreme_scores(sign, smoothing):
    layout = Layout.pairs([2], [2])
    logps = sign * torch.tensor([-2500.0, -2500.0, 2500.0, 2500.0])
    value, _, g = check(layout, links.logistic, (1.0, smoothing), logistic(1.0, smoothing), logps)
    assert value.isfinite().all() and g.isfinite().all()


def test_logistic_keeps_its_relative_precision_where_it_is_tiny():
    """-logsig(x) is about exp(-x) for large x: neither may drown in the rounding of 1 + exp(-x)."""
    x = torch.cat([torch.linspace(-20, 80, 101), torch.tensor([0.0, 1e-7, -1e-7])])
    layout = Layout.pairs([1] * len(x), [0] * len(x))
    value, _, g = tail(x.to(DEVICE), layout.index(DEVICE), links.logistic, (1.0, 0.0))
    truth = x.double()
    torch.testing.assert_close(value.cpu().double(), -F.logsigmoid(truth), rtol=1e-5, atol=0)
    torch.testing.assert_close(g.cpu().double(), -torch.sigmoid(-truth), rtol=1e-5, atol=0)
    near_zero = x.abs() < 2
    torch.testing.assert_close(value.cpu().double()[near_zero], -F.logsigmoid(truth[near_zero]), rtol=4e-7, atol=0)


def test_log1p_unit_is_exact_to_a_few_ulps():
    @triton.jit
    def kernel(t_ptr, out_ptr, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        tl.store(out_ptr + offs, link_math.log1p_unit(tl.load(t_ptr + offs)))

    t = torch.cat([torch.logspace(-38, 0, 512), torch.linspace(0, 1, 512)])
    out = torch.empty_like(t, device=DEVICE)
    kernel[(1,)](t.to(DEVICE), out, BLOCK=1024)
    torch.testing.assert_close(out.cpu().double(), t.double().log1p(), rtol=4e-7, atol=0)


@pytest.mark.parametrize("layout", [
    Layout.pairs([200_003], [100_001]), Layout.sequences([2**18 + 1]),
    Layout.pairs([121], [80]).static(1, accumulate="prefix"),
], ids=["pair", "single", "prefix"])  # fmt: skip
def test_long_sums_stay_exact(layout):
    """Segments of many tiles, prefixes of many segments: rounding must not pile up with either."""
    logps = -3 - torch.rand(layout.num_tokens, generator=torch.Generator().manual_seed(0))
    _, score, _ = tail(logps.to(DEVICE), layout.index(DEVICE), links.logistic, (1e-6,), want_grad=False)
    _, truth = eager_tail(logps.double(), layout, negative)
    torch.testing.assert_close(score.cpu().double(), truth, rtol=2e-7, atol=0)


def test_strided_operands_and_no_gradient():
    layout = Layout.pairs([5, 3], [4, 6])
    logps, ref = rows(layout)
    expected = tail(logps.to(DEVICE), layout.index(DEVICE), links.logistic, (0.1,), ref_logps_N=ref.to(DEVICE))
    both = torch.stack([logps, ref], dim=1).to(DEVICE)
    value, score, g = tail(
        both[:, 0], layout.index(DEVICE), links.logistic, (0.1,), ref_logps_N=both[:, 1], want_grad=False
    )
    assert value.equal(expected[0]) and score.equal(expected[1]) and g is None


def test_no_responses_at_all():
    value, score, g = tail(torch.zeros(0, device=DEVICE), Layout.pairs([], []).index(DEVICE), links.logistic, (0.1,))
    assert value.shape == score.shape == g.shape == (0,)


def test_rows_outside_every_segment_get_zero_gradient(monkeypatch):
    """A Layout covers every row; an index built by hand need not."""
    poison(monkeypatch)
    index = Layout.pairs([3], [3]).index(DEVICE)
    index = index._replace(segment_end_S=index.segment_end_S - 1)
    _, _, g = tail(torch.ones(6, device=DEVICE), index, links.logistic, (1.0,))
    assert (g == 0).tolist() == [False, False, True, False, False, True]
