"""Gradients made with the value, in chunks of whole prompts: as good as torch, for every loss that allows it."""

import dataclasses

import pytest
import torch
from test_token_logps import CountFlops
from torch.utils._python_dispatch import TorchDispatchMode

import prefkern as pk
from conftest import DEVICE
from numerics import LargestTensor, assert_as_good_as_torch
from prefkern import checks, planner, preference_tail
from prefkern import rows as torch_rows
from prefkern.reference import accumulator

EPS = 1e-6  # fp32 sums in another order than torch's
V, D, RANK = 61, 16, 3
OPERANDS = ("hidden", "weight", "bias", "a", "b")
# By default one prompt's value depends on the others, or a gradient flows to more than the log-probabilities.
NOT_LOCAL = {"alphadpo", "aot", "aot_unpaired", "kto", "tdpo1", "tdpo2"}


@pytest.fixture
def few_rows(monkeypatch):
    """Chunks of any size are worth their sum in fp32, and dweight's memory holds no logits."""
    monkeypatch.setattr(planner, "_rows_that_fit_dweight", lambda shape: 0)
    monkeypatch.setattr(planner, "_LOCAL_ROWS", {"cpu": 1})
    monkeypatch.setattr(planner, "_LOCAL_ROWS_ON_DEVICE", 1)


def tensors(n, seed=0):
    """Operands in float64, and labels, some ignored."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(DEVICE, torch.float64)

    labels = torch.randint(0, V, (n,), generator=g)
    labels[::7] = -100
    values = draw(n, D), draw(V, D, scale=2 / D**0.5), draw(V), draw(RANK, D, scale=0.3), draw(V, RANK, scale=0.3)
    return dict(zip(OPERANDS, values)), labels.to(DEVICE)


def run(
    loss, needs=("hidden", "weight"), dtype=torch.float32, impl="auto", rows=None, upstream=1.0, as_given=None, **kw
):
    """Output, and gradients of the needed operands by name.

    Args:
        rows: whose logits fit the workspace; "few": those of the largest prompt and one more.
        as_given: dtype in which the numbers are given; None: dtype.
    """
    batch = kw.pop("batch", None) or checks.example(loss, dtype=torch.float64)
    values, labels = tensors(batch.layout.num_tokens)

    def at(x):
        return None if x is None else x.to(DEVICE, accumulator(as_given or dtype)).to(accumulator(dtype))

    leaves = {
        name: x.to(as_given or dtype).to(dtype).detach().requires_grad_(name in needs) for name, x in values.items()
    }
    adapter = {"lora": pk.LoRA(leaves["a"], leaves["b"], 1.5)} if {"a", "b"} & set(needs) else {}
    bias = leaves["bias"] if "bias" in needs else None
    options = {
        "ref_logps": at(batch.ref_logps), "targets": at(batch.targets), "mismatched": at(batch.mismatched),
        "token_weights": at(batch.token_weights), "token_kl": at(batch.token_kl),
    }  # fmt: skip
    rows = max(batch.layout.rows_per_prompt) + 1 if rows == "few" else rows
    workspace = None if rows is None else rows * V * dtype.itemsize
    out = pk.linear_preference_loss(
        leaves["hidden"], leaves["weight"], labels, batch.layout, loss, bias=bias, impl=impl, workspace_bytes=workspace,
        **{**options, **adapter, **kw},
    )  # fmt: skip
    grads = torch.autograd.grad(out.loss, [leaves[n] for n in needs], out.loss.new_full((), upstream))
    return out, dict(zip(needs, grads))


def is_local(out):
    return type(out.loss.grad_fn).__name__ == "DifferentiatedBackward"


def compare(loss, *, local=True, **kw):
    rows = kw.pop("rows", None)
    dtype = kw.pop("dtype", torch.float32)
    truth = run(loss, dtype=torch.float64, as_given=dtype, impl="eager", **kw)
    same = run(loss, dtype=dtype, impl="eager", **kw)
    got = run(loss, dtype=dtype, rows=rows, **kw)
    assert is_local(got[0]) == local
    for name in got[1]:
        assert got[1][name].dtype == dtype
        assert_as_good_as_torch(got[1][name], same[1][name], truth[1][name], EPS)
    assert_as_good_as_torch(got[0].logps, same[0].logps, truth[0].logps, EPS)
    if dtype == torch.float32:
        assert_as_good_as_torch(got[0].loss, same[0].loss, truth[0].loss, EPS)
        for name, value in got[0].metrics.items():
            assert value.item() == pytest.approx(truth[0].metrics[name].item(), rel=1e-4, abs=1e-5), name
    assert got[0].metrics.keys() == truth[0].metrics.keys()
    return got


@pytest.mark.parametrize("name", pk.losses.names())
@pytest.mark.parametrize("rows", [None, "few"], ids=["one chunk", "several chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_loss_is_as_good_as_torch(name, rows, dtype, few_rows):
    compare(pk.losses.get(name), rows=rows, dtype=dtype, local=name not in NOT_LOCAL)


@pytest.mark.parametrize("name", pk.losses.names())
def test_every_option_of_every_loss(name, few_rows):
    """Local exactly where `couples_batch` and what the loss needs say so, and right either way."""
    for loss in checks.instances(name):
        coupled = loss.couples_batch or loss.needs_mismatched or loss.needs_token_kl
        compare(loss, rows="few", local=not coupled)


LOSSES = {
    "wpo": pk.losses.DPO(wpo=True, ld_alpha=0.5, nll_weight=0.3),
    "adadpo": pk.losses.get("adadpo", base="simpo"),
    "prefix": pk.losses.AutoregressiveDPO(granularity=pk.Static(2), accumulate="prefix", segment_reduction="mean"),
    "boundaries": pk.losses.AutoregressiveDPO(
        granularity=pk.Boundaries([[1, 2], [1], [], [2], [3, 6], [4], [1], [5]]), nll_weight=0.2
    ),
    "several": pk.losses.get(
        "combination", parts=((0.7, pk.losses.DPO()), (0.2, pk.losses.SimPO()), (1.0, pk.losses.NLL()))
    ),
}  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("needs", [OPERANDS, ("weight",), ("hidden", "bias"), ("hidden", "a", "b"), ("b",)], ids=str)
def test_partial_gradients(loss, needs, few_rows):
    compare(loss, needs=needs, rows="few", upstream=0.37)


@pytest.mark.parametrize("needs", [("hidden", "weight", "bias"), ("hidden", "a", "b"), ("b",)], ids=str)
@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"adadpo"}))
def test_partial_gradients_in_bf16(name, needs, few_rows):
    """Without adadpo: its coefficient, an exponential of sums, magnifies what rounding the adapter's logits does."""
    compare(LOSSES[name], needs=needs, rows="few", dtype=torch.bfloat16)


def test_a_factor_from_above_multiplies_in_fp32(few_rows):
    needs = ("hidden", "weight", "bias")
    one, scaled = (run(pk.losses.DPO(), needs, torch.bfloat16, rows="few", upstream=x)[1] for x in (1.0, 0.37))
    for name in needs:
        assert torch.equal(scaled[name], (one[name].float() * 0.37).bfloat16())


@pytest.mark.parametrize("rows", [None, "few"])
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 5.0, "logit_scale": 0.5, "temperature": 0.6},
        {"outputs": ("entropy", "is_top1", "mean_logit", "lse")},
        {"diagnostics": True},
        {"normalizer": 7.0},
        {"normalizer": torch.tensor(3.0, device=DEVICE)},
        {"on_policy": True, "ref_logps": None},
    ],
    ids=str,
)
def test_options(options, rows, few_rows):
    compare(pk.losses.DPO(), needs=OPERANDS, rows=rows, **options)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_value_is_that_of_recomputation(loss, few_rows):
    batch = checks.example(loss)
    local, other = run(loss, rows="few")[0], run(loss, rows=max(batch.layout.rows_per_prompt) - 1)[0]
    assert is_local(local) and not is_local(other)
    torch.testing.assert_close(local.loss, other.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(local.scores, other.scores, rtol=1e-5, atol=1e-6)
    assert local.metrics.keys() == other.metrics.keys()
    for name, value in local.metrics.items():
        torch.testing.assert_close(value, other.metrics[name], rtol=1e-5, atol=1e-6)
        assert not value.requires_grad


def test_fp16_recomputes_and_is_as_good_as_torch(few_rows):
    """A loss scale has to reach g before g (onehot - p) is rounded: it comes from above, after the value."""
    compare(pk.losses.DPO(), needs=OPERANDS, dtype=torch.float16, local=False)
    weak = dataclasses.replace(pk.losses.DPO(), beta=1e-6)
    grads = run(weak, dtype=torch.float16, upstream=2.0**20)[1]
    assert (grads["weight"] != 0).float().mean() > 0.5


@pytest.mark.parametrize("chosen, rejected", [([0, 5, 0], [0, 3, 0]), ([4, 0, 0, 6], [0, 7, 0, 2]), ([0], [1])])
def test_empty_responses_and_prompts(chosen, rejected, few_rows):
    for loss in (pk.losses.DPO(nll_weight=0.1), pk.losses.AutoregressiveDPO(granularity=pk.Static(2))):
        batch = checks.example(loss, pk.Layout.pairs(chosen, rejected))
        compare(loss, rows=8, batch=batch)


def test_all_labels_ignored(few_rows):
    layout = pk.Layout.pairs([3, 2], [4, 5])
    values, labels = tensors(14)
    hidden, weight = (values[name].float().requires_grad_() for name in ("hidden", "weight"))
    out = pk.linear_preference_loss(hidden, weight, torch.full_like(labels, -100), layout, pk.losses.SimPO())
    out.loss.backward()
    assert is_local(out) and out.loss == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()
    assert all(m.isfinite() for m in out.metrics.values())


@pytest.mark.parametrize("ignored_rows_are", [torch.inf, torch.nan])
def test_ignored_rows_poison_nothing(ignored_rows_are, few_rows):
    layout = pk.Layout.pairs([3, 2], [4, 5])
    values, labels = tensors(14)
    results = []
    for fill in (ignored_rows_are, 0.0):
        hidden = values["hidden"].float()
        hidden[labels == -100] = fill
        hidden.requires_grad_()
        bias = values["bias"].float().requires_grad_()
        out = pk.linear_preference_loss(hidden, values["weight"].float(), labels, layout, pk.losses.SimPO(), bias=bias)
        results.append((out.loss, *torch.autograd.grad(out.loss, (hidden, bias))))
        assert is_local(out)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def problem(n_pairs=3, length=40, d=32, v=257, dtype=torch.float32, **needs):
    g = torch.Generator().manual_seed(1)
    layout = pk.Layout.pairs([length] * n_pairs, [length] * n_pairs)
    n = layout.num_tokens
    hidden, weight = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g) / d**0.5
    labels = torch.randint(0, v, (n,), generator=g).to(DEVICE)
    hidden, weight = (x.to(DEVICE, dtype).requires_grad_(needs.get(k, True)) for x, k in ((hidden, "h"), (weight, "w")))
    return hidden, weight, labels, layout


@pytest.mark.parametrize("hidden_too", [True, False])
@pytest.mark.parametrize("rows", [240, 128], ids=["one chunk", "several chunks"])
def test_flops_of_a_trained_weight(rows, hidden_too, few_rows):
    hidden, weight, labels, layout = problem(h=hidden_too)
    n, d, v, workspace = *hidden.shape, weight.shape[0], rows * weight.shape[0] * 4
    with CountFlops() as counted:
        out = pk.linear_preference_loss(hidden, weight, labels, layout, pk.losses.SimPO(), workspace_bytes=workspace)
        forward = counted.flops
        out.loss.backward()
    plan = planner.plan(
        (n, d, v), hidden.dtype, hidden.device, grad_hidden=hidden_too, grad_head=True, group_rows=80,
        workspace_bytes=workspace,
    )  # fmt: skip
    assert plan.row is planner.GROUP_LOCAL and is_local(out)
    assert forward == counted.flops == plan.flops == (6 if hidden_too else 4) * n * d * v


def test_flops_of_an_adapter(few_rows):
    hidden, weight, labels, layout = problem(w=False)
    n, d, v, rank = *hidden.shape, weight.shape[0], 4
    a, b = torch.randn(rank, d, device=DEVICE).requires_grad_(), torch.randn(v, rank, device=DEVICE).requires_grad_()
    workspace = 128 * v * 4
    with CountFlops() as counted:
        out = pk.linear_preference_loss(
            hidden, weight, labels, layout, pk.losses.SimPO(), workspace_bytes=workspace, lora=pk.LoRA(a, b)
        )
        out.loss.backward()
    plan = planner.plan(
        (n, d, v), hidden.dtype, hidden.device, grad_hidden=True, grad_head=False, grad_weight=False, rank=rank,
        grad_low=(True, True), group_rows=80, workspace_bytes=workspace,
    )  # fmt: skip
    assert plan.row is planner.GROUP_LOCAL_ADAPTER and is_local(out)
    assert counted.flops == plan.flops + 6 * n * d * rank, "low = hidden @ a.T, and back, is outside of the head"
    assert plan.flops == 4 * n * d * v + 6 * n * rank * v


def test_no_tensor_is_larger_than_the_workspace():
    """Beside 20 MB of logits in all, of which 3 MB may be there at a time; dweight is 0.2 MB."""
    hidden, weight, labels, layout = problem(n_pairs=16, length=64, d=8, v=2500)
    workspace = 300 * 2500 * 4
    with LargestTensor([hidden, weight, labels]) as largest:
        out = pk.linear_preference_loss(hidden, weight, labels, layout, pk.losses.SimPO(), workspace_bytes=workspace)
        out.loss.backward()
    assert is_local(out) and 0 < largest.bytes <= workspace < labels.numel() * 2500


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_inputs_same_bits(dtype, few_rows):
    one, two = (run(pk.losses.DPO(), needs=OPERANDS, dtype=dtype, rows="few") for _ in range(2))
    assert torch.equal(one[0].loss, two[0].loss) and all(torch.equal(one[1][k], two[1][k]) for k in one[1])


CASES = {
    "whole prompts fit": ({}, True),
    "no prompt fits": ({"workspace_bytes": 79 * 257 * 4}, False),
    "chunks too small for an fp32 sum each": ({"workspace_bytes": 100 * 257 * 4}, False),
    "eager": ({"impl": "eager"}, False),
    "chunked": ({"impl": "chunked"}, True),
    "cut": ({"impl": "cut"}, False),
    "running statistics": ({"loss": pk.losses.get("bco", shift="running_mean")}, False),
    "running statistics in a sum": (
        {"loss": pk.losses.get("combination", parts=((1.0, pk.losses.DPO()), (1.0, pk.losses.get("aot"))))},
        False,
    ),
    "a pull on the divergence": ({"loss": pk.losses.get("tdpo1"), "token_kl": True}, False),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chosen_only_where_it_is_right(case):
    (options, local), (hidden, weight, labels, layout) = CASES[case], problem()
    loss = options.get("loss", pk.losses.DPO())
    options = {name: value for name, value in options.items() if name != "loss"}
    if options.get("token_kl"):
        options["token_kl"] = torch.rand(labels.shape, device=DEVICE)
    ref = torch.full(labels.shape, -5.0, device=DEVICE)
    out = pk.linear_preference_loss(hidden, weight, labels, layout, loss, ref_logps=ref, **options)
    assert is_local(out) == local
    frozen = pk.linear_preference_loss(hidden, weight.detach(), labels, layout, loss, ref_logps=ref, **options)
    assert not is_local(frozen)
    torch.testing.assert_close(out.loss, frozen.loss)


def test_the_plan_says_why():
    def reason(dtype=torch.float32, **kw):
        shape = (4096, 64, 1000)
        return planner.plan(shape, dtype, torch.device("cpu"), grad_hidden=True, grad_head=True, **kw).reason

    kb = 4000
    assert "local to groups, which fit a chunk" in reason(group_rows=300, workspace_bytes=512 * kb)
    assert "the largest group, 600 rows, exceeds a chunk of 512" in reason(group_rows=600, workspace_bytes=512 * kb)
    assert "too small to add to dweight" in reason(group_rows=100, workspace_bytes=192 * kb)
    assert "fp16" in reason(torch.float16, group_rows=100)
    text = pk.explain(4096, 64, 1000, group_rows=300)
    assert text.startswith("group_local ") and "6NDV forward + 0NDV backward" in text


def test_without_gradients_nothing_is_made():
    hidden, weight, labels, layout = problem()
    with torch.no_grad(), CountFlops() as counted:
        out = pk.linear_preference_loss(hidden, weight, labels, layout, pk.losses.SimPO())
    assert not out.loss.requires_grad and counted.flops == 2 * labels.numel() * weight.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_retained_graph_gives_the_same_gradients_twice(dtype, upstream):
    hidden, weight, labels, layout = problem(dtype=dtype)
    loss = pk.linear_preference_loss(hidden, weight, labels, layout, pk.losses.SimPO()).loss
    factor = torch.full_like(loss, upstream)
    first = torch.autograd.grad(loss, (hidden, weight), factor, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()  # the caller's own
    twice = torch.autograd.grad(loss, (hidden, weight), 2 * factor, retain_graph=True)
    last = torch.autograd.grad(loss, (hidden, weight), factor)
    for a, b, c in zip(kept, twice, last):
        assert torch.equal(a, c)
        torch.testing.assert_close(b, 2 * a)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (hidden, weight), factor)


def test_gradients_accumulate_over_calls_and_with_other_uses():
    hidden, weight, labels, layout = problem()
    whole = pk.linear_preference_loss(hidden, weight, labels, layout, pk.losses.SimPO())
    want = torch.autograd.grad(whole.loss + (weight * 0.01).sum(), (hidden, weight))
    for run in (slice(0, 1), slice(1, 3)):
        part = layout.prompts(run)
        out = pk.linear_preference_loss(
            hidden[part.rows], weight, labels[part.rows], part.layout, pk.losses.SimPO(), normalizer=3
        )
        assert is_local(out)
        out.loss.backward()
    (weight * 0.01).sum().backward()
    torch.testing.assert_close(hidden.grad, want[0])
    torch.testing.assert_close(weight.grad, want[1])


class LargeStorages(TorchDispatchMode):
    """Where tensors of at least so many bytes lie that any operation returns."""

    def __init__(self, at_least):
        super().__init__()
        self.at_least, self.found = at_least, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() >= self.at_least:
                self.found.add(t.untyped_storage().data_ptr())
        return out


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_the_gradient_becomes_the_weights_without_a_copy(factor):
    hidden, weight, labels, layout = problem(n_pairs=2, d=64, v=4000)
    loss = pk.linear_preference_loss(
        hidden, weight, labels, layout, pk.losses.SimPO(), workspace_bytes=160 * 4000 * 4
    ).loss
    with LargeStorages(weight.numel() * 4) as large:
        loss.backward(torch.full_like(loss, factor))
    assert weight.grad.abs().sum() > 0
    assert large.found <= {weight.grad.data_ptr()}


def test_double_backward_raises():
    hidden, weight, labels, layout = problem()
    loss = pk.linear_preference_loss(hidden, weight, labels, layout, pk.losses.SimPO()).loss
    (g,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        g.pow(2).sum().backward()


def test_batches_strides_and_autocast():
    hidden, weight, labels, layout = problem()
    want = pk.linear_preference_loss(hidden, weight, labels, layout, pk.losses.SimPO())
    expected = torch.autograd.grad(want.loss, (hidden, weight))
    batch = hidden.view(6, 40, -1)
    strided = weight.t().contiguous().t()
    out = pk.linear_preference_loss(batch, strided, labels.view(6, 40), layout, pk.losses.SimPO())
    assert is_local(out)
    for got, known in zip(torch.autograd.grad(out.loss, (hidden, weight)), expected):
        torch.testing.assert_close(got, known)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = pk.linear_preference_loss(hidden, weight, labels, layout, pk.losses.SimPO())
    half = pk.linear_preference_loss(hidden.bfloat16(), weight.bfloat16(), labels, layout, pk.losses.SimPO())
    assert is_local(out) and torch.equal(out.loss, half.loss)
    for a, b in zip(*(torch.autograd.grad(x.loss, (hidden, weight)) for x in (out, half))):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("trained", [True, False])
def test_states_of_the_reference_stand_for_its_log_probabilities(trained):
    hidden, weight, labels, layout = problem(w=trained)
    ref_hidden = hidden.detach() + 0.1
    ref = pk.token_logps(ref_hidden, weight.detach(), labels).logps
    a, b = torch.randn(2, 32, device=DEVICE), torch.randn(257, 2, device=DEVICE)
    options = {"lora": pk.LoRA(a, b)}
    inputs = (hidden, weight) if trained else (hidden,)
    results = []
    for given in ({"ref_logps": ref}, {"ref_hidden": ref_hidden}):
        out = pk.linear_preference_loss(hidden, weight, labels, layout, pk.losses.DPO(), **given, **options)
        assert is_local(out) == trained
        results.append((out.loss.detach(), *torch.autograd.grad(out.loss, inputs)))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)
    for also in ({"on_policy": True}, {"ref_logps": ref}):
        with pytest.raises(ValueError, match="ref_hidden are a reference's"):
            pk.linear_preference_loss(hidden, weight, labels, layout, pk.losses.DPO(), ref_hidden=ref_hidden, **also)


def test_filter_eps_belongs_to_the_cut_body():
    hidden, weight, labels, layout = problem()
    with pytest.raises(ValueError, match="filter_eps"):
        pk.linear_preference_loss(hidden, weight, labels, layout, pk.losses.SimPO(), filter_eps=1e-3)
    exact, filtered = (
        pk.linear_preference_loss(
            hidden, weight, labels, layout, pk.losses.SimPO(), impl="cut", filter_eps=eps, workspace_bytes=1 << 20
        )
        for eps in (None, 1e-2)
    )
    assert torch.equal(exact.loss, filtered.loss)
    a, b = (torch.autograd.grad(out.loss, weight)[0] for out in (exact, filtered))
    assert not torch.equal(a, b)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"ref_logps": torch.zeros(3, device=DEVICE)}, "ref_logps has shape (3,)"),
        ({"ref_logps": None}, "pass ref_logps"),
        ({"targets": torch.zeros(6, device=DEVICE)}, "reads no targets"),
        ({"normalizer": [1.0, 2.0]}, "one addend, but 2 normalizers"),
        ({"outputs": "entropi"}, "unknown 'entropi'"),
        ({"layout": pk.Layout.sequences([40] * 6)}, "takes 2 response(s)"),
        ({"layout": pk.Layout.pairs([40], [40])}, "the layout holds 80 tokens"),
        ({"labels": torch.full((240,), 257, device=DEVICE)}, "label 257"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change, words):
    hidden, weight, labels, layout = problem()
    if DEVICE != "cpu" and "labels" in change:
        pytest.skip("looking at labels would wait for the device")
    arguments = {
        "labels": labels,
        "layout": layout,
        "loss": pk.losses.DPO(),
        "ref_logps": torch.zeros_like(hidden[:, 0]),
    }
    with pytest.raises(ValueError) as error:
        pk.linear_preference_loss(hidden, weight, **{**arguments, **change})
    assert words in str(error.value)


def test_with_the_kernels_of_a_gpu(monkeypatch, few_rows):
    """The row kernel and the tail kernel, a chunk at a time."""
    pytest.importorskip("triton")
    from prefkern.kernels import row_softmax

    monkeypatch.setattr(torch_rows, "implementation", lambda device, dtype: row_softmax)
    monkeypatch.setattr(preference_tail, "uses_triton", lambda device, dtype: dtype != torch.float64)
    for loss in (pk.losses.AutoregressiveDPO(granularity=pk.Static(2), nll_weight=0.1), LOSSES["wpo"]):
        compare(loss, needs=("hidden", "weight", "bias"), rows="few", softcap=5.0)


# --- the layout's parts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_rows", [1, 5, 9, 12, 100])
def test_runs_cover_all_prompts_with_as_few_chunks_as_go(max_rows):
    layout = pk.Layout.groups([0, 0, 5, 4, 1, 0, 3, 9, 0], [2, 3, 1, 1, 1, 1])
    runs = layout.runs(max_rows)
    assert [p for run in runs for p in range(run.start, run.stop)] == list(range(layout.num_prompts))
    rows = [sum(layout.rows_per_prompt[run]) for run in runs]
    assert all(n <= max_rows or run.stop - run.start == 1 or sum(r > 0 for r in layout.rows_per_prompt[run]) == 1
               for n, run in zip(rows, runs))  # fmt: skip
    for run, after in zip(runs, runs[1:]):
        assert sum(layout.rows_per_prompt[run]) + layout.rows_per_prompt[after.start] > max_rows
    parts = [layout.prompts(run) for run in runs]
    assert [p.layout.num_tokens for p in parts] == rows
    for name, whole in (("rows", layout.num_tokens), ("responses", layout.num_responses)):
        edges = [(getattr(p, name).start, getattr(p, name).stop) for p in parts]
        assert edges[0][0] == 0 and edges[-1][1] == whole and all(a[1] == b[0] for a, b in zip(edges, edges[1:]))


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: x,
        lambda x: x.static(2),
        lambda x: x.adaptive(3, accumulate="prefix"),
        lambda x: x.split_at([[1], [2, 3], [], [0], [1], []]),
    ],
    ids=["uncut", "static", "prefix", "boundaries"],
)
def test_prompts_are_cut_as_in_the_whole(cut):
    lengths, sizes = [3, 4, 0, 2, 6, 1], [2, 2, 2]
    whole = cut(pk.Layout.groups(lengths, sizes))
    for first, stop in ((0, 1), (1, 3), (0, 3), (2, 2)):
        part = whole.prompts(slice(first, stop))
        assert part.layout.lengths == tuple(lengths[2 * first : 2 * stop]) == whole.lengths[part.responses]
        assert part.rows == slice(sum(lengths[: 2 * first]), sum(lengths[: 2 * stop]))
        assert part.layout.accumulate == whole.accumulate and part.layout.is_cut == whole.is_cut
        if whole.is_cut:
            assert part.layout.segment_lengths == whole.segment_lengths[part.responses]
        index = part.layout.index(DEVICE)
        assert index.response_offsets.tolist()[-1] == part.rows.stop - part.rows.start
    assert whole.prompts(slice(0, 3)).layout is whole
    again = whole.prompts(slice(1, 3)).layout
    assert again is whole.prompts(slice(1, 3)).layout, "so that its index is on the device already"
    assert again.index(DEVICE) is again.index(DEVICE)
