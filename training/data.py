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

import itertools
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
from datasets.fingerprint import Hasher

from prefkern.training.columns import Needs, cells, feature, scatter, standard_columns, targets, token_weights
from prefkern.training.config import DataConfig
from prefkern.training.errors import DataError
from prefkern.training.prompts import split_row

_RECIPE = 3  # raise when the same row would become other tokens: it is part of the cache's key


def prepare_dataset(
    rows: datasets.Dataset,
    tokenizer,
    config: DataConfig,
    needs: Needs | None = None,
    *,
    vocab_size: int | None = None,
    context_length: int | None = None,
    name: str = "data.train",
) -> datasets.Dataset:
    """Tokenise a dataset with `datasets.map`: progress bar, and cached by tokenizer, limits and rows.

    Args:
        rows: columns `prompt` (pairs may have none: the common beginning of the responses) and what `needs` names.
        tokenizer: a transformers tokenizer.
        config: limits, column names and EOS handling.
        needs: which columns are read, see `Needs.of(loss)`; None: those of pairs.
        vocab_size: the model's; a larger token id is an error.
        context_length: the model's; the default of max_length.
        name: what messages call the dataset.
    Returns:
        Columns `prompt_ids`; `<response>_ids`, `<response>_cuts` (in tokens) and `<response>_token_weights` for each
        response, lists of lists where a row holds a list of responses; `targets`, a number for each response;
        `length` (tokens that the model reads for the row, by which Trainer can group) and `cut_tokens` (dropped by
        truncation).
    Raises:
        DataError: a column is missing, the tokenizer has no EOS, or a row cannot be trained on; the message names
            the row, counted from 0.
    """
    needs = needs or Needs()
    rows = standard_columns(rows, needs, config.columns, name)
    limits = Limits(config.max_prompt_length, config.max_response_length, config.max_length or context_length)
    maker = RowTokenizer(tokenizer, needs, tuple(rows.column_names), config.append_eos, limits, vocab_size, name)
    key = [rows._fingerprint, _RECIPE, tokenizer_key(tokenizer), maker.settings]
    return rows.map(
        maker,
        batched=True,
        with_indices=True,
        num_proc=config.num_proc,
        remove_columns=rows.column_names,
        features=maker.features,
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
    needs: Needs
    columns: tuple[str, ...]
    append_eos: bool
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
        return self.needs, self.columns, self.append_eos, self.limits, self.vocab_size

    @property
    def features(self) -> datasets.Features:
        """Types of the columns that it makes."""
        needs, number = self.needs, datasets.Value("int32")
        kinds = {"{}_ids": "int32"}
        kinds |= {"{}_cuts": "int32"} if needs.boundaries else {}
        kinds |= {"{}_token_weights": "float32"} if needs.token_weights else {}
        made = {"prompt_ids": datasets.Sequence(number)}
        made |= {form.format(r): feature(needs.arity, kind) for form, kind in kinds.items() for r in needs.responses}
        made |= {"targets": datasets.Sequence(datasets.Value("float32"))} if needs.target_kind else {}
        return datasets.Features(made | {"length": number, "cut_tokens": number})

    def __call__(self, batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
        texts = [self._at(i, self._text, row) for i, row in zip(indices, rows)]
        prompt_ids = self._encode([t.prompt for t in texts])["input_ids"]
        encoded = self._encode([self._until_eos(t, r) for t in texts for r in range(len(t.responses))])
        responses = (dict(zip(encoded, values)) for values in zip(*(encoded[key] for key in encoded)))
        out: dict[str, list] = {column: [] for column in self.features}
        for i, row, text, prompt in zip(indices, rows, texts, prompt_ids):
            mine = list(itertools.islice(responses, len(text.responses)))
            for column, value in self._at(i, self._row, row, text, prompt, mine).items():
                out[column].append(value)
        return out

    def _text(self, row: Mapping[str, Any]):
        return split_row(row.get("prompt"), cells(row, self.needs, "", "text or conversation"), self.tokenizer)

    def _row(self, row: Mapping[str, Any], text, prompt: list[int], encoded: list[Mapping]) -> dict[str, Any]:
        """The columns made of one row."""
        arity = self.needs.arity
        prompt, whole, responses, dropped = self._fit(text, prompt, [e["input_ids"] for e in encoded])
        made = {"prompt_ids": prompt, **scatter(responses, arity, "{}_ids")}
        if self.needs.boundaries:
            given = cells(row, self.needs, "_boundaries", "list of positions")
            cuts = self._cuts(text, given, [e["offset_mapping"] for e in encoded], responses)
            made |= scatter(cuts, arity, "{}_cuts")
        if self.needs.token_weights:
            if arity == "list":
                given = cells(row, self.needs, "_token_weights", "list of weights")
            else:  # a pair may have only one of the two columns
                columns = self.needs.weight_columns
                given = [row.get(column, [1.0] * len(ids)) for column, ids in zip(columns, whole)]
            weights = [token_weights(w, len(ids))[: len(kept)] for w, ids, kept in zip(given, whole, responses)]
            made |= scatter(weights, arity, "{}_token_weights")
        if self.needs.target_kind:
            made["targets"] = targets(row, self.needs)
        made["length"] = len(responses) * (len(prompt) - 1) + sum(map(len, responses))
        return made | {"cut_tokens": dropped}

    def _at(self, index: int, function, *args):
        try:
            return function(*args)
        except DataError as error:
            raise DataError(f"row {index} of {self.name}: {error}") from error

    def _encode(self, texts: list[str]) -> Mapping[str, list]:
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=self.needs.boundaries
        )

    def _until_eos(self, text, r: int) -> str:
        """The response without the blanks that a chat template puts after its EOS."""
        response, eos = text.responses[r], self.tokenizer.eos_token
        if not text.templated or not eos:
            return response
        bare = response.rstrip()
        return bare if bare.endswith(eos) else response

    def _fit(self, text, prompt: list[int], responses: list[list[int]]) -> tuple[list[int], list, list, int]:
        """Special tokens and truncation of one row: prompt, whole and cut responses, and how many tokens were cut."""
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
        kept = [r if len(r) <= most else r[: int(most)] for r in responses]
        self._check_vocabulary(max(max(prompt), *map(max, kept)))
        return prompt, responses, kept, whole - len(prompt) - sum(map(len, kept))

    def _cuts(self, text, given: list[list[int]], offsets: list[list], responses: list[list[int]]) -> list[list[int]]:
        """Cut positions in tokens from positions in characters."""
        if text.templated:
            raise DataError("its boundaries count characters of plain text, but it is a conversation: give plain text")
        for positions, response in zip(given, text.responses):
            if not isinstance(positions, list) or not all(isinstance(p, int) for p in positions):
                raise DataError(f"its boundaries should be a list of whole numbers, not {positions!r}")
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
