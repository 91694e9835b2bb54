"""One YAML file describes a run: sections `run model data loss reference trainer`, checked key by key.

Every key can be overridden as `section.key=value`; the value is read as YAML. Unknown keys are errors that
suggest the nearest name. `Config.to_yaml` writes the resolved configuration, which can be trained from again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from prefkern.training.errors import ConfigError
from prefkern.training.schema import build

ReferenceMode = Literal[
    "auto", "none", "frozen", "adapter_off", "precomputed", "on_policy", "ema", "periodic", "kl_triggered"
]
_REFERENCE_OPTIONS = {  # the mode that each option belongs to, and its value there unless set
    "batch_size": ("precomputed", None),
    "decay": ("ema", 0.99),
    "every": ("periodic", 100),
    "threshold": ("kl_triggered", 0.1),
    "window": ("kl_triggered", 10),
}


@dataclass(frozen=True)
class RunConfig:
    """Where the run is kept.

    Fields:
        output: the run folder; a configuration file's name under runs/ unless set.
        resume: continue the run in that folder from its newest whole checkpoint.
        gradient_ratios: log how hard a pair loss pulls on either response, see `prefkern.diagnostics`.
    """

    output: str = "runs/run"
    resume: bool = False
    gradient_ratios: bool = False


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters through peft.

    Fields:
        r: rank.
        alpha: the adapters' output is scaled by alpha / r, or with rslora by alpha / sqrt(r).
        dropout: on the adapters' input.
        target_modules: names of the adapted modules, or "all-linear" (all but the output head, which may be named:
            usually lm_head).
        modules_to_save: names of modules that train whole beside the adapters, such as lm_head.
        rslora: scale by the root of the rank (Kalajdzievski 2023, arXiv:2312.03732).
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    modules_to_save: list[str] | None = None
    rslora: bool = False


@dataclass(frozen=True)
class HeadConfig:
    """How the output head is run.

    Fields:
        impl: body of the head kernels, as in `prefkern.token_logps`.
        workspace_bytes: scratch memory that the head may use; null lets the planner choose.
        temperature: divides the logits in training, reference and evaluation alike.
    """

    impl: Literal["auto", "chunked", "cut", "eager"] = "auto"
    workspace_bytes: int | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise ConfigError(f"model.head.workspace_bytes={self.workspace_bytes} should be at least 1, or null")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"model.head.temperature={self.temperature} should be positive and finite")


@dataclass(frozen=True)
class ModelConfig:
    """The policy and its tokenizer.

    Fields:
        name: folder or hub name of any causal language model.
        tokenizer: folder or hub name, the model's own unless set.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the model.
        dtype: of the weights. float32 is the safe one to train all weights in (combine it with trainer.bf16);
            bfloat16 halves the memory and suits frozen weights under LoRA.
        attn_implementation: as in transformers ("sdpa", "eager", "flash_attention_2"...), its choice unless set.
        eos_token: the token that ends a response, the tokenizer's own unless set.
        gradient_checkpointing: recompute activations in the backward pass.
        lora: train adapters instead of all weights.
        head: how the output head is run.
    """

    name: str
    tokenizer: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    attn_implementation: str | None = None
    eos_token: str | None = None
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    head: HeadConfig = field(default_factory=HeadConfig)


@dataclass(frozen=True)
class DataConfig:
    """Where the rows come from and how they become tokens; see `prefkern.training.data`.

    Fields:
        train, eval: a .json, .jsonl or .parquet file, a folder made by `save_to_disk`, or a hub name.
        config: configuration name of a hub dataset.
        split, eval_split: splits taken from `train` and `eval`. eval_split without eval is a split of `train`.
        eval_size: without eval and eval_split, rows (a whole number) or fraction (below 1) held out of train.
        columns: maps a standard column (prompt, chosen, rejected, completions, scores...) to the dataset's own name.
        limit: train on the first rows only.
        max_prompt_length: tokens kept of a prompt, cut from the left.
        max_response_length: tokens kept of a response, cut from the right.
        max_length: tokens of prompt and response together, the model's context length unless set.
        append_eos: end every response with the end-of-sequence token unless it does already.
        token_weights: read `<response>_token_weights` columns (losses that need them always do).
        num_proc: processes that tokenise.
    """

    train: str
    eval: str | None = None
    config: str | None = None
    split: str = "train"
    eval_split: str | None = None
    eval_size: int | float | None = None
    columns: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    max_prompt_length: int | None = None
    max_response_length: int | None = None
    max_length: int | None = None
    append_eos: bool = True
    token_weights: bool = False
    num_proc: int | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "max_prompt_length", "max_response_length", "max_length", "num_proc"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name}={value} should be at least 1, or null for no limit")
        if self.eval_size is not None and self.eval_size <= 0:
            raise ConfigError(
                f"data.eval_size={self.eval_size} should be a number of rows or a fraction between 0 and 1"
            )


@dataclass(frozen=True)
class ReferenceConfig:
    """The reference policy that a loss compares with.

    Fields:
        mode: auto is frozen where the loss needs a reference and none elsewhere.
            none: no reference.
            frozen: the policy as it starts: a copy of the model, or the same model with its adapters off.
            adapter_off: the same model with its adapters off; an error without adapters.
            precomputed: log-probabilities of the dataset under the frozen policy, computed once before training and
                cached.
            on_policy: the policy itself, held constant: every log-ratio is 0 and only carries the gradient.
            ema: a moving average of the policy, anchor = decay * anchor + (1 - decay) * policy after every optimizer
                step, kept in fp32 (at a decay near 1 a step is smaller than bfloat16 can tell).
            periodic: a copy of the policy, taken again every `every` optimizer steps.
            kl_triggered: a copy of the policy, taken again when the mean over the last `window` optimizer steps of
                |log pi(y) - log anchor(y)|, in nats a response, is above `threshold`; the window is then emptied.
            The last three begin as the policy begins and hold the parameters that train, nothing else; they are saved
            with every checkpoint.
        batch_size: rows per step of the precomputation, trainer.per_device_eval_batch_size unless set.
        decay: of ema, in [0, 1]; 0.99 unless set.
        every: of periodic, optimizer steps; 100 unless set.
        threshold, window: of kl_triggered, nats and optimizer steps; 0.1 and 10 unless set.
    """

    mode: ReferenceMode = "auto"
    batch_size: int | None = None
    decay: float | None = None
    every: int | None = None
    threshold: float | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        for name, (mode, default) in _REFERENCE_OPTIONS.items():
            value = getattr(self, name)
            if mode == self.mode and value is None:
                object.__setattr__(self, name, default)
            elif mode != self.mode and value is not None:
                raise ConfigError(
                    f"reference.{name}={value} belongs to reference.mode={mode}, but the mode is {self.mode}: remove it"
                )
        for name in ("batch_size", "every", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"reference.{name}={value} should be at least 1")
        if self.decay is not None and not 0 <= self.decay <= 1:
            raise ConfigError(f"reference.decay={self.decay} should be between 0 and 1, for example 0.99")
        if self.threshold is not None and not self.threshold >= 0:
            raise ConfigError(f"reference.threshold={self.threshold} should be a number of nats, 0 or more")

    @property
    def moves(self) -> bool:
        """Whether the reference follows the policy as it trains."""
        return self.mode in ("ema", "periodic", "kl_triggered")


@dataclass(frozen=True)
class Config:
    """A whole run. `loss` and `trainer` are plain mappings: see `resolve_loss` and `resolve_trainer`."""

    model: ModelConfig
    data: DataConfig
    loss: dict[str, Any]
    run: RunConfig = field(default_factory=RunConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    trainer: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
        """A checked configuration from nested mappings and `section.key=value` overrides.

        Raises:
            ConfigError: an unknown key, a value of the wrong type, a missing key, or keys that contradict each other.
        """
        merged = apply_overrides(given, overrides)
        return build(cls, {name: {} if section is None else section for name, section in merged.items()}, "")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain mappings, every key of ours spelled out."""
        sections = dataclasses.asdict(self)
        return {name: sections[name] for name in ("run", "model", "data", "loss", "reference", "trainer")}

    def to_yaml(self) -> str:
        """The configuration as YAML that `load_config` reads back to an equal configuration."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a YAML configuration.

    Args:
        path: the file.
        overrides: `section.key=value` texts, applied in order.
    Raises:
        ConfigError: the file is missing or is no YAML mapping, or as `Config.from_dict`.
    """
    path = Path(path)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {str(path)!r}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise ConfigError(
            f"{str(path)!r}{line} is not valid YAML: {getattr(error, 'problem', None) or error}"
        ) from error
    if not isinstance(given, Mapping):
        raise ConfigError(f"{str(path)!r} should hold a mapping with the sections model, data and loss")
    given = dict(given)
    run = given.get("run")
    if run is None or (isinstance(run, Mapping) and "output" not in run):
        given["run"] = {"output": f"runs/{path.stem}", **(run or {})}
    return Config.from_dict(given, overrides)


def apply_overrides(given: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of nested mappings with `a.b.c=value` texts applied; values are read as YAML.

    Raises:
        ConfigError: a text without "=" or without a section, or a key beneath something that is no mapping.
    """
    merged = _copy(given)
    for text in overrides:
        name, equals, raw = text.partition("=")
        parts = name.strip().split(".")
        if not equals or len(parts) < 2 or not all(parts):
            raise ConfigError(f"{text!r} is not an override: write section.key=value, for example loss.beta=0.1")
        try:
            value = yaml.safe_load(raw)
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of {text!r} is not valid YAML: put it in quotes") from error
        target = merged
        for i, part in enumerate(parts[:-1]):
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
            if not isinstance(target, dict):
                raise ConfigError(f"cannot set {name!r}: {'.'.join(parts[: i + 1])}={target!r} is not a mapping")
        target[parts[-1]] = value
    return merged


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, Mapping) else value
