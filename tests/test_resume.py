"""A run that is killed and resumed ends with the same bits as one that was not."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

import tiny
from prefkern.training import run as run_module
from prefkern.training.config import Config
from prefkern.training.errors import ConfigError
from prefkern.training.run import last_checkpoint, run_training


class Kill(BaseException):
    """Stands for the process being killed: nothing catches it."""


class KillAt(TrainerCallback):
    """Raises at a step: after its optimizer step and before its checkpoint, or within its accumulation."""

    def __init__(self, step: int, within: bool) -> None:
        self.step, self.within = step, within

    def on_substep_end(self, args, state, control, **kwargs):
        if self.within and state.global_step == self.step:
            raise Kill

    def on_step_end(self, args, state, control, **kwargs):
        if not self.within and state.global_step == self.step:
            raise Kill


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> dict:
    """Two epochs of six steps, two micro-batches each, with dropout, a checkpoint every other step and evaluations."""
    return tiny.write_run(
        tmp_path_factory.mktemp("resume"),
        model=tiny.llama(dropout=0.2),
        data={"eval_size": 3},
        loss={"name": "autoregressive_dpo", "granularity": {"adaptive": 2}},
        trainer={
            "num_train_epochs": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "save_steps": 2,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 3,
        },
    )


@pytest.fixture(scope="module")
def whole(config) -> dict[str, torch.Tensor]:
    """Parameters of the run that was not killed."""
    return _weights(run_training(Config.from_dict(config)).model)


@pytest.mark.parametrize("step, within", [
    pytest.param(1, False, marks=pytest.mark.slow), (3, True), pytest.param(5, False, marks=pytest.mark.slow),
    (6, False), pytest.param(10, True, marks=pytest.mark.slow),
])  # fmt: skip
def test_killed_and_resumed_is_bitwise_the_same(config, whole, tmp_path, monkeypatch, step, within):
    output = f"run.output={tmp_path / 'out'}"
    with monkeypatch.context() as patch:
        report_to = run_module._report_to
        patch.setattr(
            run_module,
            "_report_to",
            lambda trainer, out: (report_to(trainer, out), trainer.add_callback(KillAt(step, within))),
        )
        with pytest.raises(Kill):
            run_training(Config.from_dict(config, [output]))
    torch.manual_seed(step)  # another process would start from other random numbers
    result = run_training(Config.from_dict(config, [output, "run.resume=true"]))
    resumed = _weights(result.model)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    steps = [line["step"] for line in result.history if "loss" in line]
    assert steps == list(range(1, 13)), "every step is logged once"


STATES = {
    "ema": {"reference": {"mode": "ema", "decay": 0.5}},
    "periodic": {"reference": {"mode": "periodic", "every": 3}},
    "kl_triggered": {"reference": {"mode": "kl_triggered", "threshold": 0.02, "window": 3}},
    "loss state": {"loss": {"name": "bco", "shift": "running_mean"}},
}


@pytest.mark.parametrize("lora", [
    pytest.param({}, id="all weights"),
    pytest.param({"lora": {"r": 2, "dropout": 0.1}}, id="lora", marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name == "ema" else pytest.mark.slow) for name in STATES
])  # fmt: skip
def test_what_moves_with_the_policy_is_resumed_bitwise(tmp_path, monkeypatch, name, lora):
    """Killed after step 5, resumed from the checkpoint of step 4: between two copies, within a window."""
    trainer = {"max_steps": 8, "save_steps": 4, "logging_steps": 1, "report_to": "none", "learning_rate": 1e-2,
               "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}  # fmt: skip
    config = tiny.write_run(tmp_path, model=tiny.llama(dropout=0.2), trainer=trainer, **STATES[name])
    config["model"] |= lora
    one, two = (f"run.output={tmp_path / run}" for run in ("one", "two"))
    whole = run_training(Config.from_dict(config, [one]))
    with monkeypatch.context() as patch:
        report_to = run_module._report_to
        patch.setattr(
            run_module,
            "_report_to",
            lambda trainer, out: (report_to(trainer, out), trainer.add_callback(KillAt(5, False))),
        )
        with pytest.raises(Kill):
            run_training(Config.from_dict(config, [two]))
    torch.manual_seed(5)
    resumed = run_training(Config.from_dict(config, [two, "run.resume=true"]))
    logged = [[line for line in run.history if "loss" in line] for run in (resumed, whole)]
    assert logged[0] == logged[1] and len(logged[0]) == 8
    for folder in ("checkpoint-8", "model"):
        files = sorted(path.name for path in (whole.output / folder).glob("*.safetensors"))
        assert ("reference.safetensors" in files) == (name != "loss state" and folder != "model")
        assert ("loss_state.safetensors" in files) == (name == "loss state")
        for file in files:
            found, expected = (load_file(run.output / folder / file) for run in (resumed, whole))
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[k], expected[k]) for k in expected), file
    if name == "loss state":
        state = load_file(resumed.model / "loss_state.safetensors")
        assert state["weight"] == 16 and state["average"] != 0, "one update a training micro-batch"


def test_a_checkpoint_without_its_reference_is_told(tmp_path):
    config = tiny.write_run(tmp_path, trainer={"max_steps": 2, "save_steps": 1}, reference={"mode": "ema"})
    output = run_training(Config.from_dict(config)).output
    (output / "checkpoint-2" / "reference.safetensors").unlink()
    with pytest.raises(ConfigError, match="reference.safetensors' is missing, so the run cannot go on as it was"):
        run_training(Config.from_dict(config, ["run.resume=true"]))


def test_a_run_is_not_continued_as_another(config, whole):
    with pytest.raises(
        ConfigError, match="began with loss.beta=0.1, not 0.3: set it back, or choose another run.output"
    ):
        run_training(Config.from_dict(config, ["run.resume=true", "loss.beta=0.3"]))


@pytest.mark.slow
def test_a_process_killed_by_the_system_resumes_bitwise(config, whole, tmp_path):
    path, output = tmp_path / "config.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump({**config, "run": {"output": str(output), "resume": True}}))
    command = [sys.executable, "-m", "prefkern", "train", str(path)]
    victim = subprocess.Popen(command, cwd=Path(__file__).parent.parent)
    deadline = time.monotonic() + 300
    while victim.poll() is None and last_checkpoint(output) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL, "killed in the middle"
    subprocess.run(command, cwd=Path(__file__).parent.parent, check=True, timeout=300)
    resumed = _weights(output / "model")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_checkpoint_cut_short_is_passed_over(tmp_path):
    for step, state in ((2, '{"global_step": 2}'), (4, '{"global_st')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-10").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
