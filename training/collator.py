"""Tokenised rows to one packed batch: no padding, and only the rows that predict response tokens go to the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefkern.layout import Accumulate, Layout
from prefkern.training.data import RESPONSES


@dataclass(frozen=True)
class PackedCollator:
    """Packs prompt and response of every response one after another, in prefkern's order: chosen 0, rejected 0, ...

    Fields:
        arity: "pair" or "single", as the loss has it.
        accumulate: of the segments, where the rows hold cuts.

    A batch holds, all on the host,
        input_ids, position_ids: (1, T) int64; positions restart at 0 with every sequence, which tells transformers
            where one ends, so there is no attention mask. A response's last token predicts nothing and is left out.
        response_rows: (N,) int64, the rows of the T whose hidden state predicts a response token.
        labels: (N,) int64, those tokens.
        layout: the Layout of the N rows, cut if the rows hold `<response>_cuts`; moved to a device once, by the loss.
        sequence_lengths: rows of each of the packed sequences, plain integers.
        ref_logps: (N,) fp32, if the rows hold precomputed reference log-probabilities.
    """

    arity: str = "pair"
    accumulate: Accumulate = "segment"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        responses = RESPONSES[self.arity]
        ids, positions, kept, labels, lengths, sequences, reference, cuts = [], [], [], [], [], [], [], []
        for row in rows:
            prompt = list(row["prompt_ids"])
            for name in responses:
                response = list(row[f"{name}_ids"])
                start = len(ids) + len(prompt) - 1  # the last prompt row predicts the first response token
                kept.extend(range(start, start + len(response)))
                ids += prompt + response[:-1]
                sequences.append(len(prompt) + len(response) - 1)
                positions.extend(range(sequences[-1]))
                labels += response
                lengths.append(len(response))
                if f"ref_{name}_logps" in row:
                    reference += row[f"ref_{name}_logps"]
                if f"{name}_cuts" in row:
                    cuts.append(row[f"{name}_cuts"])
        layout = Layout.groups(lengths, [len(responses)] * len(rows))
        batch = {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "response_rows": torch.tensor(kept),
            "labels": torch.tensor(labels),
            "sequence_lengths": sequences,
            "layout": layout.split_at(cuts, accumulate=self.accumulate) if cuts else layout,
        }
        if reference:
            batch["ref_logps"] = torch.tensor(reference, dtype=torch.float32)
        return batch
