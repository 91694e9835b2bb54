"""Whole training steps: `PreferenceTrainer` against TRL's `DPOTrainer` on the same model, data and arguments.

Each runs its steps in a process of its own, in turn: tokeniser, collator, reference, policy, head, loss, backward and
optimizer as the trainers have them. Policy and reference differ, so the losses do; they have to agree at every step.
Time is that from the end of a step to the end of the next, first one left out; peak memory that of all steps beyond
model, reference and data.

The model is a small Llama with a vocabulary that is large for it, as real ones' are; fp32 on a CPU.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from bench import fresh
from bench.providers import BETA
from bench.record import Record, case_record, percentiles, provenance
from bench.shapes import Shape

TRAINERS = ("trl", "prefkern")
LOSS_WITHIN = 1e-4


@dataclass(frozen=True)
class Size:
    """The model and how much it is trained on."""

    vocab: int = 32_000
    hidden: int = 256
    layers: int = 4
    pairs: int = 4  # of a step
    steps: int = 4
    longest: int = 96  # tokens of a prompt or response


@dataclass(frozen=True)
class Steps:
    losses: list[float]
    seconds: list[float]
    tokens: list[int]  # of prompts and responses, of each step
    peak_extra_mib: float


def compare_trainers(size: Size = Size(), rounds: int = 3) -> list[Record]:
    """A record for each trainer.

    Raises:
        AssertionError: the losses of a step differ by more than LOSS_WITHIN.
        RuntimeError: a process failed.
    """
    shape = Shape(size.pairs, size.hidden, size.vocab)
    origin = provenance()
    if importlib.util.find_spec("trl") is None:
        return [{**origin, **case_record("trainer", shape, "fp32", "step", "trl"), "left_out": "trl is not installed"}]
    runs: dict[str, list[Steps]] = {name: [] for name in TRAINERS}
    for _ in range(rounds):
        for name in TRAINERS:
            runs[name].append(fresh.in_a_process(train, name, size))
    return [{**origin, **r} for r in records(runs, shape)]


def records(runs: dict[str, list[Steps]], shape: Shape) -> list[Record]:
    """Of several processes of each trainer; AssertionError where their losses disagree."""
    for ours, theirs in zip(runs["prefkern"], runs["trl"], strict=True):
        assert ours.tokens == theirs.tokens, f"other batches: {ours.tokens} and {theirs.tokens} tokens"
        for step, (a, b) in enumerate(zip(ours.losses, theirs.losses, strict=True)):
            assert abs(a - b) <= LOSS_WITHIN, f"step {step}: our loss is {a}, TRL's {b}"
    found = []
    for name, parts in runs.items():
        pairs = [pair for p, q in zip(parts, runs["trl"], strict=True) for pair in zip(p.losses, q.losses, strict=True)]
        times = [seconds for part in parts for seconds in part.seconds[1:]]
        tokens = [n for part in parts for n in part.tokens[1:]]
        found.append({
            **case_record("trainer", shape, "fp32", "step", name), **percentiles(times), "times_s": times,
            "tokens_per_s": sum(tokens) / sum(times), "losses": parts[0].losses,
            "loss_difference": max(abs(a - b) for a, b in pairs),  # from TRL's, of any step
            "peak_extra_mib": max(part.peak_extra_mib for part in parts),
        })  # fmt: skip
    for r in found:
        r["ratio"] = r["p50_s"] / found[0]["p50_s"]  # to TRL's
    return found


def train(name: str, size: Size) -> Steps:
    """Run the steps in this process."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import datasets
    import transformers

    warnings.simplefilter("ignore", FutureWarning)  # of packages about each other
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(name, size, folder)
        trainer.remove_callback(transformers.PrinterCallback)
        seen: dict[str, list[Any]] = {"losses": [], "seconds": [], "tokens": []}
        watch(trainer, seen)
        before = fresh.reset_peak()
        trainer.train()
        peak = fresh.peak() - before
    return Steps(**seen, peak_extra_mib=peak / 2**20)


def make(name: str, size: Size, folder: str):
    """A trainer that is ready to train."""
    import datasets

    policy, reference = models(size)
    rows, tokens = texts(size), tokenizer(size)
    arguments = dict(
        output_dir=folder, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, logging_strategy="no",
        save_strategy="no", gradient_checkpointing=False, dataloader_pin_memory=False, max_steps=size.steps,
        per_device_train_batch_size=size.pairs, learning_rate=1e-3, lr_scheduler_type="constant", seed=0,
    )  # fmt: skip
    data = datasets.Dataset.from_list(rows)
    if name == "trl":
        import trl

        config = trl.DPOConfig(beta=BETA, **arguments)
        return trl.DPOTrainer(policy, reference, config, train_dataset=data, processing_class=tokens)
    import transformers

    import prefkern as pk
    from prefkern.training.columns import Needs
    from prefkern.training.config import DataConfig
    from prefkern.training.data import prepare_dataset
    from prefkern.training.trainer import PreferenceTrainer

    loss = pk.losses.get("dpo", beta=BETA)
    data = prepare_dataset(data, tokens, DataConfig(train="made here"), Needs.of(loss))
    config = transformers.TrainingArguments(**arguments)
    return PreferenceTrainer(policy, config, loss=loss, reference_model=reference, train_dataset=data)


def watch(trainer, seen: dict[str, list[Any]]) -> None:
    """Note loss, time and tokens of every step.

    A step's time starts where the one before ends: batches are collated one step ahead, so a time that starts at the
    collation of a step's own batch would span two steps.
    """
    import transformers

    step, collate, ends = trainer.training_step, trainer.data_collator, []

    def training_step(*args, **kwargs):
        loss = step(*args, **kwargs)
        seen["losses"].append(loss.item())
        return loss

    def data_collator(rows):
        responses = [row[f"{r}_ids"] for row in rows for r in ("chosen", "rejected")]
        seen["tokens"].append(sum(2 * len(row["prompt_ids"]) for row in rows) + sum(map(len, responses)))
        return collate(rows)

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            ends.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())
            seen["seconds"].append(ends[-1] - ends[-2])

    trainer.training_step, trainer.data_collator = training_step, data_collator
    trainer.add_callback(Clock())


def models(size: Size) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A policy, and a reference some way off."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocab, hidden_size=size.hidden, intermediate_size=2 * size.hidden, num_attention_heads=4,
        num_hidden_layers=size.layers, num_key_value_heads=4, max_position_embeddings=4 * size.longest, bos_token_id=0,
        eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    policy = LlamaForCausalLM(config)
    reference = copy.deepcopy(policy).requires_grad_(False)
    for p in reference.parameters():
        p.add_(0.01 * torch.randn_like(p))
    return policy, reference


def tokenizer(size: Size):
    """One word, one token: w3, w4, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, size.vocab)}}
    body = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    body.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=body, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def texts(size: Size) -> list[dict[str, str]]:
    """Pairs of unequal lengths, enough for every step to have its own."""
    generator = torch.Generator().manual_seed(0)

    def text() -> str:
        length = int(torch.randint(size.longest // 4, size.longest, (1,), generator=generator))
        return "".join(f" w{i}" for i in torch.randint(3, size.vocab, (length,), generator=generator).tolist())

    return [{key: text() for key in ("prompt", "chosen", "rejected")} for _ in range(size.pairs * size.steps)]
