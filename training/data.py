"""Rows of text to rows of tokens.

What a row becomes:

- Prompt and responses are tokenised apart, so the boundary between them is exact whatever the tokenizer merges.
- Plain text: the prompt begins with the BOS token if the tokenizer adds one to its inputs and the text does not begin
  with it already; an empty prompt is the BOS token alone. A response ends with the EOS token, appended unless it is
  there already.
- Conversations: the chat template gives BOS and the end of the turn. Blanks that the template puts after the final
  EOS are dropped (they could never be generated), and EOS is appended where the template does not end the turn with it.
- Truncation: the prompt keeps `max_prompt_length` tokens, its BOS and the last ones; the response keeps its first
  `max_response_length` (EOS counted, and lost if it is beyond), and never more than `max_length - len(prompt)`. A
  response is never cut to nothing: a prompt that leaves no room for one token is an error.
- Segments: a column `<response>_boundaries` holds positions counted in characters of a plain response; a token belongs
  to the segment that it begins in. Cuts beyond a truncated response's end leave empty segments.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
from datasets.fingerprint import Hasher

from prefkern.training.config import DataConfig
from prefkern.training.errors import DataError, nearest
from prefkern.training.prompts import split_row

RESPONSES = {"pair": ("chosen", "rejected"), "single": ("completion",)}
_RECIPE = 2  # raise when the same row would become other tokens: it is part of the cache's key


def prepare_dataset(
    rows: datasets.Dataset,
    tokenizer,
    config: DataConfig,
    *,
    arity: str = "pair",
    boundaries: bool = False,
    vocab_size: int | None = None,
    context_length: int | None = None,
    name: str = "data.train",
) -> datasets.Dataset:
    """Tokenise a dataset with `datasets.map`: progress bar, and cached by tokenizer, limits and rows.

    Args:
        rows: columns `prompt` (or none: the common beginning of the responses) and the responses of the arity.
        tokenizer: a transformers tokenizer.
        config: limits, column names and EOS handling.
        arity: "pair" reads chosen and rejected, "single" reads completion.
        boundaries: also read `<response>_boundaries` and make `<response>_cuts`, counted in tokens.
        vocab_size: the model's; a larger token id is an error.
        context_length: the model's; the default of max_length.
        name: what messages call the dataset.
    Returns:
        Columns `prompt_ids`, one `<response>_ids` for each response, `length` (tokens that the model reads for the
        row, by which Trainer can group) and `cut_tokens` (dropped by truncation).
    Raises:
        DataError: a column is missing, the tokenizer has no EOS, or a row cannot be trained on; the message names
            the row, counted from 0.
    """
    responses = RESPONSES[arity]
    rows = _standard_columns(rows, responses, config.columns, name, boundaries)
    maker = RowTokenizer(
        tokenizer,
        responses,
        "prompt" in rows.column_names,
        config.append_eos,
        boundaries,
        Limits(config.max_prompt_length, config.max_response_length, config.max_length or context_length),
        vocab_size,
        name,
    )
    key = [rows._fingerprint, _RECIPE, tokenizer_key(tokenizer), maker.settings]
    ids, number = datasets.Sequence(datasets.Value("int32")), datasets.Value("int32")
    features = {column: ids for column in maker.columns} | {"length": number, "cut_tokens": number}
    return rows.map(
        maker,
        batched=True,
        with_indices=True,
        num_proc=config.num_proc,
        remove_columns=rows.column_names,
        features=datasets.Features(features),
        new_fingerprint=Hasher.hash(key),
        desc=f"Tokenising {name}",
    )


def tokenizer_key(tokenizer) -> str:
    """A text that changes with anything about a tokenizer that changes its tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab().items()))
    return Hasher.hash([body, tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token])


@dataclass(frozen=True)
class Limits:
    """Most tokens of a prompt, a response and both together; None for no limit."""

    prompt: int | None = None
    response: int | None = None
    total: int | None = None


@dataclass(frozen=True)
class RowTokenizer:
    """The function that `datasets.map` runs on batches of rows."""

    tokenizer: Any
    responses: tuple[str, ...]
    has_prompt: bool
    append_eos: bool
    boundaries: bool
    limits: Limits
    vocab_size: int | None
    name: str

    def __post_init__(self) -> None:
        if self.append_eos and self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-sequence token, so that responses would never end: "
                "name one with model.eos_token, or set data.append_eos=false"
            )

    @property
    def settings(self) -> tuple:
        """What, beside tokenizer and rows, decides the result."""
        return self.responses, self.has_prompt, self.append_eos, self.boundaries, self.limits, self.vocab_size

    @property
    def columns(self) -> list[str]:
        """Columns of lists of integers that it makes."""
        cuts = [f"{r}_cuts" for r in self.responses] if self.boundaries else []
        return ["prompt_ids", *(f"{r}_ids" for r in self.responses), *cuts]

    def __call__(self, batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        prompts = batch["prompt"] if self.has_prompt else [None] * len(indices)
        texts = []
        for i, prompt, *responses in zip(indices, prompts, *(batch[r] for r in self.responses)):
            texts.append(self._at(i, split_row, prompt, responses, self.tokenizer))
        out = {column: [] for column in [*self.columns, "length", "cut_tokens"]}
        prompt_ids = self._encode([t.prompt for t in texts])["input_ids"]
        encoded = [self._encode([self._until_eos(t, r) for t in texts]) for r in range(len(self.responses))]
        for n, (i, text) in enumerate(zip(indices, texts)):
            ids = [e["input_ids"][n] for e in encoded]
            prompt, responses, dropped = self._at(i, self._fit, text, prompt_ids[n], ids)
            row = [prompt, *responses]
            if self.boundaries:
                given = [batch[f"{r}_boundaries"][n] for r in self.responses]
                offsets = [e["offset_mapping"][n] for e in encoded]
                row += self._at(i, self._cuts, text, given, offsets, responses)
            length = len(responses) * (len(prompt) - 1) + sum(map(len, responses))
            for column, value in zip(out, [*row, length, dropped]):
                out[column].append(value)
        return out

    def _at(self, index: int, function, *args):
        try:
            return function(*args)
        except DataError as error:
            raise DataError(f"row {index} of {self.name}: {error}") from error

    def _encode(self, texts: list[str]) -> Mapping[str, list]:
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=self.boundaries
        )

    def _until_eos(self, text, r: int) -> str:
        """The response without the blanks that a chat template puts after its EOS."""
        response, eos = text.responses[r], self.tokenizer.eos_token
        if not text.templated or not eos:
            return response
        bare = response.rstrip()
        return bare if bare.endswith(eos) else response

    def _fit(self, text, prompt: list[int], responses: list[list[int]]) -> tuple[list[int], list[list[int]], int]:
        """Special tokens and truncation of one row: its prompt, its responses, and how many tokens were cut."""
        prompt = prompt if text.templated else self._with_bos(prompt)
        if not prompt:
            raise DataError("its prompt is empty and the tokenizer has no BOS token to stand for it: give it a prompt")
        responses = [self._with_eos(r) for r in responses]
        if any(not r for r in responses):
            raise DataError("it has a response without a token: remove the row or fill it in")
        whole, limits = len(prompt) + sum(map(len, responses)), self.limits
        prompt = self._last(prompt, limits.prompt)
        room = float("inf") if limits.total is None else limits.total - len(prompt)
        if room < 1:
            raise DataError(
                f"its prompt has {len(prompt)} tokens, which leaves no room for a response within {limits.total}: "
                "set data.max_prompt_length (prompts are cut from the left) or raise data.max_length"
            )
        most = min(room, limits.response or room)
        responses = [r if len(r) <= most else r[: int(most)] for r in responses]
        self._check_vocabulary(max(max(prompt), *map(max, responses)))
        return prompt, responses, whole - len(prompt) - sum(map(len, responses))

    def _cuts(self, text, given: list[list[int]], offsets: list[list], responses: list[list[int]]) -> list[list[int]]:
        """Cut positions in tokens from positions in characters."""
        if text.templated:
            raise DataError("its boundaries count characters of plain text, but it is a conversation: give plain text")
        for positions, response in zip(given, text.responses):
            if sorted(positions) != list(positions) or any(not 0 <= p <= len(response) for p in positions):
                raise DataError(
                    f"its boundaries {positions} should not decrease and lie within the {len(response)} characters"
                )
        starts = [[start for start, _ in pairs] for pairs in offsets]
        return [
            [min(bisect_left(begin, p), len(response)) for p in positions]
            for positions, begin, response in zip(given, starts, responses)
        ]

    def _last(self, prompt: list[int], most: int | None) -> list[int]:
        """The prompt's last tokens, after its BOS if there is one and room for it."""
        if most is None or len(prompt) <= most:
            return prompt
        bos = prompt[:1] if prompt[0] == self.tokenizer.bos_token_id and most > 1 else []
        return bos + prompt[len(prompt) - most + len(bos) :]

    def _with_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        if bos is None or ids[:1] == [bos] or (ids and not self._adds_bos):
            return ids
        return [bos, *ids]

    @cached_property
    def _adds_bos(self) -> bool:
        return self.tokenizer("a", return_attention_mask=False)["input_ids"][:1] == [self.tokenizer.bos_token_id]

    def _with_eos(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return [*ids, eos] if self.append_eos and ids and ids[-1] != eos else ids

    def _check_vocabulary(self, largest: int) -> None:
        if self.vocab_size is not None and largest >= self.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"its token {token!r} has the id {largest}, outside the model's vocabulary of {self.vocab_size}: "
                "use the model's own tokenizer, or a model whose embeddings were resized for this one"
            )


def _standard_columns(
    rows: datasets.Dataset, responses: tuple[str, ...], columns: Mapping[str, str], name: str, boundaries: bool
) -> datasets.Dataset:
    """The dataset with its columns renamed to the standard names, and nothing but those."""
    cuts = tuple(f"{r}_boundaries" for r in responses) if boundaries else ()
    known = ("prompt", *responses, *cuts)
    for standard, own in columns.items():
        if standard not in known:
            raise DataError(f"data.columns.{standard} is not a column that this loss reads: {nearest(standard, known)}")
        if own not in rows.column_names:
            raise DataError(
                f"{name} has no column {own!r} (data.columns.{standard}): {nearest(own, rows.column_names)}"
            )
    wanted = {standard: columns.get(standard, standard) for standard in known}
    needed = known if boundaries or len(responses) == 1 else responses
    missing = [s for s in needed if wanted[s] not in rows.column_names]
    if missing:
        have = ", ".join(rows.column_names)
        raise DataError(
            f"{name} has no column {' and no column '.join(map(repr, missing))} (it has {have}): "
            f"rename yours or name it with data.columns.{missing[0]}"
        )
    kept = {own: standard for standard, own in wanted.items() if own in rows.column_names}
    return rows.select_columns(list(kept)).rename_columns({o: s for o, s in kept.items() if o != s})
