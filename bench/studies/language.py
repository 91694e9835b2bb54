"""The demo's small language model and word problems, with a training loop that a study can look into.

The start is the demo's: fine-tuned on solutions most of which have a slip. It is made once (a minute
or two) and kept under runs/studies, under a name that changes with whatever it is made of.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import prefkern as pk
from bench.studies.common import SCRATCH, WORKERS, in_parallel
from prefkern.training import demo_data, demo_model
from prefkern.training.collator import PackedCollator
from prefkern.training.demo_data import Example, draw_examples, mixed_solutions, read_answer, write_jsonl
from prefkern.training.model import pack_forward

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Sizes:
    """Sizes of the task. Counts are of problems."""

    hidden_size: int = 128
    layers: int = 3
    start_steps: int = 1200
    start_batch: int = 16
    pairs: int = 960
    test: int = 240
    slipped_share: float = 0.7
    pitfall_share: float = 0.85


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW, linear warm-up over a tenth of the steps, then linear decay to 0."""

    steps: int = 60
    batch: int = 16
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    beta2: float = 0.98
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Setting:
    """What a study is run with."""

    sizes: Sizes = Sizes()
    recipe: Recipe = Recipe()
    repeats: int = 4
    quick: bool = False


FULL = Setting()
QUICK = Setting(
    Sizes(hidden_size=32, layers=2, start_steps=20, start_batch=8, pairs=8, test=12), Recipe(2, 4), 2, quick=True
)


@dataclass(frozen=True)
class Packed:
    """A packed batch as `PackedCollator` makes it, with a name for each thing in it."""

    fields: Mapping[str, Any]

    @property
    def layout(self) -> pk.Layout:
        return self.fields["layout"]

    @property
    def labels_N(self) -> Tensor:
        return self.fields["labels"]

    def forward(self, model: nn.Module, tail: Callable[[Tensor, Tensor], Any]) -> Any:
        """`tail(hidden_ND, weight_VD)` of the rows that predict response tokens."""
        names = ("input_ids", "position_ids", "response_rows", "sequence_lengths")
        return model(**{name: self.fields[name] for name in names}, tail=lambda hidden, weight, _: tail(hidden, weight))

    def logps(self, model: nn.Module) -> Tensor:
        """(N,) log-probabilities of the response tokens, differentiable."""
        return self.forward(model, lambda hidden, weight: pk.token_logps(hidden, weight, self.labels_N).logps)

    def response_sums(self, values_N: Tensor) -> Tensor:
        """(R,) sums over each response."""
        return torch.stack([part.sum() for part in values_N.split(list(self.layout.lengths))])


@dataclass(frozen=True)
class Task:
    """The start model, and the training pairs and held-out problems of one repeat."""

    repeat: int
    start: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    pairs: Sequence[Example]
    test: Sequence[Example]

    def policy(self) -> PreTrainedModel:
        """A fresh copy of the start, ready to be trained."""
        return pack_forward(copy.deepcopy(self.start)).train()

    @cached_property
    def reference(self) -> PreTrainedModel:
        return pack_forward(copy.deepcopy(self.start)).requires_grad_(False).eval()

    def pack(self, examples: Sequence[Example]) -> Packed:
        return _pack(self.tokenizer, [{"prompt": e.prompt, "chosen": e.chosen, "rejected": e.rejected}
                                      for e in examples], "pair")  # fmt: skip

    def batches(self, recipe: Recipe) -> list[Packed]:
        """The training pairs, each seen once, in as many batches as there are steps."""
        assert len(self.pairs) >= recipe.steps * recipe.batch
        return chunks(self.pack, self.pairs[: recipe.steps * recipe.batch], recipe.batch)

    @cached_property
    def test_batches(self) -> list[Packed]:
        return chunks(self.pack, self.test, 16)


def over_repeats(one_repeat: Callable[[Task, Setting], list[dict]], quick: bool) -> list[dict]:
    """The rows of all repeats; `one_repeat` is a function of a module, for it is run in other processes."""
    setting = QUICK if quick else FULL
    make_task(setting.sizes)  # so that the start is there before the workers ask for it
    calls = [(one_repeat, repeat, setting) for repeat in range(setting.repeats)]
    return in_parallel(_repeat, calls, quick)


def _repeat(one_repeat: Callable, repeat: int, setting: Setting) -> list[dict]:
    return one_repeat(make_task(setting.sizes, repeat), setting)


def make_task(sizes: Sizes, repeat: int = 0) -> Task:
    """The task of a repeat: its own pairs and its own held-out problems, but the same start for all.

    The start comes from runs/studies where it has been made before.
    """
    transformers.utils.logging.disable_progress_bar()  # of reading and writing weights
    taken: set[str] = set()
    flawed = draw_examples(sizes.start_steps * sizes.start_batch, "train", 0, sizes.pitfall_share, taken)
    pairs = draw_examples(sizes.pairs, "train", 1 + repeat, sizes.pitfall_share, taken)
    test = draw_examples(sizes.test, "test", repeat, sizes.pitfall_share)
    folder = SCRATCH / f"start-{_key(sizes)}"
    if not (folder / "model.safetensors").exists():
        _make_start(folder, sizes, mixed_solutions(flawed, sizes.slipped_share, 0))
    start, tokenizer = demo_model.load(folder)
    return Task(repeat, start.cpu(), tokenizer, pairs, test)


def train(
    model: nn.Module,
    recipe: Recipe,
    loss: Callable[[nn.Module, int], Tensor],
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Train a model in place.

    Args:
        loss: the scalar to minimise, of the model and the step's number, counted from 0.
        after_step: called with the number of steps done.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, recipe.beta2), weight_decay=recipe.weight_decay
    )
    warmup = max(1, recipe.steps // 10)
    for step in range(recipe.steps):
        share = min((step + 1) / warmup, (recipe.steps - step) / max(1, recipe.steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, share)
        optimizer.zero_grad()
        loss(model, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        if after_step is not None:
            after_step(step + 1)


@torch.no_grad()
def reference_logps(model: nn.Module, batches: Sequence[Packed]) -> list[Tensor]:
    """(N,) log-probabilities of each batch's response tokens."""
    return [batch.logps(model) for batch in batches]


@torch.no_grad()
def pair_sums(model: nn.Module, batches: Sequence[Packed]) -> tuple[Tensor, Tensor]:
    """(P,) log-probabilities of the chosen and of the rejected responses, in nats."""
    model.eval()
    sums = torch.cat([batch.response_sums(batch.logps(model)) for batch in batches])
    return sums[0::2], sums[1::2]


def answers(model: PreTrainedModel, task: Task) -> tuple[list[bool], list[int]]:
    """Whether each test problem's greedy solution ends in the right number, and its length in tokens."""
    model.eval()
    texts = demo_model.greedy(model, task.tokenizer, [e.prompt for e in task.test], MAX_NEW_TOKENS)
    right = [read_answer(text) == read_answer(e.chosen) for text, e in zip(texts, task.test)]
    return right, [len(ids) for ids in task.tokenizer(texts)["input_ids"]]


def _make_start(folder: Path, sizes: Sizes, solutions: Sequence[Mapping[str, str]]) -> None:
    print(f"[language] fine-tuning the start model ({folder})", flush=True)
    torch.set_num_threads(WORKERS)  # nothing else is running yet
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = demo_model.make_tokenizer(write_jsonl(solutions, folder / "solutions.jsonl"))
    model = pack_forward(demo_model.make_model(tokenizer, sizes.hidden_size, sizes.layers, seed=0))
    size = sizes.start_batch
    recipe = Recipe(sizes.start_steps, size, learning_rate=4e-3, weight_decay=0.1)
    batches = [_pack(tokenizer, solutions[i : i + size], "single") for i in range(0, len(solutions), size)]
    nll = pk.losses.get("nll")
    train(model, recipe, lambda m, i: pk.preference_loss(batches[i].logps(m), batches[i].layout, nll).loss)
    torch.set_num_threads(1)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def chunks(pack: Callable, examples: Sequence[Example], size: int) -> list[Packed]:
    return [pack(examples[i : i + size]) for i in range(0, len(examples), size)]


def _pack(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Mapping[str, str]], arity: str) -> Packed:
    """Prompts and responses as tokens, the responses with an end token."""

    def ids(name: str, text: str) -> list[int]:
        return tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * (name != "prompt")

    return Packed(PackedCollator(arity)([{f"{k}_ids": ids(k, v) for k, v in row.items()} for row in rows]))


def _key(sizes: Sizes) -> str:
    sources = "".join(inspect.getsource(module) for module in (demo_data, demo_model))
    made_by = inspect.getsource(_make_start) + inspect.getsource(train) + repr(astuple(sizes)[:4] + astuple(sizes)[6:])
    return hashlib.sha256((sources + made_by).encode()).hexdigest()[:12]
