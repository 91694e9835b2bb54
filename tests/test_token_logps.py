"""Every body of the head against float64, in values, gradients, memory and what it says to wrong arguments."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import prefkern as pk
from conftest import DEVICE
from numerics import LargestTensor, assert_as_good_as_torch
from prefkern import planner
from prefkern.token_logps import OUTPUTS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-6  # fp32 sums in another order than torch's
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 5.0},
    "scale and temperature": {"logit_scale": 0.5, "temperature": 1.7},
    "everything": {"softcap": 5.0, "logit_scale": 0.5, "temperature": 0.6},
}


def make(n, d, v, dtype=torch.float32, bias=True, ignored=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g).to(dtype)
    weight = (torch.randn(v, d, generator=g) * 2 / d**0.5).to(dtype)
    labels = torch.randint(0, v, (n,), generator=g)
    if n:
        labels[-1] = v - 1
    if ignored:
        labels[::5] = -100
    b = torch.randn(v, generator=g).to(dtype) if bias else None
    return tuple(None if t is None else t.to(DEVICE) for t in (hidden, weight, labels, b))


def run(tensors, needs, impl, dtype=None, entropy=True, workspace_bytes=None, **options):
    """Outputs and gradients of the needed inputs, for a random upstream gradient."""
    hidden, weight, labels, bias = tensors
    hidden, weight, bias = (
        None if t is None else t.to(dtype or t.dtype).detach().requires_grad_(name in needs)
        for t, name in zip((hidden, weight, bias), "hwb")
    )
    outputs = [name for name in OUTPUTS if impl != "cut" or name != "log_collision"]
    out = pk.token_logps(
        hidden, weight, labels, bias, outputs=outputs, impl=impl, workspace_bytes=workspace_bytes, **options
    )
    results = {name: t.detach() for name, t in zip(out._fields, out) if t is not None}
    inputs = {name: t for t, name in zip((hidden, weight, bias), "hwb") if name in needs}
    if inputs:
        g = torch.randn(labels.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        loss = (out.logps * g).sum() + ((out.entropy * g.flip(0)).sum() if entropy else 0)
        results |= dict(zip((f"d{k}" for k in inputs), torch.autograd.grad(loss, list(inputs.values()))))
    return results


def compare(tensors, needs, impl, **kwargs):
    truth = run(tensors, needs, "eager", torch.float64, **kwargs)
    torch_same = run(tensors, needs, "eager", **kwargs)
    got = run(tensors, needs, impl, **kwargs)
    for name, value in got.items():
        if name == "is_top1":
            assert (value == torch_same[name]).all()
        else:
            assert_as_good_as_torch(value, torch_same[name], truth[name], EPS)
    return got


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("needs", ["", "h", "w", "b", "hwb"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["chunked"])
def test_chunked_is_as_good_as_torch(impl, dtype, needs, options):
    compare(make(257, 123, 1031, dtype), needs, impl, workspace_bytes=40_000, **options)


@pytest.mark.parametrize("needs", ["h", "hwb"])
@pytest.mark.parametrize("entropy", [False, True], ids=["logps", "logps and entropy"])
def test_cut_is_as_good_as_torch(needs, entropy):
    compare(make(37, 48, 203), needs, "cut", entropy=entropy, workspace_bytes=40_000, **OPTIONS["everything"])


@pytest.mark.parametrize("n, d, v", [(1, 16, 2), (65, 16, 131), (257, 128, 2), (3, 1, 1)])
def test_odd_sizes(n, d, v):
    compare(make(n, d, v, ignored=False), "hwb", "chunked", workspace_bytes=1)


@pytest.mark.parametrize("impl", ["eager", "chunked", "cut"])
def test_all_rows_ignored_and_no_rows(impl):
    for n in (0, 4):
        hidden, weight, _, bias = make(n, 16, 33)
        labels = torch.full((n,), -100, device=DEVICE)
        got = run((hidden, weight, labels, bias), "hwb", impl)
        assert got["dw"].shape == weight.shape and got["dh"].shape == hidden.shape
        for name, value in got.items():
            assert (value == 0).all(), name


def test_frozen_head_without_entropy_takes_the_short_way():
    """No product in backward: 4NDV in all, counted by the products that run."""
    tensors = make(64, 32, 300, bias=False)
    with CountFlops() as counted:
        compare_with = run(tensors, "h", "chunked", entropy=False, workspace_bytes=50_000)
    assert counted.flops == 4 * 64 * 32 * 300
    truth = run(tensors, "h", "eager", torch.float64, entropy=False)
    assert_as_good_as_torch(compare_with["dh"], run(tensors, "h", "eager", entropy=False)["dh"], truth["dh"], EPS)


@pytest.mark.parametrize("needs, row", [("", planner.NO_GRAD), ("h", planner.FROZEN), ("hw", planner.RECOMPUTE)])
def test_flops_are_those_of_the_table(needs, row):
    n, d, v = 64, 32, 300
    with CountFlops() as counted:
        run(make(n, d, v, bias=False), needs, "chunked", entropy=False, workspace_bytes=50_000)
    again = 0 if row is not planner.RECOMPUTE else d  # rows whose logits dweight's memory holds
    assert counted.flops == row.flops * n * d * v - 2 * again * d * v


class CountFlops(TorchDispatchMode):
    """FLOPs of the matrix products that run under it."""

    def __enter__(self):
        self.flops = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        elif func.overloadpacket is torch.ops.mkldnn._linear_pointwise:
            a, b = args[:2]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[0]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("needs", ["", "h", "hw"])
def test_no_tensor_is_larger_than_the_workspace(needs):
    """At N = 1024 and V = 50,000 the logits would take 205 MB in fp32; the block of logits stays within 4 MiB."""
    n, d, v, workspace = 1024, 16, 50_000, 4 << 20
    hidden, weight, labels, _ = make(n, d, v, bias=False)
    hidden.requires_grad_("h" in needs)
    weight.requires_grad_("w" in needs)
    with LargestTensor([hidden, weight, labels]) as largest:
        out = pk.token_logps(hidden, weight, labels, impl="chunked", workspace_bytes=workspace)
        if needs:
            out.logps.sum().backward()
    assert 0 < largest.bytes <= workspace < n * v
    with LargestTensor([hidden, weight, labels]) as eager:
        pk.token_logps(hidden.detach(), weight.detach(), labels, impl="eager")
    assert eager.bytes >= n * v * 4, "the measure itself must see an N x V tensor"


@pytest.mark.parametrize("impl", ["chunked", "cut"])
def test_same_inputs_same_bits(impl):
    tensors = make(33, 16, 203)
    a, b = run(tensors, "hwb", impl), run(tensors, "hwb", impl)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_large_logits_stay_finite():
    hidden, weight, labels, _ = make(9, 16, 40, bias=False)
    for impl in ("eager", "chunked", "cut"):
        got = run((hidden * 1e4, weight, labels, None), "hw", impl)
        assert all(t.isfinite().all() for t in got.values()), impl


def test_masked_vocabulary():
    """A vocabulary entry at -inf has probability 0, takes no gradient and poisons nothing."""
    hidden, weight, labels, bias = make(9, 16, 40)
    bias[7], labels[labels == 7] = -torch.inf, 3
    for impl in ("eager", "chunked", "cut"):
        got = run((hidden, weight, labels, bias), "hw", impl)
        for name in ("logps", "entropy", "dh", "dw"):
            assert got[name].isfinite().all(), (impl, name)
        assert (got["dw"][7] == 0).all()


def test_the_frozen_head_is_exact_in_float64():
    hidden, weight, labels, _ = make(9, 16, 40, torch.float64, bias=False)
    options = {"logit_scale": 0.7, "temperature": 1.7}
    short, long = (run((hidden, weight, labels, None), "h", impl, **options)["dh"] for impl in ("chunked", "eager"))
    torch.testing.assert_close(short, long, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("needs", ["h", "hb"])
def test_ignored_rows_have_gradient_zero_even_where_they_are_not_finite(needs):
    hidden, weight, labels, bias = make(9, 16, 40)
    hidden[labels == -100] = torch.inf
    got = run((hidden, weight, labels, bias), needs, "chunked", workspace_bytes=400)
    assert (got["dh"][labels == -100] == 0).all()
    hidden[labels == -100] = 0.0
    want = run((hidden, weight, labels, bias), needs, "chunked", workspace_bytes=400)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_bias_may_be_wider_than_the_weight():
    hidden, weight, labels, bias = make(9, 16, 40, torch.bfloat16)
    want = run((hidden, weight, labels, bias), "hwb", "eager")
    for impl in ("eager", "chunked"):
        got = run((hidden, weight, labels, bias.float()), "hwb", impl)
        assert got["db"].dtype == torch.float32
        torch.testing.assert_close(got["logps"], want["logps"], rtol=2e-2, atol=2e-2)


def test_ignored_logits_have_gradient_zero_even_where_they_are_not_finite():
    hidden, weight, labels, _ = make(9, 16, 40, bias=False)
    logits = hidden @ weight.t()
    logits[labels == -100] = torch.nan
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(pk.logits_token_logps(logits, labels).logps.sum(), logits)
    assert (grad[labels == -100] == 0).all() and (grad[labels != -100] != 0).all()


def test_strided_inputs_and_batches():
    hidden, weight, labels, _ = make(24, 16, 50, bias=False)
    want = pk.token_logps(hidden, weight, labels)
    wide = torch.stack([hidden, hidden], -1)[..., 0]
    got = pk.token_logps(wide, weight.t().contiguous().t(), labels)
    torch.testing.assert_close(got.logps, want.logps)
    batched = pk.token_logps(hidden.view(4, 6, 16), weight, labels.view(4, 6), outputs=("entropy",))
    assert batched.entropy.shape == (4, 6)
    torch.testing.assert_close(batched.logps.flatten(), want.logps)
    one = hidden[:1].expand(24, 16).requires_grad_()
    pk.token_logps(one, weight, labels).logps.sum().backward()


def test_only_asked_outputs_come_back():
    hidden, weight, labels, _ = make(6, 16, 50, bias=False)
    for impl in ("eager", "chunked", "cut"):
        out = pk.token_logps(hidden, weight, labels, impl=impl, outputs="mean_logit")
        assert [name for name, t in zip(out._fields, out) if t is not None] == ["logps", "mean_logit"]


@pytest.mark.parametrize("impl", ["chunked", "cut"])
def test_double_backward_raises(impl):
    """Also where the upstream gradient needs none: a silent zero would be a wrong second derivative."""
    hidden, weight, labels, _ = make(6, 16, 50, bias=False, ignored=False)
    for needs_weight in (False, True):
        hidden.requires_grad_()
        weight.requires_grad_(needs_weight)
        out = pk.token_logps(hidden, weight, labels, impl=impl)
        (g,) = torch.autograd.grad(out.logps.sum(), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="use impl='eager'"):
            g.pow(2).sum().backward()


def test_eager_has_second_derivatives():
    hidden, weight, labels, _ = make(3, 4, 5, torch.float64, bias=False, ignored=False)
    assert torch.autograd.gradgradcheck(
        lambda h, w: pk.token_logps(h, w, labels, impl="eager").logps,
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


def test_gradcheck_of_the_chunked_body():
    hidden, weight, labels, bias = make(5, 4, 7, torch.float64)
    for t in (hidden, weight, bias):
        t.requires_grad_()

    def f(h, w, b):
        out = pk.token_logps(h, w, labels, b, softcap=3.0, temperature=1.3, outputs=("entropy",), workspace_bytes=100)
        return out.logps, out.entropy

    assert torch.autograd.gradcheck(f, (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda h: f(h, weight.detach(), bias.detach()), (hidden,))


def test_retained_graph_gives_the_same_gradient_twice():
    hidden, weight, labels, _ = make(6, 16, 50, bias=False)
    for needs_weight in (False, True):
        hidden.requires_grad_()
        weight.requires_grad_(needs_weight)
        loss = pk.token_logps(hidden, weight, labels).logps.sum()
        first = torch.autograd.grad(loss, hidden, retain_graph=True)
        assert torch.equal(first[0], torch.autograd.grad(loss, hidden)[0])


def test_autocast_runs_the_head_in_its_dtype():
    hidden, weight, labels, _ = make(6, 16, 50, bias=False)
    weight.requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        out = pk.token_logps(hidden, weight, labels)
    out.logps.sum().backward()
    want = pk.token_logps(hidden.bfloat16(), weight.detach().bfloat16(), labels)
    assert torch.equal(out.logps, want.logps) and out.logps.dtype == torch.float32
    assert weight.grad.dtype == torch.float32
    with torch.autocast(DEVICE, torch.bfloat16):  # which leaves float64 alone
        assert pk.token_logps(hidden.double(), weight.double(), labels).logps.dtype == torch.float64


@pytest.mark.parametrize(
    "change, words",
    [
        ({"impl": "fast"}, "impl='fast'"),
        ({"outputs": ("entropi",)}, "unknown 'entropi'"),
        ({"workspace_bytes": 0}, "workspace_bytes=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"logit_scale": float("nan")}, "logit_scale=nan"),
        ({"weight": torch.zeros(9, 5)}, "(9, 5)"),
        ({"weight": torch.zeros(9, 4).half()}, "torch.float16"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "labels (2,)"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, "must be int64"),
        ({"labels": torch.tensor([0, 9, 1])}, "label 9 is outside the vocabulary of 9"),
        ({"labels": torch.tensor([0, -1, 1])}, "label -1"),
        ({"bias": torch.zeros(4)}, "bias (4,)"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change, words):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(9, 4), "labels": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError) as error:
        pk.token_logps(**(arguments | change))
    assert words in str(error.value)


def test_cut_takes_no_float64():
    pytest.importorskip("triton")
    hidden, weight, labels, _ = make(3, 4, 5, torch.float64, bias=False)
    with pytest.raises(RuntimeError, match="no float64"):
        pk.token_logps(hidden, weight, labels, impl="cut")


def test_explain_names_the_row():
    text = pk.explain(1024, 1024, 128_256, grad_head=False)
    assert "frozen_head" in text and "4NDV" not in text.splitlines()[0] and "5.379e+11" in text
