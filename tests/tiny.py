"""Models of a few thousand parameters and a byte tokenizer, built on the spot."""

import atexit
import json
import shutil
import tempfile
from pathlib import Path

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
