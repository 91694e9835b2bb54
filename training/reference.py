"""The policy that a loss compares with: a frozen copy, the same model with its adapters off, or numbers made before.

References that follow the policy are in `prefkern.training.anchors`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any

import datasets
import torch
import xxhash
from datasets.fingerprint import Hasher
from torch import Tensor, nn

from prefkern.head import LoRA
from prefkern.losses import Loss
from prefkern.token_logps import token_logps
from prefkern.training.collator import PackedCollator
from prefkern.training.columns import RESPONSES, Arity, feature, scatter
from prefkern.training.config import HeadConfig, ReferenceConfig, ReferenceMode
from prefkern.training.errors import ConfigError
from prefkern.training.model import Tail, base_model, head_options, output_head

_NO_SETTINGS = ("_name_or_path", "transformers_version", "use_cache")  # of a configuration: the model is the same


def resolve_reference(
    reference: ReferenceMode | ReferenceConfig, loss: Loss, *, adapters: bool = False, sharded: bool = False
) -> ReferenceConfig:
    """The reference with the mode that "auto" stands for, checked against the loss and the model.

    Args:
        reference: a mode with its default options, or a whole section.
        loss: what compares with it.
        adapters: whether the model has adapters.
        sharded: whether FSDP or DeepSpeed splits the model.
    Raises:
        ConfigError: the combination cannot train; the message says which mode can.
    """
    config = ReferenceConfig(reference) if isinstance(reference, str) else reference
    mode = config.mode
    if mode == "auto":
        return ReferenceConfig("frozen" if loss.needs_reference else "none")
    if loss.needs_reference and mode == "none":
        ways = "frozen" if loss.needs_token_kl or loss.needs_mismatched else "frozen or precomputed"
        raise ConfigError(f"loss {loss.name!r} compares with a reference: set reference.mode to {ways}")
    if not loss.needs_reference and mode != "none":
        raise ConfigError(f"loss {loss.name!r} uses no reference: remove reference.mode={mode!r}")
    what = (
        "the reference's whole distribution over the vocabulary" if loss.needs_token_kl
        else "the reference's log-probabilities of mismatched pairs, made anew in every batch" if loss.needs_mismatched
        else None
    )  # fmt: skip
    if what and mode == "precomputed":
        raise ConfigError(f"loss {loss.name!r} needs {what}, which reference.mode=precomputed lacks: set it to frozen")
    if what and mode == "on_policy":
        raise ConfigError(
            f"loss {loss.name!r} needs {what}, and with reference.mode=on_policy the policy would be compared with"
            " itself: set it to frozen"
        )
    if mode == "adapter_off" and not adapters:
        raise ConfigError("reference.mode=adapter_off needs adapters to switch off: set model.lora, or use frozen")
    if config.moves and sharded:
        raise ConfigError(
            f"reference.mode={mode} keeps clones of whole parameters, which FSDP and DeepSpeed split: use frozen or"
            " precomputed, or train without them"
        )
    return config


def has_adapters(model: nn.Module) -> bool:
    """Whether the model is wrapped by peft, so that switching its adapters off gives the reference."""
    return hasattr(model, "disable_adapter")


def frozen_copy(model: nn.Module) -> nn.Module | None:
    """A copy of the model that takes no gradient and no dropout; None where switching adapters off does the same."""
    return None if has_adapters(model) else copy.deepcopy(model).requires_grad_(False).eval()


def shares_head(model: nn.Module, config: ReferenceConfig) -> bool:
    """Whether one pass over the output head serves policy and reference; the policy alone may have an adapter on it.

    Args:
        model: the policy.
        config: a resolved reference, that of no other model.
    """
    if config.mode in ("frozen", "adapter_off"):
        return has_adapters(model) and not output_head(model).is_copy
    if config.mode == "kl_triggered":  # which looks at the reference's log-probabilities itself
        return False
    return config.moves and not output_head(model).trains


def reference_logps(
    model: nn.Module, batch: Mapping[str, Any], options: Mapping[str, Any], forward: Callable | None = None
) -> Tensor:
    """Log-probabilities of a packed batch's response tokens under the reference.

    Args:
        model, batch, forward: as in `reference_outputs`.
        options: keywords of `token_logps` that describe the head.
    Returns:
        (N,) fp32, in nats.
    """
    return reference_outputs(model, batch, logps_tail(batch["labels"], options), forward)


def logps_tail(labels: Tensor, options: Mapping[str, Any]) -> Tail:
    """The tail that makes log-probabilities of hidden states; `options` are keywords of `token_logps`."""

    def tail(hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: LoRA | None = None) -> Tensor:
        return token_logps(hidden, weight, labels, bias=bias, lora=lora, **options).logps

    return tail


@torch.no_grad()
def reference_outputs(
    model: nn.Module, batch: Mapping[str, Any], tail: Tail, forward: Callable | None = None, adapters: bool = False
) -> Any:
    """What `tail(hidden, weight, bias)` makes of the reference's hidden states of a packed batch.

    Args:
        model: a frozen copy, or a policy with adapters, which are off during the call. It takes no dropout.
        batch: as `PackedCollator` makes it, on the model's device.
        tail: called within the model's forward, without gradient.
        forward: what to call in the model's place (the same model as its distributed engine wraps it).
        adapters: leave adapters on.
    """
    training = model.training
    model.eval()
    try:
        with model.disable_adapter() if has_adapters(model) and not adapters else contextlib.nullcontext():
            return (forward or model)(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                response_rows=batch["response_rows"],
                sequence_lengths=batch["sequence_lengths"],
                tail=tail,
            )
    finally:
        model.train(training)


def head_arguments(model: nn.Module, head: HeadConfig) -> dict[str, Any]:
    """Keywords of `token_logps` and `linear_preference_loss` that describe this model's head and how to run it."""
    return {
        **head_options(model),
        "temperature": head.temperature,
        "impl": head.impl,
        "workspace_bytes": head.workspace_bytes,
    }


def add_reference_logps(
    rows: datasets.Dataset,
    model: nn.Module,
    *,
    arity: Arity,
    head: HeadConfig,
    batch_size: int = 8,
    autocast: torch.dtype | None = None,
    name: str = "data.train",
) -> datasets.Dataset:
    """The dataset with a column `ref_<response>_logps` for every response, computed once and cached beside it.

    The cache's key is made of the rows' tokens and of every weight of the reference, so the next run and a resumed
    one find it again, and a changed model does not.

    Args:
        rows: as `prepare_dataset` makes them.
        model: the reference, on its device.
        arity, head: of the loss and of the head.
        batch_size: rows at a time.
        autocast: the type that training will compute in, if it is not the weights'.
        name: what the progress bar calls the dataset.
    """
    collate, options = PackedCollator(arity), head_arguments(model, head)
    device = next(model.parameters()).device

    def compute(columns: dict[str, list]) -> dict[str, list]:
        batch = collate([dict(zip(columns, row)) for row in zip(*columns.values())])
        layout = batch["layout"]
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        with torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext():
            pieces = iter(reference_logps(model, batch, options).cpu().split(list(layout.lengths)))
        made = [scatter([next(pieces).tolist() for _ in range(n)], arity, "ref_{}_logps") for n in layout.group_sizes]
        return {column: [row[column] for row in made] for column in made[0]}

    added = {f"ref_{response}_logps": feature(arity, "float32") for response in RESPONSES[arity]}
    return rows.map(
        compute,
        batched=True,
        batch_size=batch_size,
        features=datasets.Features({**rows.features, **added}),
        new_fingerprint=Hasher.hash(
            [rows._fingerprint, _weights_key(model), str(autocast), repr(sorted(options.items()))]
        ),
        desc=f"Reference log-probabilities of {name}",
    )


def _weights_key(model: nn.Module) -> str:
    """A hash of the frozen weights and of the model's configuration: what the reference computes with."""
    digest, settings = xxhash.xxh3_128(), base_model(model).config.to_dict()
    digest.update(repr(sorted((k, v) for k, v in settings.items() if k not in _NO_SETTINGS)).encode())
    for key, tensor in sorted(base_model(model).state_dict().items()):
        if ".lora_" not in key and ".modules_to_save." not in key:
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
