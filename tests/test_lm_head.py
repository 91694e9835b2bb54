"""The cut body against float64: values, every gradient, odd sizes, strides, edges, LoRA, filter, what it allocates."""

import mmap
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import DEVICE
from numerics import DTYPES, VIEWS, LargestTensor, assert_as_good_as_torch, poison, row_stats

pytest.importorskip("triton")
from prefkern.head import Head
from prefkern.kernels import block_sparse, lm_head
from prefkern.kernels.lm_head import lm_head_backward, lm_head_forward
from prefkern.kernels.tuning import HeadConfig, can_bulk_copy

EPS = 1e-6  # fp32 sums in another order than torch's
PLAIN = Head()
FULL = Head(softcap=5.0, logit_scale=1.3, temperature=0.7)
WANT = dict(want_entropy=True, want_top1=True, want_mean=True)
SHAPES = [(1, 16, 2), (40, 1, 300), (9, 40, 1), (255, 123, 507), (257, 128, 1031)]
ONE_TILE, PLENTY = 0, 1 << 30  # workspace_bytes
NEEDS = ("needs_hidden", "needs_weight", "needs_bias", "needs_low", "needs_low_weight")


@pytest.fixture(autouse=True)
def poisoned_workspaces(monkeypatch):
    poison(monkeypatch)


def make(N, D, V, dtype=torch.float32):
    """Hidden states, weight, bias, labels with the last entry and two ignored rows among them, upstream gradients."""
    torch.manual_seed(N + V)
    labels = torch.randint(0, V, (N,))
    labels[0] = V - 1
    labels[1:3] = PLAIN.ignore_index
    parameters = torch.randn(N, D), torch.randn(V, D) * 3 / D**0.5, torch.randn(V)
    return tuple(t.to(DEVICE) for t in (*(p.to(dtype) for p in parameters), labels, torch.randn(N), torch.randn(N)))


def make_low(N, V, R, dtype=torch.float32):
    """A second pair of factors of logits, as LoRA has it: (N, R), (V, R)."""
    torch.manual_seed(R)
    return tuple(t.to(DEVICE, dtype) for t in (torch.randn(N, R), torch.randn(V, R) / R**0.5))


def eager(hidden, weight, bias, labels, head, grads=None, low=(None, None)):
    """Statistics and the gradients of hidden, weight, bias and low (those given), in plain torch."""
    given = [t for t in (hidden, weight, bias, *low) if t is not None]
    inputs = [t.clone().requires_grad_() for t in given]
    hidden, weight, *rest = inputs
    bias = None if bias is None else rest.pop(0)
    logits = hidden @ weight.T + rest[0] @ rest[1].T if rest else hidden @ weight.T
    stats = row_stats(logits, labels, head, bias)
    if grads is None:
        return stats, None
    return stats, torch.autograd.grad((stats.logps * grads[0]).sum() + (stats.entropy * grads[1]).sum(), inputs)


def truth_and_torch(hidden, weight, bias, labels, head, grads=None, low=(None, None)):
    double, low_double = ([None if t is None else t.double() for t in ts] for ts in ((hidden, weight, bias), low))
    truth = eager(*double, labels, head, grads, low_double)
    return truth, eager(hidden, weight, bias, labels, head, grads, low)


def backward(
    hidden, weight, bias, labels, head, grads, *, low=(None, None), needs=NEEDS, workspace_bytes=PLENTY, filter_eps=None
):
    """Gradients of what is given, as `needs` says."""
    low = dict(low_NR=low[0], low_weight_VR=low[1])
    stats = lm_head_forward(hidden, weight, labels, head, bias_V=bias, **low, want_entropy=True)
    given = (hidden, weight, bias, *low.values())
    found = lm_head_backward(
        hidden, weight, labels, stats.lse, grads[0], head, bias_V=bias, **low, entropy_N=stats.entropy,
        grad_entropy_N=grads[1], workspace_bytes=workspace_bytes, filter_eps=filter_eps,
        **{name: name in needs and t is not None for name, t in zip(NEEDS, given)},
    )  # fmt: skip
    assert len(found) == 5
    return [grad for grad, t in zip(found, given) if t is not None]


def check_stats(got, truth, same):
    for name in ("logps", "lse", "entropy", "mean_logit"):
        assert_as_good_as_torch(getattr(got, name), getattr(same, name), getattr(truth, name), EPS)
        assert getattr(got, name).dtype == torch.float32
    assert torch.equal(got.is_top1, truth.is_top1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", [PLAIN, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("N, D, V", SHAPES)
def test_forward(N, D, V, head, dtype):
    hidden, weight, bias, labels, *_ = make(N, D, V, dtype)
    bias = bias if head is FULL else None
    (truth, _), (same, _) = truth_and_torch(hidden, weight, bias, labels, head)
    check_stats(lm_head_forward(hidden, weight, labels, head, bias_V=bias, **WANT), truth, same)


def test_forward_computes_only_what_is_wanted():
    hidden, weight, _, labels, *_ = make(5, 16, 300)
    bare, full = (lm_head_forward(hidden, weight, labels, PLAIN, **want) for want in ({}, WANT))
    assert set(bare[2:]) == {None}
    assert torch.equal(bare.logps, full.logps) and torch.equal(bare.lse, full.lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workspace_bytes", [ONE_TILE, PLENTY], ids=["one tile", "plenty"])
@pytest.mark.parametrize("N, D, V", SHAPES)
def test_backward(N, D, V, workspace_bytes, dtype):
    hidden, weight, bias, labels, *grads = make(N, D, V, dtype)
    (_, truth), (_, same) = truth_and_torch(hidden, weight, bias, labels, FULL, grads)
    got = backward(hidden, weight, bias, labels, FULL, grads, workspace_bytes=workspace_bytes)
    for g, s, t in zip(got, same, truth):
        assert g.dtype == dtype
        assert_as_good_as_torch(g, s, t, EPS)
    assert not got[0][labels == FULL.ignore_index].any()


def test_backward_of_the_log_probabilities_alone():
    hidden, weight, _, labels, grad_logps, grad_entropy = make(33, 16, 300)
    zero = torch.zeros_like(grad_entropy)
    (_, truth), (_, same) = truth_and_torch(hidden, weight, None, labels, PLAIN, (grad_logps, zero))
    lse = lm_head_forward(hidden, weight, labels, PLAIN).lse
    needs = dict(needs_hidden=True, needs_weight=True, needs_bias=False, workspace_bytes=PLENTY)
    got = lm_head_backward(hidden, weight, labels, lse, grad_logps, PLAIN, **needs)
    assert got[2] is None
    for g, s, t in zip(got, same, truth):
        assert_as_good_as_torch(g, s, t, EPS)


def test_backward_of_the_entropy_alone():
    hidden, weight, bias, labels, grad_logps, grad_entropy = make(33, 16, 300)
    grads = (torch.zeros_like(grad_logps), grad_entropy)
    (_, truth), (_, same) = truth_and_torch(hidden, weight, bias, labels, PLAIN, grads)
    for g, s, t in zip(backward(hidden, weight, bias, labels, PLAIN, grads), same, truth):
        assert_as_good_as_torch(g, s, t, EPS)


@pytest.mark.parametrize("filter_eps", [None, 1e-30], ids=["exact", "filter"])
@pytest.mark.parametrize("needs", [(), *((name,) for name in NEEDS)], ids=lambda needs: "+".join(needs) or "none")
def test_each_gradient_alone_equals_the_joint_one(needs, filter_eps):
    *tensors, labels, grad_logps, grad_entropy = make(33, 16, 300)
    call = (*tensors, labels, PLAIN, (grad_logps, grad_entropy))
    options = dict(low=make_low(33, 300, 4), filter_eps=filter_eps)
    joint = backward(*call, **options)
    got = backward(*call, **options, needs=needs)
    assert len(joint) == len(got) == 5
    for name, alone, together in zip(NEEDS, got, joint):
        assert torch.equal(alone, together) if name in needs else alone is None


def test_an_all_ignored_batch_is_zero():
    *tensors, labels, grad_logps, grad_entropy = make(6, 16, 40)
    labels.fill_(PLAIN.ignore_index)
    assert not any(t.any() for t in lm_head_forward(*tensors[:2], labels, PLAIN, **WANT)[:5])
    assert not any(g.any() for g in backward(*tensors, labels, PLAIN, (grad_logps, grad_entropy)))


@pytest.mark.parametrize("label", [-1, 40, 2**40])
def test_a_label_outside_the_vocabulary_gives_nan(label):
    hidden, weight, _, labels, *_ = make(6, 16, 40)
    labels[4] = label
    stats = lm_head_forward(hidden, weight, labels, PLAIN, **WANT)
    assert stats.logps.isnan().tolist() == [n == 4 for n in range(6)]
    assert not stats.is_top1[4] and stats.lse.isfinite().all()


@pytest.mark.parametrize("which", ["hidden", "weight"])
@pytest.mark.parametrize("view", VIEWS)
def test_strided_inputs(view, which):
    hidden, weight, bias, labels, *grads = make(33, 16, 300)
    strided = [VIEWS[view](hidden), weight] if which == "hidden" else [hidden, VIEWS[view](weight)]
    plain = [t.contiguous() for t in strided]
    stats, expected = (lm_head_forward(*x, labels, PLAIN, bias_V=bias, **WANT) for x in (strided, plain))
    assert all(torch.equal(a, b) for a, b in zip(stats[:5], expected))
    (_, truth), (_, same) = truth_and_torch(*plain, bias, labels, PLAIN, grads)
    for g, s, t in zip(backward(*strided, bias, labels, PLAIN, grads), same, truth):
        assert g.is_contiguous()
        assert_as_good_as_torch(g, s, t, EPS)


def test_masked_vocabulary():
    """-inf logits by way of the bias: all of the first part of the vocabulary, and one row's label."""
    hidden, weight, bias, labels, *grads = make(9, 16, 1031)
    bias[:600] = float("-inf")
    labels[3:] = torch.arange(1025, 1031, device=DEVICE)
    labels[4] = 17
    (truth, _), (same, _) = truth_and_torch(hidden, weight, bias, labels, PLAIN)
    stats = lm_head_forward(hidden, weight, labels, PLAIN, bias_V=bias, **WANT)
    check_stats(stats, truth, same)
    assert stats.logps[4] == float("-inf")

    finite = bias.masked_fill(bias == float("-inf"), -1e30)  # autograd of 0 * -inf is NaN: the limit instead
    (_, truth), (_, same) = truth_and_torch(hidden, weight, finite, labels, PLAIN, grads)
    for g, s, t in zip(backward(hidden, weight, bias, labels, PLAIN, grads), same, truth):
        assert_as_good_as_torch(g, s, t, EPS)


def test_large_logits_stay_finite():
    hidden, weight, bias, labels, *grads = make(9, 16, 300)
    weight, bias = weight * 100, bias + 1e4
    (truth, _), (same, _) = truth_and_torch(hidden, weight, bias, labels, PLAIN)
    check_stats(lm_head_forward(hidden, weight, labels, PLAIN, bias_V=bias, **WANT), truth, same)
    assert all(g.isfinite().all() for g in backward(hidden, weight, bias, labels, PLAIN, grads))


def test_two_runs_agree_to_the_bit():
    *tensors, labels, grad_logps, grad_entropy = make(257, 123, 1031)
    first, second = (lm_head_forward(*tensors[:2], labels, FULL, bias_V=tensors[2], **WANT) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:5], second))
    first, second = (backward(*tensors, labels, FULL, (grad_logps, grad_entropy)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_no_rows():
    hidden, weight, bias, labels, *grads = make(3, 16, 40)
    hidden, labels, grads = hidden[:0], labels[:0], [g[:0] for g in grads]
    assert all(t.shape == (0,) for t in lm_head_forward(hidden, weight, labels, PLAIN, **WANT)[:5])
    low, low_weight = make_low(3, 40, 4)
    found = backward(hidden, weight, bias, labels, PLAIN, grads, low=(low[:0], low_weight))
    assert [tuple(t.shape) for t in found] == [(0, 16), (40, 16), (40,), (0, 4), (40, 4)]
    assert not any(t.any() for t in found)


def test_nothing_of_the_size_of_the_logits_is_allocated():
    hidden, weight, bias, labels, *grads = make(257, 16, 4001)
    workspace_bytes = 257 * 1024 * 4  # about a quarter of the logits
    with LargestTensor(()) as largest:
        lm_head_forward(hidden, weight, labels, PLAIN, bias_V=bias, **WANT)
    assert largest.bytes <= weight.nbytes  # the interpreter copies its arguments
    with LargestTensor(()) as largest:
        backward(hidden, weight, bias, labels, PLAIN, grads, workspace_bytes=workspace_bytes)
    assert largest.bytes == workspace_bytes


@pytest.mark.skipif(DEVICE == "cuda", reason="bf16 runs on a GPU")
def test_bfloat16_is_refused_by_the_interpreter():
    hidden, weight, _, labels, *_ = make(3, 16, 40, torch.bfloat16)
    with pytest.raises(TypeError, match="bfloat16: use float32 or float16"):
        lm_head_forward(hidden, weight, labels, PLAIN)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R", [1, 16, 72])
def test_a_second_pair_of_factors(R, dtype):
    hidden, weight, bias, labels, *grads = make(130, 40, 507, dtype)
    low = make_low(130, 507, R, dtype)
    (truth, grads_truth), (same, grads_same) = truth_and_torch(hidden, weight, bias, labels, FULL, grads, low)
    pair = dict(low_NR=low[0], low_weight_VR=low[1])
    check_stats(lm_head_forward(hidden, weight, labels, FULL, bias_V=bias, **pair, **WANT), truth, same)
    got = backward(hidden, weight, bias, labels, FULL, grads, low=low, workspace_bytes=ONE_TILE)
    assert len(got) == 5
    for g, s, t in zip(got, grads_same, grads_truth):
        assert g.dtype == dtype and g.is_contiguous()
        assert_as_good_as_torch(g, s, t, EPS)


class Products(TorchDispatchMode):
    """Remembers the shapes that library products returned."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.shapes.add(tuple(out.shape))
        return out


def test_lora_on_a_frozen_head_costs_no_product_of_the_heads_size():
    hidden, weight, _, labels, *grads = make(33, 16, 700)
    low, low_weight = make_low(33, 700, 4)
    with Products() as products:
        backward(hidden, weight, None, labels, PLAIN, grads, low=(low, low_weight), needs=NEEDS[3:])
    assert products.shapes == {(33, 4), (700, 4)}


@pytest.fixture
def flags_seen(monkeypatch):
    """Flags of the kept tiles, as the products for the rows take them: one entry a slice."""
    seen = []
    original = block_sparse.add_rows_product

    def spy(total, slice_NW, other, kept, config):
        lines, line = kept.tiles.shape
        flags = torch.zeros(lines, line, dtype=torch.bool)
        for i, count in enumerate(kept.count.tolist()):
            flags[i, kept.tiles[i, :count].cpu()] = True
        seen.append(flags.repeat_interleave(config.block_n, 0).repeat_interleave(config.block_v, 1).to(DEVICE))
        original(total, slice_NW, other, kept, config)

    monkeypatch.setattr(block_sparse, "add_rows_product", spy)
    return seen


def filtered_gradients(dlogits, hidden, weight, low):
    """Of hidden, weight, bias, low and low_weight, from the logits'."""
    return dlogits @ weight, dlogits.T @ hidden, dlogits.sum(0), dlogits @ low[1], dlogits.T @ low[0]


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 10.0])
def test_what_a_filter_loses_is_bounded(eps, flags_seen):
    """A softmax with its mass in some of the tiles, and a block of ignored rows; at 10 nothing is left."""
    head = Head(softcap=40.0, logit_scale=1.3, temperature=1.2)
    hidden, weight, bias, labels, *grads = make(300, 48, 1100)
    low = make_low(300, 1100, 4)
    weight *= 0.3
    bias[512:] -= 8
    labels[128:256] = head.ignore_index
    labels = labels.where(labels < 0, labels % 500)
    double = [t.double() for t in (hidden, weight, bias, *low)]
    z0 = double[0] @ double[1].T + double[3] @ double[4].T + double[2]
    z0.requires_grad_()
    stats = row_stats(z0, labels, head)
    (dlogits,) = torch.autograd.grad((stats.logps * grads[0]).sum() + (stats.entropy * grads[1]).sum(), z0)

    got = backward(hidden, weight, bias, labels, head, grads, low=low, filter_eps=eps)
    (flags,) = flags_seen
    dropped = ~flags[:300, :1100]
    assert dropped[128:256].all() and dropped.all() == (eps == 10) and dlogits[dropped].abs().max() < eps
    kept = dlogits.masked_fill(dropped, 0.0)
    pair = double[3:]
    truth = filtered_gradients(kept, double[0], double[1], pair)
    same = filtered_gradients(kept.float(), hidden, weight, low)
    for g, s, t in zip(got, same, truth):
        assert_as_good_as_torch(g, s, t, 4 * EPS)

    whole = filtered_gradients(dlogits, double[0], double[1], pair)
    absolute = (double[0].abs(), double[1].abs(), [t.abs() for t in pair])
    bounds = filtered_gradients(eps * dropped.double(), *absolute)
    slack = [2 * (g - t).abs().max() for g, t in zip(got, truth)]  # rounding, which the other assertion bounds
    for g, t, bound, rounding in zip(got, whole, bounds, slack):
        assert ((g - t).abs() <= bound + rounding).all()
    if eps == 1e-3:  # and it is the filter's error that was bounded
        assert (got[0] - whole[0]).abs().max() > 100 * slack[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workspace_bytes", [ONE_TILE, PLENTY], ids=["one tile", "plenty"])
@pytest.mark.parametrize("eps", [pytest.param(0.0, marks=pytest.mark.slow), 1e-30])
def test_a_filter_that_keeps_every_tile_changes_nothing(eps, workspace_bytes, dtype, flags_seen):
    hidden, weight, bias, labels, *grads = make(130, 123, 1031, dtype)
    hidden, weight = VIEWS["columns of a wider one"](hidden), VIEWS["transposed"](weight)
    (_, truth), (_, same) = truth_and_torch(hidden, weight, bias, labels, FULL, grads)
    options = dict(workspace_bytes=workspace_bytes, filter_eps=eps)
    got = backward(hidden, weight, bias, labels, FULL, grads, **options)
    assert all(flags.all() for flags in flags_seen) and (len(flags_seen) > 1) == (workspace_bytes == ONE_TILE)
    for g, s, t in zip(got, same, truth):
        assert g.dtype == dtype
        assert_as_good_as_torch(g, s, t, EPS)
    assert all(map(torch.equal, got, backward(hidden, weight, bias, labels, FULL, grads, **options)))


def test_a_filter_lets_nan_through():
    *tensors, labels, grad_logps, grad_entropy = make(6, 16, 40)
    grad_logps[4] = float("nan")
    dhidden, dweight, _ = backward(*tensors, labels, PLAIN, (grad_logps, grad_entropy), filter_eps=1e6)
    assert dhidden[4].isnan().all() and dweight.isnan().all()


@pytest.fixture
def descriptors(monkeypatch):
    """Make the tuning choose the copy engine wherever it could; returns the matrices described to it."""
    described, config_of = [], lm_head.head_config
    original = lm_head.descriptor

    def with_tma(*args, **options):
        return replace(config_of(*args, **options), tma=options["bulk_copies"])

    monkeypatch.setattr(lm_head, "head_config", with_tma)
    monkeypatch.setattr(lm_head, "descriptor", lambda t, *block: described.append(t) or original(t, *block))
    return described


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filter_eps", [None, pytest.param(1e-3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("N, D, V", [(1, 8, 2), (130, 72, 1031)])
def test_the_copy_engine_brings_the_same_bits(N, D, V, filter_eps, dtype, descriptors, monkeypatch):
    hidden, weight, bias, labels, *grads = make(N, D, V, dtype)
    weight = torch.cat([weight, weight], 1)[:, :D]  # a view, of aligned rows
    options = dict(low=make_low(N, V, 4, dtype), filter_eps=filter_eps)
    copied = lm_head_forward(hidden, weight, labels, FULL, bias_V=bias, **WANT)
    copied_grads = backward(hidden, weight, bias, labels, FULL, grads, **options)
    assert [t.data_ptr() for t in descriptors[:2]] == [hidden.data_ptr(), weight.data_ptr()]
    monkeypatch.undo()
    loaded = lm_head_forward(hidden, weight, labels, FULL, bias_V=bias, **WANT)
    assert all(map(torch.equal, copied[:5], loaded[:5]))
    assert all(map(torch.equal, copied_grads, backward(hidden, weight, bias, labels, FULL, grads, **options)))


def test_rows_past_the_end_keep_no_tile(descriptors, flags_seen):
    """The copy engine makes them zeros, whose logits say nothing: here they are far above those of the last row."""
    N, V = 130, 1031
    hidden, weight, _, labels, grad_logps, grad_entropy = make(N, 16, V)
    labels[:-1], labels[-1] = PLAIN.ignore_index, 5
    hidden[-1], weight[:] = 1.0, -2.0
    grads = (torch.ones_like(grad_logps), torch.zeros_like(grad_entropy))
    backward(hidden, weight, None, labels, PLAIN, grads, filter_eps=0.01)
    (flags,) = flags_seen
    assert descriptors and not flags[0].any() and flags[N - 1, 5] and not flags[N - 1, 512:].any()


@pytest.mark.parametrize("view", [name for name in VIEWS if name not in ("rows of a longer one", "every other row")])
def test_what_the_copy_engine_does_not_take_is_loaded(view, descriptors):
    hidden, weight, _, labels, *_ = make(33, 16, 300)
    for tensors in ((VIEWS[view](hidden), weight), (hidden, VIEWS[view](weight))):
        assert not all(map(can_bulk_copy, tensors))
        assert lm_head_forward(*tensors, labels, PLAIN).logps.isfinite().all() and not descriptors


@pytest.fixture
def tile(monkeypatch):
    """Sets the tile, where the interpreter would take its time over a default one that is mostly empty."""

    def use(block_n, block_v):
        config = HeadConfig(block_n, block_v, 16, num_warps=1, num_stages=1)
        if DEVICE == "cpu":
            monkeypatch.setattr(lm_head, "head_config", lambda *_, **__: config)

    return use


@pytest.mark.slow
def test_a_peaked_softmax_over_129920_entries(tile):
    N, V = 3, 129_920
    tile(16, 1024)
    hidden, weight, _, labels, *grads = make(N, 16, V)
    labels[:] = torch.tensor([V - 1, 77_777, 3])
    weight[labels] += 2 * hidden  # 30 nats and more above the others
    (truth, grads_truth), (same, grads_same) = truth_and_torch(hidden, weight, None, labels, PLAIN, grads)
    assert truth.logps.max() > -1e-6 and truth.lse.max() < 64
    check_stats(lm_head_forward(hidden, weight, labels, PLAIN, **WANT), truth, same)
    # What is left of 1 - p is less than what half an ulp of the log-sum-exp does to p.
    half_ulp = 2.0**-19
    scale = [half_ulp * (abs(grads[0]) + abs(grads[1])).max() * t.abs().max() for t in (weight, hidden)]
    for g, s, t, rounding in zip(backward(hidden, weight, None, labels, PLAIN, grads), grads_same, grads_truth, scale):
        assert_as_good_as_torch(g, s, t, EPS + (rounding / t.abs().max()).item())


@pytest.mark.slow
def test_more_rows_than_65536(tile):
    N, V = 65_536 + 200, 5
    tile(1024, 16)
    hidden, weight, bias, labels, *grads = make(N, 1, V)
    (truth, grads_truth), (same, grads_same) = truth_and_torch(hidden, weight, bias, labels, PLAIN, grads)
    check_stats(lm_head_forward(hidden, weight, labels, PLAIN, bias_V=bias, **WANT), truth, same)
    for g, s, t in zip(backward(hidden, weight, bias, labels, PLAIN, grads), grads_same, grads_truth):
        assert_as_good_as_torch(g, s, t, EPS)


def test_logits_beyond_float16():
    """Products of 16-bit operands add up in fp32: logits of 1e6 are numbers here, where torch's are infinite."""
    hidden, weight, _, labels, *grads = make(9, 64, 300, torch.float16)
    hidden, weight = hidden * 100, weight * 500
    (truth, grads_truth), (same, _) = truth_and_torch(hidden, weight, None, labels, PLAIN, grads)
    assert (hidden @ weight.T).isinf().any() and truth.lse.max() > 2**17
    stats = lm_head_forward(hidden, weight, labels, PLAIN, **WANT)
    for name in ("logps", "lse", "mean_logit"):
        torch.testing.assert_close(getattr(stats, name).double(), getattr(truth, name), rtol=1e-6, atol=1e-6 * 2**18)
    for g, t in zip(backward(hidden, weight, None, labels, PLAIN, grads), grads_truth):
        torch.testing.assert_close(g.double(), t, rtol=2**-9, atol=2**-9 * t.abs().max().item())


FAR = 1 << 30  # elements from row to row: the third row is past 2^31
FAR_ROWS = {
    "lm_head_forward_kernel": (dict(hidden="stride_hn", weight="stride_wv"), ("max_ptr", "sum_ptr", "label_ptr")),
    "lm_head_dlogits_kernel": (dict(hidden="stride_hn", weight="stride_wv", out_ptr="width"), ()),
    "sparse_product_kernel": (dict(slice_ptr="width", other_ptr="stride_ok"), ("out_ptr",)),
}


class FarMatrix:
    """A copy of a matrix, its rows FAR elements apart in memory that is reserved and, for the most part, never used."""

    def __init__(self, matrix):
        rows, cols = matrix.shape
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        region = mmap.mmap(-1, ((rows - 1) * FAR + cols) * matrix.itemsize, flags=flags)
        flat = np.frombuffer(region, matrix.numpy().dtype)
        # A tensor of one row only: the interpreter copies storages. It reads from where strides point to all the same.
        self.rows = [torch.from_numpy(flat[i * FAR : i * FAR + cols]) for i in range(rows)]
        for row, values in zip(self.rows, matrix):
            row.copy_(values)


class FarRows:
    """A kernel that is launched twice: as asked, and with the rows of its matrices far apart. Both must agree."""

    def __init__(self, kernel, strides, outputs):
        self.kernel, self.strides, self.outputs, self.launches = kernel, strides, outputs, 0

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            near = dict(zip(self.kernel.arg_names, args)) | kwargs
            moved = {name: FarMatrix(near[name]) for name in self.strides}
            again = {name: near[name].clone() for name in self.outputs}
            self.kernel[grid](**near)
            far = {name: matrix.rows[0] for name, matrix in moved.items()} | dict.fromkeys(self.strides.values(), FAR)
            self.kernel[grid](**near | again | far)
            assert all(torch.equal(near[name], again[name]) for name in self.outputs)
            assert all(torch.equal(near[name], torch.stack(matrix.rows)) for name, matrix in moved.items())
            self.launches += 1

        return launch


@pytest.mark.skipif(DEVICE == "cuda", reason="the next test does it with real tensors")
@pytest.mark.parametrize("name", FAR_ROWS)
def test_offsets_beyond_2_to_the_31(name, monkeypatch):
    *tensors, labels, grad_logps, grad_entropy = make(4, 8, 4, torch.float16)
    module = block_sparse if name == "sparse_product_kernel" else lm_head
    far = FarRows(getattr(module, name), *FAR_ROWS[name])
    monkeypatch.setattr(module, name, far)
    backward(*tensors, labels, PLAIN, (grad_logps, grad_entropy), filter_eps=0.0)
    assert far.launches == (2 if module is block_sparse else 1)


@pytest.mark.skipif(DEVICE == "cpu", reason="takes 15 GB of GPU memory")
@pytest.mark.parametrize("filter_eps", [None, 0.0])
def test_a_weight_of_more_than_2_to_the_31_elements(filter_eps):
    N, D, V = 64, 4096, 600_001
    torch.manual_seed(0)
    hidden = torch.randn(N, D, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(V, D, device=DEVICE, dtype=torch.bfloat16) / D**0.5
    labels = torch.arange(V - N, V, device=DEVICE)
    grads = torch.ones(N, device=DEVICE)
    logits = torch.cat([hidden.float() @ part.float().T for part in weight.split(50_000)], 1)
    stats = lm_head_forward(hidden, weight, labels, PLAIN)
    torch.testing.assert_close(stats.lse, logits.logsumexp(1), rtol=0, atol=1e-4)
    needs = dict(needs_hidden=True, needs_weight=True, needs_bias=False, workspace_bytes=1 << 28)
    _, dweight, *_ = lm_head_backward(hidden, weight, labels, stats.lse, grads, PLAIN, filter_eps=filter_eps, **needs)
    last = -logits[:, -N:].sub(logits.logsumexp(1)[:, None]).exp()
    last += torch.eye(N, device=DEVICE)
    torch.testing.assert_close(dweight[-N:].float(), last.T @ hidden.float(), rtol=2**-7, atol=1e-2)
