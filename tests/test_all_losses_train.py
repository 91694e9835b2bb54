"""Every registered loss trains from the command line; five of them along a committed path; batches may be split.

The path is two steps of SGD on fixed weights and rows in their order, in fp32. After a change that is meant to move it,

    PYTHONPATH=. python tests/test_all_losses_train.py

writes tests/trajectories.json again.
"""

import json
import math
import tempfile
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

import tiny
from prefkern import losses
from prefkern.training.columns import Needs
from prefkern.training.config import DataConfig
from prefkern.training.data import prepare_dataset
from prefkern.training.trainer import PreferenceTrainer

FILE = Path(__file__).parent / "trajectories.json"
FOLLOWED = {
    "dpo": {}, "autoregressive_dpo": {}, "adadpo": {}, "anchored_listwise": {},
    "kto": {"beta": 0.5, "undesirable_weight": 0.5},  # with equal weights the baseline would hardly show
}  # fmt: skip
# fp32 sums depend on the number of threads, the vector unit, the BLAS and the body of the attention and of the head:
# by 2e-6 at most where that was tried. SGD, since Adam divides by its own size whatever rounding leaves of a gradient.
RELATIVE = 1e-5
SGD = ("trainer.optim=sgd", "trainer.learning_rate=0.05", "trainer.max_grad_norm=1.0")


def write_model(folder: Path) -> Path:
    """A tiny model on disk whose weights do not depend on how, and in which order, transformers draws them."""
    model, generator = tiny.llama(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.dim() > 1:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    tiny.write_run(folder, model=model)
    return folder


def trajectory(folder: Path, name: str, output: Path, *overrides: str) -> list[dict[str, float]]:
    """Loss and gradient norm of each step."""
    history = tiny.train(folder, {"name": name, **FOLLOWED[name]}, output, *SGD, *overrides)
    return [{key: line[key] for key in ("loss", "grad_norm")} for line in history]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("all_losses"))


@pytest.mark.parametrize("name", losses.names())
def test_every_loss_trains(folder, tmp_path, name):
    history = tiny.train(folder, {"name": name}, tmp_path / "out")
    assert [line["step"] for line in history] == [1, 2]
    for line in history:
        wrong = {key: value for key, value in line.items() if not math.isfinite(value)}
        assert not wrong and line["grad_norm"] > 0, line
    before, after = (load_file(f / "model" / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for key in before:
        assert after[key].isfinite().all() and not torch.equal(before[key], after[key]), key


@pytest.mark.parametrize("name", FOLLOWED)
def test_trajectory(folder, tmp_path, name):
    found, expected = trajectory(folder, name, tmp_path / "out"), json.loads(FILE.read_text())[name]
    for step, committed in zip(found, expected, strict=True):
        assert step == pytest.approx(committed, rel=RELATIVE)


SPLIT = {
    "dpo with nll": losses.DPO(nll_weight=0.5),
    "anchored_listwise": losses.AnchoredListwise(),
    "kto without mismatched": losses.KTO(baseline="zero", undesirable_weight=0.7),
    "anchored_pairwise": losses.AnchoredPairwise(),
    "critical_token_dpo": losses.CriticalTokenDPO(),
}


@pytest.mark.parametrize("name", SPLIT)
def test_accumulation_4_by_1_equals_1_by_4(tmp_path, name):
    loss = SPLIT[name]
    rows = datasets.Dataset.from_list(tiny.rows_for(loss, 8))
    rows = prepare_dataset(rows, tiny.tokenizer(), DataConfig(train="x"), Needs.of(loss))

    def steps(size: int, accumulation: int) -> tuple[dict, list]:
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", max_steps=2,
            logging_steps=1, optim="sgd", learning_rate=1e-2, max_grad_norm=0, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        run = PreferenceTrainer(tiny.llama().double(), args, loss=loss, train_dataset=rows)
        run.train()
        return dict(run.model.named_parameters()), [line for line in run.state.log_history if "loss" in line]

    (split, split_logs), (whole, whole_logs) = steps(1, 4), steps(4, 1)
    for k in whole:
        torch.testing.assert_close(split[k], whole[k], rtol=1e-9, atol=1e-11, msg=lambda m, k=k: f"{k}: {m}")
    for a, b in zip(split_logs, whole_logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-6)


@pytest.mark.parametrize("name", SPLIT)
def test_evaluation_does_not_depend_on_the_size_of_its_batches(tmp_path, name):
    """Lists and responses of several lengths, and a short last batch: every mean is over the whole set."""
    loss = SPLIT[name]
    rows = datasets.Dataset.from_list(tiny.rows_for(loss, 9))
    rows = prepare_dataset(rows, tiny.tokenizer(), DataConfig(train="x"), Needs.of(loss))

    def evaluate(size: int) -> dict[str, float]:
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, per_device_eval_batch_size=size
        )
        policy, reference = tiny.llama().double(), tiny.llama(initializer_range=0.1).double()
        found = PreferenceTrainer(policy, args, loss=loss, reference_model=reference, eval_dataset=rows).evaluate()
        return {key: value for key, value in found.items() if "runtime" not in key and "per_second" not in key}

    whole, parts = evaluate(9), evaluate(2)
    assert parts == pytest.approx(whole, rel=1e-5, abs=1e-6)
    if loss.addends()[1:]:
        assert whole["eval_loss"] == pytest.approx(whole["eval_loss/dpo"] + 0.5 * whole["eval_loss/nll"], rel=1e-5)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        made = write_model(Path(temporary))
        paths = {name: trajectory(made, name, made / name) for name in FOLLOWED}
    FILE.write_text(json.dumps(paths, indent=1) + "\n")
