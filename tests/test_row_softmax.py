"""The row kernel against float64: values, gradients, splits of rows, odd sizes, strides, offsets and edges."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import DEVICE
from numerics import DTYPES, assert_as_good_as_torch, far_apart, poison, row_stats

pytest.importorskip("triton")
from prefkern.head import Head
from prefkern.kernels import row_softmax
from prefkern.kernels.row_softmax import load_width, row_softmax_backward, row_softmax_forward
from prefkern.kernels.tuning import RowConfig

EPS = 1e-6  # fp32 sums in another order than torch's
PLAIN = Head()
FULL = Head(softcap=5.0, logit_scale=1.3, temperature=0.7)
WANT = dict(want_entropy=True, want_top1=True, want_mean=True, want_collision=True)
SHAPES = [(1, 2), (255, 507), (257, 1031)]
# The interpreter's numpy warns of what a GPU does without a word: the logarithm of an ignored row's sum, 0.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
ONE_ROW = RowConfig(1, 256, 16, 1)  # one row a program, summed in lanes, as long rows are on a GPU


@pytest.fixture(autouse=True)
def poisoned_workspaces(monkeypatch):
    poison(monkeypatch)


def force(monkeypatch, config, splits):
    """Make the launchers choose this configuration, and cut rows into so many splits."""
    monkeypatch.setattr(row_softmax, "row_config", lambda *_, **__: config)
    monkeypatch.setattr(row_softmax, "row_splits", lambda *_: splits)


def make(N, V, dtype=torch.float32, spread=3.0):
    """Logits, labels with the last entry and two ignored rows among them, bias, and two upstream gradients."""
    torch.manual_seed(N + V)
    labels = torch.randint(0, V, (N,))
    labels[0] = V - 1
    labels[1:3] = PLAIN.ignore_index
    tensors = (torch.randn(N, V) * spread).to(dtype), labels, torch.randn(V).to(dtype), torch.randn(N), torch.randn(N)
    return tuple(t.to(DEVICE) for t in tensors)


def truth_and_torch(logits, labels, head, bias=None, grads=None):
    """(statistics, gradient of the logits) in float64 and in the logits' dtype."""
    results = []
    for double in (True, False):
        x = (logits.double() if double else logits).clone().requires_grad_()
        b = None if bias is None else bias.to(x.dtype)
        stats = row_stats(x, labels, head, b)
        grad = None
        if grads is not None:
            grad_logps, grad_entropy = grads
            loss = (stats.logps * grad_logps).sum()
            if grad_entropy is not None:
                loss = loss + (stats.entropy * grad_entropy).sum()
            (grad,) = torch.autograd.grad(loss, x)
        results.append((stats, grad))
    return results


def check_stats(got, truth, same):
    for name in ("logps", "lse", "entropy", "mean_logit", "log_collision"):
        assert_as_good_as_torch(getattr(got, name), getattr(same, name), getattr(truth, name), EPS)
        assert getattr(got, name).dtype == torch.float32
    assert torch.equal(got.is_top1, same.is_top1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", [PLAIN, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("N, V", SHAPES)
def test_forward(N, V, head, dtype):
    logits, labels, bias, *_ = make(N, V, dtype)
    bias = bias if head is FULL else None
    (truth, _), (same, _) = truth_and_torch(logits, labels, head, bias)
    check_stats(row_softmax_forward(logits, labels, head, bias_V=bias, **WANT), truth, same)


def test_forward_computes_only_what_is_wanted():
    logits, labels, *_ = make(5, 33)
    bare, full = row_softmax_forward(logits, labels, PLAIN), row_softmax_forward(logits, labels, PLAIN, **WANT)
    assert set(bare[2:]) == {None}
    assert torch.equal(bare.logps, full.logps) and torch.equal(bare.lse, full.lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", [PLAIN, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("N, V", SHAPES)
def test_backward(N, V, head, dtype):
    logits, labels, bias, grad_logps, grad_entropy = make(N, V, dtype)
    bias, grad_entropy = (bias, grad_entropy) if head is FULL else (None, None)
    (_, truth), (_, same) = truth_and_torch(logits, labels, head, bias, (grad_logps, grad_entropy))
    stats = row_softmax_forward(logits, labels, head, bias_V=bias, want_entropy=True)
    upstream = dict(bias_V=bias, entropy_N=stats.entropy, grad_entropy_N=grad_entropy)
    got = row_softmax_backward(logits, labels, stats.lse, grad_logps, head, **upstream)
    assert got.dtype == dtype and got.data_ptr() != logits.data_ptr()
    assert_as_good_as_torch(got, same, truth, EPS)
    assert not got[labels == head.ignore_index].any()

    in_place = row_softmax_backward(logits, labels, stats.lse, grad_logps, head, **upstream, out=logits)
    assert in_place is logits and torch.equal(in_place, got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V, splits, head", [
    (1, 1, FULL), (1, 2, PLAIN), (5, 1, FULL), (63, 1, PLAIN), (64, 3, FULL), (256, 1, PLAIN), (257, 2, FULL),
    pytest.param(1024, 4, PLAIN, marks=pytest.mark.slow),
    (1031, 1, FULL), (1031, 3, PLAIN),
    pytest.param(1031, 16, FULL, marks=pytest.mark.slow), pytest.param(2083, 5, PLAIN, marks=pytest.mark.slow),
])  # fmt: skip
def test_rows_split_over_programs_and_starting_anywhere(V, splits, head, dtype, monkeypatch):
    """Rows at every distance from a multiple of 16 bytes; what lies around them is neither read nor written."""
    force(monkeypatch, ONE_ROW, splits)
    logits, labels, bias, grad_logps, grad_entropy = make(9, V, dtype)
    labels[3:] = torch.randint(0, V, (6,), device=DEVICE)
    bias, grad_entropy = (bias, grad_entropy) if head is FULL else (None, None)
    grads = grad_logps, grad_entropy
    (truth, truth_grad), (same, same_grad) = truth_and_torch(logits, labels, head, bias, grads)
    wide = torch.full((11, V + 13 + V % 2), float("nan"), dtype=dtype, device=DEVICE)  # an odd stride
    view = wide[1:10, 5 : V + 5]
    view.copy_(logits)
    stats = row_softmax_forward(view, labels, head, bias_V=bias, **WANT)
    check_stats(stats, truth, same)
    upstream = dict(bias_V=bias, entropy_N=stats.entropy, grad_entropy_N=grad_entropy)
    got = row_softmax_backward(view, labels, stats.lse, grad_logps, head, **upstream)
    assert_as_good_as_torch(got, same_grad, truth_grad, EPS)
    row_softmax_backward(view, labels, stats.lse, grad_logps, head, **upstream, out=view)
    assert torch.equal(view, got)
    outside = torch.ones_like(wide, dtype=torch.bool)
    outside[1:10, 5 : V + 5] = False
    assert wide[outside].isnan().all() and not (got[labels == head.ignore_index] != 0).any()


@pytest.mark.parametrize("N, V, splits", [(5, 1031, 3), (130, 1031, 2), (3, 40, 4)])
def test_blocks_of_rows_are_split_too(N, V, splits, monkeypatch):
    force(monkeypatch, RowConfig(64, 128, 1, 1), splits)
    logits, labels, bias, grad_logps, grad_entropy = make(N, V)
    grads = grad_logps, grad_entropy
    (truth, truth_grad), (same, same_grad) = truth_and_torch(logits, labels, FULL, bias, grads)
    stats = row_softmax_forward(logits, labels, FULL, bias_V=bias, **WANT)
    check_stats(stats, truth, same)
    upstream = dict(bias_V=bias, entropy_N=stats.entropy, grad_entropy_N=grad_entropy)
    got = row_softmax_backward(logits, labels, stats.lse, grad_logps, FULL, **upstream)
    assert_as_good_as_torch(got, same_grad, truth_grad, EPS)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU chooses the order of its programs itself")
@pytest.mark.parametrize("config", [
    pytest.param(ONE_ROW, marks=pytest.mark.slow), RowConfig(2, 256, 1, 1),
], ids=["one row", "two rows"])  # fmt: skip
def test_any_order_of_the_splits_gives_the_same_bits(config, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    force(monkeypatch, config, splits=5)
    logits, labels, *_ = make(6, 1280)
    set_grid_index = interpreter_builder.set_grid_idx
    expected = row_softmax_forward(logits, labels, PLAIN, **WANT)
    for seed in range(4):
        order = torch.randperm(6 // config.block_n * 5, generator=torch.Generator().manual_seed(seed)).tolist()
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z, o=order: set_grid_index(o[x], y, z))
        got = row_softmax_forward(logits, labels, PLAIN, **WANT)
        assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_a_gradient_whose_rows_start_elsewhere_than_the_logits(monkeypatch):
    force(monkeypatch, ONE_ROW, splits=2)
    logits, labels, _, grad_logps, _ = make(5, 1000)
    lse = row_softmax_forward(logits, labels, PLAIN).lse
    expected = row_softmax_backward(logits, labels, lse, grad_logps, PLAIN)
    memory = torch.zeros(5 * 1004 + 8, device=DEVICE)
    for offset, stride in ((0, 1000), (4, 1004), (1, 1000), (0, 1003)):
        out = memory.as_strided((5, 1000), (stride, 1), offset)
        assert load_width(ONE_ROW, logits, out) == (4 if offset % 4 == stride % 4 == 0 else 1)
        assert torch.equal(row_softmax_backward(logits, labels, lse, grad_logps, PLAIN, out=out), expected)


def test_what_loads_in_pieces_of_16_bytes():
    logits = torch.zeros(6, 16, dtype=torch.float16)
    assert load_width(ONE_ROW, logits) == load_width(ONE_ROW, logits[:, 1:]) == load_width(ONE_ROW, logits, logits) == 8
    assert load_width(ONE_ROW, logits.t()) == load_width(ONE_ROW, logits[:, ::2]) == 1
    assert load_width(ONE_ROW, logits, logits.float()) == load_width(replace(ONE_ROW, lanes=1), logits) == 1


@pytest.mark.parametrize("alone", ["logps", "entropy"])
def test_each_upstream_gradient_alone(alone):
    logits, labels, _, grad_logps, grad_entropy = make(9, 130)
    zero = torch.zeros_like(grad_logps)
    grads = (grad_logps, zero) if alone == "logps" else (zero, grad_entropy)
    (_, truth), (_, same) = truth_and_torch(logits, labels, PLAIN, grads=grads)
    stats = row_softmax_forward(logits, labels, PLAIN, want_entropy=True)
    entropy = dict(entropy_N=stats.entropy, grad_entropy_N=grads[1])
    got = row_softmax_backward(logits, labels, stats.lse, grads[0], PLAIN, **entropy)
    assert_as_good_as_torch(got, same, truth, EPS)
    if alone == "logps":
        assert torch.equal(got, row_softmax_backward(logits, labels, stats.lse, grad_logps, PLAIN))


def test_grad_scale_multiplies_the_gradient():
    logits, labels, _, grad_logps, _ = make(9, 130)
    lse = row_softmax_forward(logits, labels, PLAIN).lse
    scale = torch.tensor(-0.5, device=DEVICE)  # a power of two: exact
    got = row_softmax_backward(logits, labels, lse, grad_logps, PLAIN, grad_scale=scale)
    assert torch.equal(got, -0.5 * row_softmax_backward(logits, labels, lse, grad_logps, PLAIN))


def test_an_all_ignored_batch_is_zero():
    logits, labels, _, grad_logps, _ = make(6, 40)
    labels.fill_(PLAIN.ignore_index)
    logits[0] = float("nan")
    stats = row_softmax_forward(logits, labels, PLAIN, **WANT)
    assert not any(t.any() for t in stats)
    assert not row_softmax_backward(logits, labels, stats.lse, grad_logps, PLAIN).any()


def test_ignore_index_may_be_a_vocabulary_entry():
    logits, labels, *_ = make(6, 40)
    labels[3] = 0
    got = row_softmax_forward(logits, labels, Head(ignore_index=0))
    assert got.logps[3] == 0 and got.lse[3] == 0 and got.logps[0] < 0


@pytest.mark.parametrize("label", [-1, 40, 2**40])
def test_a_label_outside_the_vocabulary_gives_nan(label):
    logits, labels, *_ = make(6, 40)
    labels[4] = label
    stats = row_softmax_forward(logits, labels, PLAIN, **WANT)
    assert stats.logps.isnan().tolist() == [n == 4 for n in range(6)]
    assert not stats.is_top1[4] and stats.lse.isfinite().all()


VIEWS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.cat([x, x], 1)[:, 3 : 3 + x.shape[1]],
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strided_logits(view):
    logits, labels, _, grad_logps, _ = make(66, 130)
    strided = VIEWS[view](logits)
    plain = strided.contiguous()
    stats, expected = (row_softmax_forward(x, labels, PLAIN, **WANT) for x in (strided, plain))
    assert all(torch.equal(a, b) for a, b in zip(stats, expected))
    got, expected = (row_softmax_backward(x, labels, stats.lse, grad_logps, PLAIN) for x in (strided, plain))
    assert torch.equal(got, expected)
    if view != "expanded":
        assert torch.equal(row_softmax_backward(strided, labels, stats.lse, grad_logps, PLAIN, out=strided), expected)


def test_strided_labels_and_upstream():
    logits, labels, bias, grad_logps, _ = make(66, 130)
    wide = [t.repeat_interleave(2)[::2] for t in (labels, bias, grad_logps)]
    stats = row_softmax_forward(logits, wide[0], PLAIN, bias_V=wide[1])
    assert torch.equal(stats.logps, row_softmax_forward(logits, labels, PLAIN, bias_V=bias).logps)
    got = row_softmax_backward(logits, wide[0], stats.lse, wide[2], PLAIN, bias_V=wide[1])
    assert torch.equal(got, row_softmax_backward(logits, labels, stats.lse, grad_logps, PLAIN, bias_V=bias))


def test_masked_vocabulary():
    """-inf logits: a whole first tile, single entries, and one row's label."""
    logits, labels, _, grad_logps, grad_entropy = make(9, 1031)
    labels[3:] = torch.arange(1025, 1031, device=DEVICE)
    logits[:, :600] = float("-inf")
    logits[:, 700::3] = float("-inf")
    logits[0, 1030] = 0.0
    logits[4, labels[4]] = float("-inf")
    stats = row_softmax_forward(logits, labels, PLAIN, **WANT)
    (truth, _), (same, _) = truth_and_torch(logits, labels, PLAIN)
    check_stats(stats, truth, same)
    assert stats.logps[4] == float("-inf")

    grads = (grad_logps, grad_entropy)
    upstream = dict(entropy_N=stats.entropy, grad_entropy_N=grad_entropy)
    got = row_softmax_backward(logits, labels, stats.lse, grad_logps, PLAIN, **upstream)
    finite = logits.masked_fill(logits == float("-inf"), -1e30)  # autograd of 0 * -inf is NaN: the limit instead
    (_, truth), (_, same) = truth_and_torch(finite, labels, PLAIN, grads=grads)
    assert_as_good_as_torch(got, same, truth, EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_are_exact_forward_and_as_good_as_their_lse_backward(dtype):
    logits, labels, _, grad_logps, grad_entropy = make(9, 1031, dtype)
    logits = (logits.float() + 1e4).to(dtype)
    stats = row_softmax_forward(logits, labels, PLAIN, **WANT)
    (truth, grad), (same, same_grad) = truth_and_torch(logits, labels, PLAIN, grads=(grad_logps, grad_entropy))
    check_stats(stats, truth, same)
    upstream = dict(entropy_N=stats.entropy, grad_entropy_N=grad_entropy)
    got = row_softmax_backward(logits, labels, stats.lse, grad_logps, PLAIN, **upstream)
    assert got.isfinite().all()
    # The seam is lse in fp32: half an ulp of 1e4 is 5e-4, and so much may p = exp(z - lse) be off.
    assert_as_good_as_torch(got, same_grad, grad, eps=1e-3)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("config, splits", [(RowConfig(4, 64, 1, 1), 1), (ONE_ROW, 2)], ids=["blocks", "splits"])
def test_ignored_rows_are_zero_whatever_they_hold(config, splits, with_bias, monkeypatch):
    """NaN in all that is theirs, and an infinite bias, which is everyone's."""
    force(monkeypatch, config, splits)
    logits, labels, bias, grad_logps, grad_entropy = make(6, 300)
    bias = bias.index_fill(0, torch.tensor([7], device=DEVICE), torch.inf) if with_bias else None
    ignored = labels == PLAIN.ignore_index
    assert ignored.any() and not ignored.all()
    for t in (logits, grad_logps, grad_entropy):
        t[ignored] = torch.nan
    stats = row_softmax_forward(logits, labels, PLAIN, bias_V=bias, **WANT)
    assert not any(t[ignored].any() for t in stats)
    lse, entropy = (t.masked_fill(ignored, torch.nan) for t in (stats.lse, stats.entropy))
    upstream = dict(bias_V=bias, entropy_N=entropy, grad_entropy_N=grad_entropy)
    assert not row_softmax_backward(logits, labels, lse, grad_logps, PLAIN, **upstream)[ignored].any()


def test_two_runs_agree_to_the_bit():
    logits, labels, _, grad_logps, _ = make(257, 1031)
    first, second = (row_softmax_forward(logits, labels, FULL, **WANT) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    grads = [row_softmax_backward(logits, labels, first.lse, grad_logps, FULL) for _ in range(2)]
    assert torch.equal(*grads)


def test_no_rows():
    logits, labels, _, grad_logps, _ = (t[:0] for t in make(3, 40))
    stats = row_softmax_forward(logits, labels, PLAIN, **WANT)
    assert all(t.shape == (0,) for t in stats)
    assert row_softmax_backward(logits, labels, stats.lse, grad_logps, PLAIN).shape == (0, 40)


def test_more_rows_than_a_second_grid_axis_holds():
    logits, labels, _, grad_logps, _ = make(65_537 + 64, 3)
    (truth, grad), (same, same_grad) = truth_and_torch(logits, labels, PLAIN, grads=(grad_logps, None))
    stats = row_softmax_forward(logits, labels, PLAIN, **WANT)
    check_stats(stats, truth, same)
    got = row_softmax_backward(logits, labels, stats.lse, grad_logps, PLAIN)
    assert_as_good_as_torch(got, same_grad, grad, EPS)


@pytest.mark.parametrize("config, splits", [(RowConfig(4, 64, 1, 1), 1), (RowConfig(1, 32, 2, 1), 2)])
@pytest.mark.parametrize("strides", [(2**30, 1), (1, 2**27)], ids=["rows", "columns"])
def test_offsets_past_two_to_the_31(strides, config, splits, monkeypatch, tmp_path):
    monkeypatch.undo()  # poisoning would touch all of it
    force(monkeypatch, config, splits)
    logits, labels, _, grad_logps, _ = make(4, 40, torch.float16)
    far = far_apart(logits, strides, tmp_path)
    logits = logits if strides[1] == 1 else logits.t().contiguous().t()  # the order of sums is that of the loads
    stats, expected = (row_softmax_forward(x, labels, PLAIN, **WANT) for x in (far, logits))
    assert all(torch.equal(a, b) for a, b in zip(stats, expected))
    got, expected = (row_softmax_backward(x, labels, stats.lse, grad_logps, PLAIN, out=x) for x in (far, logits))
    assert torch.equal(got, expected)


STRIDES = """
import sys
from dataclasses import replace
import torch, triton
from prefkern.kernels import aot, fused_logits, row_softmax
from prefkern.kernels.tuning import ARCHS
compiled = []
triton.compile = lambda *args, original=triton.compile, **kw: compiled.append(original(*args, **kw)) or compiled[-1]
for module in (row_softmax, fused_logits):
    for spec in module.specializations(ARCHS["sm_90"], torch.bfloat16):
        if not spec.name.endswith("full"):
            continue
        strides = {name: "i32" for name in spec.constexprs if name.startswith("stride_")}
        constants = {name: value for name, value in spec.constexprs.items() if name not in strides}
        spec = replace(spec, signature=spec.signature | strides, constexprs=constants | {"WIDTH": 1})
        aot.compile_for(spec, ARCHS["sm_90"])
        print("kernel", spec.name)
        print(compiled[-1].asm["ttir"])
"""


def test_strides_are_widened_before_they_are_multiplied():
    """In the compiler's own representation: whatever a stride is multiplied with, the product has 64 bits."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", STRIDES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = done.stdout.split("kernel ")[1:]
    assert len(kernels) == 3
    for kernel in kernels:
        name, *lines = kernel.splitlines()
        uses = [line for line in lines if "%stride_" in line and "tt.func" not in line]
        widened = [re.search(r"arith.extsi %(stride_\w+) : i32 to i64", line) for line in uses]
        assert all(widened), uses
        expected = {"stride_ln", "stride_lv"} | ({"stride_on", "stride_ov"} if "backward" in name else set())
        assert {match[1] for match in widened} == expected


@pytest.mark.parametrize("splits", [1, 4])
def test_a_peaked_softmax_over_129_920(splits, monkeypatch):
    """V is no multiple of a tile: nothing of the last one may leak into the sums, however small they are."""
    force(monkeypatch, RowConfig(1, 8192, 256, 8), splits)
    logits, labels, _, grad_logps, grad_entropy = make(5, 129_920)
    logits[0, -1], logits[3, 5] = 80.0, 1e4
    labels[3] = 5
    grads = grad_logps, grad_entropy
    (truth, truth_grad), (same, same_grad) = truth_and_torch(logits, labels, PLAIN, grads=grads)
    stats = row_softmax_forward(logits, labels, PLAIN, **WANT)
    check_stats(stats, truth, same)
    assert stats.logps[0] == stats.logps[3] == 0 and stats.is_top1[[0, 3]].all()
    got = row_softmax_backward(
        logits, labels, stats.lse, grad_logps, PLAIN, entropy_N=stats.entropy, grad_entropy_N=grad_entropy
    )
    assert_as_good_as_torch(got, same_grad, truth_grad, EPS)


def test_fp16_logits_that_overflowed_give_nan_in_their_rows_alone():
    """As torch has it: a loss scaler looks for just that. The largest finite logits are harmless."""
    logits, labels, _, grad_logps, _ = make(9, 1031, torch.float16)
    logits[4, 700], logits[5, 3], logits[6, 9] = torch.inf, -torch.inf, torch.finfo(torch.float16).max
    (truth, truth_grad), (same, same_grad) = truth_and_torch(logits, labels, PLAIN, grads=(grad_logps, None))
    stats = row_softmax_forward(logits, labels, PLAIN)
    assert_as_good_as_torch(stats.logps, same.logps, truth.logps, EPS)
    assert stats.logps.isnan().tolist() == [n == 4 for n in range(9)] and stats.lse.isfinite().sum() == 8
    got = row_softmax_backward(logits, labels, stats.lse, grad_logps, PLAIN)
    others = [n for n in range(9) if n != 4]
    assert got[4].isnan().all()
    assert_as_good_as_torch(got[others], same_grad[others], truth_grad[others], EPS)


class Recorder(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class NeverLaunched:
    """Stands for a kernel."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def test_launchers_leave_nothing_to_wait_for(monkeypatch):
    """Around the kernels there are allocations, copies on the device and one zeroing: no value goes to the host."""
    monkeypatch.undo()  # poisoning is an operation too
    force(monkeypatch, ONE_ROW, splits=3)
    logits, labels, bias, grad_logps, grad_entropy = make(6, 300, torch.float16)
    bias, scale = bias.repeat_interleave(2)[::2], torch.tensor(0.5, device=DEVICE)
    for name in ("row_softmax_forward_kernel", "row_softmax_backward_kernel"):
        monkeypatch.setattr(row_softmax, name, NeverLaunched())
    with Recorder() as recorder:
        stats = row_softmax_forward(logits, labels, PLAIN, bias_V=bias, **WANT)
        upstream = dict(entropy_N=stats.entropy, grad_entropy_N=grad_entropy, grad_scale=scale)
        row_softmax_backward(logits, labels, stats.lse, grad_logps, PLAIN, **upstream)
    assert recorder.names == {"empty", "zeros", "split_with_sizes", "clone"}


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("N", [4, 5000], ids=["split", "whole"])
def test_a_captured_graph_gives_the_same_bits_on_other_logits(N):
    logits, labels, _, grad_logps, _ = make(N, 33_000, torch.bfloat16)
    static = torch.empty_like(logits)

    def both():
        stats = row_softmax_forward(static, labels, PLAIN, **WANT)
        return stats, row_softmax_backward(static, labels, stats.lse, grad_logps, PLAIN)

    static.copy_(logits)
    stats, grad = both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured_stats, captured_grad = both()
    for _ in range(3):  # the counters have to be zero again every time
        static.fill_(0)
        graph.replay()
        static.copy_(logits)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured_stats, stats)) and torch.equal(captured_grad, grad)


@pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU can be waited for")
def test_nothing_waits_for_the_gpu():
    logits, labels, _, grad_logps, _ = make(64, 33_000, torch.bfloat16)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats = row_softmax_forward(logits, labels, PLAIN, **WANT)
        row_softmax_backward(logits, labels, stats.lse, grad_logps, PLAIN, out=logits)
    finally:
        torch.cuda.set_sync_debug_mode(before)
