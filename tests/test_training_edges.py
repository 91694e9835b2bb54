"""Where training could mislead: metrics of split batches, values that no loss can take, options that do not fit."""

from types import SimpleNamespace

import pytest
import torch
import yaml

import tiny
from prefkern import losses
from prefkern.training.callbacks import read_metrics
from prefkern.training.cli import main
from prefkern.training.errors import ConfigError
from prefkern.training.metrics import MetricWindow
from prefkern.training.reference import _weights_key
from prefkern.training.registry_docs import options
from prefkern.training.trainer import PreferenceTrainer, check_loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and tokenizer on disk."""
    folder = tmp_path_factory.mktemp("edges")
    tiny.llama().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    return folder


def train(folder, tmp_path, rows, loss, *overrides) -> int:
    """Exit status of a run of two steps."""
    config = {
        "run": {"output": str(tmp_path / "out")},
        "model": {"name": str(folder / "model")},
        "data": {"train": str(tiny.write_jsonl(tmp_path / "data.jsonl", rows))},
        "loss": loss,
        "trainer": {
            "max_steps": 2, "logging_steps": 2, "logging_first_step": False, "save_strategy": "no", "use_cpu": True,
            "per_device_train_batch_size": 4, "train_sampling_strategy": "sequential", "optim": "sgd",
            "learning_rate": 1e-3, "report_to": "none", "disable_tqdm": True,
        },
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return main(["train", str(tmp_path / "run.yaml"), *overrides])


@pytest.mark.parametrize("loss", [
    {"name": "dpo", "nll_weight": 0.5},
    pytest.param(
        {"name": "combination", "parts": [{"weight": 1, "name": "ipo"}, {"weight": 2, "name": "ipo", "beta": 0.5}]},
        marks=pytest.mark.slow,
    ),
    {"name": "kto", "baseline": "zero"},
], ids=["dpo and nll", "two ipo", "kto"])  # fmt: skip
def test_metrics_do_not_depend_on_how_the_batch_is_split(folder, tmp_path, loss):
    rows = tiny.unpaired(8) if loss["name"] == "kto" else tiny.pairs(8)
    logged = []
    for size, accumulation in ((4, 1), (1, 4)):
        split = tmp_path / str(size)
        split.mkdir()
        options = (f"trainer.per_device_train_batch_size={size}", f"trainer.gradient_accumulation_steps={accumulation}")
        assert train(folder, split, rows, loss, *options) == 0
        logged.append(next(line for line in read_metrics(split / "out" / "metrics.jsonl") if "loss" in line))
    whole, parts = logged
    assert parts == pytest.approx(whole, rel=1e-4, abs=1e-6)
    if loss["name"] == "dpo":
        assert parts["loss/dpo"] + 0.5 * parts["loss/nll"] == pytest.approx(parts["loss"], rel=0.05)


def test_a_mean_over_a_share_of_the_prompts_is_weighted_by_it():
    window, kto = MetricWindow(), losses.KTO()
    for chosen, rejected, share in ((2.0, 0.0, 1.0), (5.0, 1.0, 0.25)):
        metrics = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/desirable": share}
        metrics = {name: torch.tensor(x) for name, x in metrics.items()} | {"rewards/margins": torch.tensor(9.0)}
        window.add(metrics, prompts=4, tokens=9, shares=kto.metric_shares(metrics))
    means = window.flush()
    assert means.pop("rewards/chosen") == pytest.approx((4 * 2 + 1 * 5) / 5)
    assert means == pytest.approx({"rewards/rejected": 1.0, "rewards/desirable": 0.625, "rewards/margins": 1.6})


def test_a_metric_of_no_prompt_is_not_logged(folder, tmp_path):
    rows = [row | {"label": True} for row in tiny.unpaired(8)]
    assert train(folder, tmp_path, rows, {"name": "kto"}) == 0
    line = next(line for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if "loss" in line)
    assert "rewards/chosen" in line and not line.keys() & {"rewards/rejected", "rewards/margins", "logps/rejected"}


LIST = {"name": "anchored_listwise"}
GIVEN = {"name": "combination", "parts": [{"weight": 1, **LIST, "targets": "given"}]}
WEIGHTED = {"name": "critical_token_dpo"}
CUT = {"name": "autoregressive_dpo", "granularity": "boundaries"}
NULL = {"rejected_token_weights": None}


def with_cells(rows: list[dict], **cells) -> list[dict]:
    """The rows, of which the third has other cells; or all have, where the column is new."""
    return [row | cells if i == 2 or not cells.keys() <= row.keys() else row for i, row in enumerate(rows)]


@pytest.mark.parametrize("rows, loss, overrides, message", [
    (with_cells(tiny.lists(4), scores=[1e300] * 4), LIST, (), "row 2 of data.train: its scores holds 1e+300"),
    (with_cells(tiny.lists(4), scores=[-1.0, 2.0, 0.0, 0.0]), GIVEN, (), "row 2 of data.train: its scores [-1.0"),
    (with_cells(tiny.lists(4), scores=[1.0] * 4), GIVEN, (), "add up to 4, but the loss takes them for probabilities"),
    (with_cells(tiny.lists(4), completions=None), LIST, (), "should be a list with a text or conversation for each"),
    (with_cells(tiny.weighted(tiny.pairs(4)), **NULL), WEIGHTED, (), "row 2 of data.train: its token weights"),
    (with_cells(tiny.pairs(4), chosen_boundaries=[0.5], rejected_boundaries=[1]), CUT, (), "list of whole numbers"),
    (tiny.lists(4), LIST, ("run.gradient_ratios=true",), "loss 'anchored_listwise' is not of pairs"),
    (tiny.unpaired(4), {"name": "kto"}, ("trainer.per_device_train_batch_size=1",), "batch_size to 2 or more"),
    (tiny.pairs(4), {"name": "adadpo", "base": None}, (), "loss.base=None should be a loss"),
    (tiny.pairs(4), {"name": "tdpo1"}, ("reference.mode=none",), "set reference.mode to frozen"),
], ids=[
    "score beyond fp32", "negative probability", "probabilities of sum 4", "no list", "null weights", "half a position",
    "ratios of a list", "kto of single rows", "null base", "no reference",
])  # fmt: skip
def test_one_sentence(folder, tmp_path, capsys, rows, loss, overrides, message):
    assert train(folder, tmp_path, rows, loss, *overrides) == 2
    *_, line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prefkern: ")]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_only_one_column_of_weights(folder, tmp_path):
    rows = [{k: v for k, v in row.items() if k != "chosen_token_weights"} for row in tiny.weighted(tiny.pairs(8))]
    assert train(folder, tmp_path, rows, WEIGHTED) == 0


def test_whole_distributions_of_heads_that_differ_are_refused(tmp_path):
    from transformers import TrainingArguments

    reference = tiny.llama()
    reference.config.final_logit_softcapping = 5.0
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    reference.packing_is_checked = True
    with pytest.raises(ValueError, match="scales or caps its logits in another way"):
        PreferenceTrainer(tiny.llama(), args, loss=losses.TDPO1(), reference="frozen", reference_model=reference)


def test_whole_distributions_are_refused_where_heads_are_sharded():
    args = SimpleNamespace(fsdp=["full_shard"], per_device_train_batch_size=4)  # real ones want several devices
    check_loss(losses.DPO(), args, diagnostics=False)
    with pytest.raises(ConfigError, match="loss 'tdpo1' needs the reference's head .* train with DDP or ZeRO-2"):
        check_loss(losses.TDPO1(), args, diagnostics=False)


def test_precomputed_references_are_kept_apart_by_the_models_configuration():
    one, other, moved = tiny.llama(), tiny.llama(rope_theta=500.0), tiny.llama()
    moved.config._name_or_path, moved.config.use_cache = "elsewhere", False
    assert _weights_key(one) == _weights_key(moved) != _weights_key(other)


def test_pages_tell_what_a_loss_is_about_before_what_every_pair_loss_has():
    names = [option.name for option in options(losses.CriticalTokenDPO)]
    assert names[0] == "granularity" and names.index("beta") < names.index("nll_weight")
    beta = next(option for option in options(losses.CriticalTokenDPO) if option.name == "beta")
    assert beta.meaning == "strength of the pull to the reference, in 1/nats."
