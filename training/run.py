"""One run from a configuration to a folder with its model, metrics and curves."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from prefkern.losses import Loss
from prefkern.planner import plan
from prefkern.training.callbacks import JsonlMetrics, LinePrinter, ProgressBar, read_metrics
from prefkern.training.columns import Needs
from prefkern.training.config import Config, load_config
from prefkern.training.data import prepare_dataset
from prefkern.training.errors import ConfigError, ModelError
from prefkern.training.model import load_model, load_model_config, load_tokenizer, output_head
from prefkern.training.plots import draw_curves
from prefkern.training.reference import add_reference_logps, resolve_reference
from prefkern.training.resolve import (
    check_same_run,
    resolve_loss,
    resolve_trainer,
    resolved,
    training_arguments,
)
from prefkern.training.sources import load_splits
from prefkern.training.trainer import PreferenceTrainer, check_loss, packed_collator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """Where a run's results lie.

    The folder holds config.yaml (resolved, can be trained from again), metrics.jsonl, tensorboard/, checkpoint-*/,
    model/ (safetensors and tokenizer) and curves.png.
    """

    output: Path
    metrics: dict[str, float]  # the last value of every logged metric
    history: list[dict]  # every logged line, each with its step

    @property
    def model(self) -> Path:
        """Folder of the final model and its tokenizer, for `from_pretrained`."""
        return self.output / "model"

    @property
    def curves(self) -> Path:
        """Picture of the training curves."""
        return self.output / "curves.png"


def run_training(config: Config) -> RunResult:
    """Train as a configuration says. Nothing is written to the run folder before all of it has been checked.

    Raises:
        UserError: configuration, data or model are at fault; the message says what to mend.
    """
    loss = resolve_loss(config.loss)
    options = resolve_trainer(config, loss)
    args = training_arguments(options, config.run.output)
    sharded = bool(args.fsdp or args.deepspeed)
    reference = resolve_reference(config.reference, loss, adapters=config.model.lora is not None, sharded=sharded)
    _check_head(config, args)
    check_loss(loss, args, config.run.gradient_ratios)
    output = Path(config.run.output)
    saved = resolved(config, loss, options)
    checkpoint = _start(output, saved)
    transformers.set_seed(args.seed)  # before adapters are initialised

    tokenizer = load_tokenizer(config.model)
    train, evaluation = _prepare(config, loss, tokenizer, args)
    model = load_model(config.model, None if args.fsdp or args.deepspeed else args.device)
    if reference.mode == "precomputed":
        train, evaluation = _precompute(config, loss, model, args, train, evaluation)
    trainer = PreferenceTrainer(
        model,
        args,
        loss=loss,
        reference=reference,
        head=config.model.head,
        data_collator=packed_collator(loss, config.data.max_length or _context(config)),
        diagnostics=config.run.gradient_ratios,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
    )
    _report_to(trainer, output)
    if trainer.is_world_process_zero():
        (output / "config.yaml").write_text(saved.to_yaml(), encoding="utf-8")
        logger.info("head    %s", _body(model, config, args))

    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if evaluation is not None and not _evaluated(trainer):
        trainer.evaluate()
    _save_model(trainer, output / "model")
    history = read_metrics(output / "metrics.jsonl")
    if trainer.is_world_process_zero():
        draw_curves(history, output / "curves.png", title=f"{output.name}: {loss.name}")
    last = {name: value for line in history for name, value in line.items()}
    return RunResult(output, last, history)


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint of a run that was written to its end.

    Trainer writes `trainer_state.json` last, so a checkpoint cut short by a kill has none that can be read.
    """
    for path in sorted(output.glob("checkpoint-*"), key=_step, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, json.JSONDecodeError):
            continue
        return path
    return None


def _check_head(config: Config, args: TrainingArguments) -> None:
    """Raise ConfigError where the body that the configuration asks for cannot run on this machine."""
    head = config.model.head
    try:
        plan((1, 1, 1), torch.float32, args.device, grad_hidden=True, grad_head=True, impl=head.impl)
    except RuntimeError as error:
        raise ConfigError(f"model.head.impl={head.impl!r} cannot run: {error}") from error


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _start(output: Path, config: Config) -> Path | None:
    """The checkpoint to start from, if any; a run that is there is not overwritten, nor continued as another."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"run.output={str(output)!r} is a file: choose another folder")
    if config.run.resume:
        if (output / "config.yaml").exists():
            check_same_run(config, load_config(output / "config.yaml"))
        return last_checkpoint(output)
    if (output / "config.yaml").exists() or any(output.glob("checkpoint-*")):
        raise ConfigError(
            f"run.output={str(output)!r} already holds a run: "
            "set run.resume=true to continue it, or choose another folder"
        )
    return None


def _prepare(
    config: Config, loss: Loss, tokenizer, args: TrainingArguments
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    text_config = load_model_config(config.model).get_text_config()
    context = _context(config)
    if config.data.max_length and context and config.data.max_length > context:
        raise ModelError(
            f"data.max_length={config.data.max_length} is more than the {context} tokens that "
            f"{config.model.name!r} can read: lower it"
        )
    with args.main_process_first(desc="tokenising"):
        train, evaluation = load_splits(config.data)
        prepared = tuple(
            rows
            and prepare_dataset(
                rows,
                tokenizer,
                config.data,
                Needs.of(loss, config.data.token_weights),
                vocab_size=getattr(text_config, "vocab_size", None),
                context_length=context,
                name=name,
            )
            for rows, name in ((train, "data.train"), (evaluation, "data.eval"))
        )
    if args.process_index == 0:
        for rows, name in zip(prepared, ("train", "eval")):
            if rows:
                cut = sum(n > 0 for n in rows["cut_tokens"])
                logger.info("%-7s %d rows%s", name, len(rows), f", {cut} of them truncated" if cut else "")
    return prepared


def _context(config: Config) -> int | None:
    """Tokens that the model can read, if its configuration says."""
    return getattr(load_model_config(config.model).get_text_config(), "max_position_embeddings", None)


def _precompute(config: Config, loss: Loss, model: nn.Module, args: TrainingArguments, *splits):
    with args.main_process_first(desc="reference log-probabilities"):
        return [
            rows
            and add_reference_logps(
                rows,
                model,
                arity=loss.arity,
                head=config.model.head,
                batch_size=config.reference.batch_size or args.per_device_eval_batch_size,
                autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
                name=name,
            )
            for rows, name in zip(splits, ("data.train", "data.eval"))
        ]


def _body(model: nn.Module, config: Config, args: TrainingArguments) -> str:
    """How the head will be run, for a batch of any number of rows."""
    head = output_head(model)
    weight, adapter = head.weight, head.adapter
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else weight.dtype
    chosen = plan(
        (1, weight.shape[1], weight.shape[0]), dtype, args.device, grad_hidden=True, grad_head=head.trains,
        grad_weight=weight.requires_grad, rank=0 if adapter is None else adapter.a.out_features,
        grad_low=(adapter is not None,) * 2,
        impl=config.model.head.impl, workspace_bytes=config.model.head.workspace_bytes,
    )  # fmt: skip
    return f"{chosen.row.name}, {chosen.row.flops}NDV: {chosen.reason}"


def _report_to(trainer: PreferenceTrainer, output: Path) -> None:
    """Our metrics file and progress bar; TensorBoard into the run folder under a name that does not change."""
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "TensorBoardCallback":
            callback.logging_dir = str(output / "tensorboard")
    trainer.add_callback(LinePrinter() if trainer.pop_callback(ProgressCallback) is None else ProgressBar())
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(JsonlMetrics(output / "metrics.jsonl"))


def _evaluated(trainer: PreferenceTrainer) -> bool:
    """Whether the last step has been evaluated."""
    return any("eval_loss" in line and line["step"] == trainer.state.global_step for line in trainer.state.log_history)


def _save_model(trainer: PreferenceTrainer, folder: Path) -> None:
    """Save the final model beside its place and move it there, so that it is whole or absent."""
    trainer.model.config.use_cache = True  # Trainer switched it off, and generating wants it
    partial = folder.with_name(folder.name + ".partial")
    trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        (partial / "training_args.bin").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    trainer.accelerator.wait_for_everyone()
