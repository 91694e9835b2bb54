"""Where a head breaks first: every body from hidden states, at the ends of shapes, numbers, strides and autograd."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")
import prefkern as pk
from conftest import DEVICE
from numerics import VIEWS, assert_as_good_as_torch, far_apart
from prefkern import rows as torch_rows
from prefkern.kernels import lm_head, row_softmax, row_softmax_cpu
from prefkern.kernels.tuning import HeadConfig, RowConfig

EPS = 1e-6  # fp32 sums in another order than torch's
BODIES = ("eager", "chunked", "compiled rows", "triton rows", "cut")
WORKSPACE = 2000  # bytes: several tiles even of a few logits


@pytest.fixture(params=BODIES)
def body(request, monkeypatch):
    """Name of a body; its `impl` as token_logps knows it is `IMPL[body]`."""
    return use(request.param, monkeypatch)


@pytest.fixture(params=[name for name in BODIES if name != "eager"])
def kernel_body(request, monkeypatch):
    """A body that has its own backward."""
    return use(request.param, monkeypatch)


IMPL = dict(zip(BODIES, ("eager", "chunked", "chunked", "chunked", "cut")))


def use(name: str, monkeypatch) -> str:
    if name == "triton rows":
        monkeypatch.setattr(torch_rows, "implementation", lambda device, dtype: row_softmax)
    elif name == "compiled rows":
        monkeypatch.setattr(torch_rows, "implementation", lambda device, dtype: row_softmax_cpu)
    elif name == "chunked":  # also on a GPU, and with compiled row functions there
        monkeypatch.setattr(torch_rows, "implementation", lambda device, dtype: torch_rows)
    elif name == "cut" and DEVICE == "cpu":
        tile = HeadConfig(32, 64, 32, num_warps=1, num_stages=1)
        monkeypatch.setattr(lm_head, "head_config", lambda *_, **__: tile)
    return name


def make(n=9, d=16, v=40, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g) * 2 / d**0.5
    labels = torch.randint(0, v, (n,), generator=g)
    labels[-1:] = v - 1
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), labels.to(DEVICE)


def run(body: str, hidden: Tensor, weight: Tensor, labels: Tensor, needs="hw", bias=None, entropy=True, **options):
    """logps, entropy and the gradients of what is needed, for upstream gradients that differ from row to row."""
    leaves = {"h": hidden, "w": weight, "b": bias}
    leaves = {k: t if t is None else t.detach().requires_grad_(k in needs) for k, t in leaves.items()}
    options = {"workspace_bytes": WORKSPACE} | options
    out = pk.token_logps(
        leaves["h"], leaves["w"], labels, leaves["b"], outputs=("entropy",), impl=IMPL.get(body, body), **options
    )
    found = {"logps": out.logps.detach(), "entropy": out.entropy.detach()}
    inputs = {k: leaves[k] for k in needs if leaves[k] is not None}
    if inputs:
        g = torch.linspace(-1, 1.3, labels.numel(), device=DEVICE)
        loss = (out.logps * g).sum() + ((out.entropy * g.flip(0)).sum() if entropy else 0)
        found |= {f"d{k}": t for k, t in zip(inputs, torch.autograd.grad(loss, list(inputs.values())))}
    return found


def double(*tensors):
    return [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors]


def compare(body: str, *tensors, eps=EPS, **options):
    wide = {k: double(t)[0] for k, t in options.items()}
    truth, same = run("eager", *double(*tensors), **wide), run("eager", *tensors, **options)
    got = run(body, *tensors, **options)
    for name in truth:
        assert_as_good_as_torch(got[name], same[name], truth[name], eps)
    return got


# --- sizes ----------------------------------------------------------------------------------------------------------


SHAPES = [(0, 8, 5), (1, 1, 1), (4, 1, 67), (5, 13, 1), (3, 37, 131), (33, 50, 97)]


@pytest.mark.parametrize("n, d, v", SHAPES)
def test_sizes_that_no_block_divides(body, n, d, v):
    compare(body, *make(n, d, v), bias=torch.linspace(-1, 1, v, device=DEVICE), needs="hwb")


@pytest.mark.parametrize("needs", ["", "h", "hw"])
@pytest.mark.parametrize("name", ["eager", "chunked"])
def test_more_rows_than_65536(name, needs, monkeypatch):
    """Of the other two bodies the kernels have a test of their own: it takes the interpreter's programs one by one."""
    use(name, monkeypatch)
    compare(name, *make(65_536 + 77, 1, 5), needs=needs, workspace_bytes=100_000)


@pytest.mark.parametrize("needs", ["h", "hw"])
@pytest.mark.parametrize("name", ["eager", "chunked", "triton rows"])
def test_a_peaked_softmax_over_129920_entries(name, needs, monkeypatch):
    """The label holds all but 1e-6 of the probability; what is left of 1 - p rests on the fp32 log-sum-exp."""
    use(name, monkeypatch)
    if DEVICE == "cpu":  # rows so few and long take the interpreter its time in tiles that are meant for many
        monkeypatch.setattr(row_softmax, "row_config", lambda *_, **__: RowConfig(4, 8192, lanes=1, num_warps=1))
    v = 129_920
    hidden, weight, labels = make(3, 16, v)
    labels[:] = torch.tensor([v - 1, 77_777, 3])
    weight[labels] += 2 * hidden
    truth = run("eager", *double(hidden, weight, labels), needs=needs)
    assert truth["logps"].max() > -1e-6 and truth["logps"].min() > -1e-2
    given = hidden, weight, labels
    half_ulp = 2.0**-19  # of a log-sum-exp below 64, relative to p
    largest = {"dh": weight.abs().max(), "dw": hidden.abs().max()}
    for entropy in (False, True):
        truth, same, got = (
            run(how, *tensors, needs=needs, entropy=entropy, workspace_bytes=300_000)
            for how, tensors in (("eager", double(*given)), ("eager", given), (name, given))
        )
        for key in truth:
            lost = 3 * half_ulp * largest[key] / truth[key].abs().max() if key in largest else 0.0
            assert_as_good_as_torch(got[key], same[key], truth[key], EPS + float(lost))


@pytest.mark.parametrize("which", ["hidden", "weight"])
@pytest.mark.parametrize("name", ["eager", "chunked", "triton rows"])
def test_offsets_past_2_to_the_31(name, which, monkeypatch, tmp_path):
    """Of the cut body, whose interpreter copies storages, the kernels have a test of their own."""
    use(name, monkeypatch)
    hidden, weight, labels = make(4, 16, 4, torch.float16)
    far = far_apart(hidden if which == "hidden" else weight, (1 << 30, 1), tmp_path)
    moved = (far, weight) if which == "hidden" else (hidden, far)
    near = hidden, weight, labels
    truth, same, got = run("eager", *double(*near)), run("eager", *near), run(name, *moved, labels)
    for key in truth:
        assert_as_good_as_torch(got[key], same[key], truth[key], EPS)


@pytest.mark.slow
@pytest.mark.parametrize("needs", ["", "h"])
def test_more_than_2_to_the_31_logits_through_tiles(needs, monkeypatch):
    use("chunked", monkeypatch)
    n, v = 66_000, 33_000
    hidden, weight, labels = make(n, 1, v)
    got = run("chunked", hidden, weight, labels, needs=needs, entropy=False, workspace_bytes=None)
    rows = torch.tensor([0, n // 2, 65_535, 65_536, n - 1], device=DEVICE)
    some = [hidden[rows].double(), weight.double(), labels[rows]]
    truth = run("eager", *some, needs="")
    same = run("eager", *(t.float() if t.is_floating_point() else t for t in some), needs="")
    for key in truth:
        assert_as_good_as_torch(got[key][rows], same[key], truth[key], EPS)
    if needs:
        p = (some[0] @ some[1].t()).softmax(1)
        unit = some[1][labels[rows]] - p @ some[1]
        g = torch.linspace(-1, 1.3, n, device=DEVICE)[rows].double()
        torch.testing.assert_close(got["dh"][rows].double(), g[:, None] * unit, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chunked"])
def test_a_weight_of_more_than_2_to_the_31_elements(name, monkeypatch):
    """Zeros but for the last rows: their pages are all one."""
    use(name, monkeypatch)
    d, v, last = 64, (1 << 25) + 1000, 40
    hidden, rows, labels = make(2, d, last)
    weight = torch.zeros(v, d, device=DEVICE)
    weight[-last:] = rows
    assert weight.numel() > 1 << 31
    got = run(name, hidden, weight, labels + v - last, needs="h", entropy=False, workspace_bytes=None)
    z = hidden.double() @ rows.double().t()
    top = z.amax(1, keepdim=True).clamp(min=0)
    total = (z - top).exp().sum(1, keepdim=True) + (v - last) * (-top).exp()
    p = (z - top).exp() / total
    logps = torch.log(p.gather(1, labels[:, None]))[:, 0]
    torch.testing.assert_close(got["logps"].double(), logps, rtol=1e-6, atol=1e-5)
    g = torch.linspace(-1, 1.3, 2, device=DEVICE).double()
    dh = g[:, None] * (rows[labels].double() - p @ rows.double())
    torch.testing.assert_close(got["dh"].double(), dh, rtol=1e-5, atol=1e-6)


# --- strides ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["hidden", "weight"])
@pytest.mark.parametrize("view", VIEWS)
def test_strides(body, view, which):
    hidden, weight, labels = make()
    hidden, weight = (VIEWS[view](hidden), weight) if which == "hidden" else (hidden, VIEWS[view](weight))
    for needs in ("h", "hw"):
        compare(body, hidden, weight, labels, needs=needs)


@pytest.mark.parametrize("part", [(slice(4, 44), slice(None)), (slice(None), slice(5, 21))], ids=["rows", "columns"])
def test_a_weight_that_is_a_view_gives_its_base_the_gradient(body, part):
    hidden, weight, labels = make()
    base = torch.zeros(48 if part[0].start else 40, 30 if part[1].start else 16, device=DEVICE)
    base[part] = weight
    base.requires_grad_()
    pk.token_logps(hidden, base[part], labels, impl=IMPL[body], workspace_bytes=WORKSPACE).logps.sum().backward()
    leaf = weight.clone().requires_grad_()
    pk.token_logps(hidden, leaf, labels, impl="eager").logps.sum().backward()
    torch.testing.assert_close(base.grad[part], leaf.grad)
    base.grad[part] = 0
    assert not base.grad.any()


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_logits_beyond_float16_are_right_or_nan(body):
    """Where torch's logits are infinite those of a library product are too: NaN, not a number that looks like one."""
    hidden, weight, labels = make(4, 64, 37, torch.float16)
    hidden[1:], weight = hidden[1:] * 300, weight * 1000
    labels[0] = 5
    raw = hidden.double() @ weight.double().t()
    beyond = raw.amax(1) > 65_520
    assert beyond.tolist() == [False, True, True, True] and raw[0].abs().max() < 65_504
    for needs in ("h", "hw"):
        options = {"needs": needs, "logit_scale": 1e-3, "entropy": False}
        got = run(body, hidden, weight, labels, **options)
        truth = run("eager", *double(hidden, weight, labels), **options)
        if body == "cut":
            for key in truth:
                torch.testing.assert_close(got[key].double(), truth[key], rtol=2e-3, atol=2e-3 * truth[key].abs().max())
            continue
        assert got["logps"].isnan().tolist() == got["dh"].isnan().all(1).tolist() == beyond.tolist()
        torch.testing.assert_close(got["logps"][0].double(), truth["logps"][0], rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("needs", ["h", pytest.param("hw", marks=pytest.mark.slow), "hwb"])
def test_a_masked_vocabulary(body, needs):
    """-inf through the bias: a whole tile of entries, single ones, and at last the label's own."""
    hidden, weight, labels = make(9, 16, 300)
    bias = torch.zeros(300, device=DEVICE)
    bias[:130] = bias[200::7] = -torch.inf
    labels[:] = torch.arange(131, 140, device=DEVICE)
    for excluded_label in (False, True):
        if excluded_label:
            bias[labels[2]] = -torch.inf
        finite = bias.clamp(min=-1e30)  # autograd of an entropy with -inf is NaN in plain torch: the limit instead
        for entropy in (False, True):
            got = run(body, hidden, weight, labels, bias=bias, needs=needs, entropy=entropy)
            truth = run("eager", *double(hidden, weight, labels), bias=finite.double(), needs=needs, entropy=entropy)
            same = run("eager", hidden, weight, labels, bias=finite, needs=needs, entropy=entropy)
            if excluded_label:
                assert got["logps"][2] == -torch.inf
                for found in (got, truth, same):
                    found["logps"][2] = 0
            if body == "eager" and entropy:
                got = {k: t for k, t in got.items() if t.isfinite().all()}
                assert {"logps", "entropy"} <= got.keys()
            for key in got:
                assert_as_good_as_torch(got[key], same[key], truth[key], EPS)
            if "dw" in got:
                assert not got["dw"][bias.isneginf() & (torch.arange(300, device=DEVICE) != labels[2])].any()


def test_a_row_whose_every_logit_is_excluded_is_nan(body):
    hidden, weight, labels = make()
    got = run(body, hidden, weight, labels, bias=torch.full((40,), -torch.inf, device=DEVICE), needs="")
    assert got["logps"].isnan().all()


# --- autograd ---------------------------------------------------------------------------------------------------------


def gradients(body: str, loss_of, *leaves: Tensor) -> list[Tensor]:
    """Gradients of loss_of(f), where f(hidden, weight, labels) are a body's log-probabilities."""

    def logps(hidden, weight, labels):
        return pk.token_logps(hidden, weight, labels, impl=IMPL[body], workspace_bytes=WORKSPACE).logps

    return list(torch.autograd.grad(loss_of(logps), leaves))


def same_as_eager(body: str, loss_of, *leaves: Tensor) -> None:
    for got, want in zip(gradients(body, loss_of, *leaves), gradients("eager", loss_of, *leaves)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_autocast(body, trained):
    """In its dtype, as F.linear's product; the gradients come back in the parameters'."""
    hidden, weight, labels = make()
    hidden.requires_grad_(), weight.requires_grad_(trained)
    with torch.autocast(DEVICE, torch.float16):
        out = pk.token_logps(hidden, weight, labels, impl=IMPL[body], workspace_bytes=WORKSPACE)
    needs = "hw" if trained else "h"
    got = [out.logps, *torch.autograd.grad(out.logps.sum(), (hidden, weight)[: len(needs)])]
    assert {t.dtype for t in got} == {torch.float32}
    low = [t.detach().half() for t in (hidden, weight)]
    truth, same = (_sum_of_logps(*tensors, labels, needs) for tensors in (double(*low), low))
    for mine, fp, true in zip(got, same, truth):
        assert_as_good_as_torch(mine, fp, true, EPS)


def _sum_of_logps(hidden: Tensor, weight: Tensor, labels: Tensor, needs: str) -> list[Tensor]:
    """Log-probabilities in plain torch, and the gradients of their sum."""
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    logps = pk.token_logps(*leaves, labels, impl="eager").logps
    return [logps.detach(), *torch.autograd.grad(logps.sum(), leaves[: len(needs)])]


def test_a_weight_that_is_computed(body):
    hidden, weight, labels = make()
    scale = torch.ones(40, 1, device=DEVICE).requires_grad_()
    weight.requires_grad_()
    same_as_eager(body, lambda f: f(hidden, weight * scale, labels).sum(), weight, scale)


def test_a_weight_shared_with_the_embedding(body):
    """Its gradient is the sum of both uses."""
    _, weight, labels = make()
    weight.requires_grad_()
    tokens = labels.roll(1)

    def loss_of(f):
        return f(nn.functional.embedding(tokens, weight).tanh(), weight, labels).sum()

    same_as_eager(body, loss_of, weight)


def test_two_losses_on_one_hidden(body):
    hidden, weight, labels = make()
    hidden.requires_grad_(), weight.requires_grad_()

    def loss_of(f):
        return f(hidden, weight, labels).sum() - 2 * f(hidden, weight, labels.roll(1)).exp().sum()

    same_as_eager(body, loss_of, hidden, weight)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_retain_graph(body, trained):
    hidden, weight, labels = make()
    hidden.requires_grad_(), weight.requires_grad_(trained)
    leaves = (hidden, weight) if trained else (hidden,)
    loss = pk.token_logps(hidden, weight, labels, impl=IMPL[body], workspace_bytes=WORKSPACE).logps.exp().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, leaves)))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_many_upstream_gradients_at_once(body):
    """autograd.grad(is_grads_batched=True), as torch.autograd.functional.jacobian asks: of a frozen head."""
    hidden, weight, labels = make()
    hidden.requires_grad_()
    logps = pk.token_logps(hidden, weight, labels, impl=IMPL[body], workspace_bytes=WORKSPACE).logps
    upstream = torch.randn(3, len(labels), generator=torch.Generator().manual_seed(0)).to(hidden.device)
    if body == "cut":
        pytest.skip("backward launches kernels, which take one gradient")
    one_by_one = [torch.autograd.grad(logps, hidden, g, retain_graph=True)[0] for g in upstream]
    (at_once,) = torch.autograd.grad(logps, hidden, upstream, is_grads_batched=True)
    torch.testing.assert_close(at_once, torch.stack(one_by_one), rtol=1e-6, atol=0)


@pytest.mark.parametrize("needs", ["h", "w", "hw"])
def test_double_backward_is_refused(kernel_body, needs):
    hidden, weight, labels = make()
    leaves = [t.requires_grad_() for k, t in (("h", hidden), ("w", weight)) if k in needs]
    out = pk.token_logps(hidden, weight, labels, impl=IMPL[kernel_body], outputs=("entropy",))
    grads = torch.autograd.grad((out.logps * out.entropy).sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="use impl='eager'"):
        sum(g.square().sum() for g in grads).backward()


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_checkpointing_around_us(body, trained, use_reentrant):
    hidden, weight, labels = make()
    hidden.requires_grad_(), weight.requires_grad_(trained)
    leaves = (hidden, weight) if trained else (hidden,)

    def wrapped(f):
        return checkpoint(lambda h, w: f(h * 2, w, labels), hidden, weight, use_reentrant=use_reentrant)

    losses = [wrapped, lambda f: f(hidden * 2, weight, labels)]
    grads = []
    for of in losses:
        for t in leaves:
            t.grad = None
        of(lambda *t: pk.token_logps(*t, impl=IMPL[body], workspace_bytes=WORKSPACE).logps).sum().backward()
        grads.append([t.grad for t in leaves])
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_torch_func_is_right_or_refused(body, transform):
    """Never a number that is not autograd's."""
    hidden, weight, labels = make()

    def f(x: Tensor, y: Tensor = labels) -> Tensor:
        return pk.token_logps(x, weight, y, impl=IMPL[body]).logps

    want = f(hidden)
    try:
        if transform == "grad":
            got = torch.func.grad(lambda x: f(x).sum())(hidden)
            x = hidden.clone().requires_grad_()
            (want,) = torch.autograd.grad(pk.token_logps(x, weight, labels, impl="eager").logps.sum(), x)
        elif transform == "vmap":
            got = torch.func.vmap(lambda x, y: f(x[None], y[None])[0])(hidden, labels)
        else:
            _, got = torch.func.jvp(f, (hidden,), (hidden,))
            eager = lambda x: pk.token_logps(x, weight, labels, impl="eager").logps  # noqa: E731
            _, want = torch.func.jvp(eager, (hidden,), (hidden,))
    except (RuntimeError, NotImplementedError) as error:
        assert body != "eager" or transform == "vmap", error
        assert any(word in str(error) for word in ("functorch", "vmap", "forward", "jvp")), error
    else:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has no streams")
def test_a_side_stream(body):
    """Inputs made and results used on another stream than the default one."""
    hidden, weight, labels = make(257, 64, 1031)
    want = run(body, hidden, weight, labels)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)  # what does not wait for this stream reads zeros
        late = [torch.zeros_like(t).copy_(t) for t in (hidden, weight)]
        got = run(body, *late, labels)
    side.synchronize()
    assert all(torch.equal(got[key], want[key]) for key in want)
