"""How many Triton kernels a step launches, by name: stated as a formula of chunks and slices, and counted."""

import math
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")
import prefkern as pk
from conftest import DEVICE
from prefkern import planner, preference_tail
from prefkern import rows as torch_rows
from prefkern.head import Head
from prefkern.kernels import lm_head, row_softmax
from prefkern.kernels.tuning import arch_of, head_config, slice_width
from prefkern.token_logps import OUTPUTS

LENGTHS = [5, 9, 12, 3, 20, 15]  # chosen, rejected, ... of three pairs
N, D, V = sum(LENGTHS), 32, 700
FORWARD, BACKWARD = "row_softmax_forward_kernel", "row_softmax_backward_kernel"


@pytest.fixture
def launches(monkeypatch):
    """Counter of the kernels launched since it was last cleared."""
    found = Counter()
    kind = type(row_softmax.row_softmax_forward_kernel)  # compiled or interpreted
    run = kind.run

    def counted(kernel, *args, **kwargs):
        found[kernel.fn.__name__] += 1
        return run(kernel, *args, **kwargs)

    monkeypatch.setattr(kind, "run", counted)
    return found


@pytest.fixture
def triton_rows(monkeypatch):
    """The chunked body with the row kernels it has on a GPU."""
    monkeypatch.setattr(torch_rows, "implementation", lambda device, dtype: row_softmax)


def step(launches: Counter, forward, *inputs: torch.Tensor) -> tuple[Counter, Counter]:
    """Launches of forward and of backward."""
    launches.clear()
    loss = forward()
    first = Counter(launches)
    launches.clear()
    if any(t.requires_grad for t in inputs):
        loss.backward()
    return first, Counter(launches)


def problem(train_hidden: bool = True, train_head: bool = False, **like):
    torch.manual_seed(0)
    hidden = torch.randn(N, D, device=DEVICE, **like).requires_grad_(train_hidden)
    weight = (torch.randn(V, D, device=DEVICE, **like) / D**0.5).requires_grad_(train_head)
    labels = torch.randint(0, V, (N,), device=DEVICE)
    return hidden, weight, labels


def pairs():
    return pk.Layout.pairs(LENGTHS[0::2], LENGTHS[1::2])


def from_logits(loss: pk.losses.Loss, outputs: tuple[str, ...], seed: int = 0):
    """Logits, and a function from an impl to the output of a loss that may write over a copy of them."""
    torch.manual_seed(seed)
    ref = torch.full((N,), -6.0, device=DEVICE) if loss.needs_reference else None
    logits = torch.randn(N, V, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, V, (N,), device=DEVICE)
    labels[2] = -100

    def call(impl: str) -> pk.PreferenceOutput:
        return pk.logits_preference_loss(logits * 1.0, labels, pairs(), loss, ref, outputs=outputs, impl=impl)

    return logits, call


@pytest.mark.parametrize("outputs", [(), OUTPUTS], ids=["bare", "every output"])
@pytest.mark.parametrize(
    "name, options",
    [
        ("dpo", {}),
        ("simpo", {}),
        ("autoregressive_dpo", {"granularity": pk.Static(4)}),
        ("autoregressive_dpo", {"granularity": pk.Static(4), "accumulate": "prefix"}),
    ],
    ids=["dpo", "simpo", "segments", "prefixes"],
)
def test_from_logits_one_launch_each_way(name, options, outputs, launches):
    logits, call = from_logits(pk.losses.get(name, **options), outputs)
    counted = step(launches, lambda: call("triton").loss, logits)
    assert counted == ({"fused_logits_forward_kernel": 1}, {BACKWARD: 1})

    (got, got_grad), (want, want_grad) = (
        (out, torch.autograd.grad(out.loss, logits)[0]) for out in map(call, ("triton", "eager"))
    )
    torch.testing.assert_close((got.loss, got.metrics, got_grad), (want.loss, want.metrics, want_grad))


@pytest.mark.parametrize(
    "name, options, tails",
    [
        ("dpo", {"wpo": True}, 1),  # weighs pairs by what their rows' statistics say
        ("dpo", {"nll_weight": 0.1}, 2),  # has two addends
    ],
    ids=["weights from the rows", "two addends"],
)
def test_from_logits_the_rows_first_where_the_tail_needs_them(name, options, tails, launches):
    logits, call = from_logits(pk.losses.get(name, **options), ("entropy",))
    expected = {FORWARD: 1, "tail_kernel": tails}, {BACKWARD: 1}
    assert step(launches, lambda: call("triton").loss, logits) == expected


def test_the_tail_is_one_launch(launches):
    logps = (-5 * torch.rand(N, device=DEVICE)).requires_grad_()

    def forward():
        return pk.preference_loss(logps, pairs(), pk.losses.DPO(), torch.zeros_like(logps), impl="triton").loss

    assert step(launches, forward, logps) == ({"tail_kernel": 1}, {})


@pytest.mark.parametrize("slices", [1, 3])
def test_cut_body(slices, launches):
    """Forward: logits and their parts' sums, the parts together, the tail. Backward: one launch a slice."""
    hidden, weight, labels = problem(train_head=True)
    config = head_config(N, hidden.dtype, arch_of(hidden.device), bare=True, bulk_copies=True, gradient=True)
    tiles = math.ceil(V / config.block_v)
    workspace = N * config.block_v * hidden.itemsize * math.ceil(tiles / slices)
    assert math.ceil(V / slice_width(N, V, config, hidden.itemsize, workspace)) == min(slices, tiles)

    def forward():
        out = pk.linear_preference_loss(
            hidden, weight, labels, pairs(), pk.losses.DPO(), torch.zeros(N, device=DEVICE), impl="cut",
            workspace_bytes=workspace,
        )  # fmt: skip
        return out.loss

    expected = {"lm_head_forward_kernel": 1, "lm_head_combine_kernel": 1, "tail_kernel": 1}
    assert step(launches, forward, hidden) == (expected, {"lm_head_dlogits_kernel": min(slices, tiles)})


@pytest.mark.parametrize("train_head", [False, True])
def test_cut_body_with_a_filter(train_head, launches):
    """A slice's products skip tiles, so they are kernels, too: one for each gradient that is needed."""
    hidden, weight, labels = problem(train_hidden=False)
    stats = lm_head.lm_head_forward(hidden, weight, labels, Head())
    launches.clear()
    lm_head.lm_head_backward(
        hidden, weight, labels, stats.lse, torch.ones(N, device=DEVICE), Head(), needs_hidden=True,
        needs_weight=train_head, needs_bias=False, workspace_bytes=1 << 30, filter_eps=1e-4,
    )  # fmt: skip
    assert launches == {"lm_head_dlogits_kernel": 1, "sparse_product_kernel": 1 + train_head}


def chunks(hidden: torch.Tensor, grad_hidden: bool, grad_head: bool, workspace: int) -> tuple[int, int]:
    """Chunks of rows in forward; tiles of the walk over the vocabulary, whether logits were kept or not."""
    plan = planner.plan(
        (N, D, V), hidden.dtype, hidden.device, grad_hidden=grad_hidden, grad_head=grad_head, workspace_bytes=workspace
    )
    height, width = plan.slab
    return math.ceil(N / plan.rows_per_chunk), math.ceil(N / height) * math.ceil(V / width)


@pytest.mark.parametrize("rows_at_once", [N, 16, 5])
@pytest.mark.parametrize("train_hidden, train_head", [(False, False), (True, False), (True, True)])
def test_chunked_body(train_hidden, train_head, rows_at_once, launches, triton_rows):
    """A forward launch a chunk; a frozen head's gradient with it, a trained one's by slices of the vocabulary."""
    workspace = rows_at_once * V * 4
    hidden, weight, labels = problem(train_hidden, train_head)
    count, slices = chunks(hidden, train_hidden, train_head, workspace)
    assert (count > 1) == (rows_at_once < N)

    def forward():
        return pk.token_logps(hidden, weight, labels, workspace_bytes=workspace).logps.sum()

    frozen = train_hidden and not train_head
    expected = Counter({FORWARD: count, BACKWARD: count if frozen else 0})
    assert step(launches, forward, hidden, weight) == (+expected, {BACKWARD: slices} if train_head else {})


@pytest.mark.parametrize("train_weight, rows_at_once, count", [(True, N, 1), (False, N, 1), (False, 40, 2)])
def test_a_loss_local_to_groups(train_weight, rows_at_once, count, launches, triton_rows, monkeypatch):
    """A chunk of whole pairs is read, differentiated and its loss made in one launch each; once more for the value."""
    monkeypatch.setattr(preference_tail, "uses_triton", lambda device, dtype: True)
    hidden, weight, labels = problem(train_head=train_weight)
    bias = torch.zeros(V, device=DEVICE, requires_grad=True)

    def forward():
        out = pk.linear_preference_loss(
            hidden, weight, labels, pairs(), pk.losses.DPO(), torch.zeros(N, device=DEVICE), bias=bias,
            workspace_bytes=rows_at_once * V * 4,
        )  # fmt: skip
        return out.loss

    expected = {FORWARD: count, BACKWARD: count, "tail_kernel": count + 1}
    assert step(launches, forward, hidden) == (expected, {})
