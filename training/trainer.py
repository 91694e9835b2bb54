"""A thin Trainer: packed batches, the head on response rows only, the loss over the whole accumulated batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from prefkern.head import LoRA
from prefkern.layout import Layout
from prefkern.losses import Loss
from prefkern.preference import PreferenceOutput, linear_preference_loss
from prefkern.reference import span_sums
from prefkern.token_kl import token_kl
from prefkern.token_logps import token_logps
from prefkern.training.anchors import Anchor, make_anchor
from prefkern.training.collator import PackedCollator
from prefkern.training.config import HeadConfig, ReferenceConfig, ReferenceMode
from prefkern.training.errors import ConfigError
from prefkern.training.metrics import MetricWindow
from prefkern.training.model import Tail, check_model, output_head, pack_forward
from prefkern.training.output_head import OutputHead
from prefkern.training.reference import (
    frozen_copy,
    has_adapters,
    head_arguments,
    logps_tail,
    reference_outputs,
    resolve_reference,
    shares_head,
)


class PreferenceTrainer(Trainer):
    """Trains a causal language model on packed pairs, lists or single responses, as the loss has it.

    The loss of a step is the sum over all prompts (for nll: response tokens) of all accumulated micro-batches of all
    processes, divided by their number: how a batch is split changes nothing.

    Args:
        model: a transformers causal language model, or peft's wrapper of one. Its `forward` is given two keywords.
        args: TrainingArguments; `remove_unused_columns` is ignored.
        loss: a loss of `prefkern.losses`.
        reference: a mode, or a `ReferenceConfig` with its options. "frozen" copies the model now, or uses it with its
            adapters off; "precomputed" expects columns `ref_<response>_logps` (see `add_reference_logps`).
        reference_model: a model to compare with, in place of a frozen copy.
        head: how the output head is run.
        data_collator: see `packed_collator`, which makes the default.
        diagnostics: log the gradient ratios of pairs, see `prefkern.diagnostics`.
        train_dataset, eval_dataset: rows as `prepare_dataset` makes them.
        others: as in transformers.Trainer.
    Raises:
        ConfigError: the reference, the batch size, the diagnostics or the engine do not fit the loss.
        ModelError: the model cannot be trained packed, see `check_model`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        loss: Loss,
        reference: ReferenceMode | ReferenceConfig = "auto",
        reference_model: nn.Module | None = None,
        head: HeadConfig | None = None,
        data_collator: PackedCollator | None = None,
        diagnostics: bool = False,
        **others: Any,
    ) -> None:
        self.loss = loss
        self.diagnostics = diagnostics
        sharded = bool(args.fsdp or args.deepspeed)
        config = resolve_reference(reference, loss, adapters=has_adapters(model), sharded=sharded)
        self.reference = config.mode
        if reference_model is not None and self.reference != "frozen":
            raise ConfigError(f"a reference_model was given, but reference.mode={self.reference!r}: set it to frozen")
        args.remove_unused_columns = False
        args._n_gpu = min(args.n_gpu, 1)  # a packed batch is one sequence: DataParallel could not split it
        check_loss(loss, args, diagnostics)
        collator = data_collator or packed_collator(loss)
        pack_forward(model)
        if not sharded:
            check_model(model)
        check_head(output_head(model), loss, args)
        super().__init__(model, args, data_collator=collator, **others)
        self.model_accepts_loss_kwargs = True  # the loss is normalised over the accumulated batch: do not divide again
        self.loss_is_scaled_for_ga = True
        self._train_window, self._eval_window = MetricWindow(), MetricWindow()
        self._addends: dict[str, float] = {}  # weights of the metrics loss/<name>, where the loss is a sum
        head = head or HeadConfig()
        self._head = self._reference_head = head_arguments(model, head)
        self._reference_model = None
        policy = self.accelerator.unwrap_model(self.model)
        self._anchor = make_anchor(config, policy)
        self.loss_state = loss.new_state()
        if self.loss_state is not None:
            self.loss_state.to(args.device)
        self.add_callback(_AfterStep(self))
        if self.reference == "frozen":
            if reference_model is None:
                frozen = frozen_copy(model)
            else:
                frozen = pack_forward(reference_model).requires_grad_(False).eval()
                check_model(frozen)
                self._reference_head = head_arguments(reference_model, head)
                if loss.needs_token_kl and self._reference_head != self._head:
                    raise ConfigError(
                        f"loss {loss.name!r} compares whole distributions, but the reference_model scales or caps its"
                        " logits in another way: use one of the policy's kind"
                    )
            if frozen is not None:
                self._reference_model = self.accelerator.prepare_model(frozen, evaluation_mode=True)
        self._shares_head = self._reference_model is None and shares_head(policy, config)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | float | None = None,
    ) -> Tensor | tuple[Tensor, PreferenceOutput]:
        """The loss of one micro-batch: its share of the whole batch's, times the number of processes.

        Processes' gradients are averaged, hence the factor.
        """
        ref_logps, ref_rows = self._ref_rows(model, inputs)
        mismatched = self._mismatched(model, inputs) if self.loss.needs_mismatched else None
        if self.loss_state is not None:
            self.loss_state.train(model.training)

        def tail(hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: LoRA | None = None) -> PreferenceOutput:
            kl = None
            if self.loss.needs_token_kl:
                ref_head = (weight, bias) if self._shares_head else ref_rows[1:]
                kl = self._token_kl((hidden, weight, bias), (ref_rows[0], *ref_head), inputs["labels"])
            return linear_preference_loss(
                hidden,
                weight,
                inputs["labels"],
                inputs["layout"],
                self.loss,
                ref_logps=ref_logps,
                token_weights=inputs.get("token_weights"),
                targets=inputs.get("targets"),
                mismatched=mismatched,
                token_kl=kl,
                normalizer=num_items_in_batch,
                bias=bias,
                lora=lora,
                ref_hidden=ref_rows[0] if self._shares_head else None,
                state=self.loss_state,
                on_policy=self.reference == "on_policy",
                diagnostics=self.diagnostics,
                **self._head,
            )

        out = _forward(model, inputs, tail)
        if model.training and self._anchor is not None:
            self._anchor.observe(out.logps, ref_logps, inputs["layout"])
        self._add_metrics(out.metrics, inputs["layout"], model.training, num_items_in_batch)
        loss = out.loss * self.accelerator.num_processes if num_items_in_batch is not None else out.loss
        return (loss, out) if return_outputs else loss

    def _add_metrics(
        self, metrics: dict[str, Tensor], layout: Layout, training: bool, normalizers: Tensor | None
    ) -> None:
        """Add one micro-batch's metrics to the window; loss/<name> counts by what that addend is divided by."""
        window = self._train_window if training else self._eval_window
        window.add(
            {name: value for name, value in metrics.items() if not name.startswith("loss/")},
            layout.num_prompts,
            layout.num_tokens,
            self.loss.metric_shares(metrics),
        )
        parts = [name for name in metrics if name.startswith("loss/")]
        self._addends = dict(zip(parts, (term.weight for term in self.loss.addends())))
        for i, (name, items) in enumerate(zip(parts, self._items(layout))):
            share = 1.0 if normalizers is None else normalizers[i] / items  # the whole batch's, which divided it
            window.add_weighted(name, metrics[name] * share, items)

    def _ref_rows(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor | None, HeadRows | None]:
        """The reference's (N,) log-probabilities, and its hidden rows and head for losses that compare distributions.

        Under a shared head the rows alone: their log-probabilities come from the policy's pass over the weight. None
        where there is none to compute.
        """
        if self.reference in ("none", "on_policy"):
            return None, None
        if self.reference == "precomputed":
            return inputs["ref_logps"], None
        if self._shares_head:
            return None, (self._reference_outputs(model, inputs, _hidden), None, None)
        logps = logps_tail(inputs["labels"], self._reference_head)
        if not self.loss.needs_token_kl:
            return self._reference_outputs(model, inputs, logps), None
        return self._reference_outputs(model, inputs, lambda *rows: (logps(*rows), rows))

    def _token_kl(self, policy: HeadRows, reference: HeadRows, labels: Tensor) -> Tensor:
        """(N,) KL(reference || policy) over the vocabulary, in nats."""
        options = {**self._head, "impl": "eager" if self._head["impl"] == "eager" else "auto"}
        (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias) = policy, reference
        return token_kl(hidden, weight, ref_hidden, ref_weight, labels, bias, ref_bias, **options)

    @torch.no_grad()
    def _mismatched(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """(R,) log-ratio sums of prompts with other prompts' responses, in nats; the policy as it trains."""
        batch = inputs["mismatched"]
        if self._shares_head:
            ref_hidden = self._reference_outputs(model, batch, _hidden)
            ratios = _forward(model, batch, _ratios_tail(batch["labels"], ref_hidden, self._head))
        else:
            ratios = _forward(model, batch, logps_tail(batch["labels"], self._head))
            if self.reference != "none":
                logps = logps_tail(batch["labels"], self._reference_head)
                ratios = ratios - self._reference_outputs(model, batch, logps)
        return span_sums(ratios, batch["layout"].index(ratios.device).response_offsets)

    def _reference_outputs(self, model: nn.Module, inputs: dict[str, Any], tail: Tail) -> Any:
        """What `tail(hidden, weight, bias)` makes of a packed batch under the reference, without gradient."""
        if self._reference_model is not None:
            return reference_outputs(self._reference_model, inputs, tail)
        policy = self.accelerator.unwrap_model(model)
        if self._anchor is not None:
            return reference_outputs(policy, inputs, tail, partial(self._anchor.call, policy), adapters=True)
        return reference_outputs(policy, inputs, tail, forward=model)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | float | None:
        """What the loss is divided by: prompts or tokens, as the loss counts, of all micro-batches of all processes."""
        if not batch_samples:
            return None
        layouts = [batch["layout"] for batch in batch_samples]
        items = torch.tensor([self._items(x) for x in layouts]).sum(0)
        return items.to(device) if self.args.world_size == 1 else self.accelerator.reduce(items.to(device))

    def _items(self, layout: Layout) -> list[float]:
        """What each part of the loss counts, in one batch."""
        return [float(n) for n in self.loss.normalizers(layout, torch.tensor(layout.lengths, dtype=torch.float64))]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer.log, with the metrics averaged since the last training log."""
        if "loss" in logs:
            logs |= self._train_window.flush(self._add_up)
            logs |= {} if self._anchor is None else self._anchor.metrics()
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of one evaluation batch; its metrics are added to the window that `evaluation_loop` reads."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        if not self._addends:
            self._eval_window.add_weighted("loss", loss, self._items(inputs["layout"])[0])
        return loss.detach(), None, None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        """As Trainer.evaluation_loop, with the training metrics under the prefix, as means over the whole set.

        On several processes accelerate repeats a few rows to fill the last batches, and these count twice. Random
        numbers drawn here (a data loader draws one) are given back: evaluating changes nothing in training.
        """
        self._eval_window = MetricWindow()
        with torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(
                dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
        means = self._eval_window.flush(self._add_up)
        if self._addends:  # each is a mean over what it counts: batches have no weight that would fit them all
            means["loss"] = sum(weight * means[name] for name, weight in self._addends.items())
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def _add_up(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, reduction="sum")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer.save_model, with the loss's running state beside the weights, and in checkpoints the anchor.

        A checkpoint's `trainer_state.json` is written after this, so one cut short here is seen to be cut short.
        """
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            for name, part in self._saved_parts():
                if _internal_call or part is self.loss_state:
                    tensors = {key: t.detach().cpu().contiguous() for key, t in part.state_dict().items()}
                    save_file(tensors, Path(output_dir or self.args.output_dir) / f"{name}.safetensors")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in Trainer, with what `save_model` saved beside the weights."""
        super()._load_optimizer_and_scheduler(checkpoint)
        for name, part in self._saved_parts() if checkpoint is not None else ():
            path = Path(checkpoint) / f"{name}.safetensors"
            if not path.exists():
                raise ConfigError(
                    f"{str(path)!r} is missing, so the run cannot go on as it was: start from an older checkpoint"
                )
            part.load_state_dict(load_file(path))

    def _saved_parts(self) -> Iterator[tuple[str, Anchor | nn.Module]]:
        """What is saved beside the weights, each under a file name."""
        if self._anchor is not None:
            yield "reference", self._anchor
        if self.loss_state is not None and self.loss_state.state_dict():
            yield "loss_state", self.loss_state

    def _after_step(self) -> None:
        """After an optimizer step, before its checkpoint."""
        if self._anchor is not None:
            self._anchor.step(self.accelerator.unwrap_model(self.model), self.state.global_step, self._add_up)
        if self.loss_state is not None and self.args.world_size > 1:
            for buffer in self.loss_state.buffers():  # each process may have seen its own share of the batch alone
                if buffer.is_floating_point():
                    buffer.copy_(self.accelerator.reduce(buffer, reduction="mean"))


# Hidden states, and the head's weight and bias; no weight where the policy's serves.
HeadRows = tuple[Tensor, Tensor | None, Tensor | None]


def packed_collator(loss: Loss, max_length: int | None = None) -> PackedCollator:
    """The collator that a loss wants.

    Args:
        max_length: the most tokens of a prompt with another's response, where the loss needs such sequences.
    """
    return PackedCollator(loss.arity, getattr(loss, "accumulate", "segment"), loss.needs_mismatched, max_length)


def check_loss(loss: Loss, args: TrainingArguments, diagnostics: bool) -> None:
    """Raise ConfigError where batch size, diagnostics or engine do not fit the loss."""
    if diagnostics and loss.arity != "pair":
        raise ConfigError(
            f"run.gradient_ratios=true compares the responses of a pair, but loss {loss.name!r} is not of pairs"
        )
    if loss.needs_mismatched and args.per_device_train_batch_size < 2:
        raise ConfigError(
            f"loss {loss.name!r} needs prompts with the responses of other prompts in the batch: set"
            " trainer.per_device_train_batch_size to 2 or more"
        )
    if loss.needs_token_kl and args.fsdp:
        raise ConfigError(
            f"loss {loss.name!r} needs the reference's head while the policy runs, but FSDP keeps a head only while its"
            " own model runs: train with DDP or ZeRO-2"
        )


def check_head(head: OutputHead, loss: Loss, args: TrainingArguments) -> None:
    """Raise ConfigError where the loss or the engine does not fit an adapted output head."""
    if head.adapter is not None and loss.needs_token_kl:
        raise ConfigError(
            f"loss {loss.name!r} compares whole distributions, which cannot be done yet where the output head is"
            " adapted: leave it out of model.lora.target_modules"
        )
    if args.fsdp and (head.adapter is not None or head.is_copy):
        raise ConfigError(
            "peft has FSDP keep the weights that train on the output head in units of their own, out of reach: leave it"
            " out of model.lora, or train with DDP or ZeRO-2"
        )


def _forward(model: nn.Module, batch: dict[str, Any], tail: Tail) -> Any:
    return model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        response_rows=batch["response_rows"],
        sequence_lengths=batch["sequence_lengths"],
        tail=tail,
    )


def _hidden(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    """The tail that leaves the rows as they are."""
    return hidden


def _ratios_tail(labels: Tensor, ref_hidden: Tensor, options: dict[str, Any]) -> Tail:
    """The tail that makes log-ratios of hidden states and a reference's under the same head."""

    def tail(hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: LoRA | None = None) -> Tensor:
        out = token_logps(hidden, weight, labels, bias=bias, lora=lora, ref_hidden=ref_hidden, **options)
        return out.logps - out.ref_logps

    return tail


class _AfterStep(TrainerCallback):
    """Calls the trainer back after every optimizer step, before logs, evaluation and checkpoint."""

    def __init__(self, trainer: PreferenceTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._after_step()
