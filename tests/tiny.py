"""Models of a few thousand parameters and a byte tokenizer, built on the spot."""

import atexit
import json
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import datasets
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefkern.losses import Loss
from prefkern.training.callbacks import read_metrics
from prefkern.training.cli import main
from prefkern.training.columns import Needs
from prefkern.training.resolve import resolve_loss

datasets.config.HF_DATASETS_CACHE = Path(tempfile.mkdtemp(prefix="prefkern-tests-"))  # leave the user's cache alone
atexit.register(shutil.rmtree, datasets.config.HF_DATASETS_CACHE, ignore_errors=True)

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(*, eos: str | None = "</s>", adds_bos: bool = True, chat_template: str | None = CHAT, extra: int = 0):
    """A byte tokenizer with one merge ("ab" is one token), <s> and </s>; `extra` more tokens x0, x1, ... at the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *alphabet, "ab"]
    body = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("a", "b")]))
    body.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    body.decoder = decoders.ByteLevel()
    body.add_tokens([f"<x{i}>" for i in range(extra)])
    if adds_bos:
        body.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=body, bos_token="<s>", eos_token=eos, additional_special_tokens=["</s>"]
    )
    made.chat_template = chat_template
    return made


def llama(vocab: int = 259, dropout: float = 0.0, **options) -> LlamaForCausalLM:
    """A two-layer Llama of width 16 with fixed weights."""
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    config = {
        **sizes,
        "max_position_embeddings": 128,
        "attention_dropout": dropout,
        "initializer_range": 0.3,
        **options,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, bos_token_id=0, eos_token_id=1, **config))


def pairs(n: int = 24) -> list[dict]:
    """Preference rows of several lengths."""
    return [
        {
            "prompt": f"{i} and {i % 5} make ",
            "chosen": f"{i + i % 5}",
            "rejected": f"{i + i % 5 + 1}, or{'!' * (i % 4)}",
        }
        for i in range(n)
    ]


def completions(n: int = 24) -> list[dict]:
    """Prompts with one response each."""
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(n)]


def lists(n: int = 24) -> list[dict]:
    """Prompts with two to four responses; scores are positive and add up to 1, so that they may be probabilities."""
    rows = []
    for i in range(n):
        parts = [1 + (i + j) % 4 for j in range(2 + i % 3)]
        texts = [f"{i + j}, or{'!' * (j * i % 3)}" for j in range(len(parts))]
        rows.append({"prompt": f"{i} is ", "completions": texts, "scores": [part / sum(parts) for part in parts]})
    return rows


def unpaired(n: int = 24) -> list[dict]:
    """Prompts with one response each, every other one desirable."""
    return [{**row, "label": i % 2 == 0} for i, row in enumerate(completions(n))]


def soft(n: int = 24) -> list[dict]:
    """Pairs with the probability that chosen is the better one: 0, 1/4, ... 1."""
    return [{**row, "preference": i % 5 / 4} for i, row in enumerate(pairs(n))]


def weighted(rows: list[dict]) -> list[dict]:
    """The rows with a weight for each token of `tokenizer()`, EOS counted; the weights differ within a response."""
    tok = tokenizer()

    def weights(text: str) -> list[float]:
        ids = tok(text, add_special_tokens=False)["input_ids"]
        return [(1 + t % 3) / 4 for t in range(len(ids) + 1)]

    def columns(row: dict) -> dict:
        cells = {r: row[r] for r in ("chosen", "rejected", "completion", "completions") if r in row}
        return {
            f"{r}_token_weights": weights(cell) if isinstance(cell, str) else [weights(text) for text in cell]
            for r, cell in cells.items()
        }

    return [{**row, **columns(row)} for row in rows]


def rows_for(loss: Loss, n: int = 24) -> list[dict]:
    """Rows with every column that a loss reads, chosen by what the loss says of itself."""
    needs = Needs.of(loss)
    kinds = {"label": unpaired, "preference": soft}
    rows = kinds.get(needs.target_kind, {"pair": pairs, "single": completions, "list": lists}[needs.arity])(n)
    if needs.target_kind == "score" and needs.arity != "list":
        rows = [row | {c: (i + k) % 3 / 2 for k, c in enumerate(needs.target_columns)} for i, row in enumerate(rows)]
    if needs.boundaries:
        rows = [row | {c: [1] for c in needs.boundary_columns} for row in rows]
    return weighted(rows) if needs.token_weights else rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_run(folder: Path, *, rows: list[dict] | None = None, model=None, tok=None, **sections) -> dict:
    """Model, tokenizer and data on disk, and the configuration of a short run over them as nested mappings."""
    (model or llama()).save_pretrained(folder / "model")
    (tok or tokenizer()).save_pretrained(folder / "model")
    write_jsonl(folder / "data.jsonl", pairs() if rows is None else rows)
    config = {
        "run": {"output": str(folder / "out")},
        "model": {"name": str(folder / "model")},
        "data": {"train": str(folder / "data.jsonl")},
        "loss": {"name": "dpo"},
        "trainer": {"learning_rate": 1e-3, "per_device_train_batch_size": 4, "disable_tqdm": True, "use_cpu": True},
    }
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section}
    return config


def train(folder: Path, loss: dict, output: Path, *overrides: str) -> list[dict]:
    """What two steps of `prefkern train` with a loss section log, run in this process on the model of `write_run`.

    The rows are those of `rows_for`, four a step in their order; `output` is the run's folder.
    """
    data = write_jsonl(output.with_name(f"{output.name}.jsonl"), rows_for(resolve_loss(loss), 8))
    trainer = {
        "max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4, "train_sampling_strategy": "sequential",
        "learning_rate": 1e-3, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    config = {
        "run": {"output": str(output)}, "model": {"name": str(folder / "model")}, "data": {"train": str(data)},
        "loss": loss, "trainer": trainer,
    }  # fmt: skip
    file = output.with_name(f"{output.name}.yaml")
    file.write_text(yaml.safe_dump(config))
    with mock.patch("prefkern.training.run.draw_curves"):  # three quarters of the time, and tested on its own
        assert main(["train", str(file), *overrides]) == 0
    return [line for line in read_metrics(output / "metrics.jsonl") if "loss" in line]
