"""KL of two heads against float64 in values, gradients and memory, and the two losses that add it to log-ratios."""

import pytest
import torch
import torch.nn.functional as F

import prefkern as pk
from conftest import DEVICE
from numerics import LargestTensor, assert_as_good_as_torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-6  # fp32 sums in another order than torch's
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 5.0},
    "everything": {"softcap": 5.0, "logit_scale": 0.5, "temperature": 0.6},
}


def make(n, d, v, dtype=torch.float32, near=None, bias=True, seed=0):
    """Policy and reference, of other widths; `near` makes the reference the policy plus so much noise."""
    g = torch.Generator().manual_seed(seed)
    e = d if near is not None else d + 3

    def side(width):
        head = (torch.randn(v, width, generator=g) * 2 / width**0.5, torch.randn(v, generator=g) if bias else None)
        return torch.randn(n, width, generator=g), *head

    hidden, weight, b = side(d)
    ref_hidden, ref_weight, ref_b = side(e)
    if near is not None:
        ref_hidden, ref_weight, ref_b = hidden + near * ref_hidden, weight, b
    labels = torch.randint(0, v, (n,), generator=g)
    labels[::5] = -100
    tensors = (hidden, weight, b, ref_hidden, ref_weight, ref_b)
    return [None if t is None else t.to(dtype).to(DEVICE) for t in tensors], labels.to(DEVICE)


def run(tensors, labels, needs, impl, dtype=None, **options):
    """KL and the gradients of the needed inputs, for a random upstream gradient."""
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = (
        None if t is None else t.detach().to(dtype or t.dtype) for t in tensors
    )
    inputs = {name: t.requires_grad_() for t, name in zip((hidden, weight, bias), "hwb") if name in needs}
    kl = pk.token_kl(hidden, weight, ref_hidden, ref_weight, labels, bias, ref_bias, impl=impl, **options)
    results = {"kl": kl.detach()}
    if inputs:
        g = torch.randn(kl.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        results |= dict(zip((f"d{k}" for k in inputs), torch.autograd.grad((kl * g).sum(), list(inputs.values()))))
    return results


def compare(made, needs, **options):
    truth = run(*made, needs, "eager", torch.float64, **options)
    same = run(*made, needs, "eager", **options)
    got = run(*made, needs, "chunked", workspace_bytes=40_000, **options)
    for name, value in got.items():
        assert_as_good_as_torch(value, same[name], truth[name], EPS)
    return got


def by_hand(hidden, weight, ref_hidden, ref_weight, bias=None, ref_bias=None):
    """The formula on full logits."""
    log_p, log_q = (F.linear(*x).log_softmax(-1) for x in ((hidden, weight, bias), (ref_hidden, ref_weight, ref_bias)))
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("needs", ["", "h", "w", "hwb"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_good_as_torch(dtype, needs, options):
    got = compare(make(133, 64, 531, dtype), needs, **options)
    assert got["kl"].dtype == torch.float32 and (got["kl"] >= 0).all()


@pytest.mark.parametrize("n, d, v", [(1, 16, 2), (255, 16, 33), (3, 1, 1)])
def test_odd_sizes(n, d, v):
    compare(make(n, d, v), "hwb")


@pytest.mark.parametrize("impl", ["eager", "chunked"])
def test_the_definition_is_the_formula(impl):
    (hidden, weight, bias, *ref), _ = make(9, 4, 21, torch.float64)
    got = pk.token_kl(hidden, weight, *ref[:2], bias=bias, ref_bias=ref[2], impl=impl)
    torch.testing.assert_close(got, by_hand(hidden, weight, *ref[:2], bias, ref[2]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("near", [1e-2, 1e-4])
def test_a_small_divergence_keeps_its_digits(near):
    """Of 50,000 entries, plain torch's normalisers are off by 1e-6: more than the whole divergence."""
    made = make(8, 16, 50_000, near=near, bias=False)
    truth, same, got = (run(*made, "", *how)["kl"] for how in (("eager", torch.float64), ("eager",), ("chunked",)))
    error, torch_error = ((x - truth).abs().max() for x in (got, same))
    assert error < 0.1 * torch_error, (error, torch_error)


@pytest.mark.parametrize("needs", ["h", "hw"])
def test_a_policy_that_is_its_reference(needs):
    got = run(*make(12, 8, 60, near=0.0), needs, "chunked", workspace_bytes=2000)
    assert not any(t.any() for t in got.values())


@pytest.mark.parametrize("needs", ["h", "hwb"])
def test_gradcheck(needs):
    (hidden, weight, bias, *ref), labels = make(5, 4, 7, torch.float64)
    for t, name in zip((hidden, weight, bias), "hwb"):
        t.requires_grad_(name in needs)

    def f(*inputs):
        h, w, b = (*inputs, weight, bias) if needs == "h" else inputs
        options = dict(softcap=3.0, temperature=1.3, logit_scale=0.7, workspace_bytes=200)
        return pk.token_kl(h, w, ref[0], ref[1], labels, b, ref[2], **options)

    assert torch.autograd.gradcheck(f, (hidden,) if needs == "h" else (hidden, weight, bias))


@pytest.mark.parametrize("needs", ["h", "hw"])
def test_masked_vocabulary_and_underflow(needs):
    """Excluded by both adds nothing; a q that underflows adds nothing; excluded by the policy alone is infinite."""
    (hidden, weight, bias, ref_hidden, ref_weight, ref_bias), labels = make(9, 16, 40)
    bias[7] = ref_bias[7] = -torch.inf
    ref_bias[8], bias[8] = -300.0, -torch.inf
    got = run((hidden, weight, bias, ref_hidden, ref_weight, ref_bias), labels, needs, "chunked", workspace_bytes=999)
    assert all(t.isfinite().all() for t in got.values())
    keep = [v for v in range(40) if v not in (7, 8)]
    part = [hidden, weight[keep], bias[keep], ref_hidden, ref_weight[keep], ref_bias[keep]]
    want = run(part, labels, needs, "eager")
    torch.testing.assert_close(got["kl"], want["kl"])
    torch.testing.assert_close(got["dh"], want["dh"])
    bias[9] = -torch.inf
    for impl in ("eager", "chunked"):
        kl = run((hidden, weight, bias, ref_hidden, ref_weight, ref_bias), labels, "", impl)["kl"]
        assert kl[labels != -100].isposinf().all() and not kl[labels == -100].any()


@pytest.mark.parametrize("needs", ["h", "hw"])
def test_large_logits_and_ignored_rows_stay_finite(needs):
    tensors, labels = make(10, 16, 40)
    tensors[0] *= 1e4
    tensors[3] *= 1e4
    got = run(tensors, labels, needs, "chunked")
    assert all(t.isfinite().all() for t in got.values())
    tensors[3][labels == -100] = torch.nan
    again = run(tensors, labels, needs, "chunked")
    assert all(torch.equal(got[name], again[name]) for name in got)


@pytest.mark.parametrize("needs", ["", "h", "hw"])
def test_no_tensor_is_larger_than_the_workspace(needs):
    """At N = 1024 and V = 50,000 each model's logits would take 205 MB in fp32."""
    n, v, workspace = 1024, 50_000, 4 << 20
    tensors, labels = make(n, 16, v, bias=False)
    hidden, weight, _, ref_hidden, ref_weight, _ = tensors
    hidden.requires_grad_("h" in needs)
    weight.requires_grad_("w" in needs)
    with LargestTensor([hidden, weight, ref_hidden, ref_weight]) as largest:
        kl = pk.token_kl(hidden, weight, ref_hidden, ref_weight, labels, workspace_bytes=workspace)
        if needs:
            kl.sum().backward()
    assert 0 < largest.bytes <= workspace


def test_batches_strides_no_rows_and_bits():
    (hidden, weight, _, ref_hidden, ref_weight, _), labels = make(24, 8, 50, bias=False)
    want = pk.token_kl(hidden, weight, ref_hidden, ref_weight, labels)
    batched = pk.token_kl(
        hidden.view(4, 6, 8), weight.t().contiguous().t(), ref_hidden.view(4, 6, 11), ref_weight, labels.view(4, 6)
    )
    assert torch.equal(batched.flatten(), want)
    hidden.requires_grad_()
    none = pk.token_kl(hidden[:0], weight.requires_grad_(), ref_hidden[:0], ref_weight)
    none.sum().backward()
    assert none.shape == (0,) and not hidden.grad.any() and not weight.grad.any()
    first, second = (run(*make(33, 8, 203), "hwb", "chunked", workspace_bytes=4000) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_reference_may_have_another_dtype_and_gets_no_gradient():
    (hidden, weight, _, ref_hidden, ref_weight, _), labels = make(6, 8, 50, bias=False)
    ref = [t.bfloat16().requires_grad_() for t in (ref_hidden, ref_weight)]
    for impl in ("eager", "chunked"):
        kl = pk.token_kl(hidden.requires_grad_(), weight, *ref, labels, impl=impl)
        kl.sum().backward()
        assert all(t.grad is None for t in ref) and kl.dtype == torch.float32
    with torch.autocast(DEVICE, torch.bfloat16):
        got = pk.token_kl(hidden, weight, *ref, labels)
    assert torch.equal(got, pk.token_kl(hidden.bfloat16(), weight.bfloat16(), *ref, labels))


@pytest.mark.parametrize("needs", ["h", "hw"])
def test_the_result_may_be_written_over(needs):
    (hidden, weight, _, ref_hidden, ref_weight, _), _ = make(6, 8, 50, bias=False)
    hidden.requires_grad_()
    weight.requires_grad_("w" in needs)
    kl = pk.token_kl(hidden, weight, ref_hidden, ref_weight)
    (want,) = torch.autograd.grad(kl.sum(), hidden, retain_graph=True)
    assert torch.equal(torch.autograd.grad(kl.mul_(2).sum(), hidden)[0], 2 * want)


@pytest.mark.parametrize("needs", ["h", "hw"])
def test_double_backward_raises(needs):
    (hidden, weight, _, ref_hidden, ref_weight, _), _ = make(6, 8, 50, bias=False)
    hidden.requires_grad_()
    weight.requires_grad_("w" in needs)
    (g,) = torch.autograd.grad(pk.token_kl(hidden, weight, ref_hidden, ref_weight).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="use impl='eager'"):
        g.pow(2).sum().backward()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"impl": "fast"}, "impl='fast'"),
        ({"impl": "cut"}, "impl='cut' cannot compare two heads: use impl='auto' or 'chunked'"),
        ({"workspace_bytes": 0}, "workspace_bytes=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"ref_weight": torch.zeros(8, 5)}, "weight has 9 vocabulary entries and ref_weight 8"),
        ({"ref_hidden": torch.zeros(3, 6)}, "ref_hidden (3, 6)"),
        ({"ref_hidden": torch.zeros(2, 5)}, "less its last axis (2, 5)"),
        ({"ref_bias": torch.zeros(4)}, "ref_bias (4,)"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "labels (2,)"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_arguments_are_named(change, words):
    given = {"hidden": (3, 4), "weight": (9, 4), "ref_hidden": (3, 5), "ref_weight": (9, 5)}
    with pytest.raises(ValueError) as error:
        pk.token_kl(**({name: torch.zeros(shape) for name, shape in given.items()} | change))
    assert words in str(error.value)


# One pair of 6 and 9 tokens: sums of log-probabilities, of the reference's, and of divergences; beta 0.1.
PAIR, LENGTHS = ((-12.0, -12.5, 0.8), (-15.0, -14.0, 1.1)), (6, 9)
GOLDEN = [
    (pk.losses.TDPO1(), 0.6349461015956135),
    (pk.losses.TDPO2(), 0.6279235777077612),
    (pk.losses.TDPO2(alpha=1.0), 0.6349461015956135),
    (pk.losses.TDPO2(alpha=0.0), 0.6209570477895321),
]


@pytest.mark.parametrize(
    "impl, dtype, digits",
    [("eager", torch.float32, 1e-6), ("eager", torch.float64, 1e-9), ("triton", torch.float32, 1e-6)],
)
@pytest.mark.parametrize("loss, value", GOLDEN, ids=repr)
def test_golden_tdpo(loss, value, impl, dtype, digits):
    logps, ref, kl = (
        torch.cat([torch.full((n,), side[i] / n, dtype=dtype, device=DEVICE) for side, n in zip(PAIR, LENGTHS)])
        for i in range(3)
    )
    out = pk.preference_loss(logps, pk.Layout.pairs([6], [9]), loss, ref_logps=ref, token_kl=kl, impl=impl)
    assert out.loss.item() == pytest.approx(value, rel=digits)


def test_tdpo2_without_its_divergence_is_dpo():
    layout, logps, ref = pk.Layout.pairs([5, 2], [3, 4]), -torch.rand(14), -torch.rand(14)
    dpo = pk.preference_loss(logps, layout, pk.losses.DPO(beta=0.3), ref_logps=ref).loss
    loss = pk.losses.TDPO2(beta=0.3, alpha=0.0)
    assert torch.equal(pk.preference_loss(logps, layout, loss, ref_logps=ref, token_kl=torch.rand(14)).loss, dpo)


@pytest.mark.parametrize(
    "loss, chosen, rejected",
    [(pk.losses.TDPO1(), 1.0, 1.0), (pk.losses.TDPO2(), 0.0, 0.5), (pk.losses.TDPO2(alpha=2.0), 0.0, 2.0)],
    ids=repr,
)
def test_which_divergences_get_a_gradient(loss, chosen, rejected):
    """Against that of the log-ratio beside it, and 0 for a masked token, whatever its divergence."""
    layout, mask = pk.Layout.pairs([3], [2]), torch.tensor([1, 1, 0, 1, 1]).bool()
    logps, kl = (-torch.rand(5)).requires_grad_(), torch.rand(5)
    kl[2] = torch.inf
    kl.requires_grad_()
    pk.preference_loss(logps, layout, loss, ref_logps=torch.zeros(5), token_kl=kl, mask=mask).loss.backward()
    want = logps.grad * torch.tensor([chosen] * 3 + [rejected] * 2)
    torch.testing.assert_close(kl.grad, want)
    assert kl.grad[2] == 0 and logps.grad[0] != 0


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_tdpo_of_a_model_against_autograd_on_full_logits(name, train_head):
    torch.manual_seed(0)
    lengths = (5, 2, 3, 4)
    (hidden, weight, bias, ref_hidden, ref_weight, ref_bias), labels = make(14, 6, 23, torch.float64)
    layout, options = pk.Layout.pairs(lengths[::2], lengths[1::2]), {"softcap": 4.0, "temperature": 0.8}
    inputs = [hidden.requires_grad_(), weight.requires_grad_(train_head), bias.requires_grad_(train_head)]
    trained = [t for t in inputs if t.requires_grad]

    def log_softmax(*head):
        return (4.0 * torch.tanh(F.linear(*head) / 4.0) / 0.8).log_softmax(-1)

    log_p, log_q = log_softmax(*inputs), log_softmax(ref_hidden, ref_weight, ref_bias)
    column, kept = labels.clamp(min=0)[:, None], labels != -100
    ratio = torch.where(kept, (log_p - log_q).gather(-1, column)[:, 0], 0.0)
    kl = torch.where(kept, (log_q.exp() * (log_q - log_p)).sum(-1), 0.0)
    values = []
    for w, r in ((slice(0, 5), slice(5, 7)), (slice(7, 10), slice(10, 14))):
        gap = kl[r].sum() - (kl[w].sum() if name == "tdpo1" else kl[w].sum().detach())
        h = ratio[w].sum() - ratio[r].sum()
        values.append(-F.logsigmoid(0.3 * (h - (1.0 if name == "tdpo1" else 0.5) * gap)))
    want = torch.stack(values).mean()
    expected = torch.autograd.grad(want, trained)

    ref_logps = pk.token_logps(ref_hidden, ref_weight, labels, ref_bias, **options).logps
    own = pk.token_kl(hidden, weight, ref_hidden, ref_weight, labels, bias, ref_bias, workspace_bytes=999, **options)
    out = pk.linear_preference_loss(
        hidden, weight, labels, layout, pk.losses.get(name, beta=0.3), ref_logps=ref_logps, token_kl=own, bias=bias,
        workspace_bytes=999, **options,
    )  # fmt: skip
    torch.testing.assert_close(out.loss, want, rtol=1e-12, atol=1e-12)
    for got, grad in zip(torch.autograd.grad(out.loss, trained), expected):
        torch.testing.assert_close(got, grad, rtol=1e-10, atol=1e-12)
