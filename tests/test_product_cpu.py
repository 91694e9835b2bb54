"""The compiled product of bf16 matrices: right for any shape and layout, within its memory, whatever the threads."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import prefkern as pk
from prefkern import products
from prefkern.kernels import product_cpu
from prefkern.kernels.product_cpu import library, product_into, serves

pytestmark = [
    pytest.mark.skipif(library() is None, reason="not built, or this processor does not want it"),
    pytest.mark.usefixtures("engine"),
]
BF16 = torch.bfloat16
LAYOUTS = list(itertools.product([False, True], repeat=2))


def matrix(rows, columns, transposed, pad, seed):
    """bf16 amid NaN, which nothing may read: (rows, columns), as it lies or transposed."""
    lines, length = (columns, rows) if transposed else (rows, columns)
    memory = torch.full((lines + 1, length + pad), torch.nan, dtype=BF16)
    x = memory[:lines, :length].copy_(torch.randn(lines, length, generator=torch.Generator().manual_seed(seed)))
    return x.t() if transposed else x


def check(rows, columns, depth, a_transposed, b_transposed, pad=0):
    a, b = matrix(rows, depth, a_transposed, pad, 1), matrix(depth, columns, b_transposed, pad, 2)
    truth, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    # Of sums in fp32: what random roundings of so many terms may add up to. One term left out would be more.
    rounding = 4 * depth**0.5 * 2**-24 * size
    memory = torch.full((rows, columns + 5), 7.0, dtype=BF16)
    out = memory[:, :columns]
    product_into(out, a, b)
    assert ((out.double() - truth).abs() <= 2**-8 * (truth.abs() + rounding) + rounding).all()
    assert (memory[:, columns:] == 7).all()

    g = torch.Generator().manual_seed(3)
    before, keep, gain = (torch.randn(*shape, generator=g) for shape in ((rows, columns), (rows,), (rows,)))
    for factors in ((None, None), (keep, gain), (None, gain)):
        memory = torch.full((rows, columns + 5), 7.0)
        total = memory[:, :columns].copy_(before)
        product_into(total, a, b, *factors)
        k, f = (1.0 if x is None else x[:, None] for x in factors)
        want = k * before.double() + f * truth
        blending = 2**-22 * ((k * before).abs() + (f * truth).abs())
        assert ((total.double() - want).abs() <= (f * rounding).abs() + blending).all()
        assert (memory[:, columns:] == 7).all()


@pytest.mark.parametrize("a_transposed, b_transposed", LAYOUTS)
@pytest.mark.parametrize("depth", [1, 2, 31, 33, 64, 100, 1153])
@pytest.mark.parametrize("rows, columns", [(1, 1), (5, 63), (6, 64), (7, 65), (97, 130), (200, 3)])
def test_odd_sizes(rows, columns, depth, a_transposed, b_transposed):
    check(rows, columns, depth, a_transposed, b_transposed, pad=3)


@pytest.mark.parametrize("a_transposed, b_transposed", LAYOUTS)
@pytest.mark.parametrize(
    "shape",
    [(1024, 320, 1024), (1031, 200, 2100), (130, 70, 16_387), (4099, 96, 1190), (70, 1216, 2500), (333, 2240, 1190)],
    ids=str,
)
def test_large(shape, a_transposed, b_transposed):
    """Several pieces of depth, panels cut into ranges, and up to four side by side, of which the last are fewer."""
    check(*shape, a_transposed, b_transposed)


def test_more_rows_than_are_packed_at_a_time():
    check(700, 64, 16_384, False, False)
    check(700, 64, 16_384, True, True)


@pytest.mark.parametrize("a_transposed, b_transposed", LAYOUTS)
def test_bits_do_not_depend_on_threads(a_transposed, b_transposed):
    a, b = matrix(555, 1500, a_transposed, 0, 1), matrix(1500, 1100, b_transposed, 0, 2)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            out, total = torch.empty(555, 1100, dtype=BF16), torch.zeros(555, 1100)
            product_into(out, a, b)
            product_into(total, a, b)
            found.append((out, total))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_what_is_not_finite_stays_where_it_is():
    a, b = matrix(100, 100, False, 0, 1), matrix(100, 130, False, 0, 2)
    a[3, 5], a[97, 0], b[50, 129] = torch.nan, torch.inf, torch.inf
    out = torch.empty(100, 130, dtype=BF16)
    product_into(out, a, b)
    want = a.float() @ b.float()
    assert torch.equal(out.isfinite(), want.isfinite()) and torch.equal(out.isnan(), want.isnan())


def test_products_are_taken_where_they_serve(monkeypatch):
    """Large bf16 matrices of a CPU in either layout; all else goes to the libraries, with the same result."""
    calls = []
    monkeypatch.setattr(product_cpu, "product_into", lambda *a, _f=product_into, **k: calls.append(1) or _f(*a, **k))
    x = matrix(128, 128, False, 0, 1)
    for a, b, served in [
        (x, x.t(), True),
        (x[:, :63], x[:63], False),
        (x.float(), x.float(), False),
        (x.half(), x.half(), False),
        (x.repeat_interleave(2, 1)[:, ::2], x, False),
        (x[:1].expand(128, 128), x, False),
    ]:
        calls.clear()
        got, want = products.product(a, b), a.double() @ b.double()
        assert bool(calls) == served == serves(a, b)
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)
        total = torch.ones(128, 128, dtype=torch.float32)
        products.add_product(total, a, b, alpha=0.5)
        torch.testing.assert_close(total.double(), 1 + 0.5 * want, rtol=2e-2, atol=2e-2)
        keep, gain = torch.rand(2, 128, generator=torch.Generator().manual_seed(0))
        products.blend_product(total, keep, a, b, gain)
        want = keep[:, None] * (1 + 0.5 * want) + gain[:, None] * want
        torch.testing.assert_close(total.double(), want, rtol=4e-2, atol=4e-2)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_see_the_product():
    x = matrix(128, 128, False, 0, 1)
    with Operators() as operators, FlopCounterMode(display=False) as counter:
        products.product(x, x)
    assert operators.seen.count("prefkern.product.default") == 1
    assert counter.get_total_flops() == 2 * 128**3


@pytest.mark.parametrize("kind", ["frozen", "trained"])
def test_the_head_uses_it(kind):
    """Forward and backward of a head of 128 rows: every product of its tiles, and FLOPs as planned."""
    n, d, v = 128, 128, 1000
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=g).to(BF16).requires_grad_()
    weight = torch.randn(v, d, generator=g).to(BF16).requires_grad_(kind == "trained")
    with FlopCounterMode(display=False) as counter, Operators() as operators:
        pk.token_logps(hidden, weight, torch.arange(n)).logps.sum().backward()
    assert not any("mm" in name for name in operators.seen)
    assert counter.get_total_flops() == (4 if kind == "frozen" else 6) * n * d * v


def test_a_sum_in_bf16_is_added_to_all_the_same():
    x = matrix(128, 128, False, 0, 1)
    total = torch.ones(128, 128, dtype=BF16)
    products.add_product(total, x, x)
    torch.testing.assert_close(total.double(), 1 + x.double() @ x.double(), rtol=2e-2, atol=2e-2)


def test_importing_it_does_not_import_triton():
    script = "import sys, prefkern.kernels.product_cpu; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_matrix_registers_are_used_where_there_are_some():
    script = "from prefkern.kernels import product_cpu as p; print(p.library().prefkern_multiply_by(p.TILES))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    there = torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()
    assert int(found) == (product_cpu.TILES if there else product_cpu.VECTORS)


def test_torch_multiplies_by_the_same_registers():
    """In turn, on the same threads: each sets the shape of the tiles for itself."""
    a, b = matrix(192, 256, False, 0, 1), matrix(256, 320, False, 0, 2)
    want, out = a.double() @ b.double(), torch.empty(192, 320, dtype=BF16)
    for _ in range(3):
        for found in (torch.mm(a, b), product_into(out, a, b) or out):
            torch.testing.assert_close(found.double(), want, rtol=2e-2, atol=2e-2)
