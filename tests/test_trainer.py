"""The loss is the whole batch's, whatever the split; references agree; all options train; metrics are right."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import tiny
from prefkern import losses
from prefkern.granularity import Adaptive
from prefkern.training.columns import Needs
from prefkern.training.config import Config, DataConfig
from prefkern.training.data import prepare_dataset
from prefkern.training.errors import ConfigError
from prefkern.training.metrics import MetricWindow
from prefkern.training.model import pack_forward
from prefkern.training.run import run_training
from prefkern.training.trainer import PreferenceTrainer

LOSSES = {
    "nll": losses.NLL(),
    "dpo": losses.DPO(),
    "segments": losses.AutoregressiveDPO(granularity=Adaptive(2)),
    "simpo": losses.SimPO(),
}


def trainer(tmp_path, loss, *, model=None, reference="auto", rows=16, **args) -> PreferenceTrainer:
    texts = tiny.completions(rows) if loss.arity == "single" else tiny.pairs(rows)
    data = prepare_dataset(datasets.Dataset.from_list(texts), tiny.tokenizer(), DataConfig(train="x"), Needs.of(loss))
    options = dict(
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        learning_rate=1e-2,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    args = TrainingArguments(output_dir=str(tmp_path), **{**options, **args})
    return PreferenceTrainer(
        model or tiny.llama(), args, loss=loss, reference=reference, train_dataset=data, eval_dataset=data
    )


@pytest.mark.parametrize("name", LOSSES)
def test_accumulation_8_by_1_equals_1_by_8(tmp_path, name):
    def steps(size: int, accumulation: int) -> tuple[dict, list]:
        run = trainer(
            tmp_path, LOSSES[name], model=tiny.llama().double(), max_steps=3, logging_steps=1, optim="sgd",
            max_grad_norm=0, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        run.train()
        return dict(run.model.named_parameters()), [line for line in run.state.log_history if "loss" in line]

    (split, split_logs), (whole, whole_logs) = steps(1, 8), steps(8, 1)
    for k in whole:
        torch.testing.assert_close(split[k], whole[k], rtol=1e-9, atol=1e-11, msg=lambda m, k=k: f"{k}: {m}")
    for step, (a, b) in enumerate(zip(split_logs, whole_logs, strict=True)):
        # At first the policy is its reference: which of two rewards of 0 is the larger, their rounding decides.
        for k in b.keys() - {"epoch", "learning_rate"} - ({"rewards/accuracies"} if step == 0 else set()):
            assert a[k] == pytest.approx(b[k], rel=1e-5, abs=1e-6), k


@pytest.mark.slow
@pytest.mark.parametrize("lora", [[], ["model.lora={r: 2}"]], ids=["all weights", "lora"])
def test_two_processes_equal_two_accumulated_batches(tmp_path, lora):
    config = tiny.write_run(
        tmp_path, rows=tiny.pairs(16), trainer={"max_steps": 3, "report_to": "none", "save_strategy": "no"}
    )
    one, two = tmp_path / "one", tmp_path / "two"
    run_training(Config.from_dict(config, [f"run.output={one}", "trainer.gradient_accumulation_steps=2", *lora]))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "prefkern", "train",
         str(tmp_path / "c.yaml"), f"run.output={two}", *lora],
        cwd=Path(__file__).parent.parent, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found, expected = (load_file(next((out / "model").glob("*.safetensors"))) for out in (two, one))
    for k in expected:
        torch.testing.assert_close(found[k], expected[k], rtol=1e-5, atol=1e-7)


def test_a_short_last_accumulation_counts_what_it_has(tmp_path):
    """6 prompts in steps of 4: the second step averages over 2."""
    run = trainer(tmp_path, losses.DPO(), rows=6, num_train_epochs=1, logging_steps=1, learning_rate=0.0,
                  per_device_train_batch_size=1, gradient_accumulation_steps=4)  # fmt: skip
    run.train()
    found = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert found == pytest.approx([math.log(2)] * 2, rel=1e-5), "policy equals reference: log 2 a pair"


def test_nll_is_the_mean_over_tokens_of_the_whole_batch(tmp_path):
    run = trainer(tmp_path, losses.NLL(), max_steps=1, logging_steps=1, learning_rate=0.0,
                  per_device_train_batch_size=4, gradient_accumulation_steps=4)  # fmt: skip
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in run.train_dataset:
            ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
            logps = (
                run.model(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :]
            )
            total, tokens = total - logps.sum().item(), tokens + len(logps)
    run.train()
    [found] = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert found == pytest.approx(total / tokens, rel=1e-4)
    assert run.evaluate()["eval_loss"] == pytest.approx(total / tokens, rel=1e-4)


def test_evaluation_is_exact_whatever_the_batches(tmp_path):
    run = trainer(tmp_path, losses.DPO(), max_steps=4, per_device_train_batch_size=4, optim="sgd")
    run.train()
    one, many = (
        PreferenceTrainer(run.model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True,
                          per_device_eval_batch_size=size), loss=run.loss, reference_model=tiny.llama(),
                          eval_dataset=run.eval_dataset).evaluate()
        for size in (16, 5)
    )  # fmt: skip
    for k in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "entropy", "mean_token_accuracy"):
        assert one[f"eval_{k}"] == pytest.approx(many[f"eval_{k}"], rel=1e-5, abs=1e-6), k
    assert one["eval_rewards/margins"] > 0.01, "training moved the policy away from the reference"


def test_evaluating_draws_no_random_number(tmp_path):
    run = trainer(tmp_path, losses.SimPO())
    state = torch.get_rng_state()
    run.evaluate()
    assert torch.equal(state, torch.get_rng_state())


def test_metrics_are_added_up_on_the_device_and_weighted():
    window = MetricWindow()
    with _no_reads():
        window.add({"rewards/margins": torch.tensor(1.0), "entropy": torch.tensor(2.0)}, prompts=1, tokens=30)
        window.add({"rewards/margins": torch.tensor(4.0), "entropy": torch.tensor(5.0)}, prompts=2, tokens=10)
    assert window.flush() == {"rewards/margins": pytest.approx(3.0), "entropy": pytest.approx(2.75)}
    assert window.flush() == {}


def test_references_agree(tmp_path):
    """Frozen copy and precomputed columns train to the same weights; so do adapters off and precomputed."""
    base = tiny.write_run(
        tmp_path, rows=tiny.pairs(8), trainer={"max_steps": 4, "save_strategy": "no", "report_to": "none"}
    )
    for lora in ({}, {"model.lora": "{r: 2}"}):
        found = []
        for mode in ("frozen", "precomputed"):
            out = tmp_path / f"{mode}{len(lora)}"
            overrides = [f"reference.mode={mode}", f"run.output={out}", *(f"{k}={v}" for k, v in lora.items())]
            run = run_training(Config.from_dict(base, overrides))
            assert run.history[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)
            found.append(load_file(next(run.model.glob("*.safetensors"))))
        for k in found[0]:
            torch.testing.assert_close(found[0][k], found[1][k], rtol=1e-4, atol=1e-6)


def test_precomputed_reference_is_computed_once(tmp_path, monkeypatch):
    from prefkern.training import reference

    calls = []
    compute = reference.reference_logps
    monkeypatch.setattr(reference, "reference_logps", lambda *a, **k: calls.append(1) or compute(*a, **k))
    base = tiny.write_run(tmp_path, rows=tiny.pairs(8), reference={"mode": "precomputed", "batch_size": 4},
                          trainer={"max_steps": 1, "save_strategy": "no", "report_to": "none"})  # fmt: skip
    run_training(Config.from_dict(base))
    assert len(calls) == 2
    run_training(Config.from_dict(base, ["run.output=" + str(tmp_path / "again")]))
    assert len(calls) == 2, "found again in the cache"
    tiny.llama(rope_theta=20_000.0, initializer_range=0.2).save_pretrained(tmp_path / "model")
    run_training(Config.from_dict(base, ["run.output=" + str(tmp_path / "other")]))
    assert len(calls) == 4, "another model, another cache"


@pytest.mark.parametrize("loss, reference, message", [
    (losses.DPO(), "none", "set reference.mode to frozen or precomputed"),
    (losses.SimPO(), "frozen", "loss 'simpo' uses no reference: remove reference.mode='frozen'"),
])  # fmt: skip
def test_reference_errors(tmp_path, loss, reference, message):
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, loss, reference=reference)


def test_the_model_learns_and_the_reference_stays(tmp_path):
    run = trainer(tmp_path, losses.DPO(), max_steps=20, per_device_train_batch_size=16, logging_steps=1)
    before = {k: p.clone() for k, p in run._reference_model.named_parameters()}
    run.train()
    logs = [line for line in run.state.log_history if "loss" in line]
    assert logs[-1]["loss"] < 0.5 * logs[0]["loss"]
    assert logs[-1]["rewards/accuracies"] == 1.0
    assert all(torch.equal(p, before[k]) for k, p in run._reference_model.named_parameters())


def test_run_folder(tmp_path):
    base = tiny.write_run(
        tmp_path, data={"eval_size": 4}, trainer={"num_train_epochs": 1, "logging_steps": 2, "report_to": "tensorboard"}
    )
    run = run_training(Config.from_dict(base))
    assert run.curves.read_bytes()[:4] == b"\x89PNG"
    assert list((run.output / "tensorboard").glob("events.*"))
    assert (run.output / "checkpoint-5" / "optimizer.pt").exists()
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "loss", "rewards/margins", "grad_norm", "learning_rate"} <= lines[0].keys()
    assert {"eval_loss", "eval_rewards/accuracies"} <= run.metrics.keys()
    model = AutoModelForCausalLM.from_pretrained(run.model)
    assert model.config.use_cache and AutoTokenizer.from_pretrained(run.model).eos_token == "</s>"
    assert sorted(p.name for p in run.model.iterdir() if p.suffix in (".safetensors", ".bin")) == ["model.safetensors"]


@pytest.mark.parametrize("overrides", [
    ["loss.name=autoregressive_dpo", "loss.granularity=boundaries"],
    ["model.dtype=bfloat16", "model.gradient_checkpointing=true"],
    ["trainer.bf16=true", "model.head.impl=eager", "trainer.train_sampling_strategy=group_by_length"],
    ["model.lora={r: 2, dropout: 0.1}", "model.gradient_checkpointing=true", "loss.name=ipo"],
], ids=["boundaries", "bf16 checkpointed", "autocast, grouped", "lora checkpointed"])  # fmt: skip
def test_options_train(tmp_path, overrides):
    rows = [{**row, "chosen_boundaries": [1], "rejected_boundaries": [1, 2]} for row in tiny.pairs(8)]
    base = tiny.write_run(
        tmp_path, rows=rows, trainer={"max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2, "save_strategy": "no"}
    )
    run = run_training(Config.from_dict(base, overrides))
    trained = [line["loss"] for line in run.history if "loss" in line]
    assert trained[-1] < trained[0]


def test_a_given_model_is_only_given_two_keywords(tmp_path):
    model = tiny.llama()
    ids = torch.tensor([[3, 4, 5]])
    before = model(ids).logits
    assert torch.equal(pack_forward(model)(ids).logits, before)


class _no_reads(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where a tensor's value is read by the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read by the host"
        return func(*args, **(kwargs or {}))
