"""Tokenised rows to one packed batch: no padding, and only the rows that predict response tokens go to the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefkern.layout import Accumulate, Layout
from prefkern.training.columns import Arity, gather


@dataclass(frozen=True)
class PackedCollator:
    """Packs prompt and response of every response one after another, in prefkern's order: chosen 0, rejected 0, ...

    Fields:
        arity: "pair", "single" or "list", as the loss has it.
        accumulate: of the segments, where the rows hold cuts.
        mismatched: also pack every prompt with the response of the row before it (the first with the last row's), for
            losses that estimate a baseline from such pairs. A batch of one row pairs it with itself.
        max_length: tokens of a mismatched prompt and response together; more are cut from the response.

    A batch holds, all on the host,
        input_ids, position_ids: (1, T) int64; positions restart at 0 with every sequence, which tells transformers
            where one ends, so there is no attention mask. A response's last token predicts nothing and is left out.
        response_rows: (N,) int64, the rows of the T whose hidden state predicts a response token.
        labels: (N,) int64, those tokens.
        layout: the Layout of the N rows, cut if the rows hold `<response>_cuts`; moved to a device once, by the loss.
        sequence_lengths: rows of each of the packed sequences, plain integers.
        ref_logps, token_weights: (N,) fp32, if the rows hold them.
        targets: (R,) fp32, if the rows hold them.
        mismatched: a batch of input_ids to sequence_lengths, if asked for.
    """

    arity: Arity = "pair"
    accumulate: Accumulate = "segment"
    mismatched: bool = False
    max_length: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        prompts = [list(row["prompt_ids"]) for row in rows]
        responses = [gather(row, self.arity, "{}_ids") for row in rows]
        batch = pack_sequences(prompts, responses)
        cuts = self._flat(rows, "{}_cuts")
        if cuts is not None:
            batch["layout"] = batch["layout"].split_at(cuts, accumulate=self.accumulate)
        for name, column in (("ref_logps", "ref_{}_logps"), ("token_weights", "{}_token_weights")):
            values = self._flat(rows, column)
            if values is not None:
                batch[name] = torch.tensor([x for response in values for x in response], dtype=torch.float32)
        if rows and "targets" in rows[0]:
            batch["targets"] = torch.tensor([x for row in rows for x in row["targets"]], dtype=torch.float32)
        if self.mismatched:
            others = [self._fit(p, r) for p, r in zip(prompts, responses[-1:] + responses[:-1])]
            batch["mismatched"] = pack_sequences(prompts, others)
        return batch

    def _flat(self, rows: Sequence[Mapping[str, Any]], column: str) -> list | None:
        """One value for each response of the batch; None where the rows have no such column."""
        found = [gather(row, self.arity, column) for row in rows]
        return None if not found or found[0] is None else [value for row in found for value in row]

    def _fit(self, prompt: list[int], responses: list[list[int]]) -> list[list[int]]:
        room = None if self.max_length is None else max(1, self.max_length - len(prompt))
        return [response[:room] for response in responses]


def pack_sequences(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Sequence[int]]]) -> dict[str, Any]:
    """The batch of each prompt followed by each of its responses, see `PackedCollator`."""
    ids, positions, kept, labels, lengths, sequences = [], [], [], [], [], []
    for prompt, answers in zip(prompts, responses, strict=True):
        for response in answers:
            start = len(ids) + len(prompt) - 1  # the last prompt row predicts the first response token
            kept.extend(range(start, start + len(response)))
            ids += [*prompt, *response[:-1]]
            sequences.append(len(prompt) + len(response) - 1)
            positions.extend(range(sequences[-1]))
            labels += response
            lengths.append(len(response))
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "response_rows": torch.tensor(kept),
        "labels": torch.tensor(labels),
        "sequence_lengths": sequences,
        "layout": Layout.groups(lengths, [len(answers) for answers in responses]),
    }
