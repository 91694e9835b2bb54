"""The output head in force: plain, copied for training (peft's modules_to_save), or with a low-rank adapter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from prefkern.head import LoRA
from prefkern.training.errors import ModelError

_ELSE = "leave it out of model.lora.target_modules, or adapt it by plain LoRA"


@dataclass(frozen=True)
class Adapter:
    """peft's LoRA on the output head: scale * b(a(dropout(hidden))) is added to the logits."""

    a: nn.Linear
    b: nn.Linear
    scale: float
    dropout: nn.Module

    def of(self, hidden_ND: Tensor) -> LoRA:
        """What the head's kernels take, for these hidden states; dropout is drawn now."""
        drops = self.dropout.training and not isinstance(self.dropout, nn.Identity)
        dropped = self.dropout(hidden_ND.to(self.a.weight.dtype)) if drops else None
        return LoRA(self.a.weight, self.b.weight, self.scale, dropped)


@dataclass(frozen=True)
class OutputHead:
    """The layer whose weight (V, D) and bias (V,) or None make logits of hidden states, and the adapter on it.

    Fields:
        is_copy: peft trains a copy of the head (modules_to_save): with adapters off, the weight is another.
    """

    layer: nn.Module
    adapter: Adapter | None = None
    is_copy: bool = False

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.layer, "bias", None)

    @property
    def trains(self) -> bool:
        """Whether anything of it takes a gradient."""
        parts = [self.layer] if self.adapter is None else [self.layer, self.adapter.a, self.adapter.b]
        return any(p.requires_grad for part in parts for p in part.parameters())


def head_in_force(head: nn.Module) -> OutputHead:
    """What an output layer computes with now, as peft's adapters on it are switched on or off.

    Raises:
        ModelError: it is wrapped in another way than by modules_to_save or one plain, unmerged LoRA.
    """
    if not _is_wrapped(head):
        return OutputHead(head)
    from peft.tuners.lora import Linear
    from peft.utils import ModulesToSaveWrapper

    if isinstance(head, ModulesToSaveWrapper):
        active = head.active_adapters
        off = head.disable_adapters or not active or any(name not in head.modules_to_save for name in active)
        found = OutputHead(head.original_module if off else head.modules_to_save[active[0]], is_copy=True)
    elif isinstance(head, Linear):
        found = OutputHead(head.base_layer, _adapter(head))
    else:
        raise _unsupported(head)
    if _is_wrapped(found.layer):
        raise _unsupported(found.layer)
    return found


def _is_wrapped(head: nn.Module) -> bool:
    return hasattr(head, "base_layer") or hasattr(head, "original_module")


def _adapter(head: nn.Module) -> Adapter | None:
    if head.merged:
        raise ModelError("the output head's adapter is merged into its weight: call unmerge_adapter() before")
    names = [name for name in head.active_adapters if name in head.lora_A]
    if head.disable_adapters or not names:
        return None
    if len(names) > 1:
        raise ModelError(f"the output head has several active adapters ({', '.join(names)}): choose one by set_adapter")
    [name] = names
    if name in getattr(head, "lora_variant", ()) or getattr(head, "use_dora", {}).get(name):
        raise ModelError(f"the output head's adapter is DoRA or another variant of LoRA: {_ELSE}")
    if head.lora_B[name].bias is not None:
        raise ModelError("the output head's adapter has a bias, which is not supported: set lora_bias=False")
    return Adapter(head.lora_A[name], head.lora_B[name], head.scaling[name], head.lora_dropout[name])


def _unsupported(head: nn.Module) -> ModelError:
    kind = f"{type(head).__module__.split('.')[0]}'s {type(head).__name__}"
    return ModelError(f"the output head is wrapped by {kind}, which is not supported: {_ELSE}")
