"""The policy that a loss compares with: a frozen copy, the same model with its adapters off, or numbers made before."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import datasets
import torch
import xxhash
from datasets.fingerprint import Hasher
from torch import Tensor, nn

from prefkern.losses import Loss
from prefkern.token_logps import token_logps
from prefkern.training.collator import PackedCollator
from prefkern.training.config import HeadConfig, ReferenceMode
from prefkern.training.data import RESPONSES
from prefkern.training.errors import ConfigError
from prefkern.training.model import base_model, head_options


def resolve_reference(mode: ReferenceMode, loss: Loss) -> ReferenceMode:
    """The mode that "auto" stands for; the others are checked against the loss.

    Raises:
        ConfigError: a reference for a loss without one, or none for a loss that needs it.
    """
    if mode == "auto":
        return "frozen" if loss.needs_reference else "none"
    if loss.needs_reference and mode == "none":
        raise ConfigError(f"loss {loss.name!r} compares with a reference: set reference.mode to frozen or precomputed")
    if not loss.needs_reference and mode != "none":
        raise ConfigError(f"loss {loss.name!r} uses no reference: remove reference.mode={mode!r}")
    return mode


def has_adapters(model: nn.Module) -> bool:
    """Whether the model is wrapped by peft, so that switching its adapters off gives the reference."""
    return hasattr(model, "disable_adapter")


def frozen_copy(model: nn.Module) -> nn.Module | None:
    """A copy of the model that takes no gradient and no dropout; None where switching adapters off does the same."""
    return None if has_adapters(model) else copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def reference_logps(
    model: nn.Module, batch: dict[str, Any], options: dict[str, Any], forward: Callable | None = None
) -> Tensor:
    """Log-probabilities of a packed batch's response tokens under the reference.

    Args:
        model: a frozen copy, or a policy with adapters, which are off during the call.
        batch: as `PackedCollator` makes it, on the model's device.
        options: keywords of `token_logps` that describe the head.
        forward: what to call in the model's place (the same model as its distributed engine wraps it).
    Returns:
        (N,) fp32, in nats.
    """

    def tail(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return token_logps(hidden, weight, batch["labels"], bias=bias, **options).logps

    training = model.training
    model.eval()
    try:
        with model.disable_adapter() if has_adapters(model) else contextlib.nullcontext():
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
    arity: str,
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
    collate, responses, options = PackedCollator(arity), RESPONSES[arity], head_arguments(model, head)
    device = next(model.parameters()).device

    def compute(columns: dict[str, list]) -> dict[str, list]:
        batch = collate([dict(zip(columns, row)) for row in zip(*columns.values())])
        lengths = list(batch["layout"].lengths)
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        with torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext():
            pieces = reference_logps(model, batch, options).cpu().split(lengths)
        return {f"ref_{r}_logps": [p.tolist() for p in pieces[i :: len(responses)]] for i, r in enumerate(responses)}

    logps = datasets.Sequence(datasets.Value("float32"))
    return rows.map(
        compute,
        batched=True,
        batch_size=batch_size,
        features=datasets.Features({**rows.features, **{f"ref_{r}_logps": logps for r in responses}}),
        new_fingerprint=Hasher.hash(
            [rows._fingerprint, _weights_key(model), str(autocast), repr(sorted(options.items()))]
        ),
        desc=f"Reference log-probabilities of {name}",
    )


def _weights_key(model: nn.Module) -> str:
    """A hash of the frozen weights: what the reference computes with."""
    digest = xxhash.xxh3_128()
    for key, tensor in sorted(base_model(model).state_dict().items()):
        if ".lora_" not in key:
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
