"""A low-rank adapter on the head, W + scale b a, in every body: against float64, the merged weight, and plain torch."""

from dataclasses import dataclass

import pytest
import torch
from test_token_logps import CountFlops
from torch import Tensor

import prefkern as pk
from conftest import DEVICE
from numerics import DTYPES, LargestTensor, assert_as_good_as_torch, row_stats
from prefkern import planner
from prefkern.head import Head

EPS = 1e-6  # fp32 sums in another order than torch's
BODIES = [("eager", d) for d in DTYPES] + [("chunked", d) for d in (*DTYPES, torch.bfloat16)]
BODIES += [("cut", d) for d in DTYPES]
OPTIONS = {"plain": {}, "everything": {"softcap": 5.0, "logit_scale": 0.5, "temperature": 0.6}}
ADAPTER = ("hidden", "a", "b")
NEEDS = {
    "only a": ("a",),
    "only b": ("b",),
    "dropped": ("dropped",),
    "adapter": ADAPTER,
    "adapter and bias": (*ADAPTER, "bias"),
    "all": (*ADAPTER, "weight", "bias", "dropped"),
}


@dataclass
class Case:
    """Tensors of one call. `dropped` is what the adapter sees in place of hidden."""

    tensors: dict[str, Tensor | None]
    labels: Tensor
    scale: float = 0.7

    def leaves(self, needs=(), dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
        return {
            name: None if t is None else t.to(dtype or t.dtype).detach().clone().requires_grad_(name in needs)
            for name, t in self.tensors.items()
        }


def make(n=37, d=24, v=203, rank=8, dtype=torch.float32, bias=True, dropped=True) -> Case:
    g = torch.Generator().manual_seed(n + rank)

    def randn(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(dtype).to(DEVICE)

    hidden = randn(n, d)
    kept = (torch.rand(n, d, generator=g) > 0.25).to(DEVICE)
    labels = torch.randint(0, v, (n,), generator=g).to(DEVICE)
    labels[::5] = -100
    tensors = {
        "hidden": hidden, "weight": randn(v, d, scale=2 / d**0.5), "bias": randn(v) if bias else None,
        "a": randn(rank, d, scale=d**-0.5), "b": randn(v, rank, scale=rank**-0.5),
        "dropped": hidden * kept / 0.75 if dropped else None,
    }  # fmt: skip
    return Case(tensors, labels)


def results(stats, tensors, needs, entropy: bool) -> dict[str, Tensor]:
    """Values, and gradients of the needed tensors for a random upstream gradient."""
    found = {name: getattr(stats, name).detach() for name in ("logps", "entropy", "lse", "mean_logit")}
    if needs:
        g = torch.randn(stats.logps.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        loss = (stats.logps * g).sum() + ((stats.entropy * g.flip(0)).sum() if entropy else 0)
        found |= dict(zip((f"d{x}" for x in needs), torch.autograd.grad(loss, [tensors[x] for x in needs])))
    return found


def ours(case: Case, needs=(), impl="auto", entropy=True, **options) -> dict[str, Tensor]:
    t = case.leaves(needs)
    lora = pk.LoRA(t["a"], t["b"], case.scale, t["dropped"])
    out = pk.token_logps(t["hidden"], t["weight"], case.labels, t["bias"], impl=impl, lora=lora,
                         outputs=("entropy", "lse", "mean_logit"), **options)  # fmt: skip
    return results(out, t, needs, entropy)


def plain(case: Case, needs=(), dtype=None, entropy=True, merged=False, **options) -> dict[str, Tensor]:
    """The same by torch alone: the adapter's share added to the logits, or its weight to the head's."""
    t = case.leaves(needs, dtype)
    hidden = t["hidden"]
    if merged:
        logits = hidden @ (t["weight"] + case.scale * t["b"] @ t["a"]).T
    else:
        x = hidden if t["dropped"] is None else t["dropped"]
        logits = hidden @ t["weight"].T + x @ t["a"].T * case.scale @ t["b"].T
    return results(row_stats(logits, case.labels, Head(**options), t["bias"]), t, needs, entropy)


def compare(case: Case, needs, impl: str, entropy=True, merged=False, workspace_bytes=None, **options) -> None:
    truth = plain(case, needs, torch.float64, entropy, merged, **options)
    same = plain(case, needs, None, entropy, **options)
    found = ours(case, needs, impl, entropy, workspace_bytes=workspace_bytes, **options)
    assert found.keys() == truth.keys()
    for name, value in found.items():
        try:
            assert_as_good_as_torch(value, same[name], truth[name], EPS)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("impl, dtype", BODIES, ids=lambda x: str(x).removeprefix("torch."))
def test_every_body_is_as_good_as_torch(impl, dtype, needs, options):
    compare(make(dtype=dtype), needs, impl, workspace_bytes=10_000, **options)


@pytest.mark.parametrize("entropy", [False, True], ids=["logps", "logps and entropy"])
@pytest.mark.parametrize("rank", [1, 8, 65])
@pytest.mark.parametrize("impl", ["eager", "chunked", "cut"])
def test_it_is_the_merged_weight(impl, rank, entropy):
    """Values and gradients of a head whose weight is W + scale b a; rank 65 exceeds hidden's width."""
    compare(make(rank=rank, dropped=False), (*ADAPTER, "weight", "bias"), impl, entropy, merged=True)


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "a"), ("a",), ADAPTER, (*ADAPTER, "weight")], ids="+".join)
def test_flops_are_those_of_the_plan(needs):
    """What is asked of a gradient decides the row; products with the adapter's narrow sides are counted too."""
    n, d, v, rank, workspace = 64, 32, 300, 8, 50_000
    case = make(n, d, v, rank, bias=False, dropped=False)
    t = case.leaves(needs)
    plan = planner.plan(
        (n, d, v), torch.float32, torch.device(DEVICE), grad_hidden="hidden" in needs, grad_head="b" in needs,
        grad_weight="weight" in needs, rank=rank, grad_low=(bool({"hidden", "a"} & {*needs}), "b" in needs),
        workspace_bytes=workspace,
    )  # fmt: skip
    row = "recompute" if "weight" in needs else "recompute_adapter" if "b" in needs else "frozen_head"
    assert plan.row.name == row
    lora = pk.LoRA(t["a"], t["b"], case.scale)
    low_NR, _ = lora.factors(t["hidden"], t["weight"])
    with CountFlops() as outside:  # the product with a is autograd's
        torch.autograd.grad(low_NR.sum(), [t[x] for x in needs if x in ("hidden", "a")], allow_unused=True)
        lora.factors(t["hidden"], t["weight"])
    with CountFlops() as counted:
        out = pk.token_logps(t["hidden"], t["weight"], case.labels, lora=lora, workspace_bytes=workspace)
        torch.autograd.grad(out.logps.sum(), [t[x] for x in needs])
    assert counted.flops - outside.flops == plan.flops


def test_an_adapter_adds_little_to_a_frozen_head():
    """6NDV where b trains, 4NDV where only a does, and what rank / D of a pass costs more."""
    n, d, v, rank = 1024, 4096, 128_256, 16
    options = {"grad_hidden": True, "rank": rank, "device": torch.device("cpu"), "dtype": torch.bfloat16}
    trained = planner.plan((n, d, v), grad_head=True, grad_weight=False, grad_low=(True, True), **options)
    only_a = planner.plan((n, d, v), grad_head=False, grad_low=(True, False), **options)
    assert (trained.row.flops, only_a.row.flops) == (6, 4)
    for p in (trained, only_a):
        assert p.row.flops < p.flops / (n * d * v) < 1.01 * p.row.flops


@pytest.mark.parametrize("needs", [(), ("a",), ADAPTER, (*ADAPTER, "weight")], ids=lambda x: "+".join(x) or "none")
@pytest.mark.parametrize("impl", ["eager", "chunked"])
def test_the_merged_weight_is_never_made(impl, needs):
    """With few rows nothing has the size of the weight but its own gradient."""
    n, d, v, rank = 8, 128, 4099, 2
    case = make(n, d, v, rank, bias=False)
    t = case.leaves(needs)
    with LargestTensor([x for x in t.values() if x is not None]) as largest, torch.set_grad_enabled(bool(needs)):
        lora = pk.LoRA(t["a"], t["b"], case.scale, t["dropped"])
        out = pk.token_logps(t["hidden"], t["weight"], case.labels, impl=impl, lora=lora)
        if needs:
            torch.autograd.grad(out.logps.sum(), [t[x] for x in needs])
    whole = v * d * 4
    if "weight" in needs:
        assert largest.bytes == whole, "dweight, once"
    else:
        assert 0 < largest.bytes <= max(n, d, 4 * rank) * v * 4 // 8
    with LargestTensor(list(t.values())[:2]) as merged:
        (t["weight"] + case.scale * t["b"] @ t["a"]).sum()
    assert merged.bytes == whole, "the measure itself must see a merged weight"


@pytest.mark.parametrize("needs", [(), ("hidden",), ADAPTER, (*ADAPTER, "weight")], ids=lambda x: "+".join(x) or "none")
@pytest.mark.parametrize("impl", ["eager", "chunked", "cut"])
def test_the_reference_has_the_bare_head(impl, needs):
    """ref_logps are those of ref_hidden without the adapter; the policy's results do not change by their company."""
    case = make(rank=8)
    g = torch.Generator().manual_seed(5)
    ref_hidden = torch.randn(case.tensors["hidden"].shape, generator=g).to(DEVICE).requires_grad_()
    t = case.leaves(needs)
    lora = pk.LoRA(t["a"], t["b"], case.scale, t["dropped"])
    options = {"impl": impl, "outputs": ("entropy", "lse", "mean_logit")}
    out = pk.token_logps(t["hidden"], t["weight"], case.labels, t["bias"], lora=lora, ref_hidden=ref_hidden, **options)
    bare = pk.token_logps(ref_hidden.detach(), t["weight"].detach(), case.labels, case.tensors["bias"], impl=impl)
    torch.testing.assert_close(out.ref_logps, bare.logps)
    assert not out.ref_logps.requires_grad and not torch.allclose(out.ref_logps, out.logps)
    truth, same = plain(case, needs, torch.float64, entropy=False), plain(case, needs, entropy=False)
    for name, value in results(out, t, needs, entropy=False).items():
        assert_as_good_as_torch(value, same[name], truth[name], EPS)
    assert ref_hidden.grad is None


@pytest.mark.parametrize("with_lora", [False, True], ids=["bare head", "adapter"])
@pytest.mark.parametrize("needs", [(), ("hidden",)], ids=["no gradient", "frozen head"])
def test_policy_and_reference_walk_the_weight_once(needs, with_lora):
    """Where one tile holds all rows, one product reads a slice of the weight for both."""
    n, d, v = 64, 32, 300
    case = make(n, d, v, bias=False, dropped=False)
    t = case.leaves(needs)
    lora = pk.LoRA(t["a"], t["b"], case.scale) if with_lora else None
    ref_hidden = torch.randn(n, d, device=DEVICE)

    def reads(**options) -> CountReads:
        with CountReads(t["weight"]) as count, torch.set_grad_enabled(bool(needs)):
            pk.token_logps(t["hidden"], t["weight"], case.labels, lora=lora, **options)
        return count

    alone, both = reads(), reads(ref_hidden=ref_hidden)
    assert both.products == alone.products
    assert both.rows == alone.rows + n, "the reference's rows enter the product of the logits and no other"


class CountReads(CountFlops):
    """Products that read (a part of) one weight, and how many rows entered them."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.storage, self.products, self.rows = weight.untyped_storage().data_ptr(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = self.flops
        out = super().__torch_dispatch__(func, types, args, kwargs)
        a, b = [x for x in args if isinstance(x, Tensor)][-2:] if self.flops != before else (None, None)
        if b is not None and b.untyped_storage().data_ptr() == self.storage:
            self.products, self.rows = self.products + 1, self.rows + a.shape[0]
        return out


@pytest.mark.parametrize("impl", ["eager", "chunked", "cut"])
def test_adapters_may_be_wider_than_the_head(impl):
    """fp32 adapters over a half-precision head, as peft makes them; gradients come in the adapters' dtype."""
    narrow = torch.float16
    case = make(dtype=narrow, dropped=False)
    t = case.leaves(ADAPTER)
    a, b = (t[x].detach().float().requires_grad_() for x in "ab")
    out = pk.token_logps(t["hidden"], t["weight"], case.labels, t["bias"], impl=impl, lora=pk.LoRA(a, b, case.scale))
    g = torch.randn(out.logps.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    dhidden, da, db = torch.autograd.grad((out.logps * g).sum(), [t["hidden"], a, b])
    assert (dhidden.dtype, da.dtype, db.dtype) == (narrow, torch.float32, torch.float32)
    truth, same = plain(case, ADAPTER, torch.float64, entropy=False), plain(case, ADAPTER, entropy=False)
    for name, value in {"logps": out.logps, "da": da, "db": db, "dhidden": dhidden}.items():
        assert_as_good_as_torch(value, same[name], truth[name], EPS)


def test_autocast_runs_the_adapter_in_its_dtype():
    case = make(dropped=False, bias=False)
    t = case.leaves(ADAPTER)
    lora = pk.LoRA(t["a"], t["b"], case.scale)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = pk.token_logps(t["hidden"], t["weight"], case.labels, lora=lora)
        logits = torch.nn.functional.linear(t["hidden"], t["weight"]) + case.scale * torch.nn.functional.linear(
            torch.nn.functional.linear(t["hidden"], t["a"]), t["b"]
        )
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(out.logps, row_stats(logits, case.labels, Head()).logps, rtol=2e-2, atol=2e-2)
    grads = torch.autograd.grad(out.logps.sum(), [t[x] for x in ADAPTER])
    assert all(g.dtype == torch.float32 and g.abs().sum() > 0 for g in grads)


def test_batches_and_gradients_of_a_batch():
    case = make(24, dropped=True)
    t = case.leaves(("a", "dropped"))
    flat = pk.token_logps(t["hidden"], t["weight"], case.labels, lora=pk.LoRA(t["a"], t["b"], 0.5, t["dropped"]))
    shape = (4, 6, t["hidden"].shape[1])
    batch = pk.token_logps(
        t["hidden"].view(shape), t["weight"], case.labels.view(4, 6),
        lora=pk.LoRA(t["a"], t["b"], 0.5, t["dropped"].view(shape)), ref_hidden=t["hidden"].view(shape),
    )  # fmt: skip
    assert batch.logps.shape == batch.ref_logps.shape == (4, 6)
    torch.testing.assert_close(batch.logps.flatten(), flat.logps)


@pytest.mark.parametrize("impl", ["chunked", "cut"])
def test_same_inputs_same_bits_and_no_second_derivative(impl):
    case = make()
    first, second = ours(case, NEEDS["all"], impl), ours(case, NEEDS["all"], impl)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for needs in (("a",), ("b",)):
        t = case.leaves(needs)
        out = pk.token_logps(t["hidden"], t["weight"], case.labels, impl=impl, lora=pk.LoRA(t["a"], t["b"]))
        (grad,) = torch.autograd.grad(out.logps.sum(), [t[needs[0]]], create_graph=True)
        with pytest.raises(RuntimeError, match="use impl='eager'"):
            grad.pow(2).sum().backward()


def test_gradcheck_in_float64():
    case = make(5, 4, 7, 2, torch.float64)
    t = case.leaves(NEEDS["all"])

    def f(hidden, weight, bias, a, b, dropped):
        out = pk.token_logps(hidden, weight, case.labels, bias, lora=pk.LoRA(a, b, 0.7, dropped), softcap=3.0,
                             outputs=("entropy",), workspace_bytes=100)  # fmt: skip
        return out.logps, out.entropy

    assert torch.autograd.gradcheck(f, tuple(t.values()))
    fixed = case.leaves(("hidden", "a", "dropped"))
    assert torch.autograd.gradcheck(f, tuple(fixed.values()))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"a": (8, 23)}, "lora: a (8, 23) must be (r, 24)"),
        ({"b": (202, 8)}, "b (202, 8) (203, r)"),
        ({"b": (203, 7)}, "b (203, 7)"),
        ({"a": (0, 24), "b": (203, 0)}, "r > 0"),
        ({"dropped": (36, 24)}, "its hidden (36, 24) as the head's (37, 24)"),
        ({"ref_hidden": (36, 24)}, "ref_hidden (36, 24)"),
        ({"ref_hidden": (37, 23)}, "must have hidden's shape (37, 24)"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change, words):
    case = make()
    t = {**case.leaves(), "ref_hidden": None} | {k: torch.zeros(shape, device=DEVICE) for k, shape in change.items()}
    with pytest.raises(ValueError) as error:
        lora = pk.LoRA(t["a"], t["b"], 1.0, t["dropped"])
        pk.token_logps(t["hidden"], t["weight"], case.labels, lora=lora, ref_hidden=t["ref_hidden"])
    assert words in str(error.value)
