"""The compiled row functions against float64, at every vector width that this processor has; and when they serve."""

import json
import os
import subprocess
import sys

import pytest
import torch

import prefkern as pk
from numerics import assert_as_good_as_torch, row_stats
from prefkern import rows
from prefkern.head import Head
from prefkern.kernels import row_softmax_cpu
from prefkern.kernels.row_softmax_cpu import fold, library, row_softmax_backward, row_softmax_forward
from prefkern.reference import accumulator

EPS = 1e-6  # fp32 sums in another order than torch's
HEADS = {
    "plain": Head(),
    "capped": Head(softcap=5.0, logit_scale=1.3, temperature=0.7),
    "scaled": Head(logit_scale=-0.7, temperature=1.9),
}
WANT = dict(want_entropy=True, want_mean=True, want_collision=True)
pytestmark = pytest.mark.skipif(library() is None, reason="the row functions for a CPU are not built")


@pytest.fixture(autouse=True, params=[4, 8, 16], ids="{} lanes".format)
def lanes(request):
    if library().prefkern_limit_lanes(request.param) != request.param:
        pytest.skip("this processor has no such vectors")
    yield request.param
    library().prefkern_limit_lanes(16)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=HEADS)
def head(request):
    return HEADS[request.param]


def make(n, v, dtype, spread=3.0):
    """Logits amid NaN that nothing may read or write, labels, bias and two upstream gradients."""
    g = torch.Generator().manual_seed(n * 1000 + v)
    wide = torch.full((n + 2, v + 7), torch.nan, dtype=dtype)
    logits = wide[1 : n + 1, 3 : v + 3].copy_(torch.randn(n, v, generator=g) * spread)
    labels = torch.randint(0, v, (n,), generator=g)
    labels[0], labels[-1] = v - 1, -100
    return wide, logits, labels, torch.randn(v, generator=g), *torch.randn(2, n, generator=g)


def outside(wide):
    frame = wide.clone()
    frame[1:-1, 3:-4] = torch.nan
    return frame


@pytest.mark.parametrize("v", [1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 65, 130, 1031, 5003])
def test_as_good_as_torch(v, dtype, head):
    wide, logits, labels, bias, grad_logps, grad_entropy = make(9, v, dtype)
    bias = None if head.softcap is None else bias
    leaves = [x.clone().requires_grad_() for x in (logits.double(), logits)]
    truth, same = (row_stats(x, labels, head, None if bias is None else bias.to(x.dtype)) for x in leaves)
    got = row_softmax_forward(logits, labels, head, bias_V=bias, want_top1=True, **WANT)
    for name in ("logps", "lse", "entropy", "mean_logit", "log_collision"):
        assert_as_good_as_torch(getattr(got, name), getattr(same, name), getattr(truth, name), EPS)
    bare = row_softmax_forward(logits, labels, head, bias_V=bias)
    assert torch.equal(bare.logps, got.logps) and bare.entropy is None

    def gradient(stats, x):
        loss = (stats.logps * grad_logps).sum() + (stats.entropy * grad_entropy).sum()
        return torch.autograd.grad(loss, x)[0]

    options = dict(bias_V=bias, entropy_N=got.entropy, grad_entropy_N=grad_entropy)
    apart = row_softmax_backward(logits, labels, got.lse, grad_logps, head, **options)
    assert_as_good_as_torch(apart, gradient(same, leaves[1]), gradient(truth, leaves[0]), EPS)
    assert not apart[-1].any()
    in_place = row_softmax_backward(logits, labels, got.lse, grad_logps, head, **options, out=logits)
    assert in_place is logits and torch.equal(in_place, apart)
    assert outside(wide).isnan().all()


@pytest.mark.parametrize("v", [5, 16, 77, 600])
def test_fold_is_its_twin(v, dtype, head):
    """Sums and exponentials of a slice; labels of other slices; rows that want no gradient stay as they are."""
    wide, logits, labels, bias, *_ = make(8, v, dtype)
    labels += torch.tensor([0, 0, -v, v, 0, 0, 0, 0])
    before, twin, exact = logits.clone(), logits.clone(), logits.double()
    got = fold(logits, labels, head, bias_V=bias, gradient=5, overwrite=False, **WANT)
    same = rows.fold(twin, labels, head, bias_V=bias, gradient=5, overwrite=False, **WANT)
    truth = rows.fold(exact, labels, head, bias_V=bias.double(), gradient=5, overwrite=False, **WANT)
    for x, y, z in zip(got, same, truth):
        assert_as_good_as_torch(x, y, z, EPS)
    assert_as_good_as_torch(logits[:5], twin[:5], exact[:5], EPS)
    assert torch.equal(logits[5:], before[5:]) and torch.equal(twin[5:], before[5:])
    own = (labels[:5] >= 0) & (labels[:5] < v)
    assert own.any() and not own.all() and not logits[:5][own].gather(1, labels[:5][own, None]).any()
    assert outside(wide).isnan().all()


def test_long_rows_are_summed_in_stretches():
    """200,000 equal logits, where one running fp32 sum a lane is off by 1e-5 and more."""
    x = torch.full((2, 200_003), 0.3)
    got = row_softmax_forward(x, torch.zeros(2, dtype=torch.int64), Head(), want_entropy=True)
    torch.testing.assert_close(
        got.entropy.double(), torch.tensor(200_003.0).double().log().expand(2), rtol=2e-7, atol=0
    )


@pytest.mark.parametrize("cap", [1e-3, 1.0, 30.0])
def test_softcap_over_all_magnitudes(cap):
    """tanh by a polynomial near 0 and by exp elsewhere: both to a few units in the last place, signs kept."""
    x = torch.logspace(-30, 9, 4001, dtype=torch.float64)
    x = torch.cat([x, -x, torch.zeros(1)]).float()[:, None]
    z = fold(x, torch.zeros(len(x), dtype=torch.int64), Head(softcap=cap)).label
    truth = cap * torch.tanh(x[:, 0].double() / cap)
    assert ((z - truth).abs() <= 5e-7 * truth.abs() + 1e-37).all()


def test_exponentials_over_their_range():
    """exp(z - top) of single differences from 0 to -200, against float64."""
    d = torch.linspace(0, 200, 20_001)
    x = torch.stack([torch.zeros_like(d), -d], 1)
    fold(x, torch.full((len(d),), -1), Head(), gradient=len(d))
    truth = torch.exp(-d.double())
    assert ((x[:, 1] - truth).abs() <= 3e-7 * truth + 2e-38).all()
    assert (x[:, 0] == 1).all() and (x[-1, 1] == 0).all()


def test_excluded_not_a_number_and_large_logits(dtype):
    """-inf, whole rows of it, NaN, infinity and 1e4: as the twin."""
    x = torch.randn(7, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 5:] = -torch.inf
    x[1] = -torch.inf
    x[2, 3], x[3, 4], x[4, 5] = torch.nan, torch.inf, 1e4
    labels = torch.tensor([1, 2, 3, 4, 5, 6, -100])
    got, want = (f(x, labels, Head(), want_top1=True, **WANT) for f in (row_softmax_forward, rows.row_softmax_forward))
    for name, a, b in zip(got._fields, got, want):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True, msg=name)
    g = torch.ones(7)
    a, b = (f(x, labels, want.lse, g, Head()) for f in (row_softmax_backward, rows.row_softmax_backward))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert not a[6].any() and a[1].isnan().all()


def test_bits_do_not_depend_on_threads(dtype):
    _, logits, labels, bias, g, e = make(70, 3001, dtype)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            stats = row_softmax_forward(logits, labels, Head(), bias_V=bias, **WANT)
            grad = row_softmax_backward(
                logits, labels, stats.lse, g, Head(), bias_V=bias, entropy_N=stats.entropy, grad_entropy_N=e
            )
            found.append([*stats[:3], stats.mean_logit, stats.log_collision, grad])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize(
    "block",
    [
        torch.randn(4, 6).double(),
        torch.randn(4, 6).half(),
        torch.randn(6, 4).t(),
        torch.randn(4, 12)[:, ::2],
        torch.randn(4, 1).expand(4, 6),
    ],
    ids=["float64", "float16", "transposed", "every other column", "expanded columns"],
)
def test_what_they_do_not_take_goes_to_torch(block, monkeypatch):
    monkeypatch.setattr(row_softmax_cpu, "library", lambda: pytest.fail("compiled code was called"))
    labels, g = torch.tensor([0, 5, -100, 2]), torch.ones(4, dtype=accumulator(block.dtype))
    got, want = (f(block, labels, Head()) for f in (row_softmax_forward, rows.row_softmax_forward))
    assert torch.equal(got.logps, want.logps)
    got, want = (
        f(block, labels, want.lse, g, Head(), out=torch.empty(4, 6, dtype=block.dtype).copy_(block))
        for f in (row_softmax_backward, rows.row_softmax_backward)
    )
    assert torch.equal(got, want)


def test_rows_that_share_memory(dtype):
    x = torch.randn(1, 50).to(dtype).expand(6, 50)
    labels = torch.arange(6)
    got, want = (f(x, labels, Head()) for f in (row_softmax_forward, rows.row_softmax_forward))
    torch.testing.assert_close(got.logps, want.logps, rtol=1e-6, atol=1e-6)


def test_the_head_uses_them(monkeypatch):
    """token_logps on a CPU, forward and backward, in both dtypes; float64 goes without."""
    called = []
    for name in ("fold", "row_softmax_backward"):
        inner = getattr(row_softmax_cpu, name)
        monkeypatch.setattr(row_softmax_cpu, name, lambda *a, _f=inner, _n=name, **k: called.append(_n) or _f(*a, **k))
    for dtype, expected in ((torch.bfloat16, 2), (torch.float32, 2), (torch.float64, 0)):
        called.clear()
        hidden, weight = torch.randn(5, 8, dtype=dtype, requires_grad=True), torch.randn(30, 8, dtype=dtype)
        pk.token_logps(hidden, weight.requires_grad_(), torch.arange(5)).logps.sum().backward()
        assert len(set(called)) == expected
    assert "compiled code" in pk.explain(5, 8, 30) and "compiled code" not in pk.explain(5, 8, 30, torch.float64)


def test_without_a_build_torch_does_the_work(tmp_path):
    """What a machine without a compiler has: no library, and the same log-probabilities but for rounding."""
    script = """
import importlib.util, torch
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.endswith("_row_softmax_cpu") else real(name, *a)
import prefkern as pk
g = torch.Generator().manual_seed(0)
hidden, weight = torch.randn(5, 8, generator=g), torch.randn(30, 8, generator=g)
print("row work by torch" in pk.explain(5, 8, 30), pk.token_logps(hidden, weight, torch.arange(5)).logps.tolist())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, check=True)
    said, _, values = done.stdout.partition(" ")
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 8, generator=g), torch.randn(30, 8, generator=g)
    want = pk.token_logps(hidden, weight, torch.arange(5)).logps
    assert said == "True"
    torch.testing.assert_close(torch.tensor(json.loads(values)), want, rtol=1e-6, atol=1e-6)
