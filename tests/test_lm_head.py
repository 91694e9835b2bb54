"""The cut body against float64: values, every gradient, odd sizes, strides, edges, and what it may allocate."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import DEVICE
from numerics import DTYPES, assert_as_good_as_torch, poison, row_stats

pytest.importorskip("triton")
from prefkern.head import Head
from prefkern.kernels.lm_head import lm_head_backward, lm_head_forward

EPS = 1e-6  # fp32 sums in another order than torch's
PLAIN = Head()
FULL = Head(softcap=5.0, logit_scale=1.3, temperature=0.7)
WANT = dict(want_entropy=True, want_top1=True, want_mean=True)
SHAPES = [(1, 16, 2), (255, 123, 507), (257, 128, 1031)]
ONE_TILE, PLENTY = 0, 1 << 30  # workspace_bytes
NEEDS = ("needs_hidden", "needs_weight", "needs_bias")


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


def eager(hidden, weight, bias, labels, head, grads=None):
    """Statistics and the gradients of hidden, weight and bias (where given), in plain torch."""
    inputs = [t.clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    stats = row_stats(inputs[0] @ inputs[1].T, labels, head, inputs[2] if bias is not None else None)
    if grads is None:
        return stats, None
    return stats, torch.autograd.grad((stats.logps * grads[0]).sum() + (stats.entropy * grads[1]).sum(), inputs)


def truth_and_torch(hidden, weight, bias, labels, head, grads=None):
    double = [None if t is None else t.double() for t in (hidden, weight, bias)]
    return eager(*double, labels, head, grads), eager(hidden, weight, bias, labels, head, grads)


def backward(hidden, weight, bias, labels, head, grads, *, needs=NEEDS, workspace_bytes=PLENTY):
    stats = lm_head_forward(hidden, weight, labels, head, bias_V=bias, want_entropy=True)
    return lm_head_backward(
        hidden, weight, labels, stats.lse, grads[0], head, bias_V=bias, entropy_N=stats.entropy,
        grad_entropy_N=grads[1], workspace_bytes=workspace_bytes, **{name: name in needs for name in NEEDS},
    )  # fmt: skip


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


@pytest.mark.parametrize("needs", [(), *((name,) for name in NEEDS)], ids=lambda needs: "+".join(needs) or "none")
def test_each_gradient_alone_equals_the_joint_one(needs):
    *tensors, labels, grad_logps, grad_entropy = make(33, 16, 300)
    grads = (grad_logps, grad_entropy)
    joint = backward(*tensors, labels, PLAIN, grads)
    got = backward(*tensors, labels, PLAIN, grads, needs=needs)
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


VIEWS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.cat([x, x], 1)[:, 3 : 3 + x.shape[1]],
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


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
    dhidden, dweight, dbias = backward(hidden, weight, bias, labels, PLAIN, grads)
    assert dhidden.shape == (0, 16) and not dweight.any() and not dbias.any()


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operator returned."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.nbytes = max([self.nbytes, *(t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_nothing_of_the_size_of_the_logits_is_allocated():
    hidden, weight, bias, labels, *grads = make(257, 16, 4001)
    workspace_bytes = 257 * 1024 * 4  # about a quarter of the logits
    with LargestTensor() as largest:
        lm_head_forward(hidden, weight, labels, PLAIN, bias_V=bias, **WANT)
    assert largest.nbytes <= weight.nbytes  # the interpreter copies its arguments
    with LargestTensor() as largest:
        backward(hidden, weight, bias, labels, PLAIN, grads, workspace_bytes=workspace_bytes)
    assert largest.nbytes == workspace_bytes


@pytest.mark.skipif(DEVICE == "cuda", reason="bf16 runs on a GPU")
def test_bfloat16_is_refused_by_the_interpreter():
    hidden, weight, _, labels, *_ = make(3, 16, 40, torch.bfloat16)
    with pytest.raises(TypeError, match="bfloat16: use float32 or float16"):
        lm_head_forward(hidden, weight, labels, PLAIN)
