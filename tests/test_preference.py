"""From hidden states and from logits: all bodies agree, logits are overwritten only when that is allowed."""

import pytest
import torch

import prefkern as pk
from conftest import DEVICE
from numerics import assert_as_good_as_torch

LOSSES = {
    "dpo": pk.losses.DPO(label_smoothing=0.1),
    "static": pk.losses.AutoregressiveDPO(granularity=pk.Static(2)),
    "adaptive mean": pk.losses.AutoregressiveDPO(granularity=pk.Adaptive(3), segment_reduction="mean"),
    "prefix": pk.losses.AutoregressiveDPO(granularity=pk.Static(2), accumulate="prefix"),
    "simpo": pk.losses.SimPO(),
    "ipo": pk.losses.IPO(),
    "nll": pk.losses.NLL(),
}
LAYOUTS = {"pair": pk.Layout.pairs([7, 0, 3], [4, 5, 3]), "single": pk.Layout.sequences([7, 0, 5])}
HEAD = {"softcap": 8.0, "logit_scale": 0.7, "temperature": 1.2}


def data(loss, dtype=torch.float32, ignored=True, vocab=61):
    layout = LAYOUTS[loss.arity]
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(layout.num_tokens, 16, generator=g).to(DEVICE, dtype)
    weight = torch.randn(vocab, 16, generator=g).to(DEVICE, dtype)
    labels = torch.randint(0, vocab, (layout.num_tokens,), generator=g).to(DEVICE)
    if ignored:
        labels[::4] = -100
    ref = -4 * torch.rand(layout.num_tokens, generator=g).to(DEVICE)
    return layout, hidden, weight, labels, ref if loss.needs_reference else None


def from_hidden(loss, impl, dtype=torch.float32, **kw):
    layout, hidden, weight, labels, ref = data(loss, **kw)
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    ref = None if ref is None else ref.to(torch.promote_types(dtype, torch.float32))
    out = pk.linear_preference_loss(hidden, weight, labels, layout, loss, ref_logps=ref, impl=impl, **HEAD)
    return out, torch.autograd.grad(out.loss, (hidden, weight))


def from_logits(loss, impl, dtype=torch.float32, keep_logits=False, **kw):
    layout, hidden, weight, labels, ref = data(loss, **kw)
    leaf = (hidden.to(dtype) @ weight.to(dtype).t()).requires_grad_()
    logits = leaf * 1.0
    ref = None if ref is None else ref.to(torch.promote_types(dtype, torch.float32))
    out = pk.logits_preference_loss(
        logits, labels, layout, loss, ref_logps=ref, impl=impl, keep_logits=keep_logits, **HEAD
    )
    return out, torch.autograd.grad(out.loss, (leaf,)), logits, leaf


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("impl", ["chunked", "cut"])
def test_bodies_from_hidden_states(loss, impl):
    truth, same, got = (from_hidden(loss, *how) for how in (("eager", torch.float64), ("eager",), (impl,)))
    agree(got, same, truth)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_bodies_from_logits(loss, impl):
    truth, same, got = (from_logits(loss, *how)[:2] for how in (("eager", torch.float64), ("eager",), (impl,)))
    agree(got, same, truth)


def agree(got, same, truth):
    """Loss, gradients, log-probs, scores and metrics of two bodies, each (output, gradients)."""
    eps = 1e-6
    for a, b, c in zip(
        (got[0].loss, got[0].logps, got[0].scores), *((x.loss, x.logps, x.scores) for x in (same[0], truth[0]))
    ):
        assert_as_good_as_torch(a, b, c, eps)
    for a, b, c in zip(got[1], same[1], truth[1]):
        assert_as_good_as_torch(a, b, c, eps)
    assert got[0].metrics.keys() == truth[0].metrics.keys()
    for name, value in got[0].metrics.items():
        assert value.ndim == 0 and not value.requires_grad
        assert value.item() == pytest.approx(truth[0].metrics[name].item(), rel=1e-4, abs=1e-5), name


def test_hidden_and_logits_agree_on_dpo_and_one_segment_to_the_last_bit():
    """One segment and DPO run the same arithmetic on each body."""
    one = pk.losses.AutoregressiveDPO(granularity=pk.Adaptive(1))
    for run in (
        lambda x: from_hidden(x, "chunked"),
        lambda x: from_hidden(x, "cut"),
        lambda x: from_logits(x, "triton")[:2],
    ):
        (a, da), (b, db) = run(pk.losses.DPO()), run(one)
        assert torch.equal(a.loss, b.loss) and all(torch.equal(x, y) for x, y in zip(da, db))


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_logits_are_overwritten_unless_kept(impl):
    _, grads, logits, leaf = from_logits(pk.losses.DPO(), impl)
    assert torch.equal(logits, grads[0]), "the gradient took the place of the logits"
    _, grads, logits, leaf = from_logits(pk.losses.DPO(), impl, keep_logits=True)
    assert torch.equal(logits, leaf) and not torch.equal(logits, grads[0])


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_a_leaf_is_never_overwritten(impl):
    layout, hidden, weight, labels, ref = data(pk.losses.DPO())
    leaf = (hidden @ weight.t()).requires_grad_()
    before = leaf.detach().clone()
    pk.logits_preference_loss(leaf, labels, layout, pk.losses.DPO(), ref_logps=ref, impl=impl).loss.backward()
    assert torch.equal(leaf.detach(), before) and leaf.grad is not None


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_a_view_of_a_leaf_is_never_overwritten(impl):
    """Nor does the leaf's gradient share memory with it: an optimizer would step along its own result."""
    layout, hidden, weight, labels, ref = data(pk.losses.DPO())
    leaf = (hidden @ weight.t()).requires_grad_()
    before = leaf.detach().clone()
    for logits in (leaf[None], leaf.view(leaf.shape)):
        leaf.grad = None
        out = pk.logits_preference_loss(
            logits, labels.view(logits.shape[:-1]), layout, pk.losses.DPO(), ref_logps=ref, impl=impl
        )
        out.loss.backward()
        assert torch.equal(leaf.detach(), before) and leaf.grad.data_ptr() != leaf.data_ptr()


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_rows_that_share_memory_are_never_overwritten(impl):
    layout, _, weight, labels, ref = data(pk.losses.DPO())
    row = weight[:, 0].clone().requires_grad_()

    def gradient(impl):
        logits = (row * 1.0).expand(layout.num_tokens, -1)
        out = pk.logits_preference_loss(logits, labels, layout, pk.losses.DPO(), ref_logps=ref, impl=impl)
        return torch.autograd.grad(out.loss, row)[0]

    torch.testing.assert_close(gradient(impl), gradient("eager"))


@pytest.mark.parametrize("impl", ["auto", "triton", "eager"])
def test_batches_of_logits(impl):
    layout, hidden, weight, labels, ref = data(pk.losses.DPO())
    logits, options = hidden @ weight.t(), {"ref_logps": ref, "impl": impl}
    flat = pk.logits_preference_loss(logits, labels, layout, pk.losses.DPO(), **options)
    batch = pk.logits_preference_loss(logits.view(2, 11, -1), labels.view(2, 11), layout, pk.losses.DPO(), **options)
    assert torch.equal(flat.loss, batch.loss) and torch.equal(flat.logps, batch.logps)


def test_a_loss_that_needs_all_scores_runs_on_every_body():
    class Centred(pk.losses.DPO):
        """Subtracts the batch's mean difference of scores."""

        needs_first_pass = True

        def margin(self, batch):
            chosen, rejected = batch.pairs(batch.logp_R - batch.ref_R)
            return self.beta * (chosen - rejected).mean().expand(batch.layout.num_groups)

    truth, *others = (from_logits(Centred(), impl)[:2] for impl in ("eager", "auto", "triton"))
    plain = from_logits(pk.losses.DPO(), "eager")[0]
    assert truth[0].loss != plain.loss
    for out, grads in others:
        torch.testing.assert_close(out.loss, truth[0].loss)
        torch.testing.assert_close(grads, truth[1])


def test_unknown_body_of_the_logits_is_named():
    layout, hidden, weight, labels, _ = data(pk.losses.SimPO())
    with pytest.raises(ValueError, match="impl='fast'"):
        pk.logits_preference_loss(hidden @ weight.t(), labels, layout, pk.losses.SimPO(), impl="fast")


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_overwritten_logits_cannot_be_used_again(impl):
    layout, hidden, weight, labels, ref = data(pk.losses.DPO())
    leaf = (hidden @ weight.t()).requires_grad_()
    loss = pk.logits_preference_loss(leaf * 1, labels, layout, pk.losses.DPO(), ref_logps=ref, impl=impl).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_logits_double_backward_raises(impl):
    layout, hidden, weight, labels, ref = data(pk.losses.DPO())
    leaf = (hidden @ weight.t()).requires_grad_()
    loss = pk.logits_preference_loss(leaf, labels, layout, pk.losses.DPO(), ref_logps=ref, impl=impl).loss
    (g,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        g.pow(2).sum().backward()


def test_triton_tail_double_backward_raises():
    logps = -torch.rand(8, device=DEVICE).requires_grad_()
    logps = logps.detach().requires_grad_()
    out = pk.preference_loss(logps, pk.Layout.pairs([3], [5]), pk.losses.SimPO(), impl="triton")
    (g,) = torch.autograd.grad(out.loss, logps, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        g.pow(2).sum().backward()


@pytest.mark.parametrize("impl", ["eager", "chunked", "cut"])
def test_all_labels_ignored(impl):
    """Nothing was compared: the loss is 0, gradients are there and are 0, no metric is NaN."""
    for loss in LOSSES.values():
        layout, hidden, weight, labels, ref = data(loss)
        hidden.requires_grad_()
        out = pk.linear_preference_loss(
            hidden, weight, torch.full_like(labels, -100), layout, loss, ref_logps=ref, impl=impl
        )
        out.loss.backward()
        assert out.loss.item() == 0 and (hidden.grad == 0).all()
        assert all(m.isfinite() for m in out.metrics.values())


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_batch_without_prompts(loss, impl):
    layout = pk.Layout.pairs([], []) if loss.arity == "pair" else pk.Layout.sequences([])
    logps = torch.zeros(0, device=DEVICE, requires_grad=True)
    out = pk.preference_loss(
        logps, layout, loss, ref_logps=torch.zeros(0, device=DEVICE) if loss.needs_reference else None, impl=impl
    )
    out.loss.backward()
    assert out.loss == 0 and logps.grad.shape == (0,)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_a_pair_without_tokens_costs_nothing(impl):
    logps = -torch.rand(7, device=DEVICE)
    for granularity in (None, pk.Static(2)):
        loss = pk.losses.AutoregressiveDPO(granularity=granularity)
        ref = torch.zeros_like(logps)
        with_empty = pk.preference_loss(
            logps, pk.Layout.pairs([3, 0], [4, 0]), loss, ref_logps=ref, normalizer=1, impl=impl
        )
        without = pk.preference_loss(logps, pk.Layout.pairs([3], [4]), loss, ref_logps=ref, normalizer=1, impl=impl)
        assert torch.equal(with_empty.loss, without.loss)


def test_normalizer_scales_loss_and_gradient():
    layout, hidden, weight, labels, ref = data(pk.losses.DPO())
    hidden.requires_grad_()
    results = []
    for normalizer in (None, 12, torch.tensor(12.0, device=DEVICE)):
        out = pk.linear_preference_loss(
            hidden, weight, labels, layout, pk.losses.DPO(), ref_logps=ref, normalizer=normalizer
        )
        results.append((out.loss.detach(), torch.autograd.grad(out.loss, hidden)[0]))
    for value, grad in results[1:]:
        torch.testing.assert_close(value * 4, results[0][0])
        torch.testing.assert_close(grad * 4, results[0][1])


def test_lengths_count_labels_that_count():
    """SimPO's length is the number of counted tokens: ignoring a label is the same as leaving its row out."""
    layout, hidden, weight, labels, _ = data(pk.losses.SimPO())
    kept = labels != -100
    lengths = [int(k.sum()) for k in kept.split(list(layout.lengths))]
    smaller = pk.Layout.groups(lengths, layout.group_sizes)
    whole = pk.linear_preference_loss(hidden, weight, labels, layout, pk.losses.SimPO())
    dropped = pk.linear_preference_loss(hidden[kept], weight, labels[kept], smaller, pk.losses.SimPO())
    torch.testing.assert_close(whole.loss, dropped.loss)
    for name in whole.metrics:
        torch.testing.assert_close(whole.metrics[name], dropped.metrics[name])


def test_padded_batches_are_packed():
    hidden, labels = torch.randn(4, 6, 8, device=DEVICE), torch.randint(0, 9, (4, 6), device=DEVICE)
    lengths = [3, 6, 0, 2]
    for row, n in enumerate(lengths):
        labels[row, n:] = -100
    packed = pk.pack(hidden, labels)
    assert packed.lengths == (3, 6, 0, 2)
    assert torch.equal(packed.hidden, torch.cat([hidden[i, :n] for i, n in enumerate(lengths)]))
    assert torch.equal(packed.labels, labels[labels != -100])
    first = pk.pack(hidden, labels, mask=torch.arange(6, device=DEVICE).expand(4, 6) < 1)
    assert first.lengths == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="must be"):
        pk.pack(hidden, labels[:, :3])


def test_a_mask_may_be_of_integers():
    layout, logps = pk.Layout.pairs([3], [5]), -torch.rand(8, device=DEVICE)
    weights, mask = torch.rand(8, device=DEVICE), torch.arange(8, device=DEVICE) % 3 > 0
    want, got = (
        pk.preference_loss(logps, layout, pk.losses.SimPO(), mask=m, token_weights=weights) for m in (mask, mask.long())
    )
    assert torch.equal(want.loss, got.loss)


def test_data_in_float64_leaves_the_loss_in_the_policys_precision():
    layout, logps = pk.Layout.pairs([3], [5]), -torch.rand(8, device=DEVICE)
    for impl in ("eager", "triton"):
        ref = torch.zeros(8, device=DEVICE, dtype=torch.float64)
        assert pk.preference_loss(logps, layout, pk.losses.DPO(), ref_logps=ref, impl=impl).loss.dtype == torch.float32


def test_eager_tail_has_second_derivatives():
    ref = -torch.rand(8, dtype=torch.float64)
    logps = -torch.rand(8, dtype=torch.float64)
    loss = pk.losses.AutoregressiveDPO(granularity=pk.Static(2), accumulate="prefix")
    assert torch.autograd.gradgradcheck(
        lambda x: pk.preference_loss(x, pk.Layout.pairs([3], [5]), loss, ref_logps=ref, impl="eager").loss,
        logps.requires_grad_(),
    )


@pytest.mark.parametrize("name", ["ref_logps", "token_weights", "mask"])
def test_data_on_another_device_is_named(name):
    options = {"ref_logps": torch.zeros(8, device=DEVICE), name: torch.zeros(8, device="meta")}
    with pytest.raises(ValueError, match=f"{name} is on meta"):
        pk.preference_loss(torch.zeros(8, device=DEVICE), pk.Layout.pairs([3], [5]), pk.losses.DPO(), **options)
    with pytest.raises(ValueError, match="but labels on meta"):
        pk.logits_token_logps(torch.zeros(3, 4, device=DEVICE), torch.zeros(3, dtype=torch.int64, device="meta"))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: there is no stream to wait for on a CPU")
@pytest.mark.parametrize("path", ["frozen head", "trained head", "cut", "logits"])
def test_no_host_sync_in_a_step(path):
    loss = pk.losses.AutoregressiveDPO(granularity=pk.Adaptive(3), segment_reduction="mean")
    layout, hidden, weight, labels, ref = data(loss)
    hidden.requires_grad_()
    weight.requires_grad_(path in ("trained head", "cut"))

    def step():
        if path == "logits":
            return pk.logits_preference_loss(hidden @ weight.t(), labels, layout, loss, ref_logps=ref)
        impl = "cut" if path == "cut" else "auto"
        return pk.linear_preference_loss(hidden, weight, labels, layout, loss, ref_logps=ref, impl=impl)

    for attempt in range(2):  # the first call compiles kernels and copies the layout
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")
        try:
            step().loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_where_their_tensors_are():
    loss = pk.losses.DPO()
    layout, *tensors = data(loss)
    hidden, weight, labels, ref = (t.to("cuda:1") for t in tensors)
    hidden.requires_grad_()
    for impl in ("auto", "cut"):
        pk.linear_preference_loss(hidden, weight, labels, layout, loss, ref_logps=ref, impl=impl).loss.backward()
    pk.logits_preference_loss(hidden @ weight.t(), labels, layout, loss, ref_logps=ref).loss.backward()
