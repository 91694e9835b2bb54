"""The demo's language model and tokenizer, made from nothing, and what is measured on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from prefkern.training.collator import PackedCollator
from prefkern.training.config import DataConfig, HeadConfig
from prefkern.training.data import prepare_dataset
from prefkern.training.model import pack_forward
from prefkern.training.reference import head_arguments, reference_logps
from prefkern.training.sources import load_rows

EOS = "<eos>"
PAD = "<pad>"


def make_tokenizer(rows: Path, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the prompts and completions of a JSONL file; every digit is a token of its own.

    The arithmetic is done digit by digit; numbers as whole tokens would leave nothing to read an unseen number by.
    """
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = rows.read_text().splitlines()[:2000]  # enough to meet every word
    texts = (text for line in lines for text in json.loads(line).values())
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def make_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int, seed: int) -> LlamaForCausalLM:
    """A freshly initialised Llama-architecture model for the tokenizer's vocabulary; heads are 32 wide."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        max_position_embeddings=256,
        initializer_range=0.06,  # the usual 0.02 suits wide models; one this narrow learns faster from larger weights
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A saved model, ready to be measured, on the GPU where there is one, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch: int = 120,
) -> list[str]:
    """The greedy continuation of each prompt, decoded in batches (padded on the left) with a key-value cache."""
    texts: list[str] = []
    for first in tqdm(range(0, len(prompts), batch), desc="Greedy decoding", unit="batch", leave=False):
        inputs = tokenizer(
            list(prompts[first : first + batch]),
            return_tensors="pt",
            padding=True,
            padding_side="left",
            return_token_type_ids=False,
        ).to(model.device)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        texts += tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def pair_logps(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: Path, batch: int = 4
) -> tuple[list[float], list[float]]:
    """Log-probabilities of the chosen and of the rejected responses, in nats, summed over a response's tokens and EOS.

    Read, packed and run exactly as in training.

    Args:
        pairs: JSON lines with prompt, chosen and rejected.
        batch: pairs packed together.
    """
    name = f"{pairs.stem} pairs"
    rows = prepare_dataset(load_rows(str(pairs), "train", key=name), tokenizer, DataConfig(train=str(pairs)), name=name)
    collate, options = PackedCollator("pair"), head_arguments(model, HeadConfig())
    pack_forward(model)
    sums: list[float] = []
    for first in tqdm(range(0, len(rows), batch), desc="Log-probabilities", unit="batch", leave=False):
        packed = collate([rows[i] for i in range(first, min(first + batch, len(rows)))])
        lengths = list(packed["layout"].lengths)
        packed = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in packed.items()}
        sums += [float(x.sum()) for x in reference_logps(model, packed, options).cpu().split(lengths)]
    return sums[0::2], sums[1::2]
