"""Where logits are the input and break first: every body at the ends of shapes, numbers and strides."""

import pytest
import torch

import prefkern as pk
from conftest import DEVICE
from numerics import VIEWS, assert_as_good_as_torch, row_stats
from prefkern.head import Head

EPS = 1e-6
BODIES = ("eager", "auto", "triton")  # auto is the torch rows on a CPU
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(params=BODIES)
def body(request):
    """What to pass as impl."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def make(n, v, dtype=torch.float32):
    """Logits and labels, the last vocabulary entry and an ignored row among them."""
    torch.manual_seed(n + v)
    labels = torch.randint(0, v, (n,))
    labels[:1] = v - 1
    labels[2:3] = -100
    return (3 * torch.randn(n, v)).to(dtype).to(DEVICE), labels.to(DEVICE)


def plain(logits, labels, g, e, dtype):
    """Log-probabilities, entropies, and their gradient for upstreams g and e, in plain torch and dtype."""
    x = logits.detach().to(dtype).requires_grad_()
    stats = row_stats(x, labels, Head())
    (grad,) = torch.autograd.grad((stats.logps * g + stats.entropy * e).sum(), x)
    return stats.logps, stats.entropy, grad


def compare(body, logits, labels, keep=True):
    """The gradient of logits that are made on the way, so that it may be written over them unless keep."""
    g = torch.linspace(-1, 1.3, labels.numel(), device=DEVICE)
    e = g.flip(0)
    truth, same = (plain(logits, labels, g, e, dtype) for dtype in (torch.float64, logits.dtype))
    leaf = torch.zeros((), dtype=logits.dtype, device=DEVICE, requires_grad=True)
    made = logits + leaf if keep else _Made.apply(leaf, logits)
    out = pk.logits_token_logps(made, labels, outputs=("entropy",), impl=body, keep_logits=keep)
    (grad,) = torch.autograd.grad((out.logps * g + out.entropy * e).sum(), made)
    for mine, fp, true in zip((out.logps, out.entropy, grad), same, truth):
        assert_as_good_as_torch(mine, fp, true, EPS)
    assert grad.dtype == logits.dtype and not grad[labels == -100].any()
    return out.logps, grad


class _Made(torch.autograd.Function):
    """Gives out the logits as they lie in memory, as an operation's result."""

    @staticmethod
    def forward(ctx, leaf, logits):
        return logits

    @staticmethod
    def backward(ctx, grad):
        return grad.sum(), None


@pytest.mark.parametrize("n, v", [(0, 5), (1, 1), (6, 1), (3, 2), (7, 131), (2, 1031)])
def test_sizes_that_no_block_divides(body, n, v):
    compare(body, *make(n, v))


def test_more_rows_than_65536(body):
    compare(body, *make(65_536 + 77, 3))


def test_a_peaked_softmax_over_129920_entries(body):
    logits, labels = make(4, 129_920)
    logits[0, -1], logits[1, labels[1]] = 60.0, 24.0
    logps, _ = compare(body, logits, labels)
    assert logps[0] == 0 and -1e-3 < logps[1] < -1e-5


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "in place"])
@pytest.mark.parametrize("view", VIEWS)
def test_strides(body, view, keep):
    logits, labels = make(6, 130)
    compare(body, VIEWS[view](logits), labels, keep)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_logits_that_overflowed_are_nan_in_their_row_alone(body, dtype):
    """As in torch, whose loss scalers look for it."""
    logits, labels = make(6, 300, dtype)
    logits[4, 7], logits[5, 9] = torch.inf, torch.finfo(dtype).max
    leaf = logits.clone().requires_grad_()
    logps = pk.logits_token_logps(leaf, labels, impl=body).logps
    (grad,) = torch.autograd.grad(logps.sum(), leaf)
    assert logps.isnan().tolist() == [n == 4 for n in range(6)]
    assert grad.isfinite().all(1).tolist() == [n != 4 for n in range(6)]
    others = [0, 1, 2, 3, 5]
    truth = row_stats(logits[others].double(), labels[others], Head()).logps
    assert_as_good_as_torch(logps[others], row_stats(logits[others], labels[others], Head()).logps, truth, EPS)


def test_a_masked_vocabulary(body):
    """-inf is a probability of 0: no gradient there, and -inf for a label that was masked."""
    logits, labels = make(6, 300)
    logits[:, 100:200] = -torch.inf
    labels[3], labels[4] = 150, 3
    logits[4, :3], logits[4, 4:] = -torch.inf, -torch.inf
    leaf = logits.clone().requires_grad_()
    out = pk.logits_token_logps(leaf, labels, outputs=("lse",), impl=body)
    truth, same = (row_stats(logits.to(dtype), labels, Head()) for dtype in (torch.float64, torch.float32))
    assert_as_good_as_torch(out.logps, same.logps, truth.logps, EPS)
    assert_as_good_as_torch(out.lse, same.lse, truth.lse, EPS)
    assert out.logps[3] == -torch.inf and out.logps[4] == 0
    g = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0], device=DEVICE)
    (grad,) = torch.autograd.grad(out.logps, leaf, g)
    assert grad.isfinite().all() and not grad[:3, 100:200].any()
    if body != "eager":
        finite = logits.masked_fill(logits == -torch.inf, -1e30)
        zero = torch.zeros(6, device=DEVICE)
        truth, same = (plain(finite, labels, g, zero, dtype)[2] for dtype in (torch.float64, torch.float32))
        assert_as_good_as_torch(grad, same, truth, EPS)


@pytest.mark.parametrize("impl", BODIES)
def test_a_preference_loss_of_no_rows(impl):
    logits = torch.zeros(0, 7, device=DEVICE, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    out = pk.logits_preference_loss(logits, labels, pk.Layout.pairs([0], [0]), pk.losses.SimPO(), impl=impl, outputs=())
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert out.loss == 0 and grad.shape == (0, 7)
