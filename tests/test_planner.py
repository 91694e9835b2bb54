"""The planner's figures against what runs: FLOPs of every row of the table, counted; the table is all reached."""

import sys

import pytest
import torch

pytest.importorskip("triton")
from test_token_logps import CountFlops

import prefkern as pk
from conftest import DEVICE
from prefkern import planner
from prefkern.kernels import lm_head
from prefkern.kernels.tuning import HeadConfig

N, D, V, R = 64, 32, 640, 16  # whole tiles of the interpreted kernels: a tile that is padded multiplies zeros too
WORKSPACE = 64 * 256 * 4  # fewer logits than there are, in the walks that take parts
LAYOUT = pk.Layout.pairs([16, 8], [10, 30])


@pytest.fixture
def dots(monkeypatch):
    """FLOPs of the tl.dot of interpreted kernels, as a list to sum."""
    from triton.runtime import interpreter

    found = []
    builder = interpreter.InterpreterBuilder
    original = builder.create_dot

    def counted(self, a, b, *args, **kwargs):
        (m, k), n = a.data.shape[-2:], b.data.shape[-1]
        found.append(2 * m * k * n)
        return original(self, a, b, *args, **kwargs)

    monkeypatch.setattr(builder, "create_dot", counted)
    tile = HeadConfig(32, 64, 32, num_warps=1, num_stages=1)
    monkeypatch.setattr(lm_head, "head_config", lambda *_, **__: tile)
    return found


@pytest.fixture
def plans(monkeypatch):
    """Every plan that was made."""
    found = []
    original = planner.plan

    def noted(*args, **kwargs):
        found.append(original(*args, **kwargs))
        return found[-1]

    for name, module in list(sys.modules.items()):
        if name.startswith("prefkern.") and getattr(module, "plan", None) is original:
            monkeypatch.setattr(module, "plan", noted)
    return found


def operands(needs: str, rank: int):
    """hidden, weight, bias, LoRA; h, w, b, a and l of `needs` say which need a gradient."""
    g = torch.Generator().manual_seed(0)
    shapes = {"h": (N, D), "w": (V, D), "b": (V,), "a": (rank, D), "l": (V, rank)}
    t = {k: (torch.randn(shape, generator=g) / 8).to(DEVICE).requires_grad_(k in needs) for k, shape in shapes.items()}
    return t["h"], t["w"], t["b"], pk.LoRA(t["a"], t["l"]) if rank else None


def outside(needs: str, rank: int) -> int:
    """FLOPs of low = hidden @ a.T and its gradients: autograd's, and no part of the head."""
    return 2 * N * D * rank * (1 + ("a" in needs) + ("h" in needs and rank > 0))


# row: every kind of call that shall reach it, as what needs a gradient and the adapter's rank
CALLS = {
    planner.NO_GRAD: [("", 0), ("", R)],
    planner.FROZEN: [("h", 0), ("h", R), ("ha", R), ("a", R)],
    planner.RECOMPUTE_ADAPTER: [("hb", 0), ("b", 0), ("hal", R), ("al", R), ("l", R)],
    planner.RECOMPUTE: [("w", 0), ("hw", 0), ("hwb", 0), ("hwal", R)],
    planner.GROUP_LOCAL_ADAPTER: [("hb", 0), ("hal", R), ("al", R), ("l", R)],
    planner.GROUP_LOCAL: [("hw", 0), ("w", 0), ("hwb", 0), ("hwal", R)],
    planner.CUT_NO_GRAD: [("", 0), ("", R)],
    planner.CUT_FROZEN: [("h", 0), ("hb", 0), ("hal", R), ("al", R), ("l", R), ("a", R)],
    planner.CUT_TRAINED: [("w", 0), ("hw", 0), ("hwal", R)],
    planner.EAGER_NO_GRAD: [("", 0), ("", R)],
    planner.EAGER_FROZEN: [("h", 0), ("hb", 0), ("hal", R), ("al", R)],
    planner.EAGER_TRAINED: [("w", 0), ("hw", 0), ("hwal", R)],
}  # fmt: skip
EACH = [(row, *call) for row, calls in CALLS.items() for call in calls]


def test_every_row_of_the_table_is_called():
    assert set(CALLS) == set(planner.TABLE)


@pytest.mark.parametrize("row, needs, rank", EACH, ids=[f"{row.name}-{needs or 'none'}-{r}" for row, needs, r in EACH])
def test_flops_are_those_that_run(row, needs, rank, dots, plans):
    hidden, weight, bias, lora = operands(needs, rank)
    labels = torch.arange(N, device=DEVICE)
    options = {"bias": bias, "lora": lora, "impl": row.body}
    with CountFlops() as counted:
        if row in planner.LOCAL.values():
            out = pk.linear_preference_loss(hidden, weight, labels, LAYOUT, pk.losses.SimPO(), outputs=(), **options)
            total = out.loss
        else:
            total = pk.token_logps(hidden, weight, labels, workspace_bytes=WORKSPACE, **options).logps.sum()
        if needs:
            total.backward()
    plan = plans[-1]
    assert plan.row is row
    if DEVICE == "cuda" and row.body == "cut":
        pytest.skip("what a compiled kernel multiplies is not counted")
    ran = counted.flops + sum(dots) - outside(needs, rank)
    assert ran == pytest.approx(plan.flops, rel=0.01)


@pytest.mark.parametrize("row, needs, rank", EACH, ids=[f"{row.name}-{needs or 'none'}-{r}" for row, needs, r in EACH])
def test_explain_says_row_cost_and_reason(row, needs, rank):
    options = {"grad_hidden": "h" in needs, "grad_head": bool(set(needs) & set("wb")), "grad_weight": "w" in needs}
    options |= {"rank": rank, "grad_low": (rank > 0 and bool(set(needs) & set("ha")), "l" in needs), "impl": row.body}
    options["group_rows"] = 40 if row in planner.LOCAL.values() else None
    chosen = planner.plan((N, D, V), torch.float32, torch.device(DEVICE), **options)
    assert chosen.row is row
    text = pk.explain(N, D, V, torch.float32, DEVICE, **options)
    for part in (row.name, row.how, chosen.reason, f"{chosen.flops:.3e}", f"{chosen.bytes:.3e}", row.memory):
        assert part in text
    assert f"workspace {chosen.workspace_bytes / 2**20:.0f} MiB" in text


def moved_bytes(products: list[tuple[int, int, int]], itemsize: int) -> int:
    """Operands and result of each product (M, K, L) once."""
    return itemsize * sum(m * k + k * ncols + m * ncols for m, k, ncols in products)


@pytest.mark.parametrize("row, needs, products", [
    (planner.NO_GRAD, "", [(N, D, V)]),
    (planner.FROZEN, "h", [(N, D, V), (N, V, D)]),
    (planner.RECOMPUTE, "hw", [(N, D, V), (N - D, D, V), (N, V, D), (V, N, D)]),
    (planner.GROUP_LOCAL, "hw", [(N, D, V), (N, V, D), (V, N, D)]),
    (planner.EAGER_TRAINED, "hw", [(N, D, V), (N, V, D), (V, N, D)]),
], ids=lambda x: getattr(x, "name", None))  # fmt: skip
def test_bytes_are_those_of_the_products(row, needs, products):
    plan = planner.plan(
        (N, D, V), torch.float32, torch.device(DEVICE), grad_hidden="h" in needs, grad_head="w" in needs,
        impl=row.body, group_rows=40 if row is planner.GROUP_LOCAL else None,
    )  # fmt: skip
    assert plan.row is row and plan.bytes == moved_bytes(products, 4)


def test_a_head_that_trains_on_few_rows_costs_what_plain_autograd_does():
    """Up to D rows: 6NDV, whatever the loss; then the sum of a loss's groups in fp32 buys nothing."""
    for n, kept, local in ((D, D, planner.RECOMPUTE), (D + 1, D, planner.GROUP_LOCAL)):
        options = {"grad_hidden": True, "grad_head": True}
        plan = planner.plan((n, D, V), torch.float32, torch.device(DEVICE), **options)
        assert plan.kept_rows == kept and plan.flops == (6 * n + 2 * (n - kept)) * D * V
        assert planner.plan((n, D, V), torch.float32, torch.device(DEVICE), group_rows=n, **options).row is local
        again = planner.plan((n, D, V), torch.float32, torch.device(DEVICE), keep_logits=False, **options)
        assert again.kept_rows == 0 and again.flops == 8 * n * D * V


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("workspace", [1, 1 << 12, 1 << 20, 1 << 30])
def test_tiles_of_many_rows_are_half_as_large_on_a_cpu(dtype, workspace):
    """The fp32 sums beside them take the other half of what a step may hold."""

    def bytes_of(n: int) -> int:
        at = (n, 1024, 128_256), dtype, torch.device("cpu")
        rows, width = planner.plan(*at, grad_hidden=True, grad_head=True, workspace_bytes=workspace).slab
        assert 1 <= rows <= n and 1 <= width <= 128_256
        return rows * width * dtype.itemsize

    few, many = bytes_of(2048), bytes_of(2049)
    smallest = 2048 * dtype.itemsize  # one vocabulary entry
    assert few <= max(min(workspace, 8 << 20), smallest)
    assert few / 2 * 0.9 <= many <= max(few / 2 * 1.1, smallest / 2)
