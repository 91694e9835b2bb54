"""An output head with peft's LoRA or a copy that trains: as peft's own forward has it, and in the trainer."""

import copy
from types import SimpleNamespace

import datasets
import peft
import pytest
import torch
from safetensors.torch import load_file
from test_model import ROWS, build, one_by_one, packed
from test_resume import Kill, KillAt
from torch import nn
from transformers import TrainingArguments

import tiny
from numerics import assert_as_good_as_torch
from prefkern import chunked, losses
from prefkern.training import run as run_module
from prefkern.training.collator import PackedCollator
from prefkern.training.columns import Needs
from prefkern.training.config import Config, DataConfig, HeadConfig, LoraConfig, ReferenceConfig
from prefkern.training.data import prepare_dataset
from prefkern.training.errors import ConfigError, ModelError
from prefkern.training.model import add_adapters, base_model, check_model, output_head, pack_forward
from prefkern.training.output_head import OutputHead
from prefkern.training.reference import _weights_key, head_arguments, reference_logps
from prefkern.training.run import run_training
from prefkern.training.trainer import PreferenceTrainer, check_head

LORA = LoraConfig(r=3, target_modules=["q_proj", "lm_head"])
COPY = LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"])
PLAIN = LoraConfig(r=3)  # all but the head
KINDS = {"lora": LORA, "rslora": LoraConfig(r=3, target_modules=["lm_head"], rslora=True), "copy": COPY}
MODELS = {
    "plain": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "bias": ("Phi", {}),
    "softcap, tied": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0, "tie_word_embeddings": True}),
}


def adapted(lora: LoraConfig, name: str = "Llama", scatter: bool = True, **options):
    """A model with adapters that are not at their start, where they do nothing."""
    model = build(name, "eager" if name == "Gemma2" else "sdpa", **options)
    return scattered(add_adapters(model, lora)) if scatter else add_adapters(model, lora)


def scattered(model):
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * (0.3 if "lora_" in name else 0.1))
    return model


def by_peft(model) -> torch.Tensor:
    """The packed batch's, from its hidden states on as peft's own layer has them: the body's rounding is in it too."""
    batch, options = PackedCollator("pair")(ROWS), head_arguments(model, HeadConfig())
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "response_rows")}

    def tail(hidden, *_, **__):
        z = base_model(model).lm_head(hidden)
        z = z if options["softcap"] is None else options["softcap"] * torch.tanh(z / options["softcap"])
        return z.log_softmax(-1)[torch.arange(len(z)), batch["labels"]]

    return model(**inputs, tail=tail)


def gradients(model, logps) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name, options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS)
def test_values_and_gradients_are_those_of_pefts_logits(lora, name, options):
    model = adapted(lora, name, **options).train()
    check_model(model)
    same, found = by_peft(model), packed(model)
    before = one_by_one(model).detach()
    double = copy.deepcopy(model).double()
    truth = one_by_one(double, torch.float64)
    assert_as_good_as_torch(found, same, truth, 1e-5)
    expected, torch_same, grads = gradients(double, truth), gradients(model, same), gradients(model, found)
    assert grads.keys() == expected.keys()
    assert sum("lm_head" in k for k in grads) == (1 if lora is COPY and name != "Phi" else 2)
    for k, grad in grads.items():
        assert expected[k].abs().max() > 1e-4, k
        # Half an ulp of the weights moves some of these gradients by 3e-5, and the body rounds more often than once.
        assert (torch_same[k] - expected[k]).abs().max() < 5e-4 * expected[k].abs().max(), f"{k}: the packed body"
        assert_as_good_as_torch(grad, torch_same[k], expected[k], 1e-5)
    with model.disable_adapter(), torch.no_grad():
        bare = one_by_one(model)
        assert not torch.allclose(bare, before, atol=1e-2)
        torch.testing.assert_close(packed(model), bare, rtol=1e-5, atol=1e-5)
    reference = reference_logps(model, PackedCollator("pair")(ROWS), head_arguments(model, HeadConfig()))
    torch.testing.assert_close(reference, bare, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed(model), before, rtol=1e-5, atol=1e-5)
    assert {k for k, p in model.named_parameters() if p.requires_grad} == grads.keys(), "switched on again"


def test_fp32_adapters_over_a_bf16_head():
    model = add_adapters(build("Llama").to(torch.bfloat16), LORA)
    scattered(model)
    head = output_head(model)
    assert (head.weight.dtype, head.adapter.a.weight.dtype) == (torch.bfloat16, torch.float32)
    double = copy.deepcopy(model).double()
    truth, same = one_by_one(double, torch.float64), one_by_one(model)
    found = packed(model)
    assert_as_good_as_torch(found, same, truth, 1e-3)
    expected, torch_same, grads = gradients(double, truth), gradients(model, same), gradients(model, found)
    for k in (k for k in grads if "lm_head" in k):
        assert grads[k].dtype == torch.float32
        assert_as_good_as_torch(grads[k], torch_same[k], expected[k], 1e-3)


class EveryThird(nn.Dropout):
    """Drops the same features of every row."""

    def forward(self, x):
        return x * (torch.arange(x.shape[-1]) % 3 != 0) * 1.5 if self.training else x


def test_dropout_is_between_the_hidden_states_and_the_adapter():
    model = adapted(LoraConfig(r=3, dropout=0.4, target_modules=["lm_head"]))
    head = base_model(model).lm_head
    assert isinstance(head.lora_dropout["default"], nn.Dropout)
    torch.manual_seed(3)
    first, second = packed(model.train()), packed(model)
    assert not torch.equal(first, second), "drawn anew in every forward"
    torch.testing.assert_close(packed(model.eval()), one_by_one(model), rtol=1e-5, atol=1e-5)
    head.lora_dropout["default"] = EveryThird(0.4)
    expected = gradients(model.train(), one_by_one(model))
    found = packed(model)
    torch.testing.assert_close(found, one_by_one(model), rtol=1e-5, atol=1e-5)
    for k, grad in gradients(model, found).items():
        torch.testing.assert_close(grad, expected[k], rtol=1e-4, atol=1e-5)


def test_the_output_head_says_what_is_in_force():
    model = adapted(LORA)
    layer = base_model(model).lm_head
    head = output_head(model)
    assert head.weight is layer.base_layer.weight and head.trains and not head.is_copy
    assert (head.adapter.scale, head.adapter.a.weight.shape) == (32 / 3, (3, 16))
    assert output_head(adapted(KINDS["rslora"])).adapter.scale == pytest.approx(32 / 3**0.5)
    with model.disable_adapter():
        assert output_head(model) == OutputHead(layer.base_layer)
    model = adapted(COPY)
    wrapper = base_model(model).lm_head
    assert output_head(model).weight is wrapper.modules_to_save["default"].weight and output_head(model).is_copy
    with model.disable_adapter():
        assert output_head(model).weight is wrapper.original_module.weight and not output_head(model).trains
    elsewhere = adapted(LoraConfig(r=2, target_modules=["q_proj"]))
    assert output_head(elsewhere) == OutputHead(base_model(elsewhere).lm_head)
    elsewhere.add_adapter("other", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    assert output_head(elsewhere).adapter is None, "the active adapter does not touch the head"
    elsewhere.set_adapter("other")
    assert output_head(elsewhere).adapter is not None


def two_active(model):
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize("options, change, message", [
    ({}, two_active, r"several active adapters \(default, other\): choose one"),
    ({}, lambda model: model.merge_adapter(), "merged into its weight: call unmerge_adapter"),
    ({"use_dora": True}, None, "DoRA or another variant of LoRA"),
    ({"lora_bias": True}, None, "has a bias, which is not supported: set lora_bias=False"),
    ({"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}, None, "wrapped by peft's TrainableTokensWr"),
], ids=["two active", "merged", "dora", "bias", "trained tokens, tied"])  # fmt: skip
def test_what_is_not_supported_is_told(options, change, message):
    base = build("Llama", tie_word_embeddings="trainable_token_indices" in options)
    model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 2, "target_modules": ["lm_head"], **options}))
    if change is not None:
        check_model(model)
        change(model)
    for call in (output_head, packed):
        with pytest.raises(ModelError, match=message) as error:
            call(model)
        assert len(str(error.value).splitlines()) == 1


def test_other_adapters_are_told():
    model = peft.get_peft_model(build("Llama"), peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]))
    with pytest.raises(ModelError, match="the output head is wrapped by peft's Linear"):
        output_head(model)


def trainer(tmp_path, lora=LORA, reference="auto", loss=None, model=None, rows=None, **options) -> PreferenceTrainer:
    loss = loss or losses.DPO()
    rows = tiny.rows_for(loss, 16) if rows is None else rows
    data = prepare_dataset(datasets.Dataset.from_list(rows), tiny.tokenizer(), DataConfig(train="x"), Needs.of(loss))
    if model is None:
        base = tiny.llama(tie_word_embeddings=options.pop("tied", False))
        torch.manual_seed(1)
        model = add_adapters(pack_forward(base), lora, options.get("gradient_checkpointing", False))
    others = {name: options.pop(name) for name in ("reference_model", "head") if name in options}
    arguments = dict(use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=1e-2, save_strategy="no",
                     dataloader_pin_memory=False, max_steps=4, logging_steps=1, per_device_train_batch_size=2,
                     gradient_accumulation_steps=2, train_sampling_strategy="sequential")  # fmt: skip
    return PreferenceTrainer(
        model, TrainingArguments(output_dir=str(tmp_path), **{**arguments, **options}), loss=loss,
        reference=reference, train_dataset=data, eval_dataset=data, **others,
    )  # fmt: skip


def train(run: PreferenceTrainer) -> list[float]:
    run.train()
    return [line["loss"] for line in run.state.log_history if "loss" in line]


OPTIONS = {
    "plain": {},
    "tied": {"tied": True},
    "checkpointed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "checkpointed, reentrant": {"gradient_checkpointing": True},
    "autocast": {"bf16": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS)
def test_the_trainer_trains_it(tmp_path, lora, options):
    run = trainer(tmp_path, lora, **options)
    before = {k: p.detach().clone() for k, p in run.model.named_parameters()}
    logs = train(run)
    assert logs[0] == pytest.approx(0.6931472, abs=1e-3) and logs[-1] < logs[0] - 1e-3
    changed = {k for k, p in run.model.named_parameters() if not torch.equal(p, before[k])}
    assert changed == {k for k, p in run.model.named_parameters() if p.requires_grad}
    assert sum("lm_head" in k for k in changed) == (1 if lora is COPY else 2)


@pytest.mark.parametrize("lora", [LORA, COPY], ids=["lora", "copy"])
def test_what_is_trained_does_not_depend_on_checkpointing(tmp_path, lora):
    plain, checkpointed = (trainer(tmp_path, lora, **OPTIONS[name]) for name in ("plain", "checkpointed"))
    assert train(plain) == train(checkpointed)
    others = dict(checkpointed.model.named_parameters())
    assert all(torch.equal(p, others[k]) for k, p in plain.model.named_parameters())


@pytest.mark.parametrize("loss", [
    losses.DPO(), losses.get("tdpo2"),
    *(pytest.param(loss, marks=pytest.mark.slow)
      for loss in (losses.get("kto"), losses.DPO(nll_weight=0.5), losses.get("adadpo"))),
], ids=lambda loss: loss.name)  # fmt: skip
@pytest.mark.parametrize("lora", [LORA, COPY, PLAIN], ids=["lora", "copy", "plain head"])
def test_adapters_off_is_the_model_before_training(tmp_path, lora, loss):
    """Whether the reference's rows share the policy's pass (adapter), or have their own (copy, another model)."""
    if loss.needs_token_kl and lora is LORA:
        with pytest.raises(ConfigError, match="cannot be done yet where the output head is adapted: leave it out of"):
            trainer(tmp_path, lora, loss=loss)
        return
    off = trainer(tmp_path, lora, "adapter_off", loss)
    other = trainer(tmp_path, lora, "frozen", loss, reference_model=tiny.llama())
    assert off._shares_head == (lora is not COPY) and not other._shares_head
    assert train(off) == pytest.approx(train(other), rel=1e-4)
    assert off.evaluate()["eval_loss"] == pytest.approx(other.evaluate()["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("reference", [
    ReferenceConfig("ema", decay=1.0), ReferenceConfig("periodic", every=10**9), ReferenceConfig("frozen"),
], ids=lambda reference: reference.mode)  # fmt: skip
@pytest.mark.parametrize("lora", [
    LORA, COPY, pytest.param(PLAIN, marks=pytest.mark.slow),
], ids=["lora", "copy", "plain head"])  # fmt: skip
def test_a_still_reference_is_one_reference(tmp_path, lora, reference):
    """An anchor that stays where training began is what adapters off is. It shares a head of which nothing trains."""
    still = trainer(tmp_path, lora, reference)
    assert still._shares_head == (lora is not COPY and (lora is not LORA or reference.mode == "frozen"))
    assert train(still) == pytest.approx(train(trainer(tmp_path, lora, "adapter_off")), rel=1e-5)


@pytest.mark.parametrize("lora, training", [(LORA, False), (COPY, False), (PLAIN, False), (PLAIN, True)],
                         ids=["lora", "copy", "plain head", "plain head, training"])  # fmt: skip
def test_one_pass_over_the_weight_serves_policy_and_reference(tmp_path, monkeypatch, lora, training):
    """The head runs once, on the rows of both; with a copy that trains there are two heads, and each runs once."""
    run = trainer(tmp_path, lora, "adapter_off")
    batch = run._prepare_inputs(next(iter(run.get_eval_dataloader())))
    run.model.train(training)
    rows, passes, forward = len(batch["labels"]), [], chunked.forward

    def counted(operands, *args, **kwargs):
        passes.append((operands.weight.data_ptr(), len(operands.hidden)))
        return forward(operands, *args, **kwargs)

    monkeypatch.setattr(chunked, "forward", counted)
    with torch.set_grad_enabled(training):
        run.compute_loss(run.model, batch)
    own = output_head(run.model).weight.data_ptr()
    with run.model.disable_adapter():
        original = output_head(run.model).weight.data_ptr()
    assert passes == ([(original, rows), (own, rows)] if lora is COPY else [(own, 2 * rows)])


def test_fsdp_cannot_reach_an_adapted_head():
    args = SimpleNamespace(fsdp=["full_shard"])
    for lora in (LORA, COPY):
        with pytest.raises(ConfigError, match="leave it out of model.lora, or train with DDP or ZeRO-2"):
            check_head(output_head(adapted(lora)), losses.DPO(), args)
    check_head(output_head(build("Llama")), losses.DPO(), args)


def test_precomputed_references_outlive_what_trains():
    """The cache's key is made of what the reference computes with: neither adapters nor copies that train."""
    for lora in (LORA, COPY):
        model = adapted(lora, scatter=False)
        before = _weights_key(model)
        assert _weights_key(scattered(model)) == before
        with torch.no_grad():
            base_model(model).model.norm.weight.mul_(2)
        assert _weights_key(model) != before


RESUMED = {
    "lora": {"r": 2, "target_modules": ["q_proj", "lm_head"], "dropout": 0.1, "rslora": True},
    "copy": {"r": 2, "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("lora, tied", [
    pytest.param("lora", False, marks=pytest.mark.slow), ("lora", True), ("copy", True),
])  # fmt: skip
def test_a_run_is_saved_resumed_and_read_by_peft(tmp_path, monkeypatch, lora, tied):
    args = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "report_to": "none", "learning_rate": 1e-2,
            "per_device_train_batch_size": 2}  # fmt: skip
    config = tiny.write_run(tmp_path, model=tiny.llama(tie_word_embeddings=tied), trainer=args)
    config["model"]["lora"] = RESUMED[lora]
    whole, cut = (f"run.output={tmp_path / name}" for name in ("whole", "cut"))
    done = run_training(Config.from_dict(config, [whole]))
    with monkeypatch.context() as patch:
        report_to = run_module._report_to
        killed = lambda trainer, out: (report_to(trainer, out), trainer.add_callback(KillAt(3, False)))  # noqa: E731
        patch.setattr(run_module, "_report_to", killed)
        with pytest.raises(Kill):
            run_training(Config.from_dict(config, [cut]))
    resumed = run_training(Config.from_dict(config, [cut, "run.resume=true"]))
    history = [[line["loss"] for line in run.history if "loss" in line] for run in (done, resumed)]
    assert history[0] == history[1] and history[0][-1] < history[0][0]
    found, expected = (load_file(run.model / "adapter_model.safetensors") for run in (resumed, done))
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)

    loaded = peft.PeftModel.from_pretrained(tiny.llama(tie_word_embeddings=tied), done.model)
    head, start = output_head(loaded), tiny.llama(tie_word_embeddings=tied).lm_head.weight
    if lora == "copy":
        assert not torch.allclose(head.weight, start, atol=1e-4)
        assert torch.equal(base_model(loaded).lm_head.original_module.weight, start)
    else:
        assert torch.equal(head.weight, start)
        assert head.adapter.b.weight.abs().max() > 1e-4 and head.adapter.scale == 32 / 2**0.5
    assert "target_modules" in (done.output / "config.yaml").read_text()


def test_the_body_of_the_run_is_named(tmp_path):
    config = tiny.write_run(tmp_path)
    args = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True)
    lora = LoraConfig(r=2)
    for kind, row in ((lora, "frozen_head, 4NDV"), (LORA, "recompute_adapter, 6NDV"), (COPY, "recompute, 8NDV")):
        told = run_module._body(add_adapters(tiny.llama(), kind), Config.from_dict(config), args)
        assert told.startswith(row)
