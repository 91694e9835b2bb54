"""torch.compile of a model and a loss in one graph, whose lengths are no constants; the operators that make it so."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

import prefkern as pk
from conftest import DEVICE
from prefkern import checks, operators, preference

D, V = 8, 37
DPO = pk.losses.get("dpo", beta=0.3)
LOSSES = [
    DPO,
    pk.losses.get("autoregressive_dpo", granularity=pk.Adaptive(3)),
    pk.losses.get("autoregressive_dpo", granularity=pk.Static(2), accumulate="prefix"),
    pk.losses.get("dpo", nll_weight=0.5, wpo=True),
    pk.losses.get("anchored_listwise"),
    pk.losses.get("kto"),
    pk.losses.get("combination", parts=[(1.0, pk.losses.get("dpo")), (0.5, pk.losses.get("nll"))]),
]
ALL = [loss for name in pk.losses.names() for loss in checks.instances(name)]


def named(x) -> str:
    return x.name if isinstance(x, pk.losses.Loss) else str(x)


class Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self, backend: str = "aot_eager"):
        self.backend, self.graphs = backend, 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)


class Model(torch.nn.Module):
    """Two layers and a head; calls itself with what a loss over its hidden states needs."""

    def __init__(self, frozen: bool = False, bias: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.Tanh())
        self.head = torch.nn.Linear(D, V, bias=bias)
        self.head.requires_grad_(not frozen)
        self.to(DEVICE)

    def forward(self, x, labels, layout, loss, **options):
        return pk.linear_preference_loss(self.body(x), self.head.weight, labels, layout, loss, **options)


def batch(loss, size: int) -> tuple[Tensor, Tensor, pk.Layout, dict]:
    """States, labels, layout and what else the loss wants; `size` decides all lengths and the number of prompts."""
    generator = torch.Generator().manual_seed(size)
    layout = {
        "pair": lambda: pk.Layout.pairs([size + i for i in range(size)], [2 * size + 1] * size),
        "single": lambda: pk.Layout.sequences([size + i for i in range(2 * size)]),
        "list": lambda: pk.Layout.groups([size + i for i in range(2 * size + 1)], [2] * (size - 1) + [3]),
    }[loss.arity]()
    made = checks.example(loss, layout, torch.float32, seed=size)
    options = {"ref_logps": made.ref_logps, "targets": made.targets, "mismatched": made.mismatched}
    options = {name: t.to(DEVICE) for name, t in options.items() if t is not None}
    n = layout.num_tokens
    labels = torch.randint(V, (n,), generator=generator)
    labels[1] = -100
    return torch.randn(n, D, generator=generator).to(DEVICE), labels.to(DEVICE), layout, options


def results(call, module, *args, **options):
    """The output of a call and the gradients of the module's parameters."""
    out = call(*args, **options)
    parameters = [p for p in module.parameters() if p.requires_grad]
    return out, torch.autograd.grad(out.loss, parameters)


def assert_same(got, want) -> None:
    (got, got_grads), (want, want_grads) = got, want
    torch.testing.assert_close(got.loss, want.loss)
    assert got.loss.dtype == want.loss.dtype and list(got.metrics) == list(want.metrics)
    torch.testing.assert_close(got.metrics, want.metrics, check_dtype=False)
    torch.testing.assert_close(got.logps, want.logps)
    torch.testing.assert_close(got_grads, want_grads)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.fixture
def recompiles_raise():
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("loss", LOSSES, ids=named)
def test_a_model_and_a_loss_are_one_graph_for_all_lengths(loss, frozen):
    """Six batches of other lengths and other numbers of prompts: a graph of the first, and one for all."""
    model, counting = Model(frozen), Counting()
    compiled = torch.compile(model, fullgraph=True, backend=counting)
    for size in (2, 3, 4, 5, 7, 6):
        x, labels, layout, options = batch(loss, size)
        args = x, labels, layout, loss
        assert_same(results(compiled, model, *args, **options), results(model, model, *args, **options))
    assert counting.graphs <= 2


def test_dynamic_from_the_start_is_one_graph(recompiles_raise):
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (3, 2, 5, 4, 6):
        x, labels, layout, options = batch(DPO, size)
        assert_same(
            results(compiled, model, x, labels, layout, DPO, **options),
            results(model, model, x, labels, layout, DPO, **options),
        )


def test_another_loss_is_another_graph():
    """Its values are constants of the graph: a graph of one must not serve the other."""
    model, counting = Model(), Counting()
    compiled = torch.compile(model, fullgraph=True, backend=counting)
    x, labels, layout, options = batch(DPO, 3)
    other = pk.losses.get("dpo", beta=0.7)
    for loss in (DPO, other, copy.deepcopy(other), DPO):
        assert_same(
            results(compiled, model, x, labels, layout, loss, **options),
            results(model, model, x, labels, layout, loss, **options),
        )
    assert counting.graphs == 3


@pytest.mark.parametrize(
    "options",
    [
        {"normalizer": 7.0},
        {"normalizer": torch.tensor(7.0)},
        {"softcap": 5.0, "logit_scale": 0.5, "temperature": 2.0},
        {"outputs": ("entropy", "is_top1", "mean_logit", "lse", "log_collision")},
        {"token_weights": True},
        {"diagnostics": True},
        {"impl": "eager"},
        {"workspace_bytes": 1000},
    ],
    ids=lambda o: "-".join(o),
)
def test_options_survive(options):
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, labels, layout, given = batch(DPO, 3)
    if "token_weights" in options:
        options = {"token_weights": torch.rand(len(labels), device=DEVICE)}
    assert_same(
        results(compiled, model, x, labels, layout, DPO, **given, **options),
        results(model, model, x, labels, layout, DPO, **given, **options),
    )


def test_changing_normalizers_are_no_constants(recompiles_raise):
    """With gradient accumulation a step's count changes with every step."""
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (3, 4, 5, 6):
        x, labels, layout, options = batch(DPO, size)
        args, options = (x, labels, layout, DPO), {**options, "normalizer": torch.tensor(float(size))}
        assert_same(results(compiled, model, *args, **options), results(model, model, *args, **options))


def test_bias_adapter_and_reference_rows():
    model = Model(frozen=True, bias=True)
    torch.manual_seed(1)
    a, b = (torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in ((3, D), (V, 3)))
    model.register_parameter("a", a), model.register_parameter("b", b)
    x, labels, _, _ = batch(DPO, 3)

    def call(x, labels):
        out = pk.token_logps(
            model.body(x), model.head.weight, labels, model.head.bias, outputs=("entropy",),
            lora=pk.LoRA(a, b, 0.5), ref_hidden=x,
        )  # fmt: skip
        return (out.logps - out.ref_logps).square().sum() + out.entropy.sum()

    parameters = [p for p in model.parameters() if p.requires_grad]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, want = compiled(x, labels), call(x, labels)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters))


@pytest.mark.parametrize("where", ["here", "on a GPU"])
def test_logits(where, monkeypatch):
    """On a GPU the loss of logits is one launch, which a graph cannot hold: there it is two operators, too."""
    if where == "on a GPU":  # so far as tracing is concerned
        pytest.importorskip("triton")
        monkeypatch.setattr(preference, "uses_triton", lambda device, dtype: True)

    def call(x, labels, layout, ref_logps):
        logits = torch.nn.functional.linear(model.body(x), model.head.weight)
        return pk.logits_preference_loss(logits, labels, layout, DPO, ref_logps=ref_logps)

    model, counting = Model(), Counting()
    compiled = torch.compile(call, fullgraph=True, backend=counting)
    for size in (2, 3, 4, 5):
        x, labels, layout, options = batch(DPO, size)
        args = x, labels, layout, options["ref_logps"]
        assert_same(results(compiled, model, *args), results(call, model, *args))
    assert counting.graphs <= 2


def test_a_language_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(DEVICE)

    def call(tokens, positions, labels, layout, ref_logps):
        hidden = model.model(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state[0]
        return pk.linear_preference_loss(hidden, model.lm_head.weight, labels, layout, DPO, ref_logps=ref_logps)

    counting = Counting()
    compiled = torch.compile(call, fullgraph=True, backend=counting, dynamic=True)
    for size in (3, 4, 5):
        _, labels, layout, options = batch(DPO, size)
        tokens = torch.randint(V, (1, layout.num_tokens), device=DEVICE)
        positions = torch.cat([torch.arange(n) for n in layout.lengths])[None].to(DEVICE)
        args = tokens, positions, labels, layout, options["ref_logps"]
        assert_same(results(compiled, model, *args), results(call, model, *args))
    assert counting.graphs <= 2


@pytest.mark.slow
def test_inductor():
    """The default backend, which needs a C++ compiler on a CPU."""
    model = Model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for size in (3, 4, 5):
        x, labels, layout, options = batch(DPO, size)
        args = x, labels, layout, DPO
        assert_same(results(compiled, model, *args, **options), results(model, model, *args, **options))


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: repr(loss)[:60])
def test_the_operator_of_the_loss_is_the_loss(loss):
    """Value, metrics and gradients of every registered loss, and the names that tracing tells beforehand."""
    made = checks.example(loss, dtype=torch.float32)
    x = made.logps.clone().requires_grad_()
    want = pk.preference_loss(x, made.layout, loss, impl="eager", **made.options)
    facts = operators.facts(loss.key, False)
    assert facts.metrics == tuple(want.metrics)
    y = made.logps.clone().requires_grad_()
    value, metrics, *_ = operators.preference(
        y, made.layout.handle, loss.key, made.ref_logps, made.token_weights, None, made.targets, made.mismatched,
        [made.stats[name] for name in facts.row_outputs], made.token_kl, [], 64, False, "eager", len(facts.metrics),
        [True, False],
    )  # fmt: skip
    torch.testing.assert_close(value, want.loss, rtol=0, atol=0)
    torch.testing.assert_close(dict(zip(facts.metrics, metrics)), want.metrics, check_dtype=False, equal_nan=True)
    torch.testing.assert_close(torch.autograd.grad(value, y), torch.autograd.grad(want.loss, x), rtol=0, atol=0)


# --- the operators by themselves --------------------------------------------------------------------------------------


def head_inputs(*, bias=False, lora=False, ref=False, want="", train=(True, True), dtype=torch.float32, n=5, **options):
    """Arguments of prefkern::token_logps; `train`: whether hidden, and whether all of the head."""
    torch.manual_seed(0)

    def draw(*shape: int, grad: bool = False) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=DEVICE).requires_grad_(grad)

    rows, head = train
    tensors = [
        draw(n, D, grad=rows), draw(V, D, grad=head), draw(V, grad=head) if bias else None,
        draw(n, 3, grad=rows) if lora else None, draw(V, 3, grad=head) if lora else None,
    ]  # fmt: skip
    needs = [t is not None and t.requires_grad for t in tensors]
    labels = torch.randint(V, (n,), device=DEVICE)
    labels[:1] = -100
    scalars = {"softcap": None, "logit_scale": 1.0, "temperature": 1.0, "workspace_bytes": None, **options}
    return (
        *tensors, draw(n, D) if ref else None, labels, scalars["softcap"], scalars["logit_scale"],
        scalars["temperature"], -100, want, "auto", scalars["workspace_bytes"], None, needs,
    )  # fmt: skip


EVERY = "entropy,is_top1,mean_logit,lse,log_collision"
HEADS = [
    {},
    {"train": (True, False)},
    {"train": (False, True)},
    {"train": (False, False), "want": EVERY},
    {"bias": True, "want": EVERY, "softcap": 5.0, "temperature": 2.0},
    {"bias": True, "lora": True, "ref": True, "want": "entropy"},
    {"lora": True, "ref": True, "train": (True, False), "want": EVERY},
    {"train": (True, False), "want": "entropy", "dtype": torch.bfloat16, "workspace_bytes": 200},
    {"bias": True, "n": 0},
]


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_opcheck_of_the_head(options):
    torch.library.opcheck(operators.token_logps, head_inputs(**options))


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_opcheck_of_the_heads_gradient(options):
    inputs = head_inputs(**options)
    *tensors, ref, labels, softcap, scale, temperature, ignore, want, impl, workspace, eps, needs = inputs
    tensors = [None if t is None else t.detach() for t in tensors]
    stats = operators.token_logps(
        *tensors, ref, labels, softcap, scale, temperature, ignore, want, impl, workspace, eps, needs
    )
    entropy = "entropy" in want
    args = (
        torch.rand_like(stats[1]), torch.rand_like(stats[1]) if entropy else None, *tensors, labels, stats[1],
        stats[2] if entropy else None, softcap, scale, temperature, ignore, want, impl, workspace, eps, needs,
    )  # fmt: skip
    torch.library.opcheck(operators.token_logps_backward, args)


@pytest.mark.parametrize("want", ["", EVERY])
def test_opcheck_of_logits(want):
    logits = torch.randn(5, V, device=DEVICE, requires_grad=True)
    labels = torch.randint(V, (5,), device=DEVICE)
    scalars = 4.0, 1.0, 2.0, -100, want, "auto"
    torch.library.opcheck(operators.logits_token_logps, (logits, labels, *scalars))
    stats = operators.logits_token_logps(logits.detach(), labels, *scalars)
    upstream = torch.rand(5, device=DEVICE), torch.rand(5, device=DEVICE) if want else None
    args = (*upstream, logits.detach().t().contiguous().t(), labels, stats[1], stats[2] if want else None, *scalars)
    torch.library.opcheck(operators.logits_token_logps_backward, args)


@pytest.mark.parametrize("loss", [*LOSSES, pk.losses.get("tdpo1")], ids=named)
def test_opcheck_of_the_loss(loss):
    made = checks.example(loss, dtype=torch.float32)
    facts = operators.facts(loss.key, False)
    logps = made.logps.requires_grad_()
    kl = None if made.token_kl is None else made.token_kl.requires_grad_()
    normalizers = [torch.tensor(3.0)] * len(loss.addends())
    args = (
        logps, made.layout.handle, loss.key, made.ref_logps, made.token_weights, torch.ones(len(logps)).bool(),
        made.targets, made.mismatched, [made.stats[name] for name in facts.row_outputs], kl, normalizers, 64, False,
        "auto", len(facts.metrics), [True, kl is not None],
    )  # fmt: skip
    torch.library.opcheck(operators.preference, args)


def test_second_derivatives_raise():
    loss, made = DPO, checks.example(DPO, dtype=torch.float32)
    logps = made.logps.requires_grad_()
    value, *_ = operators.preference(
        logps, made.layout.handle, loss.key, made.ref_logps, None, None, None, None, [], None, [], None, False, "auto",
        len(operators.facts(loss.key, False).metrics), [True, False],
    )  # fmt: skip
    (g,) = torch.autograd.grad(value, logps, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        g.sum().backward()
    for options in ({}, {"train": (True, False)}):
        inputs = head_inputs(**options)
        (g,) = torch.autograd.grad(operators.token_logps(*inputs)[0].sum(), inputs[0], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            g.sum().backward()
    logits = torch.randn(5, V, requires_grad=True)
    labels = torch.randint(V, (5,))
    stats = operators.logits_token_logps(logits, labels, None, 1.0, 1.0, -100, "", "auto")
    (g,) = torch.autograd.grad(stats[0].sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        g.sum().backward()


# --- what cannot be traced says so ------------------------------------------------------------------------------------


def test_running_statistics_break_the_graph_and_say_why():
    loss = next(loss for loss in ALL if loss.new_state() is not None)
    made = checks.example(loss, dtype=torch.float32)

    def call(logps, state):
        return pk.preference_loss(logps * 1, made.layout, loss, state=state, **made.options).loss

    with pytest.raises(torch._dynamo.exc.Unsupported, match="running statistics"):
        torch.compile(call, fullgraph=True, backend="aot_eager")(made.logps, loss.new_state())
    got = torch.compile(call, backend="aot_eager")(made.logps, loss.new_state())
    torch.testing.assert_close(got, call(made.logps, loss.new_state()))


def test_a_handle_outlives_no_layout():
    layout = pk.Layout.pairs([2], [3])
    handle, copied = layout.handle, pickle.loads(pickle.dumps(layout))
    assert pk.Layout.of_handle(handle) is layout and pk.Layout.of_handle(copied.handle) is copied and copied == layout
    assert copy.deepcopy(layout) == layout
    del layout
    with pytest.raises(RuntimeError, match="the layout of this call is gone"):
        pk.Layout.of_handle(handle)


def test_a_copied_loss_has_a_key_of_its_own():
    copied = pickle.loads(pickle.dumps(DPO))
    assert copied == DPO and copied.key != DPO.key and pk.losses.Loss.of_key(copied.key) is copied


def test_a_layout_that_does_not_fit_is_an_error_at_run_time():
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, labels, _, options = batch(DPO, 3)
    other = pk.Layout.pairs([2], [3])
    with pytest.raises(ValueError, match="the layout holds 5 tokens"):
        compiled(x, labels, other, DPO, **options)


def test_functional_transforms_are_right_or_say_that_they_are_not():
    """torch.func: the definition under grad; the kernels' autograd.Functions refuse."""
    hidden, weight, bias, *_, labels = head_inputs(train=(False, False))[:7]

    def loss(hidden, impl):
        return pk.token_logps(hidden, weight, labels, impl=impl).logps.sum()

    x = hidden.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(x, "eager"), x)
    torch.testing.assert_close(torch.func.grad(loss)(hidden, "eager"), want)
    _, tangent = torch.func.jvp(lambda h: loss(h, "eager"), (hidden,), (torch.ones_like(hidden),))
    torch.testing.assert_close(tangent, want.sum())
    stacked = torch.func.vmap(lambda h: loss(h, "eager"))(torch.stack([hidden, 2 * hidden]))
    torch.testing.assert_close(stacked, torch.stack([loss(hidden, "eager"), loss(2 * hidden, "eager")]))
    refused = "autograd.Function|functorch|forward-mode"
    with pytest.raises((RuntimeError, NotImplementedError), match=refused):
        torch.func.grad(loss)(hidden, "auto")
    with pytest.raises((RuntimeError, NotImplementedError), match=refused):
        torch.func.jvp(lambda h: loss(h, "auto"), (hidden,), (torch.ones_like(hidden),))
    with pytest.raises((RuntimeError, NotImplementedError), match=refused):
        torch.func.vmap(lambda h: loss(h, "auto"))(torch.stack([hidden, 2 * hidden]))


def test_functional_transforms_of_a_loss_refuse():
    made = checks.example(DPO, dtype=torch.float32)

    def value(logps):
        return pk.preference_loss(logps, made.layout, DPO, **made.options).loss

    refused = "autograd.Function|functorch|forward-mode"
    with pytest.raises((RuntimeError, NotImplementedError), match=refused):
        torch.func.grad(value)(made.logps)
    with pytest.raises((RuntimeError, NotImplementedError), match=refused):
        torch.func.jvp(value, (made.logps,), (torch.ones_like(made.logps),))
    with pytest.raises((RuntimeError, NotImplementedError), match=refused):
        torch.func.vmap(value)(torch.stack([made.logps, made.logps]))
