"""References that follow the policy: clones of the parameters that train, put in the model's place for a forward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from prefkern.layout import Layout
from prefkern.reference import accumulator, span_sums
from prefkern.training.config import ReferenceConfig
from prefkern.training.errors import ConfigError

Reduce = Callable[[Tensor], Tensor]  # adds a tensor up over all processes


class Anchor(ABC):
    """A policy that shares with the trained one all that does not train.

    Its memory is one clone of the trainable parameters: of the adapters under LoRA, of the model elsewhere. A forward
    reads the clones through `torch.func.functional_call` and leaves the model as it was.

    Args:
        model: the policy as training begins, not wrapped by a distributed engine. Parameters that train are cloned.
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights = {
            name: p.detach().to(self.dtype_of(p), copy=True) for name, p in model.named_parameters() if p.requires_grad
        }

    @staticmethod
    def dtype_of(parameter: Tensor) -> torch.dtype:
        """The type in which a parameter's clone is kept."""
        return parameter.dtype

    @torch.no_grad()
    def call(self, model: nn.Module, **inputs: Any) -> Any:
        """`model(**inputs)` with the anchor's weights, in the types of the model's own."""
        own = dict(model.named_parameters())
        weights = {name: w.to(own[name].dtype) for name, w in self.weights.items()}
        return functional_call(model, weights, args=(), kwargs=inputs)

    def observe(self, logps_N: Tensor, ref_logps_N: Tensor, layout: Layout) -> None:
        """See a training micro-batch's log-probabilities under the policy and under the anchor."""
        return None

    @abstractmethod
    def step(self, model: nn.Module, step: int, reduce: Reduce) -> None:
        """Follow the policy after optimizer step number `step`, counted from 1; the same on every process."""

    def copy(self, model: nn.Module) -> None:
        """Become the policy."""
        for name, p in model.named_parameters():
            if name in self.weights:
                self.weights[name].copy_(p.detach())

    def metrics(self) -> dict[str, float]:
        """What there is to log."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run needs, as tensors."""
        return {f"weights.{name}": w for name, w in self.weights.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ConfigError: other parameters train now than then.
        """
        saved = {name.removeprefix("weights."): t for name, t in state.items() if name.startswith("weights.")}
        if saved.keys() != self.weights.keys():
            odd = min(saved.keys() ^ self.weights.keys())
            raise ConfigError(f"the checkpoint's reference has other parameters than train now, such as {odd!r}")
        for name, weight in self.weights.items():
            weight.copy_(saved[name])


class MovingAverage(Anchor):
    """anchor = decay * anchor + (1 - decay) * policy after every optimizer step, in at least fp32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay

    @staticmethod
    def dtype_of(parameter: Tensor) -> torch.dtype:
        return accumulator(parameter.dtype)

    @torch.no_grad()
    def step(self, model: nn.Module, step: int, reduce: Reduce) -> None:
        for name, p in model.named_parameters():
            if name in self.weights:
                weight = self.weights[name]
                weight.lerp_(p.to(weight.dtype), 1 - self.decay)


class PeriodicCopy(Anchor):
    """The policy as it was after the last step whose number `every` divides."""

    def __init__(self, model: nn.Module, every: int) -> None:
        super().__init__(model)
        self.every = every

    def step(self, model: nn.Module, step: int, reduce: Reduce) -> None:
        if step % self.every == 0:
            self.copy(model)


class TriggeredCopy(Anchor):
    """The policy as it was when it had last drifted too far from the copy before.

    A step's gap is the mean over its responses, of all micro-batches and processes, of |log pi(y) - log anchor(y)| in
    nats. When the mean of the last `window` gaps is above `threshold`, the policy is copied and the gaps are forgotten.
    Each step waits once for the device, to read its gap.
    """

    def __init__(self, model: nn.Module, threshold: float, window: int) -> None:
        super().__init__(model)
        self.threshold, self.gaps = threshold, deque(maxlen=window)
        self._sums: Tensor | None = None  # of this step's gaps, and their number
        self._last: float | None = None

    @torch.no_grad()
    def observe(self, logps_N: Tensor, ref_logps_N: Tensor, layout: Layout) -> None:
        offsets = layout.index(logps_N.device).response_offsets
        gap_R = span_sums(logps_N.detach() - ref_logps_N, offsets).abs()
        sums = torch.stack([gap_R.sum(), gap_R.new_tensor(float(len(gap_R)))])
        self._sums = sums if self._sums is None else self._sums + sums

    def step(self, model: nn.Module, step: int, reduce: Reduce) -> None:
        if self._sums is None:
            return
        total, count = reduce(self._sums).tolist()
        self._sums, self._last = None, total / max(count, 1.0)
        self.gaps.append(self._last)
        if len(self.gaps) == self.gaps.maxlen and sum(self.gaps) / len(self.gaps) > self.threshold:
            self.copy(model)
            self.gaps.clear()

    def metrics(self) -> dict[str, float]:
        return {} if self._last is None else {"reference/gap": self._last}

    def state_dict(self) -> dict[str, Tensor]:
        return {**super().state_dict(), "gaps": torch.tensor(list(self.gaps), dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.gaps.clear()
        self.gaps.extend(state["gaps"].tolist())


def make_anchor(config: ReferenceConfig, model: nn.Module) -> Anchor | None:
    """The anchor of a reference that moves; None for one that does not."""
    if config.mode == "ema":
        return MovingAverage(model, config.decay)
    if config.mode == "periodic":
        return PeriodicCopy(model, config.every)
    return TriggeredCopy(model, config.threshold, config.window) if config.mode == "kl_triggered" else None
