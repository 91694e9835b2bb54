"""The compiled LM head: sums, kept logits and gradients, slice by slice, for any rows and on any threads."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import prefkern as pk
from prefkern import planner, rows
from prefkern.head import Head, Operands, RowStats
from prefkern.kernels import lm_head_cpu, product_cpu, row_softmax_cpu
from prefkern.rows import RowSums

pytestmark = [
    pytest.mark.skipif(
        product_cpu.library() is None or row_softmax_cpu.library() is None,
        reason="not built, or this processor does not want it",
    ),
    pytest.mark.usefixtures("engine"),
]
BF16 = torch.bfloat16
IGNORED = -100


def inputs(n, depth, vocab, *, spread=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, depth, generator=g).to(BF16)
    weight = (torch.randn(vocab, depth, generator=g) * spread * depth**-0.5).to(BF16)
    labels = torch.randint(vocab, (n,), generator=g)
    labels[:: max(2, n // 5)] = IGNORED
    return hidden, weight, labels


def nothing_seen(n, stats):
    empty, zeros = torch.full((n,), -torch.inf), torch.zeros
    sums = RowSums(empty, zeros(n), zeros(n), zeros(n) if stats else None)
    return sums, torch.full((n,), -torch.inf) if stats else None


def fold_all(hidden, weight, labels, head, width, *, stats=False, acc=None, logits=None):
    sums, top = nothing_seen(len(hidden), stats)
    own, n, vocab = lm_head_cpu.Rows.of(hidden, labels, head), len(hidden), len(weight)
    memory = None if logits is None else torch.empty(vocab, n + 5, dtype=BF16)
    assert own.fold(weight, 0, width, sums, top, logits=memory, rows_before=3, acc=acc) == vocab
    for first in range(0, vocab, width) if logits is not None else ():
        lines = memory[first : first + width]
        logits[:, first : first + width] = lines.view(-1)[: (n + 3) * len(lines)].view(n + 3, -1)[3:]
    return sums, top


def truth(hidden, weight, labels, head):
    """float64 of the logits as a product in bf16 leaves them."""
    z = (hidden.double() @ weight.double().t()).to(torch.float32).to(BF16).double()
    z = z * (head.logit_scale / head.temperature)
    return z, labels.clamp(min=0)[:, None]


# A rounding of a logit to bf16 may go either way where fp32 sums differ in the last bits.
LOGIT = 2**-8


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("scale, temperature", [(1.0, 1.0), (0.5, 0.7)])
@pytest.mark.parametrize("n, depth, vocab", [(64, 64, 256), (70, 65, 320), (97, 100, 128), (131, 1190, 192)])
def test_sums(n, depth, vocab, scale, temperature, stats):
    hidden, weight, labels = inputs(n, depth, vocab)
    head = Head(ignore_index=IGNORED, logit_scale=scale, temperature=temperature)
    logits = torch.full((n, vocab), 7.0, dtype=BF16)
    sums, top = fold_all(hidden, weight, labels, head, 64, stats=stats, logits=logits)
    z, column = truth(hidden, weight, labels, head)
    assert torch.allclose(logits.double() * scale / temperature, z, rtol=LOGIT, atol=1e-3)
    # Of the logits that it left, everything follows to fp32's precision.
    z = logits.double() * (head.logit_scale / head.temperature)
    lse = sums.top.double() + sums.sum.double().log()
    counted = labels != IGNORED
    assert torch.allclose(lse[counted], z.logsumexp(1)[counted], rtol=0, atol=2e-6)
    scaled = logits.float() * torch.tensor(scale / temperature, dtype=torch.float32)
    assert torch.equal(sums.label[counted], scaled.gather(1, column)[:, 0][counted])
    if not stats:
        return
    assert torch.equal(top[counted], scaled.amax(1)[counted])
    mean = (z.softmax(1) * (z - sums.top.double()[:, None])).sum(1)
    got = sums.dot.double() / sums.sum.double()
    assert torch.allclose(got[counted], mean[counted], rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [2, 64, 97])
@pytest.mark.parametrize("spread", [1.0, 5.0, 13.0])
def test_sums_of_the_weight(count, spread):
    """acc / sum is the mean of the weight's rows under the softmax, without the label's; whatever the logits' size."""
    hidden, weight, labels = inputs(97, 80, 640, spread=spread)
    head, acc = Head(ignore_index=IGNORED), torch.zeros(count, 80)
    logits = torch.empty(97, 640, dtype=BF16)
    sums, _ = fold_all(hidden, weight, labels, head, 128, acc=acc, logits=logits)
    z = logits.double()
    assert spread < 13 or z.abs().max() > 40
    counted, lse = labels != IGNORED, (sums.top + sums.sum.log()).double()
    assert torch.allclose(lse[counted], z.logsumexp(1)[counted], rtol=1e-6, atol=2e-6)
    p = z.softmax(1).scatter(1, labels.clamp(min=0)[:, None], 0.0)
    want, got = (p @ weight.double())[:count], acc.double() / sums.sum.double()[:count, None]
    rounding = 2**-8 * (p @ weight.double().abs())[:count]  # of each exponential to bf16
    assert ((got - want).abs() <= rounding + 1e-6)[counted[:count]].all()


@pytest.mark.parametrize("scale, temperature", [(1.0, 1.0), (0.5, 0.7)])
@pytest.mark.parametrize("n, depth, vocab", [(64, 64, 256), (70, 65, 320), (97, 100, 128)])
def test_gradient_of_hidden_is_made_when_all_has_been_folded(n, depth, vocab, scale, temperature):
    """unit = scale ((1 - p) weight[label] - the others' mean), of rows of all kinds."""
    hidden, weight, labels = inputs(n, depth, vocab)
    hidden[3], labels[3] = 16 * weight[7] / weight[7].float().square().sum(), 7  # a label that is nearly sure
    labels[4], labels[5] = vocab + 5, -7  # and some that nobody should ask for
    head = Head(ignore_index=IGNORED, logit_scale=scale, temperature=temperature)
    count, (sums, _) = n - 5, nothing_seen(n, False)
    acc, unit = torch.zeros(count, depth), torch.full((count, depth), torch.nan, dtype=BF16)
    rows = lm_head_cpu.Rows.of(hidden, labels, head)
    assert rows.fold(weight[: vocab - 20], 0, 64, sums, None, acc=acc, unit=unit) == vocab - 64
    assert unit.isnan().all()
    assert rows.fold(weight, vocab - 64, 64, sums, None, acc=acc, unit=unit) == vocab
    counted = labels[:count] != IGNORED
    assert (unit[~counted] == 0).all() and (~counted).any()
    logp = (sums.label - sums.top - sums.sum.log()).double()[:count, None]
    own, others = weight[labels[:count].clamp(0, vocab - 1)].double(), acc.double() / sums.sum.double()[:count, None]
    want = (-logp.expm1() * own - others) * (scale / temperature)
    size = (-logp.expm1() * own.abs() + others.abs()) * (scale / temperature)
    assert ((unit.double() - want).abs() <= 2**-8 * want.abs() + 1e-6 * size)[counted].all()
    assert scale < 1 or 1e-6 < -logp[3] < 1e-3


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_slices_of_more_entries_than_a_panel_is_deep(threads):
    hidden, weight, labels = inputs(200, 600, 3000 // 64 * 64)
    head, acc, before = Head(ignore_index=IGNORED), torch.zeros(200, 600), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        sums, _ = fold_all(hidden, weight, labels, head, 1280, acc=acc)
    finally:
        torch.set_num_threads(before)
    z, column = truth(hidden, weight, labels, head)
    p = z.softmax(1).scatter(1, column, 0.0)
    want, got = p @ weight.double(), acc.double() / sums.sum.double()[:, None]
    rounding = (2 * LOGIT + 2**-8) * (p @ weight.double().abs())  # of logits and of their exponentials
    assert ((got - want).abs() <= rounding + 1e-6)[labels != IGNORED].all()


def test_sums_that_fp32_cannot_hold_are_refused_and_nothing_is_changed():
    hidden, weight, labels = inputs(64, 64, 128)
    head = Head(ignore_index=IGNORED)
    own, acc = lm_head_cpu.Rows.of(hidden, labels, head), torch.ones(64, 64)
    for bad in (1e4, -1e4, torch.nan, torch.inf):
        broken = hidden.clone()
        broken[5] = bad
        broken_rows = lm_head_cpu.Rows.of(broken, labels, head)
        sums, top = nothing_seen(64, True)
        ones = torch.ones(128, 64, dtype=BF16)
        before = [x.clone() for x in (*sums[:4], top, acc)]
        assert broken_rows.fold(ones, 0, 128, sums, top, acc=acc) == 0
        assert all(map(torch.equal, before, (*sums[:4], top, acc)))
    sums, top = nothing_seen(64, True)
    assert own.fold(weight, 0, 128, sums, top, acc=acc) == 128


@pytest.mark.parametrize("bad", range(64, 448, 64))
def test_sums_are_those_up_to_the_slice_that_is_refused(bad):
    hidden, weight, labels = inputs(70, 64, 448)
    head, acc, same = Head(ignore_index=IGNORED), torch.zeros(70, 64), torch.zeros(70, 64)
    sums, top = fold_all(hidden, weight[:bad], labels, head, 64, stats=True, acc=acc)
    weight[bad] = torch.nan
    own, (found, found_top) = lm_head_cpu.Rows.of(hidden, labels, head), nothing_seen(70, True)
    assert own.fold(weight, 0, 64, found, found_top, acc=same) == bad
    assert all(map(torch.equal, (*sums[:4], top, acc), (*found[:4], found_top, same)))


@pytest.fixture
def calls(monkeypatch):
    """What the compiled head was asked for: the entries that folds came to, and the gradients."""
    seen = {"folds": [], "gradients": 0}
    fold, add = lm_head_cpu.Rows.fold, lm_head_cpu.Gradient.add

    def folding(*args, **options):
        seen["folds"].append(fold(*args, **options))
        return seen["folds"][-1]

    def adding(*args):
        seen["gradients"] += 1
        add(*args)

    monkeypatch.setattr(lm_head_cpu.Rows, "fold", folding)
    monkeypatch.setattr(lm_head_cpu.Gradient, "add", adding)
    return seen


@pytest.mark.parametrize("bad", [1e3, -1e3, torch.nan, torch.inf])
@pytest.mark.parametrize("frozen", [False, True])
def test_refused_slices_are_done_by_other_means(bad, frozen, calls, monkeypatch):
    """One row that the first slice, or none, takes: it gets what torch gives it, and the others stay right."""
    monkeypatch.setattr(planner, "_TILE_BYTES", 1 << 16)
    hidden, weight, labels = inputs(80, 64, 1024)
    hidden[7] = bad
    weight[:, 0] = weight[:, 0].abs() + 1
    found, wanted = [], []
    for impl, into in (("auto", found), ("eager", wanted)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        out = pk.token_logps(h, w, labels, ignore_index=IGNORED, outputs=("entropy", "is_top1"), impl=impl)
        others = torch.arange(80) != 7
        out.logps[others].sum().backward()
        into += [out.logps.detach(), out.entropy.detach(), h.grad[others]]
    for ours, theirs in zip(found, wanted):
        assert torch.allclose(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2, equal_nan=True)
    refused = [i for i, done in enumerate(calls["folds"]) if not done]
    # 80 rows: 64 of them kept where the head is trained, so that its blocks are two.
    assert refused and refused[0] == 0
    assert any(calls["folds"]) == (bad in (1e3, -1e3) or not frozen)


def test_ignored_rows_may_hold_anything(calls, monkeypatch):
    monkeypatch.setattr(planner, "_TILE_BYTES", 1 << 16)
    hidden, weight, labels = inputs(128, 128, 1024)
    clean = run(hidden, weight, labels, frozen=False)
    hidden[labels == IGNORED] = torch.nan
    calls["folds"].clear()
    logps, dhidden, _ = run(hidden, weight, labels, frozen=False)
    assert calls["folds"] == [1024]
    assert torch.equal(logps, clean[0]) and torch.equal(dhidden, clean[1])


@pytest.mark.parametrize("size", [2.0**20, 2.0**25, 2.0**27])
def test_references_that_are_not_exact(size, calls, monkeypatch):
    """Equal logits, so large that fp32 has no whole numbers left between them."""
    monkeypatch.setattr(planner, "_TILE_BYTES", 1 << 14)
    hidden, weight = torch.zeros(64, 64, dtype=BF16), torch.zeros(1024, 64, dtype=BF16)
    hidden[:, 0], weight[:, 0] = 2.0**10, size / 2**10
    out = pk.token_logps(hidden, weight, torch.arange(64), outputs=("entropy",))
    assert not all(calls["folds"]) and any(calls["folds"])
    assert torch.allclose(out.logps, torch.tensor(1024.0).log().neg(), rtol=1e-5)
    assert torch.allclose(out.entropy, torch.tensor(1024.0).log(), rtol=1e-5)


def gradients(logits, hidden, weight, labels, head, lse, g, entropy=None, e=None):
    z = logits.double() * (head.logit_scale / head.temperature)
    log_p = z - lse.double()[:, None]
    p, counted = log_p.exp(), labels != head.ignore_index
    onehot = torch.zeros_like(p).scatter_(1, labels.clamp(min=0)[:, None], 1.0)
    d = g.double()[:, None] * (onehot - p)
    if e is not None:
        d -= e.double()[:, None] * p * (log_p + entropy.double()[:, None])
    return d * counted[:, None] * (head.logit_scale / head.temperature)


SLICES = [(64, 64, 64), (71, 65, 160), (97, 70, 96), (130, 300, 224), (6, 64, 416), (1200, 70, 1216)]


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("n, depth, vocab", SLICES)
def test_gradients_of_a_slice(n, depth, vocab, with_entropy):
    hidden, weight, labels = inputs(n, depth, vocab)
    head = Head(ignore_index=IGNORED, temperature=0.8)
    generator = torch.Generator().manual_seed(1)
    logits = (hidden.float() @ weight.float().t()).to(BF16)
    lse = (logits.float() / 0.8).logsumexp(1)
    g, e, entropy = (torch.randn(n, generator=generator) for _ in range(3))
    d = gradients(logits, hidden, weight, labels, head, lse, g, *((entropy, e) if with_entropy else ()))
    stats = RowStats(lse, lse, entropy)
    whole = lm_head_cpu.Gradient.of(Operands(hidden, weight), labels, head, stats, g, e if with_entropy else None)
    everything = slice(0, n), slice(0, vocab)

    want_hidden, size_hidden = d @ weight.double(), d.abs() @ weight.double().abs()
    want_weight, size_weight = d.t() @ hidden.double(), d.abs().t() @ hidden.double().abs()
    dhidden, dsum = torch.ones(n, depth), torch.ones(vocab, depth)
    whole.add(logits, *everything, dhidden, dsum)
    assert ((dhidden.double() - 1 - want_hidden).abs() <= 2**-8 * size_hidden + 1e-6).all()
    assert ((dsum.double() - 1 - want_weight).abs() <= 2**-8 * size_weight + 1e-6).all()
    # dweight over the logits' own memory, and one without the other.
    memory = torch.zeros(max(n, depth) * vocab, dtype=BF16)
    kept, dweight = memory[: n * vocab].view(n, vocab).copy_(logits), memory[: vocab * depth].view(vocab, depth)
    whole.add(kept, *everything, None, dweight)
    assert ((dweight.double() - want_weight).abs() <= 2**-7 * size_weight + 1e-6).all()
    alone = torch.ones(n, depth)
    whole.add(logits, *everything, alone, None)
    assert torch.equal(alone, dhidden)


def test_gradients_of_ignored_rows_are_zero_whatever_their_logits():
    hidden, weight, labels = inputs(64, 64, 64)
    labels[3] = IGNORED
    logits = torch.zeros(64, 64, dtype=BF16)
    logits[3], lse = torch.nan, torch.full((64,), 4.0)
    head = Head(ignore_index=IGNORED)
    whole = lm_head_cpu.Gradient.of(Operands(hidden, weight), labels, head, RowStats(lse, lse), torch.ones(64), None)
    dhidden, dweight = torch.zeros(64, 64), torch.zeros(64, 64, dtype=BF16)
    whole.add(logits, slice(0, 64), slice(0, 64), dhidden, dweight)
    assert (dhidden[3] == 0).all() and dhidden.isfinite().all() and dweight.isfinite().all()


def run(hidden, weight, labels, frozen, **options):
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
    out = pk.token_logps(h, w, labels, ignore_index=IGNORED, **options)
    loss = (out.logps * torch.linspace(-1, 1, out.logps.numel())).sum()
    if out.entropy is not None:
        loss = loss + 0.3 * out.entropy.sum()
    loss.backward()
    return out.logps.detach(), h.grad, *([] if frozen else [w.grad])


SHAPES = [(150, 96, 1000), (300, 64, 1024), (64, 200, 704), (280, 300, 704)]
CASES = list(itertools.product([False, True], [False, True], SHAPES))


@pytest.mark.parametrize("frozen, with_entropy, shape", CASES, ids=str)
def test_the_head_is_near_the_truth(frozen, with_entropy, shape, calls, monkeypatch):
    """Several tiles, the last one narrow or odd, and more rows than are kept: error at most twice torch's own."""
    monkeypatch.setattr(planner, "_TILE_BYTES", 1 << 16)
    monkeypatch.setattr(planner, "_TILE_ROWS", 128)
    hidden, weight, labels = inputs(*shape, spread=3.0)
    options = dict(outputs=("entropy", "is_top1")) if with_entropy else {}
    ours = run(hidden, weight, labels, frozen, **options)
    assert max(calls["folds"]) >= 512 and (calls["gradients"] > 1) == (with_entropy or not frozen)
    theirs = run(hidden, weight, labels, frozen, impl="eager", **options)
    exact = run(hidden.double(), weight.double(), labels, frozen, impl="eager", **options)
    for own, other, true in zip(ours, theirs, exact):
        scale = true.abs().max()
        error, its = ((x.double() - true).abs().max() / scale for x in (own, other))
        assert error <= 2 * its + 1e-6


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_top1_is_exact(temperature, monkeypatch):
    """Also where the same logit lies in two slices, one of them of a width that goes by other means."""
    monkeypatch.setattr(planner, "_TILE_BYTES", 1 << 15)
    hidden, weight, labels = inputs(128, 64, 500, spread=3.0)
    weight[450:] = weight[:50]
    top = (hidden.float() @ weight.float().t()).to(BF16)
    best = top.argmax(1)
    best = torch.where(best < 50, best + 450, best)
    labels = torch.where(torch.arange(128) % 2 == 0, best, labels.clamp(min=0))
    ours = pk.token_logps(hidden, weight, labels, outputs=("is_top1",), temperature=temperature).is_top1
    assert ours[::2].all() and (best >= 450).any()
    assert torch.equal(ours, (labels == best) | (labels == best - 450))


# Few panels for a thread, of whose last each takes a part, and many: where two go side by side, from 1,024 on.
@pytest.mark.parametrize("depth", [130, 580, 1024])
@pytest.mark.parametrize("frozen", [False, True])
def test_bits_do_not_depend_on_threads(frozen, depth, monkeypatch):
    monkeypatch.setattr(planner, "_TILE_BYTES", 1 << 17)
    hidden, weight, labels = inputs(520 if depth == 1024 else 200, depth, 1024)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(run(hidden, weight, labels, frozen))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("frozen, products", [(True, 2), (False, 3)])
def test_products_are_counted(frozen, products, calls, monkeypatch):
    monkeypatch.setattr(planner, "_TILE_BYTES", 1 << 17)
    hidden, weight, labels = inputs(128, 128, 1024)
    with FlopCounterMode(display=False) as counter:
        run(hidden, weight, labels, frozen)
    assert calls["folds"] == [1024] and (calls["gradients"] > 1) == (not frozen)
    assert counter.get_total_flops() == 2 * products * 128 * 128 * 1024


def test_what_it_does_not_serve():
    hidden, weight, _ = inputs(64, 64, 128)
    operands, head = Operands(hidden, weight), Head()
    assert rows.whole_head(row_softmax_cpu, operands, head, want_entropy=True, want_top1=True) is lm_head_cpu
    assert rows.whole_head(rows, operands, head) is None
    for other in (
        operands._replace(bias=torch.zeros(128, dtype=BF16)),
        operands._replace(low=torch.zeros(64, 2, dtype=BF16), low_weight=torch.zeros(128, 2, dtype=BF16)),
        Operands(hidden.float(), weight.float()),
        Operands(hidden[:10], weight),
        Operands(hidden, weight.t().contiguous().t()),
    ):
        assert rows.whole_head(row_softmax_cpu, other, head) is None
    assert rows.whole_head(row_softmax_cpu, operands, Head(softcap=30.0)) is None
    assert rows.whole_head(row_softmax_cpu, operands, head, want_collision=True) is None
    (sums, top), own = nothing_seen(64, False), lm_head_cpu.Rows.of(hidden, torch.zeros(64, dtype=torch.int64), head)
    assert own.fold(weight[:100], 0, 100, sums, top) == 0
    assert own.fold(weight[:100], 0, 64, sums, top) == 64
