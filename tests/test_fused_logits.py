"""The one-launch logits path against plain torch in float64: statistics, values, scores, logit gradients."""

import pytest
import torch

pytest.importorskip("triton")
from conftest import DEVICE
from numerics import DTYPES, assert_as_good_as_torch, far_apart, poison, row_stats
from prefkern.head import Head
from prefkern.kernels import fused_logits, links, row_softmax
from prefkern.kernels.fused_logits import fused_logits_forward
from prefkern.kernels.row_softmax import row_softmax_backward
from prefkern.kernels.tuning import RowConfig
from prefkern.layout import Layout
from tail_oracle import eager_tail, kernel_operands, logistic, negative, random_operands, squared

# The interpreter's numpy warns of what a GPU does without a word: the logarithm of an ignored row's sum, 0.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
EPS = 1e-6  # relative, of fp32 results
SPLIT = RowConfig(1, 256, 16, 1), 3  # one row a program and three programs a row, as a GPU has it for few rows
PLAIN = Head()
LOGISTIC = links.logistic, (0.3, 0.1), logistic(0.3, 0.1)


def force(monkeypatch, tiling):
    """Make the launchers choose this configuration and number of splits of a row."""
    config, splits = tiling
    monkeypatch.setattr(fused_logits, "row_config", lambda *_, **__: config)
    monkeypatch.setattr(row_softmax, "row_config", lambda *_, **__: config)
    monkeypatch.setattr(row_softmax, "row_splits", lambda *_: splits)


def problem(layout: Layout, V: int, dtype=torch.float32, seed: int = 0):
    """Logits, labels with a few ignored ones and one at the last vocabulary entry, reference log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    N = layout.num_tokens
    logits = (3 * torch.randn(N, V, generator=generator)).to(dtype)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[2::7] = -100
    labels[:1] = V - 1
    return logits, labels, -6 * torch.rand(N, generator=generator)


def check(layout, logits, labels, link, head=PLAIN, bias=None, want=False, **operands):
    """Forward and in-place backward of the kernels; plain torch on the same numbers, same dtype and float64."""
    link, params, loss = link
    upstream = torch.tensor(0.7)
    results = []
    for dtype in (logits.dtype, torch.float64):
        fp = torch.promote_types(dtype, torch.float32)
        x = logits.detach().to(dtype, copy=True).requires_grad_()
        stats = row_stats(x, labels, head, None if bias is None else bias.to(dtype))
        converted = {k: v.to(fp) for k, v in operands.items()}
        if "ref" in converted:
            converted["ref"] = torch.where(labels == head.ignore_index, 0.0, converted["ref"])
        value, score = eager_tail(stats.logps, layout, loss, **converted)
        (grad,) = torch.autograd.grad(value.sum(), x, upstream.to(fp))
        results.append((stats, value, score, grad))
    (same_stats, *same), (true_stats, *truth) = results

    device_logits, device_labels = logits.to(DEVICE), labels.to(DEVICE)
    device_bias = None if bias is None else bias.to(DEVICE)
    stats, value, score, g = fused_logits_forward(
        device_logits, device_labels, head, layout.index(DEVICE), link, params, bias_V=device_bias,
        want_entropy=want, want_top1=want, want_mean=want, want_collision=want, **kernel_operands(operands),
    )  # fmt: skip
    assert (g[device_labels == head.ignore_index] == 0).all()
    grad = row_softmax_backward(
        device_logits, device_labels, stats.lse, g, head, bias_V=device_bias, grad_scale=upstream.to(DEVICE),
        out=device_logits,
    )  # fmt: skip
    assert grad.data_ptr() == device_logits.data_ptr()
    for mine, fp, true in zip((value, score, grad), same, truth):
        assert_as_good_as_torch(mine, fp, true, EPS)
    for name in ("logps", "lse", *(("entropy", "mean_logit", "log_collision") if want else ())):
        assert_as_good_as_torch(getattr(stats, name), getattr(same_stats, name), getattr(true_stats, name), EPS)
    if want:
        assert stats.is_top1.cpu().equal(true_stats.is_top1)
    else:
        assert set(stats[2:]) == {None}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("layout, V, link", [
    (Layout.sequences([1]), 2, (links.negative, (), negative)),
    (Layout.pairs([2], [3]), 1, LOGISTIC),
    (Layout.pairs([120, 0, 30], [100, 4, 1]), 507, LOGISTIC),
    (Layout.pairs([120, 2, 30], [100, 4, 1]).adaptive(4), 1031, LOGISTIC),
    (Layout.pairs([9, 0], [4, 0]).static(2), 2, (links.squared, (), squared)),
    (Layout.pairs([31, 6], [24, 0]).static(9, accumulate="prefix"), 507, LOGISTIC),
], ids=["n1_v2", "n5_v1", "n255_v507", "n257_v1031_adaptive", "static_v2", "prefix_v507"])  # fmt: skip
def test_matches_plain_torch(layout, V, link, dtype, monkeypatch):
    poison(monkeypatch)
    logits, labels, ref = problem(layout, V, dtype)
    check(layout, logits, labels, link, want=True, ref=ref, **random_operands(layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("layout, V", [
    (Layout.pairs([3, 0], [2, 1]), 1),
    pytest.param(Layout.pairs([7, 0, 3], [5, 4, 1]), 1031, marks=pytest.mark.slow),
    (Layout.pairs([7, 6], [9, 0]).static(4, accumulate="prefix"), 600),
], ids=["v1", "v1031", "prefix_v600"])  # fmt: skip
def test_split_rows_match_plain_torch(layout, V, dtype, monkeypatch):
    poison(monkeypatch)
    force(monkeypatch, SPLIT)
    logits, labels, ref = problem(layout, V, dtype)
    check(layout, logits, labels, LOGISTIC, want=True, ref=ref, **random_operands(layout))


@pytest.mark.parametrize("head", [
    Head(softcap=5.0), Head(logit_scale=0.25), Head(temperature=2.0), Head(7.0, 0.5, 1.3, ignore_index=-1),
], ids=["softcap", "logit_scale", "temperature", "all"])  # fmt: skip
def test_head_options_and_bias(head):
    layout = Layout.pairs([7, 3], [5, 9])
    logits, labels, ref = problem(layout, 123)
    labels[labels == -100] = head.ignore_index
    check(layout, logits, labels, LOGISTIC, head, bias=torch.linspace(-2, 2, 123), ref=ref)


@pytest.mark.parametrize("strided", ["rows", "columns", "offset", "transposed", "expanded"])
def test_strided_logits(strided):
    layout = Layout.pairs([7, 3], [5, 9])
    logits, labels, ref = problem(layout, 123)
    N, V = logits.shape
    wide = torch.full((2 * N + 1, 2 * V), float("nan"))
    views = dict(rows=wide[1::2, :V], columns=wide[:N, ::2], offset=wide[3 : N + 3, 5 : V + 5])
    views |= dict(transposed=torch.empty(V, N).t(), expanded=torch.empty(1, V).expand(N, V))
    view = views[strided].to(DEVICE)
    if strided == "expanded":
        logits = logits[:1].expand(N, V)
        view[:1] = logits[:1]
    else:
        view.copy_(logits)
    stats, *rest = fused_logits_forward(view, labels.to(DEVICE), Head(), layout.index(DEVICE), links.logistic, (0.1,))
    again, *expected = fused_logits_forward(
        logits.to(DEVICE), labels.to(DEVICE), Head(), layout.index(DEVICE), links.logistic, (0.1,)
    )
    assert stats.logps.equal(again.logps) and all(a.equal(b) for a, b in zip(rest, expected))


@pytest.mark.parametrize("strides", [(2**30, 1), (1, 2**27)], ids=["rows", "columns"])
@pytest.mark.parametrize("tiling", [(RowConfig(4, 64, 1, 1), 1), SPLIT], ids=["blocks", "splits"])
def test_offsets_past_two_to_the_31(strides, tiling, monkeypatch, tmp_path):
    force(monkeypatch, tiling)
    layout = Layout.pairs([2], [3])
    logits, labels, ref = problem(layout, 40, torch.float16)
    logits, labels, ref, index = logits.to(DEVICE), labels.to(DEVICE), ref.to(DEVICE), layout.index(DEVICE)
    logits = logits if strides[1] == 1 else logits.t().contiguous().t()  # the order of sums is that of the loads
    (stats, *rest), (same, *expected) = (
        fused_logits_forward(x, labels, Head(), index, links.logistic, (0.1,), ref_logps_N=ref)
        for x in (far_apart(logits, strides, tmp_path), logits)
    )
    assert stats.logps.equal(same.logps) and all(a.equal(b) for a, b in zip(rest, expected))


@pytest.mark.slow
def test_more_rows_than_a_second_grid_axis_holds():
    layout = Layout.pairs([32_801], [32_800])
    logits, labels, ref = problem(layout, 3)
    check(layout, logits, labels, LOGISTIC, ref=ref)


@pytest.mark.parametrize("tiling", [(RowConfig(1, 8192, 256, 8), 1), (RowConfig(1, 8192, 256, 8), 3)])
def test_a_peaked_softmax_over_129_920(tiling, monkeypatch):
    force(monkeypatch, tiling)
    layout = Layout.pairs([2], [1])
    logits, labels, ref = problem(layout, 129_920)
    logits[0, -1], logits[1, 5], labels[1], labels[2] = 80.0, 1e4, 5, 7
    check(layout, logits, labels, LOGISTIC, want=True, ref=ref)


def test_masked_vocabulary_and_logits_that_overflowed(monkeypatch):
    """-inf is a probability of 0; +inf, as in torch, makes its row NaN and so its pair, and no other's."""
    force(monkeypatch, SPLIT)
    layout = Layout.pairs([3, 2], [2, 4])
    logits, labels, ref = problem(layout, 900, torch.float16)
    logits[:, 300:600] = -torch.inf
    logits[5] = logits[5].masked_fill(torch.arange(900) != labels[5], -torch.inf)
    labels = labels.where((labels < 300) | (labels >= 600), 7)
    logits[5, labels[5]] = 3.0
    index = layout.index(DEVICE)

    def run(logits):
        logits = logits.to(DEVICE)
        return fused_logits_forward(
            logits, labels.to(DEVICE), Head(), index, links.logistic, (0.1,), ref_logps_N=ref.to(DEVICE)
        )

    stats, value, score, g = run(logits)
    truth = row_stats(logits.double(), labels, Head())
    assert_as_good_as_torch(stats.logps, row_stats(logits, labels, Head()).logps, truth.logps, EPS)
    assert value.isfinite().all() and g.isfinite().all() and stats.logps[5] == 0
    overflowed = logits.clone()
    overflowed[1, 20] = torch.inf
    bad_stats, bad_value, _, bad_g = run(overflowed)
    assert bad_stats.logps.isnan().tolist() == [n == 1 for n in range(11)]
    assert bad_value.isnan().tolist() == [True, False] and bad_value[1] == value[1]
    assert bad_g[5:].equal(g[5:])


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
def test_a_captured_graph_gives_the_same_bits_every_time():
    layout = Layout.pairs([20, 9], [17, 18])
    logits, labels, ref = (t.to(DEVICE) for t in problem(layout, 33_000, torch.bfloat16))
    static, index = logits.clone(), layout.index(DEVICE)

    def both():
        stats, value, score, g = fused_logits_forward(
            static, labels, Head(), index, links.logistic, (0.1,), ref_logps_N=ref
        )
        return value, score, g, row_softmax_backward(static, labels, stats.lse, g, Head())

    expected = both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for _ in range(3):  # the counters have to be zero again every time
        static.zero_()
        graph.replay()
        static.copy_(logits)
        graph.replay()
        assert all(a.equal(b) for a, b in zip(captured, expected))


def test_ignored_rows_take_no_part_whatever_their_reference_says():
    layout = Layout.pairs([4, 3], [5, 2])
    logits, labels, ref = problem(layout, 17)
    ref[labels == -100] = float("nan")
    check(layout, logits, labels, LOGISTIC, ref=ref)


def test_all_rows_ignored():
    layout = Layout.pairs([4, 3], [5, 2])
    logits, labels, ref = problem(layout, 17)
    logits, labels = logits.to(DEVICE), torch.full_like(labels, -100).to(DEVICE)
    stats, value, score, g = fused_logits_forward(
        logits, labels, Head(), layout.index(DEVICE), links.logistic, (0.1,), ref_logps_N=ref.to(DEVICE)
    )
    torch.testing.assert_close(value, torch.full_like(value, 0.6931471805599453), rtol=1e-7, atol=0)
    assert (score == 0).all() and (g == 0).all() and (stats.logps == 0).all()
    assert (row_softmax_backward(logits, labels, stats.lse, g, Head(), out=logits) == 0).all()


@pytest.mark.parametrize("layout", [
    Layout.pairs([0, 0], [0, 0]), Layout.pairs([3, 0], [2, 0]), Layout.pairs([0, 2], [0, 0]), Layout.pairs([], []),
], ids=["no_rows", "last_chain_empty", "first_chain_empty", "nothing"])  # fmt: skip
def test_chains_without_rows(layout, monkeypatch):
    poison(monkeypatch)
    logits, labels, ref = problem(layout, 11)
    index = layout.index(DEVICE)
    stats, value, score, g = fused_logits_forward(
        logits.to(DEVICE), labels.to(DEVICE), Head(), index, links.logistic, (0.1,), ref_logps_N=ref.to(DEVICE)
    )
    assert stats.logps.isfinite().all() and g.isfinite().all() and g.shape == (layout.num_tokens,)
    empty = index.chain_tokens_C == 0
    assert value.isfinite().all() and score.isfinite().all()
    torch.testing.assert_close(value[empty], torch.full_like(value[empty], 0.6931471805599453), rtol=1e-7, atol=0)


def test_rows_outside_every_segment_get_zero_gradient(monkeypatch):
    """A Layout covers every row; an index built by hand need not."""
    poison(monkeypatch)
    logits, labels, _ = problem(Layout.pairs([3], [3]), 11)
    labels = labels.clamp(min=0)
    index = Layout.pairs([3], [3]).index(DEVICE)
    index = index._replace(segment_end_S=index.segment_end_S - 1)
    *_, g = fused_logits_forward(logits.to(DEVICE), labels.to(DEVICE), Head(), index, links.logistic, (1.0,))
    assert (g == 0).tolist() == [False, False, True, False, False, True]


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU chooses the order of its programs itself")
@pytest.mark.parametrize("tiling", [(RowConfig(2, 64, 1, 1), 1), SPLIT], ids=["blocks", "splits"])
@pytest.mark.parametrize("accumulate", [pytest.param("segment", marks=pytest.mark.slow), "prefix"])
def test_any_order_of_the_programs_gives_the_same_bits(accumulate, tiling, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    force(monkeypatch, tiling)
    config, splits = tiling
    layout = Layout.pairs([5, 0, 3], [6, 0, 0]).static(3, accumulate=accumulate)
    logits, labels, ref = (t.to(DEVICE) for t in problem(layout, 100))
    index = layout.index(DEVICE)
    programs = layout.num_tokens // config.block_n * splits + index.chain_tokens_C.shape[0]
    set_grid_index = interpreter_builder.set_grid_idx
    results = []
    for seed in range(4):
        order = torch.randperm(programs, generator=torch.Generator().manual_seed(seed)).tolist()
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z, o=order: set_grid_index(o[x], y, z))
        results.append(fused_logits_forward(logits, labels, Head(), index, links.logistic, (0.1,), ref_logps_N=ref))
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_index)
    results.append(fused_logits_forward(logits, labels, Head(), index, links.logistic, (0.1,), ref_logps_N=ref))
    for stats, *rest in results[1:]:
        assert stats.logps.equal(results[0][0].logps) and all(a.equal(b) for a, b in zip(rest, results[0][1:]))


def test_bitwise_repeatable():
    layout = Layout.pairs([70, 40], [64, 81])
    logits, labels, ref = (t.to(DEVICE) for t in problem(layout, 300))
    runs = [
        fused_logits_forward(logits, labels, Head(), layout.index(DEVICE), links.logistic, (0.1,), ref_logps_N=ref)
        for _ in range(2)
    ]
    assert all(a.equal(b) for a, b in zip(runs[0][0][:2] + runs[0][1:], runs[1][0][:2] + runs[1][1:]))


def test_evaluation_computes_no_gradient():
    layout = Layout.pairs([4, 3], [5, 2]).static(2, accumulate="prefix")
    logits, labels, ref = (t.to(DEVICE) for t in problem(layout, 17))
    arguments = logits, labels, Head(), layout.index(DEVICE), links.logistic, (0.1,)
    _, value, score, g = fused_logits_forward(*arguments, ref_logps_N=ref, want_grad=False)
    _, *expected, _ = fused_logits_forward(*arguments, ref_logps_N=ref)
    assert g is None and value.equal(expected[0]) and score.equal(expected[1])
