"""From the plain `loss` and `trainer` sections to a loss object and transformers' TrainingArguments, and back."""

from __future__ import annotations

import dataclasses
import importlib.util
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prefkern import losses
from prefkern.granularity import Boundaries
from prefkern.training.config import Config
from prefkern.training.errors import ConfigError
from prefkern.training.fields import describe_loss, read_loss
from prefkern.training.schema import check_names, check_value

_OURS = {
    "output_dir": "use run.output",
    "resume_from_checkpoint": "use run.resume",
    "remove_unused_columns": "leave it out, the collator reads all columns",
    "label_smoothing_factor": "use loss.label_smoothing",
    "use_liger_kernel": "use model.head.impl",
}


def resolve_loss(section: Mapping[str, Any]) -> losses.Loss:
    """The loss that a `loss` section describes: its name and its fields, written as `prefkern.training.fields` says.

    Raises:
        ConfigError: unknown name or option, a value of the wrong type or out of range.
    """
    try:
        return read_loss(section, "loss")
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"the loss section is wrong: {error}") from error


def cuts_from_data(loss: losses.Loss) -> bool:
    """Whether the loss takes its segments from the dataset's `<response>_boundaries` columns."""
    granularity = getattr(loss, "granularity", None)
    return isinstance(granularity, Boundaries) and granularity.cuts is None


def resolve_trainer(config: Config, loss: losses.Loss) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments: the `trainer` section, checked, over our defaults.

    Our defaults: learning_rate 1e-6 for preference losses, 2e-5 for supervised ones (single responses of which the
    data says nothing more), ten times that with adapters; logging every 10 steps to TensorBoard, never hiding a NaN;
    evaluation at the end of every epoch where there is data for it.

    Raises:
        ConfigError: an option that TrainingArguments lacks, one that another section sets, or a wrong type.
    """
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    names = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    check_names(config.trainer, names, "trainer")
    for name in config.trainer:
        if name in _OURS:
            raise ConfigError(f"trainer.{name} is not yours to set: {_OURS[name]}")
    given = {k: check_value(f"trainer.{k}", _yaml_no(v, hints[k]), hints[k]) for k, v in config.trainer.items()}
    data = config.data
    supervised = loss.arity == "single" and loss.target_kind is None and not loss.needs_reference
    has_eval = any(x is not None for x in (data.eval, data.eval_split, data.eval_size))
    defaults = {
        "learning_rate": (2e-5 if supervised else 1e-6) * (10 if config.model.lora else 1),
        "num_train_epochs": 1,
        "logging_steps": 10,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "report_to": ["tensorboard"] if importlib.util.find_spec("tensorboard") else [],
        "eval_strategy": "epoch" if has_eval else "no",
    }
    if config.model.gradient_checkpointing:
        name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
        defaults |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    return defaults | given


def training_arguments(options: Mapping[str, Any], output: str | Path):
    """TrainingArguments from `resolve_trainer`'s options.

    Raises:
        ConfigError: transformers refuses a value or a combination.
    """
    from transformers import TrainingArguments

    options = {"dataloader_pin_memory": torch.cuda.is_available(), **options}
    try:
        return TrainingArguments(output_dir=str(output), remove_unused_columns=False, **options)
    except (ValueError, ImportError, TypeError) as error:
        raise ConfigError(f"the trainer section is refused by transformers: {' '.join(str(error).split())}") from error


def resolved(config: Config, loss: losses.Loss, trainer_options: Mapping[str, Any]) -> Config:
    """The configuration with loss and trainer options spelled out, as it is saved with the run."""
    return dataclasses.replace(config, loss=describe_loss(loss), trainer=dict(trainer_options))


def check_same_run(config: Config, saved: Config) -> None:
    """Raise ConfigError where a run would be continued with another model, data, loss or reference than before."""
    for section in ("model", "data", "loss", "reference"):
        now, then = (_flat(c.to_dict()[section], section) for c in (config, saved))
        for key in sorted(now.keys() | then.keys()):
            if now.get(key) != then.get(key):
                raise ConfigError(
                    f"run.resume=true continues a run that began with {key}={then.get(key)!r}, not {now.get(key)!r}: "
                    "set it back, or choose another run.output"
                )


def _flat(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {key: value}
    return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{key}.{name}").items()}


def _yaml_no(value: Any, hint: Any) -> Any:
    """YAML 1.1 reads a bare `no` as false; where text is wanted, it meant the text."""
    return "no" if value is False and bool not in (hint, *typing.get_args(hint)) else value
