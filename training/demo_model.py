"""The demo's language model and tokenizer, made from nothing, and what is measured on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

EOS = "<eos>"
PAD = "<pad>"


def make_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the texts, in which every digit is a token of its own (with its leading space).

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
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], max_new_tokens: int, batch: int = 128
) -> list[str]:
    """The model's greedy continuation of each prompt, decoded in batches (padded on the left) with a key-value cache."""
    model.eval()
    texts: list[str] = []
    for first in range(0, len(prompts), batch):
        inputs = tokenizer(
            list(prompts[first : first + batch]), return_tensors="pt", padding=True, padding_side="left"
        ).to(model.device)
        inputs.pop("token_type_ids", None)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        texts += tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts
