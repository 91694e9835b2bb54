"""The products of the chunked body: whichever library computes them, the result is as good as torch.mm's."""

import pytest
import torch

from conftest import DEVICE
from numerics import assert_as_good_as_torch
from prefkern import products

EPS = 1e-6


@pytest.fixture(params=["torch.mm", "oneDNN"])
def library(request, monkeypatch):
    if request.param == "oneDNN" and not (torch.backends.mkldnn.is_available() and DEVICE == "cpu"):
        pytest.skip("oneDNN is a CPU library that this build of torch lacks")
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: request.param == "oneDNN")
    monkeypatch.setattr(products, "_SMALL", 0)
    return request.param


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same matrix with other strides."""
    wider = torch.zeros(x.shape[0], x.shape[1] + 3, dtype=x.dtype, device=x.device)
    wider[:, 1:-2] = x
    return {"rows": x.contiguous(), "columns": x.t().contiguous().t(), "of a wider one": wider[:, 1:-2]}


def matrices(m, k, n, dtype):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=g).to(DEVICE, dtype) for shape in ((m, k), (k, n)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(33, 17, 65), (1, 5, 3), (7, 1, 1), (4, 130, 2)], ids=str)
def test_every_layout(library, shape, dtype):
    a, b = matrices(*shape, dtype)
    truth, torch_same = a.double() @ b.double(), a @ b
    for x in layouts(a).values():
        for y in layouts(b).values():
            assert_as_good_as_torch(products.product(x, y), torch_same, truth, EPS)
            out = torch.empty_like(truth, dtype=dtype)
            products.product_into(out, x, y)
            assert_as_good_as_torch(out, torch_same, truth, EPS)


@pytest.mark.parametrize("terms", [1000, 5000])
def test_long_sums_lose_at_most_twice_what_torch_loses(library, terms):
    """Root mean squares, of which nothing is luck; and in memory that is given."""
    a, b = matrices(256, terms, 64, torch.float32)
    truth = a.double() @ b.double()

    def loss(x):
        return (x.double() - truth).square().mean().sqrt().item()

    bound = 2 * loss(torch.mm(a, b))
    for x in layouts(a).values():
        for y in layouts(b).values():
            out = torch.full((256, 64), torch.nan, device=DEVICE)
            products.product_into(out, x, y)
            assert loss(products.product(x, y)) <= bound and loss(out) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_are_fp32(library, dtype):
    a, b = matrices(16, 32, 24, dtype)
    total = torch.full((16, 24), 3.0, device=DEVICE)
    products.add_product(total, a, b, alpha=-0.5)
    product = a.double() @ b.double()
    # A bf16 product may be rounded once before it is added, the sum never is.
    assert_as_good_as_torch(total - 3, (-0.5 * (a @ b)).float(), -0.5 * product, 1e-6 * 3)
    assert total.dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (4, 3, 0)], ids=str)
def test_empty(library, shape):
    a, b = matrices(*shape, torch.float32)
    got = products.product(a, b)
    assert got.shape == (shape[0], shape[2]) and (got == 0).all()


def test_onednn_is_asked_where_it_is_faster(monkeypatch):
    """Counted, not timed: the rule is a property of the processor, so that equal inputs give equal bits."""
    calls = []
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: calls.append(1) or False)
    a, b = matrices(64, 64, 64, torch.float32)
    products.product(a, b)
    assert len(calls) == (DEVICE == "cpu")
    products.product(a.to(torch.bfloat16), b.to(torch.bfloat16))
    products.product(a.double(), b.double())
    assert len(calls) == (DEVICE == "cpu"), "only fp32 has two libraries"
