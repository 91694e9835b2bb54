"""What a loss compares with: fixed references, references that follow the policy, and wrong combinations."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

import tiny
from prefkern import losses
from prefkern.layout import Layout
from prefkern.preference import linear_preference_loss, preference_loss
from prefkern.training.anchors import MovingAverage, TriggeredCopy
from prefkern.training.config import Config, DataConfig, LoraConfig, ReferenceConfig
from prefkern.training.data import prepare_dataset
from prefkern.training.errors import ConfigError
from prefkern.training.model import add_adapters, pack_forward
from prefkern.training.reference import resolve_reference
from prefkern.training.run import run_training
from prefkern.training.trainer import PreferenceTrainer

NEVER = 10**9
SIMPLE = {"model": {"name": "m"}, "data": {"train": "d"}, "loss": {"name": "dpo"}}


def trainer(tmp_path, reference, *, lora=False, loss=None, model=None, callbacks=(), **args) -> PreferenceTrainer:
    data = prepare_dataset(datasets.Dataset.from_list(tiny.pairs(16)), tiny.tokenizer(), DataConfig(train="x"))
    if model is None:
        model = tiny.llama()
        torch.manual_seed(1)
        model = add_adapters(pack_forward(model), LoraConfig(r=2)) if lora else model
    options = dict(use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=1e-2, save_strategy="no",
                   dataloader_pin_memory=False, max_steps=4, logging_steps=1, per_device_train_batch_size=2,
                   gradient_accumulation_steps=2)  # fmt: skip
    return PreferenceTrainer(
        model, TrainingArguments(output_dir=str(tmp_path), **{**options, **args}), loss=loss or losses.DPO(),
        reference=reference, train_dataset=data, eval_dataset=data, callbacks=list(callbacks),
    )  # fmt: skip


def trained(run: PreferenceTrainer) -> tuple[dict[str, Tensor], list[float]]:
    run.train()
    logged = [line["loss"] for line in run.state.log_history if "loss" in line]
    return {k: p.detach().clone() for k, p in run.model.named_parameters()}, logged


class Record(TrainerCallback):
    """Trainable parameters as they were after every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append({k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad})


@pytest.mark.parametrize("dtype, bf16", [
    pytest.param(torch.float32, False, id="fp32"),
    pytest.param(torch.bfloat16, False, id="bf16", marks=pytest.mark.slow),
    pytest.param(torch.float32, True, id="autocast", marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("still", [
    ReferenceConfig("ema", decay=1.0),
    pytest.param(ReferenceConfig("periodic", every=NEVER), marks=pytest.mark.slow),
    pytest.param(ReferenceConfig("kl_triggered", threshold=float("inf"), window=1), marks=pytest.mark.slow),
], ids=lambda r: r.mode)  # fmt: skip
def test_an_anchor_that_stays_is_the_frozen_reference_to_the_bit(tmp_path, still, lora, dtype, bf16):
    def run(reference):
        torch.manual_seed(1)
        model = tiny.llama(dropout=0.2).to(dtype)
        model = add_adapters(pack_forward(model), LoraConfig(r=2)) if lora else model
        return trained(trainer(tmp_path, reference, model=model, bf16=bf16))

    (found, found_logs), (expected, expected_logs) = run(still), run("frozen")
    assert found_logs == expected_logs and found_logs[-1] != found_logs[0]
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_adapters_off_is_what_frozen_means_with_adapters(tmp_path):
    (found, logs), (expected, _) = (trained(trainer(tmp_path, mode, lora=True)) for mode in ("adapter_off", "frozen"))
    assert logs[-1] < logs[0]
    assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
def test_moving_average_follows_its_formula(tmp_path, lora):
    record = Record()
    run = trainer(tmp_path, ReferenceConfig("ema", decay=0.75), lora=lora, callbacks=[record])
    want = {k: p.detach().double() for k, p in run.model.named_parameters() if p.requires_grad}
    run.train()
    for step in record.steps:
        want = {k: 0.75 * a + 0.25 * step[k].double() for k, a in want.items()}
    assert run._anchor.weights.keys() == want.keys(), "what trains, and no more"
    for k, anchor in run._anchor.weights.items():
        torch.testing.assert_close(anchor.double(), want[k], rtol=1e-5, atol=1e-7)


def test_moving_average_of_a_bf16_policy_does_not_stall():
    model = nn.Linear(4, 4).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    anchor = MovingAverage(model, decay=0.999)
    nn.init.constant_(model.weight, 1.25)
    for step in range(2000):
        anchor.step(model, step + 1, lambda x: x)
    assert anchor.weights["weight"].dtype == torch.float32
    torch.testing.assert_close(anchor.weights["weight"], torch.full((4, 4), 1.25 - 0.25 * 0.999**2000))


def test_periodic_copy_copies_every_so_many_steps(tmp_path):
    record = Record()
    run = trainer(tmp_path, ReferenceConfig("periodic", every=3), callbacks=[record], max_steps=5)
    run.train()
    assert all(torch.equal(run._anchor.weights[k], p) for k, p in record.steps[2].items())
    assert not torch.equal(run._anchor.weights["lm_head.weight"], run.model.lm_head.weight)


def test_every_step_compares_with_the_step_before(tmp_path):
    """With a copy after every step the reference is the policy: log 2 a pair, whatever was learnt."""
    _, logged = trained(trainer(tmp_path, ReferenceConfig("periodic", every=1)))
    assert logged == pytest.approx([0.6931472] * 4, rel=1e-5)
    _, drifting = trained(trainer(tmp_path, ReferenceConfig("periodic", every=3)))
    assert drifting[:3] != pytest.approx([0.6931472] * 3, rel=1e-3)
    assert drifting[3] == pytest.approx(0.6931472, rel=1e-5)


def test_triggered_copy_looks_at_a_window_of_gaps():
    layout = Layout.pairs([2], [1])
    model = nn.Linear(2, 2)
    anchor = TriggeredCopy(model, threshold=1.0, window=2)
    nn.init.zeros_(model.weight)

    def step(*gaps: float, reduce=lambda x: x) -> bool:
        for gap in gaps:  # micro-batches: responses of gap and of -gap nats
            anchor.observe(torch.tensor([gap / 2, gap / 2, -gap]), torch.zeros(3), layout)
        anchor.step(model, 1, reduce)
        return bool((anchor.weights["weight"] == 0).all())

    assert not step(5.0), "the window is not full"
    anchor.load_state_dict({**anchor.state_dict(), "gaps": torch.tensor([], dtype=torch.float64)})
    assert not step(0.5) and not step(1.25, 1.25), "mean 0.875"
    assert anchor.metrics() == {"reference/gap": 1.25}
    assert list(anchor.gaps) == [0.5, 1.25]
    assert not step(0.7), "mean 0.975: the oldest gap has left the window"
    assert step(1.0, 2.0), "mean 1.1; of the last step 1.5"
    assert not anchor.gaps, "emptied by a copy"
    assert anchor.metrics() == {"reference/gap": 1.5}
    step(1.0, reduce=lambda sums: sums + torch.tensor([4.0, 2.0]))
    assert list(anchor.gaps) == [1.5], "of all processes"


def test_triggered_copy_in_training(tmp_path):
    run = trainer(tmp_path, ReferenceConfig("kl_triggered", threshold=0.01, window=2), max_steps=6)
    run.train()
    gaps = [line["reference/gap"] for line in run.state.log_history if "loss" in line]
    same = pytest.approx(0, abs=1e-6)  # policy and anchor pass the head by rows of the planner that round apart
    assert gaps[0] == same and gaps[1] > 0.02, "the anchor begins as the policy, and the policy moves"
    assert gaps[2] == same, "the second step's window was full and above the threshold"
    assert len(run._anchor.gaps) == 0 and gaps[4] == same


def test_the_policy_itself_as_reference(tmp_path):
    """Every log-ratio is 0: the loss stays log 2 and its gradient is beta / 2 a response."""
    _, logged = trained(trainer(tmp_path, "on_policy"))
    assert logged == pytest.approx([0.6931472] * 4, rel=1e-5)
    layout, loss = Layout.pairs([3, 2], [2, 2]), losses.IPO()
    hidden, weight, labels = torch.randn(9, 4, requires_grad=True), torch.randn(11, 4), torch.arange(9)
    found = linear_preference_loss(hidden, weight, labels, layout, loss, on_policy=True)
    logps = torch.log_softmax(hidden @ weight.T, -1)[torch.arange(9), labels]
    expected = preference_loss(logps, layout, loss, ref_logps=logps.detach())
    torch.testing.assert_close(found.loss, expected.loss)
    gradients = (torch.autograd.grad(x.loss, hidden)[0] for x in (found, expected))
    torch.testing.assert_close(*gradients)
    with pytest.raises(ValueError, match="ref_logps were given; leave them out"):
        linear_preference_loss(hidden, weight, labels, layout, loss, ref_logps=logps, on_policy=True)


def test_a_forward_leaves_the_policy_as_it_was(tmp_path):
    run = trainer(tmp_path, "ema", lora=True)
    before = {k: (p, p.detach().clone()) for k, p in run.model.named_parameters()}
    for w in run._anchor.weights.values():
        w.add_(1.0)
    run.model.train()
    batch = run.data_collator([run.train_dataset[i] for i in range(2)])
    _, (inside, *_) = run._ref_rows(run.model, batch)  # adapters share the head, so the rows alone
    assert run.model.training and not inside.requires_grad
    for k, p in run.model.named_parameters():
        assert p is before[k][0] and torch.equal(p, before[k][1]), k
    with torch.no_grad():
        for k, w in run._anchor.weights.items():
            run.model.get_parameter(k).copy_(w)
    torch.testing.assert_close(trainer(tmp_path, "ema", model=run.model)._ref_rows(run.model, batch)[1][0], inside)


@dataclass(frozen=True, kw_only=True)
class Awkward(losses.DPO):
    """A DPO that asks for more."""

    name: ClassVar[str] = "awkward"
    needs_token_kl: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Baseline(losses.DPO):
    """A DPO that asks for other prompts' responses."""

    name: ClassVar[str] = "baseline"
    needs_mismatched: ClassVar[bool] = True


@pytest.mark.parametrize("mode, loss, options, message", [
    ("none", losses.DPO(), {}, "loss 'dpo' compares with a reference: set reference.mode to frozen or precomputed"),
    ("ema", losses.SimPO(), {}, "loss 'simpo' uses no reference: remove reference.mode='ema'"),
    ("on_policy", losses.NLL(), {}, "loss 'nll' uses no reference: remove reference.mode='on_policy'"),
    ("precomputed", Awkward(), {}, "loss 'awkward' needs the reference's whole distribution over the vocabulary, which"
     " reference.mode=precomputed lacks: set it to frozen"),
    ("precomputed", Baseline(), {}, "loss 'baseline' needs the reference's log-probabilities of mismatched pairs"),
    ("on_policy", Awkward(), {}, "the policy would be compared with itself: set it to frozen"),
    ("adapter_off", losses.DPO(), {}, "needs adapters to switch off: set model.lora, or use frozen"),
    ("periodic", losses.DPO(), {"sharded": True}, "which FSDP and DeepSpeed split: use frozen or precomputed"),
])  # fmt: skip
def test_wrong_combinations(mode, loss, options, message):
    with pytest.raises(ConfigError) as error:
        resolve_reference(mode, loss, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["frozen", "adapter_off", "ema", "periodic", "kl_triggered"])
def test_right_combinations(mode):
    for loss in (losses.DPO(), Awkward(), Baseline()):
        assert resolve_reference(mode, loss, adapters=True).mode == mode


@pytest.mark.parametrize("section, message", [
    ("{mode: emma}", "reference.mode='emma' should be 'auto' or 'none' or 'frozen'"),
    ("{mode: periodic, decay: 0.9}",
     "reference.decay=0.9 belongs to reference.mode=ema, but the mode is periodic: remove it"),
    ("{mode: precomputed, decay: 0.9}", "reference.decay=0.9 belongs to reference.mode=ema"),
    ("{window: 3}", "reference.window=3 belongs to reference.mode=kl_triggered, but the mode is auto: remove it"),
    ("{mode: frozen, batch_size: 3}", "reference.batch_size=3 belongs to reference.mode=precomputed"),
    ("{mode: ema, decay: 1.5}", "reference.decay=1.5 should be between 0 and 1"),
    ("{mode: periodic, every: 0}", "reference.every=0 should be at least 1"),
    ("{mode: periodic, every: 2.5}", "reference.every=2.5 should be a whole number or null"),
    ("{mode: kl_triggered, threshold: -1}", "reference.threshold=-1 should be a number of nats, 0 or more"),
    ("{mode: kl_triggered, window: 0}", "reference.window=0 should be at least 1"),
])  # fmt: skip
def test_options_belong_to_their_mode(section, message):
    with pytest.raises(ConfigError) as error:
        Config.from_dict({**SIMPLE, "reference": yaml.safe_load(section)})
    assert message in str(error.value)


def test_defaults_are_spelled_out():
    config = Config.from_dict({**SIMPLE, "reference": {"mode": "kl_triggered"}})
    assert config.reference == ReferenceConfig("kl_triggered", threshold=0.1, window=10)
    assert ReferenceConfig("ema").decay == 0.99 and ReferenceConfig("periodic").every == 100
    assert Config.from_dict(yaml.safe_load(config.to_yaml())) == config


def test_a_model_of_ones_own_goes_with_frozen_alone(tmp_path):
    with pytest.raises(ConfigError, match="a reference_model was given, but reference.mode='ema': set it to frozen"):
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        PreferenceTrainer(tiny.llama(), args, loss=losses.DPO(), reference="ema", reference_model=tiny.llama())


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["{mode: ema, decay: 0.5}", "{mode: kl_triggered, threshold: 0.001, window: 2}"])
@pytest.mark.parametrize("lora", [[], ["model.lora={r: 2}"]], ids=["all weights", "lora"])
def test_two_processes_follow_as_one(tmp_path, reference, lora):
    short = {"max_steps": 4, "report_to": "none", "save_steps": 4}
    config = tiny.write_run(tmp_path, rows=tiny.pairs(16), trainer=short, reference=yaml.safe_load(reference))
    one, two = tmp_path / "one", tmp_path / "two"
    run_training(Config.from_dict(config, [f"run.output={one}", "trainer.gradient_accumulation_steps=2", *lora]))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "prefkern", "train",
         str(tmp_path / "c.yaml"), f"run.output={two}", *lora],
        cwd=Path(__file__).parent.parent, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found, expected = (load_file(out / "checkpoint-4" / "reference.safetensors") for out in (two, one))
    assert found.keys() == expected.keys()
    for k in expected:
        torch.testing.assert_close(found[k], expected[k], rtol=1e-5, atol=1e-6)
