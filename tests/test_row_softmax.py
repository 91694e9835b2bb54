"""The row kernel against float64: values, gradients, odd sizes, strides and edges."""

import pytest
import torch

from conftest import DEVICE
from numerics import DTYPES, assert_as_good_as_torch, poison, row_stats

pytest.importorskip("triton")
from prefkern.head import Head
from prefkern.kernels.row_softmax import row_softmax_backward, row_softmax_forward

EPS = 1e-6  # fp32 sums in another order than torch's
PLAIN = Head()
FULL = Head(softcap=5.0, logit_scale=1.3, temperature=0.7)
WANT = dict(want_entropy=True, want_top1=True, want_mean=True, want_collision=True)
SHAPES = [(1, 2), (255, 507), (257, 1031)]


@pytest.fixture(autouse=True)
def poisoned_workspaces(monkeypatch):
    poison(monkeypatch)


def make(N, V, dtype=torch.float32, spread=3.0):
    """Logits, labels with the last entry and two ignored rows among them, bias, and two upstream gradients."""
    torch.manual_seed(N + V)
    labels = torch.randint(0, V, (N,))
    labels[0] = V - 1
    labels[1:3] = PLAIN.ignore_index
    tensors = (torch.randn(N, V) * spread).to(dtype), labels, torch.randn(V).to(dtype), torch.randn(N), torch.randn(N)
    return tuple(t.to(DEVICE) for t in tensors)


def truth_and_torch(logits, labels, head, bias=None, grads=None):
    """(statistics, gradient of the logits) in float64 and in the logits' dtype."""
    results = []
    for double in (True, False):
        x = (logits.double() if double else logits).clone().requires_grad_()
        b = None if bias is None else bias.to(x.dtype)
        stats = row_stats(x, labels, head, b)
        grad = None
        if grads is not None:
            grad_logps, grad_entropy = grads
            loss = (stats.logps * grad_logps).sum()
            if grad_entropy is not None:
                loss = loss + (stats.entropy * grad_entropy).sum()
            (grad,) = torch.autograd.grad(loss, x)
        results.append((stats, grad))
    return results


def check_stats(got, truth, same):
    for name in ("logps", "lse", "entropy", "mean_logit", "log_collision"):
        assert_as_good_as_torch(getattr(got, name), getattr(same, name), getattr(truth, name), EPS)
        assert getattr(got, name).dtype == torch.float32
    assert torch.equal(got.is_top1, same.is_top1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", [PLAIN, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("N, V", SHAPES)
def test_forward(N, V, head, dtype):
    logits, labels, bias, *_ = make(N, V, dtype)
    bias = bias if head is FULL else None
    (truth, _), (same, _) = truth_and_torch(logits, labels, head, bias)
    check_stats(row_softmax_forward(logits, labels, head, bias_V=bias, **WANT), truth, same)


def test_forward_computes_only_what_is_wanted():
    logits, labels, *_ = make(5, 33)
    bare, full = row_softmax_forward(logits, labels, PLAIN), row_softmax_forward(logits, labels, PLAIN, **WANT)
    assert set(bare[2:]) == {None}
    assert torch.equal(bare.logps, full.logps) and torch.equal(bare.lse, full.lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", [PLAIN, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("N, V", SHAPES)
def test_backward(N, V, head, dtype):
    logits, labels, bias, grad_logps, grad_entropy = make(N, V, dtype)
    bias, grad_entropy = (bias, grad_entropy) if head is FULL else (None, None)
    (_, truth), (_, same) = truth_and_torch(logits, labels, head, bias, (grad_logps, grad_entropy))
    stats = row_softmax_forward(logits, labels, head, bias_V=bias, want_entropy=True)
    upstream = dict(bias_V=bias, entropy_N=stats.entropy, grad_entropy_N=grad_entropy)
    got = row_softmax_backward(logits, labels, stats.lse, grad_logps, head, **upstream)
    assert got.dtype == dtype and got.data_ptr() != logits.data_ptr()
    assert_as_good_as_torch(got, same, truth, EPS)
    assert not got[labels == head.ignore_index].any()

    in_place = row_softmax_backward(logits, labels, stats.lse, grad_logps, head, **upstream, out=logits)
    assert in_place is logits and torch.equal(in_place, got)


@pytest.mark.parametrize("alone", ["logps", "entropy"])
def test_each_upstream_gradient_alone(alone):
    logits, labels, _, grad_logps, grad_entropy = make(9, 130)
    zero = torch.zeros_like(grad_logps)
    grads = (grad_logps, zero) if alone == "logps" else (zero, grad_entropy)
    (_, truth), (_, same) = truth_and_torch(logits, labels, PLAIN, grads=grads)
    stats = row_softmax_forward(logits, labels, PLAIN, want_entropy=True)
    entropy = dict(entropy_N=stats.entropy, grad_entropy_N=grads[1])
    got = row_softmax_backward(logits, labels, stats.lse, grads[0], PLAIN, **entropy)
    assert_as_good_as_torch(got, same, truth, EPS)
    if alone == "logps":
        assert torch.equal(got, row_softmax_backward(logits, labels, stats.lse, grad_logps, PLAIN))


def test_grad_scale_multiplies_the_gradient():
    logits, labels, _, grad_logps, _ = make(9, 130)
    lse = row_softmax_forward(logits, labels, PLAIN).lse
    scale = torch.tensor(-0.5, device=DEVICE)  # a power of two: exact
    got = row_softmax_backward(logits, labels, lse, grad_logps, PLAIN, grad_scale=scale)
    assert torch.equal(got, -0.5 * row_softmax_backward(logits, labels, lse, grad_logps, PLAIN))


def test_an_all_ignored_batch_is_zero():
    logits, labels, _, grad_logps, _ = make(6, 40)
    labels.fill_(PLAIN.ignore_index)
    logits[0] = float("nan")
    stats = row_softmax_forward(logits, labels, PLAIN, **WANT)
    assert not any(t.any() for t in stats)
    assert not row_softmax_backward(logits, labels, stats.lse, grad_logps, PLAIN).any()


def test_ignore_index_may_be_a_vocabulary_entry():
    logits, labels, *_ = make(6, 40)
    labels[3] = 0
    got = row_softmax_forward(logits, labels, Head(ignore_index=0))
    assert got.logps[3] == 0 and got.lse[3] == 0 and got.logps[0] < 0


@pytest.mark.parametrize("label", [-1, 40, 2**40])
def test_a_label_outside_the_vocabulary_gives_nan(label):
    logits, labels, *_ = make(6, 40)
    labels[4] = label
    stats = row_softmax_forward(logits, labels, PLAIN, **WANT)
    assert stats.logps.isnan().tolist() == [n == 4 for n in range(6)]
    assert not stats.is_top1[4] and stats.lse.isfinite().all()


VIEWS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.cat([x, x], 1)[:, 3 : 3 + x.shape[1]],
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strided_logits(view):
    logits, labels, _, grad_logps, _ = make(66, 130)
    strided = VIEWS[view](logits)
    plain = strided.contiguous()
    stats, expected = (row_softmax_forward(x, labels, PLAIN, **WANT) for x in (strided, plain))
    assert all(torch.equal(a, b) for a, b in zip(stats, expected))
    got, expected = (row_softmax_backward(x, labels, stats.lse, grad_logps, PLAIN) for x in (strided, plain))
    assert torch.equal(got, expected)
    if view != "expanded":
        assert torch.equal(row_softmax_backward(strided, labels, stats.lse, grad_logps, PLAIN, out=strided), expected)


def test_strided_labels_and_upstream():
    logits, labels, bias, grad_logps, _ = make(66, 130)
    wide = [t.repeat_interleave(2)[::2] for t in (labels, bias, grad_logps)]
    stats = row_softmax_forward(logits, wide[0], PLAIN, bias_V=wide[1])
    assert torch.equal(stats.logps, row_softmax_forward(logits, labels, PLAIN, bias_V=bias).logps)
    got = row_softmax_backward(logits, wide[0], stats.lse, wide[2], PLAIN, bias_V=wide[1])
    assert torch.equal(got, row_softmax_backward(logits, labels, stats.lse, grad_logps, PLAIN, bias_V=bias))


def test_masked_vocabulary():
    """-inf logits: a whole first tile, single entries, and one row's label."""
    logits, labels, _, grad_logps, grad_entropy = make(9, 1031)
    labels[3:] = torch.arange(1025, 1031, device=DEVICE)
    logits[:, :600] = float("-inf")
    logits[:, 700::3] = float("-inf")
    logits[0, 1030] = 0.0
    logits[4, labels[4]] = float("-inf")
    stats = row_softmax_forward(logits, labels, PLAIN, **WANT)
    (truth, _), (same, _) = truth_and_torch(logits, labels, PLAIN)
    check_stats(stats, truth, same)
    assert stats.logps[4] == float("-inf")

    grads = (grad_logps, grad_entropy)
    upstream = dict(entropy_N=stats.entropy, grad_entropy_N=grad_entropy)
    got = row_softmax_backward(logits, labels, stats.lse, grad_logps, PLAIN, **upstream)
    finite = logits.masked_fill(logits == float("-inf"), -1e30)  # autograd of 0 * -inf is NaN: the limit instead
    (_, truth), (_, same) = truth_and_torch(finite, labels, PLAIN, grads=grads)
    assert_as_good_as_torch(got, same, truth, EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_are_exact_forward_and_as_good_as_their_lse_backward(dtype):
    logits, labels, _, grad_logps, grad_entropy = make(9, 1031, dtype)
    logits = (logits.float() + 1e4).to(dtype)
    stats = row_softmax_forward(logits, labels, PLAIN, **WANT)
    (truth, grad), (same, same_grad) = truth_and_torch(logits, labels, PLAIN, grads=(grad_logps, grad_entropy))
    check_stats(stats, truth, same)
    upstream = dict(entropy_N=stats.entropy, grad_entropy_N=grad_entropy)
    got = row_softmax_backward(logits, labels, stats.lse, grad_logps, PLAIN, **upstream)
    assert got.isfinite().all()
    # The seam is lse in fp32: half an ulp of 1e4 is 5e-4, and so much may p = exp(z - lse) be off.
    assert_as_good_as_torch(got, same_grad, grad, eps=1e-3)


def test_two_runs_agree_to_the_bit():
    logits, labels, _, grad_logps, _ = make(257, 1031)
    first, second = (row_softmax_forward(logits, labels, FULL, **WANT) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    grads = [row_softmax_backward(logits, labels, first.lse, grad_logps, FULL) for _ in range(2)]
    assert torch.equal(*grads)


def test_no_rows():
    logits, labels, _, grad_logps, _ = (t[:0] for t in make(3, 40))
    stats = row_softmax_forward(logits, labels, PLAIN, **WANT)
    assert all(t.shape == (0,) for t in stats)
    assert row_softmax_backward(logits, labels, stats.lse, grad_logps, PLAIN).shape == (0, 40)


def test_more_rows_than_a_second_grid_axis_holds():
    logits, labels, _, grad_logps, _ = make(65_537 + 64, 3)
    (truth, grad), (same, same_grad) = truth_and_torch(logits, labels, PLAIN, grads=(grad_logps, None))
    stats = row_softmax_forward(logits, labels, PLAIN, **WANT)
    check_stats(stats, truth, same)
    got = row_softmax_backward(logits, labels, stats.lse, grad_logps, PLAIN)
    assert_as_good_as_torch(got, same_grad, grad, EPS)


@pytest.mark.slow
def test_offsets_past_two_to_the_31(monkeypatch):
    monkeypatch.undo()  # poisoning would touch, and so commit, all of it
    logits, labels, _, grad_logps, _ = make(4, 40, torch.float16)
    far = torch.empty(3 * 2**30 + 40, dtype=torch.float16, device=DEVICE).as_strided((4, 40), (2**30, 1))
    far.copy_(logits)
    stats, expected = (row_softmax_forward(x, labels, PLAIN, **WANT) for x in (far, logits))
    assert all(torch.equal(a, b) for a, b in zip(stats, expected))
    got, expected = (row_softmax_backward(x, labels, stats.lse, grad_logps, PLAIN, out=x) for x in (far, logits))
    assert torch.equal(got, expected)
