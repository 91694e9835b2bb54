"""`prefkern score-critical-tokens`: a weight for every token of a preference dataset, from two contrasted models.

One model was tuned on right answers and one on wrong answers (or one model with an adapter for each). A token of a
rejected response weighs what `prefkern.critical_token_scores` says of it, s_t; a token of a chosen one weighs 1, or
1 - s_t. A response's end-of-sequence token weighs 1: neither model was asked about it.

Rows are tokenised as in training with the same limits, and what is added are columns `chosen_token_weights` and
`rejected_token_weights`: one number for each token of a response with its EOS token, before truncation. Tokens that
the limits cut off weigh 1.
"""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import torch
from torch import Tensor, nn

from prefkern.critical_tokens import critical_token_scores
from prefkern.training.collator import PackedCollator
from prefkern.training.config import DataConfig, ModelConfig
from prefkern.training.data import prepare_dataset
from prefkern.training.errors import ConfigError, DataError, ModelError
from prefkern.training.model import head_options, load_model, load_model_config, load_tokenizer, output_head
from prefkern.training.sources import load_rows

_FILES = {".jsonl": "to_json", ".json": "to_json", ".parquet": "to_parquet"}
_ROLES = ("positive", "negative")


@dataclass(frozen=True)
class Contrast:
    """Two models of one vocabulary, or one model with two adapters.

    Fields:
        positive, negative: with the packed forward, see `load_model`; the same object where adapters tell them apart.
        adapters: names of the two adapters of that one model, or None.
        gamma, workspace_bytes: as in `critical_token_scores`.
    """

    positive: nn.Module
    negative: nn.Module
    adapters: tuple[str, str] | None = None
    gamma: float = 1.0
    workspace_bytes: int | None = None

    @torch.no_grad()
    def scores(self, sequences: Sequence[Mapping[str, list[int]]]) -> list[list[float]]:
        """The score of each response token, for sequences of `prompt_ids` and `completion_ids`, in one packed batch."""
        batch = PackedCollator("single")(sequences)
        lengths = list(batch["layout"].lengths)
        device = next(self.positive.parameters()).device
        batch = {name: t.to(device) for name, t in batch.items() if isinstance(t, Tensor)} | {
            "sequence_lengths": batch["sequence_lengths"]
        }
        pos, neg = (self._rows(i, batch) for i in range(2))
        scores = critical_token_scores(
            pos[0], pos[1], neg[0], neg[1], batch["labels"], self.gamma, pos[2], neg[2],
            workspace_bytes=self.workspace_bytes, **head_options(self.positive),
        )  # fmt: skip
        return [piece.tolist() for piece in scores.cpu().split(lengths)]

    def _rows(self, i: int, batch: dict) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states of the response rows, and the head, of one of the two models."""
        model = (self.positive, self.negative)[i].eval()
        if self.adapters is not None:
            model.set_adapter(self.adapters[i])
        return model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            response_rows=batch["response_rows"],
            sequence_lengths=batch["sequence_lengths"],
            tail=lambda hidden, weight, bias: (hidden, weight, bias),
        )


def load_contrast(
    positive: str, negative: str, model: ModelConfig | None, like: ModelConfig, device: torch.device, **options
) -> Contrast:
    """Load two models, or one model and two adapters.

    Args:
        positive, negative: folders or hub names of models, or of adapters where `model` is given.
        model: what the adapters belong to, or None.
        like: everything but the name of the two models.
        device: where to put them.
        options: fields of Contrast.
    Raises:
        ModelError: one cannot be loaded, or the two cannot be compared.
    """
    if model is not None:
        wrapped = _load("model", model, device)
        for role, folder in zip(_ROLES, (positive, negative)):
            wrapped = _with_adapter(wrapped, role, folder, model.name)
        for role in _ROLES:
            wrapped.set_adapter(role)
            if output_head(wrapped).adapter is not None:
                raise ModelError("--positive and --negative adapt the output head, which cannot be scored: merge them")
        return Contrast(wrapped, wrapped, _ROLES, **options)
    for role, name in zip(_ROLES, (positive, negative)):
        if (Path(name).expanduser() / "adapter_config.json").exists():
            raise ModelError(f"--{role}={name!r} is an adapter: name the model that it belongs to with --model")
    pair = [_load(role, replace(like, name=name), device) for role, name in zip(_ROLES, (positive, negative))]
    sizes = [output_head(m).weight.shape[0] for m in pair]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"--positive has a vocabulary of {sizes[0]} tokens and --negative of {sizes[1]}: tune both from one model"
        )
    if head_options(pair[0]) != head_options(pair[1]):
        raise ModelError("--positive and --negative scale or cap their logits differently: tune both from one model")
    return Contrast(*pair, **options)


def _load(role: str, config: ModelConfig, device: torch.device) -> nn.Module:
    try:
        return load_model(config, device).requires_grad_(False).eval()
    except ModelError as error:
        raise ModelError(f"--{role}={config.name!r} cannot be used: {error}") from error


def _with_adapter(model: nn.Module, role: str, folder: str, base: str) -> nn.Module:
    import peft

    try:
        if isinstance(model, peft.PeftModel):
            model.load_adapter(folder, adapter_name=role)
            return model
        return peft.PeftModel.from_pretrained(model, folder, adapter_name=role)
    except Exception as error:  # peft raises many kinds for what is no adapter of this model
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"--{role}={folder!r} is no adapter of {base!r}, check both: {line}") from error


def add_token_weights(
    rows: datasets.Dataset,
    tokenizer,
    contrast: Contrast,
    config: DataConfig,
    *,
    both: bool = False,
    batch_size: int = 8,
    vocab_size: int | None = None,
    context_length: int | None = None,
    name: str = "the dataset",
) -> datasets.Dataset:
    """The dataset with columns `chosen_token_weights` and `rejected_token_weights`, see the module's docstring.

    Args:
        rows: a preference dataset as `prepare_dataset` reads it, with a column `prompt`.
        tokenizer, config, vocab_size, context_length: as training will have them.
        contrast: the two models.
        both: score chosen responses too.
        batch_size: rows at a time.
        name: what messages and progress bars call the dataset.
    Raises:
        DataError: a column is missing or there already, or a row cannot be tokenised.
    """
    _check_columns(rows, config, name)
    unlimited = replace(config, max_prompt_length=None, max_response_length=None, max_length=None)
    whole, read = (
        prepare_dataset(rows, tokenizer, limits, vocab_size=vocab_size, context_length=context, name=name)
        for limits, context in ((unlimited, None), (config, context_length))
    )
    responses, eos = ("chosen", "rejected"), tokenizer.eos_token_id
    scored = responses if both else ("rejected",)

    def weigh(columns: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        full = whole[indices[0] : indices[-1] + 1]
        weights = {response: [[1.0] * len(ids) for ids in full[f"{response}_ids"]] for response in responses}
        sequences = [
            {"prompt_ids": prompt, "completion_ids": ids}
            for response in scored
            for prompt, ids in zip(columns["prompt_ids"], columns[f"{response}_ids"])
        ]
        places = [(response, n) for response in scored for n in range(len(indices))]
        for (response, n), scores in zip(places, contrast.scores(sequences)):
            made = scores if response == "rejected" else [1.0 - s for s in scores]
            row, ids = weights[response][n], full[f"{response}_ids"][n]
            row[: len(made)] = made
            row[-1] = 1.0 if ids[-1] == eos else row[-1]
        return {f"{response}_token_weights": weights[response] for response in responses}

    numbers = datasets.Sequence(datasets.Value("float32"))
    made = read.map(
        weigh,
        batched=True,
        batch_size=batch_size,
        with_indices=True,
        remove_columns=read.column_names,
        features=datasets.Features({f"{response}_token_weights": numbers for response in responses}),
        keep_in_memory=True,
        new_fingerprint=uuid.uuid4().hex,  # hashing two models to look for a cache would take longer than it saves
        desc=f"Scoring tokens of {name}",
    )
    return datasets.concatenate_datasets([rows, made], axis=1)


def _check_columns(rows: datasets.Dataset, config: DataConfig, name: str) -> None:
    prompt = config.columns.get("prompt", "prompt")
    if prompt not in rows.column_names:
        raise DataError(
            f"{name} has no column {prompt!r} (it has {', '.join(rows.column_names)}): weights belong to responses"
            " that stand apart from their prompt"
        )
    for column in ("chosen_token_weights", "rejected_token_weights"):
        if column in rows.column_names:
            raise DataError(f"{name} has a column {column!r} already: remove or rename it")


def write_rows(rows: datasets.Dataset, output: Path) -> None:
    """Write a .jsonl, .json (also a row a line) or .parquet file, or a folder that `load_from_disk` reads."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix in _FILES:
        getattr(rows, _FILES[output.suffix])(str(output))
    else:
        rows.save_to_disk(str(output))


def main(args: argparse.Namespace) -> int:
    """Score a dataset as the command line says.

    Returns:
        Exit status 0.
    Raises:
        UserError: an option, the data or a model are at fault; nothing has been written.
    """
    output = Path(args.output).expanduser()
    if output.exists():
        raise ConfigError(f"--output={args.output!r} is there already: remove it or choose another name")
    if not 0 <= args.gamma < float("inf"):
        raise ConfigError(f"--gamma={args.gamma} should be at least 0, and is 1 in the authors' code")
    for option in ("batch_size", "workspace_bytes"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option.replace('_', '-')}={value} should be at least 1")
    data = DataConfig(
        train=args.dataset, config=args.config, split=args.split, columns=_columns(args.column), limit=args.limit,
        max_prompt_length=args.max_prompt_length, max_response_length=args.max_response_length,
        max_length=args.max_length, append_eos=args.append_eos, num_proc=args.num_proc,
    )  # fmt: skip
    rows = load_rows(data.train, data.split, data.config, "DATASET")
    rows = rows if data.limit is None else rows.select(range(min(data.limit, len(rows))))
    _check_columns(rows, data, "DATASET")
    like = ModelConfig(
        name=args.model or args.positive, tokenizer=args.tokenizer, dtype=args.dtype, eos_token=args.eos_token,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    tokenizer = load_tokenizer(like)
    device = _device(args.device)
    contrast = load_contrast(
        args.positive, args.negative, like if args.model else None, like, device,
        gamma=args.gamma, workspace_bytes=args.workspace_bytes,
    )  # fmt: skip
    text_config = load_model_config(like).get_text_config()
    weighted = add_token_weights(
        rows, tokenizer, contrast, data, both=args.both, batch_size=args.batch_size,
        vocab_size=getattr(text_config, "vocab_size", None),
        context_length=getattr(text_config, "max_position_embeddings", None), name="DATASET",
    )  # fmt: skip
    write_rows(weighted, output)
    print(f"rows     {len(weighted)}\ncolumns  chosen_token_weights, rejected_token_weights\ndataset  {output}")
    return 0


def _device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch built without it raises the latter
        raise ConfigError(f"--device={name!r} cannot be used here: name another, or leave it out") from error


def _columns(pairs: Sequence[str]) -> dict[str, str]:
    made = {}
    for text in pairs:
        standard, equals, own = text.partition("=")
        if not (standard and equals and own):
            raise ConfigError(f"--column {text!r} is no pair: write standard=own, for example chosen=good_answer")
        made[standard] = own
    return made
