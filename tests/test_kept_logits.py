"""Logits in the memory of dweight: computed once, right wherever rows and slices end, not read once overwritten."""

import importlib

import pytest
import torch
from test_token_logps import OPTIONS, CountFlops, compare, make
from torch.utils.checkpoint import checkpoint

import prefkern as pk
from conftest import DEVICE
from numerics import LargestTensor, assert_as_good_as_torch
from prefkern import planner
from prefkern import rows as torch_rows
from prefkern.kept_logits import KeptLogits

EPS = 1e-6  # fp32 sums in another order than torch's
D, V = 24, 203


@pytest.fixture(params=[None, 8], ids=["one block", "blocks of rows"])
def blocks(request, monkeypatch):
    """All rows at a time in backward, or a few."""
    if request.param:
        monkeypatch.setattr(planner, "_TILE_ROWS", request.param)


@pytest.fixture(params=["torch", "compiled", "triton"])
def row_functions(request, monkeypatch):
    if request.param == "triton":
        pytest.importorskip("triton")
    name = {"torch": "rows", "compiled": "kernels.row_softmax_cpu", "triton": "kernels.row_softmax"}[request.param]
    module = importlib.import_module(f"prefkern.{name}")
    monkeypatch.setattr(torch_rows, "implementation", lambda device, dtype: module)
    return request.param


def leaves_of(n, dtype=torch.float32):
    hidden, weight, labels, _ = make(n, D, V, dtype, bias=False)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize("n", [1, D - 1, D, D + 1, 3 * D - 1], ids="{} rows".format)
@pytest.mark.parametrize("workspace", [None, 900, 9_000])
def test_as_good_as_torch_at_every_size(n, workspace, blocks):
    compare(make(n, D, V), "hwb", "chunked", workspace_bytes=workspace, **OPTIONS["everything"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [123, 257])
def test_as_good_as_torch_in_sixteen_bits(n, dtype):
    """Sizes at which the largest of many roundings is hardly a matter of luck."""
    compare(make(n, 123, 1031, dtype), "hwb", "chunked", workspace_bytes=40_000, **OPTIONS["everything"])


@pytest.mark.parametrize("n", [D, 2 * D + 1])
def test_as_good_as_torch_with_either_row_function(n, row_functions, blocks):
    compare(make(n, D, V), "hwb", "chunked", workspace_bytes=9_000, **OPTIONS["everything"])


@pytest.mark.parametrize("lora", [False, True])
def test_a_reference_in_the_same_pass_is_not_kept(lora, row_functions):
    """Its rows come after the policy's, whose logits alone are kept."""
    n = D - 5
    hidden, weight, labels = leaves_of(n)
    ref_hidden = hidden.detach().flip(0)
    seed = torch.Generator().manual_seed(2)
    g, a, b = ((torch.randn(*shape, generator=seed) / 4).to(DEVICE) for shape in ((n,), (2, D), (V, 2)))
    adapter = pk.LoRA(a, b) if lora else None

    def both(impl, dtype):
        h, w = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
        own = None if adapter is None else adapter._replace(a=adapter.a.to(dtype), b=adapter.b.to(dtype))
        out = pk.token_logps(h, w, labels, impl=impl, lora=own, ref_hidden=ref_hidden.to(dtype), workspace_bytes=5_000)
        return out.logps, out.ref_logps, *torch.autograd.grad(out.logps, (h, w), g.to(out.logps.dtype))

    truth, same, got = (both(*k) for k in (("eager", torch.float64), ("eager", torch.float32), ("auto", torch.float32)))
    for value, torchs, true in zip(got, same, truth):
        assert_as_good_as_torch(value, torchs, true, EPS)


def test_every_logit_is_computed_once_where_all_rows_fit():
    for n, passes in ((D, 6 * D), (D + 7, 6 * D + 8 * 7)):
        hidden, weight, labels = leaves_of(n)
        with CountFlops() as counted:
            pk.token_logps(hidden, weight, labels).logps.sum().backward()
        assert counted.flops == passes * D * V


@pytest.mark.parametrize("needs", ["", "h", "b", "hb"])
def test_nothing_is_kept_where_weight_needs_no_gradient(needs):
    hidden, weight, labels, bias = make(3 * D, D, 10 * V)
    hidden.requires_grad_("h" in needs), bias.requires_grad_("b" in needs)
    with LargestTensor((hidden, weight, labels, bias)) as largest:
        logps = pk.token_logps(hidden, weight, labels, bias, workspace_bytes=20_000).logps
        if needs:
            logps.sum().backward()
    assert largest.bytes < weight.nbytes / 2


def test_no_tensor_is_larger_than_dweight():
    hidden, weight, labels = leaves_of(D)
    with LargestTensor((hidden, weight, labels)) as largest:
        pk.token_logps(hidden, weight, labels, workspace_bytes=2_000).logps.sum().backward()
    assert largest.bytes == weight.nbytes


@pytest.mark.parametrize("n", [D, D + 5])
def test_later_backwards_compute_logits_again(n, blocks):
    """The first dweight lies where the logits were: a second backward may neither read nor change it."""
    hidden, weight, labels = leaves_of(n)
    logps = pk.token_logps(hidden, weight, labels, workspace_bytes=3_000).logps
    first = torch.autograd.grad(logps.sum(), (hidden, weight), retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(logps.sum(), (hidden, weight), retain_graph=True)
    for x, y, z in zip(first, second, kept):
        assert torch.equal(x, z) and x.data_ptr() != y.data_ptr()
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6)
    first[1].zero_()  # as an optimizer does
    third = torch.autograd.grad(logps.sum(), (hidden, weight))
    assert all(torch.equal(x, y) for x, y in zip(second, third))


def test_one_gradient_after_the_other():
    hidden, weight, labels = leaves_of(D)
    logps = pk.token_logps(hidden, weight, labels).logps
    expected = torch.autograd.grad(pk.token_logps(hidden, weight, labels).logps.sum(), (hidden, weight))
    (dhidden,) = torch.autograd.grad(logps.sum(), hidden, retain_graph=True)
    (dweight,) = torch.autograd.grad(logps.sum(), weight)
    assert torch.equal(dhidden, expected[0])
    torch.testing.assert_close(dweight, expected[1], rtol=1e-5, atol=1e-6)


def test_gradients_are_accumulated_over_calls():
    hidden, weight, labels = leaves_of(D)
    for _ in range(3):
        pk.token_logps(hidden, weight, labels).logps.sum().backward()
    once = torch.autograd.grad(pk.token_logps(hidden, weight, labels).logps.sum(), (hidden, weight))
    for total, grad in zip((hidden.grad, weight.grad), once):
        torch.testing.assert_close(total, 3 * grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_drops_them(reentrant):
    """What a checkpoint throws away and makes again is a saved tensor like any other."""
    hidden, weight, labels = leaves_of(D)
    plain = torch.autograd.grad(pk.token_logps(hidden, weight, labels).logps.sum(), (hidden, weight))
    logps = checkpoint(lambda h, w: pk.token_logps(h, w, labels).logps, hidden, weight, use_reentrant=reentrant)
    logps.sum().backward()
    assert torch.equal(hidden.grad, plain[0]) and torch.equal(weight.grad, plain[1])


def test_hooks_of_saved_tensors_may_move_them():
    hidden, weight, labels = leaves_of(D)
    plain = torch.autograd.grad(pk.token_logps(hidden, weight, labels).logps.sum(), (hidden, weight))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
        logps = pk.token_logps(hidden, weight, labels).logps
    for _ in range(2):
        moved = torch.autograd.grad(logps.sum(), (hidden, weight), retain_graph=True)
        for x, y in zip(moved, plain):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", [1, 4, 7, 20])
@pytest.mark.parametrize("width", [1, 3, 7, 20])
def test_what_is_stored_by_tiles_is_read_by_slices(step, width):
    vocab, dim, rows = 20, 5, 3
    logits = torch.randn(7, vocab)
    kept = KeptLogits(torch.full((vocab, dim), torch.nan), rows, step)
    for start in range(0, 7, 2):
        for i in range(0, vocab, width):
            part = slice(i, min(i + width, vocab))
            kept.store(logits[start : start + 2, part], start, part)
    for i in range(0, vocab, step):
        part = slice(i, min(i + step, vocab))
        assert torch.equal(kept.slice(part), logits[:rows, part])
