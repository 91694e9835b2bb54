"""What there is to read about the losses, made of the registry: a table, a page a loss, and docs/losses.md."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from prefkern import losses
from prefkern.losses import Loss
from prefkern.training.columns import Needs
from prefkern.training.errors import ConfigError, nearest
from prefkern.training.fields import MANY_LOSSES, ONE_LOSS, describe_field, describe_loss, variant_forms
from prefkern.training.schema import describe_hint

_INTRO = """\
# Losses

Made by `make docs` from the registry; do not edit. `prefkern losses NAME` prints a loss's page. A loss is made by
`prefkern.losses.get("dpo", beta=0.1)`, or in a configuration by

```yaml
loss: {name: dpo, beta: 0.1}
```

In formulas y is a response and |y| (or n) its number of counted tokens; w is the chosen and l the rejected response of
a pair; d_t = log pi(y_t) - log pi_ref(y_t) is a token's log-ratio, a = sum_t d_t a response's; sigma is the logistic
function; sg[] lets no gradient through. Log-probabilities are in nats.

What a loss may need:

- reference: the policy it compares with, see `reference.mode` of a configuration;
- lengths: the number of counted tokens enters the formula;
- scores, labels, preference probabilities, token weights: columns of the data;
- a first pass: its constants depend on the batch's log-probabilities, which it sees before it is computed;
- the whole batch: a prompt's value depends on the other prompts, so how a batch is split changes it;
- running state: statistics that move with training and are saved in checkpoints;
- KL of every row, mismatched pairs, and other quantities of every row: computed by the trainer.
"""
_READ_IN = {
    "paper": "the paper",
    "authors' code": "the authors' code",
    "third party": "third parties' code or summaries",
    "derived": "nowhere: derived here",
}
_REQUIRED = "required"
_TARGETS = {"score": "scores", "label": "labels", "preference": "preference probabilities"}


def table() -> str:
    """One row a loss, for the terminal: what it reads, what it compares with, its formula."""
    rows = [("loss", "responses", "needs", "formula")]
    for name in losses.names():
        loss = losses.get(name)
        rows.append((name, loss.arity, ", ".join(needs(loss)) or "-", loss.formula))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, tuple("-" * w for w in widths))
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def page(name: str) -> str:
    """All about one loss, for the terminal.

    Raises:
        ConfigError: unknown name; the nearest one is suggested.
    """
    if name not in losses.names():
        raise ConfigError(f"unknown loss {name!r}: {nearest(name, losses.names())}")
    cls = losses.loss_class(name)
    facts = [(label.replace("`", ""), text.replace("`", "")) for label, text in _facts(losses.get(name))]
    width = max(len(label) for label, _ in facts) + 3
    lines = [name, "=" * len(name), "", *_without_fields(cls), ""]
    for label, text in facts:
        lines += _wrapped(f"{label + ':':<{width}}{text}", " " * width)
    for option in options(cls):
        hint = f" ({option.recommended})" if option.recommended else ""
        lines += ["", f"{name}.{option.name}: {option.default}", *_wrapped(f"    {option.values}{hint}", " " * 4)]
        lines += _wrapped(f"    {option.meaning}", " " * 4)
    return "\n".join(lines)


def markdown() -> str:
    """The text of docs/losses.md, the same bytes whenever the registry is the same."""
    lines = [_INTRO, "| loss | formula | responses | needs | read in |", "|---|---|---|---|---|"]
    for name in losses.names():
        loss = losses.get(name)
        what = ", ".join(needs(loss)) or "-"
        lines.append(_row((f"[`{name}`](#{name})", f"`{loss.formula}`", loss.arity, what, loss.confidence)))
    for name in losses.names():
        cls = losses.loss_class(name)
        facts = [f"- {label}: {text}" for label, text in _facts(losses.get(name))]
        lines += ["", f"## {name}", "", *_prose(cls), "", *facts, *_option_table(cls)]
    lines += ["", "## Values of options", "", "Small objects that an option may hold, written by their kind's name."]
    for cls, uses in sorted(_uses().items(), key=lambda item: item[0].__name__):
        lines += ["", f"### {cls.__name__}", "", *_prose(cls), "", *(f"- {use}" for use in uses), *_option_table(cls)]
    return "\n".join(lines) + "\n"


def needs(loss: Loss) -> list[str]:
    """What a loss needs beside log-probabilities, in words."""
    found = {
        "reference": loss.needs_reference,
        "lengths": loss.needs_lengths,
        _TARGETS.get(loss.target_kind): loss.target_kind,
        "token weights": loss.needs_token_weights,
        "KL of every row": loss.needs_token_kl,
        "mismatched pairs": loss.needs_mismatched,
        **{f"{output} of every row": True for output in loss.row_outputs},
        "a first pass": loss.needs_first_pass,
        "the whole batch": loss.couples_batch,
        "running state": loss.new_state() is not None,
    }
    return [name for name, needed in found.items() if needed]


@dataclass(frozen=True)
class Option:
    """One field of a loss, or of a small object, in words."""

    name: str
    values: str
    default: str
    recommended: str
    meaning: str
    kinds: dict[str, type]


def options(cls: type) -> list[Option]:
    """The options of a loss or of a small object, those of nearer classes first."""
    hints, found = typing.get_type_hints(cls), []
    for f in dataclasses.fields(cls):
        allowed, choices, kinds = (f.metadata.get(key) for key in ("range", "choices", "kinds"))
        if kinds:
            values = variant_forms(f)
        elif hints[f.name] in ONE_LOSS:
            values = "a loss: its name, or {name: ..., option: ...}"
        elif hints[f.name] in MANY_LOSSES:
            values = "losses: [{weight: ..., name: ..., option: ...}, ...]"
        elif choices:
            values = ", ".join(choices)
        else:
            values = str(allowed) if allowed else describe_hint(hints[f.name])
        default = _REQUIRED if f.default is dataclasses.MISSING else _yaml(_short(describe_field(f, f.default)))
        hint = allowed.recommended if allowed else ""
        found.append(Option(f.name, values, default, hint, _meaning(cls, f.name), kinds or {}))
    stated = [base.__dict__.get("__annotations__", {}) for base in cls.__mro__]
    return sorted(found, key=lambda option: next(i for i, names in enumerate(stated) if option.name in names))


def _short(value: Any) -> Any:
    """A described value whose losses show only what is not their default."""
    if isinstance(value, list):
        return [_short(v) for v in value]
    if not isinstance(value, dict) or value.get("name") not in losses.names():
        return value
    plain = describe_loss(losses.get(value["name"]))
    return {k: v for k, v in value.items() if k == "name" or k not in plain or v != plain[k]}


def _facts(loss: Loss) -> Iterator[tuple[str, str]]:
    columns, needed = Needs.of(loss).known, needs(loss)
    yield "Columns", " ".join(f"`{column}`" for column in columns)
    yield "Needs", ", ".join(needed) or "nothing but log-probabilities"
    for setting, other in _variations(loss):
        more = [f"`{c}`" for c in Needs.of(other).known if c not in columns]
        more += [n for n in needs(other) if n not in needed]
        less = [n for n in needed if n not in needs(other)]
        if more or less:
            parts = [f"also {', '.join(more)}"] * bool(more) + [f"not {', '.join(less)}"] * bool(less)
            yield f"With `{setting}`", "; ".join(parts)
    yield "Formula read in", _READ_IN[loss.confidence]


def _variations(loss: Loss) -> Iterator[tuple[str, Loss]]:
    """The loss with one option changed, for every choice, kind and switch; and how YAML writes the change."""
    for f in dataclasses.fields(loss):
        tried: list[Any] = [*f.metadata.get("choices", ())]
        tried += [None] if f.metadata.get("optional") else []
        for kind in f.metadata.get("kinds", {}).values():
            if all(k.default is not dataclasses.MISSING for k in dataclasses.fields(kind)):
                tried.append(kind())
        tried += [not f.default] if isinstance(f.default, bool) else []
        for value in tried:
            if value != f.default:
                written = describe_field(f, value)
                if isinstance(written, dict):
                    [written] = written
                try:
                    yield f"{f.name}: {_yaml(written)}", dataclasses.replace(loss, **{f.name: value})
                except ValueError:  # not with the other options' defaults
                    continue


def _meaning(cls: type, option: str) -> str:
    """What the docstring of the class, or of the nearest base that knows the option, says of it.

    "as in `dpo`; more" is replaced by what is said there, and more.
    """
    known = [found for base in cls.__mro__ if base.__doc__ and (found := dict(_entries(base)).get(option))]
    for i, text in enumerate(known):
        elsewhere = re.match(r"as in (?:`(\w+)`|every \w+ loss|[A-Z]\w+)(?:[.,;:] ?(.*))?$", text)
        if elsewhere is None:
            return text
        name, more = elsewhere.groups()
        there = _meaning(losses.loss_class(name), option) if name in losses.names() else " ".join(known[i + 1 : i + 2])
        if there:
            return f"{there.rstrip('.')}; {more}" if more else there
    return known[0] if known else ""


def _entries(cls: type) -> Iterator[tuple[str, str]]:
    """Fields and their meanings, of the docstring's section of fields."""
    names, words, inside = [], [], False
    for line in [*inspect.cleandoc(cls.__doc__).splitlines(), "."]:
        entry = re.match(r" {4}(\w+(?:, \w+)*): ?(.*)", line) if inside else None
        if names and (entry or not line.startswith(" ")):
            yield from ((name, " ".join(words).strip()) for name in names)
            names = []
        if entry:
            names, words = entry[1].split(", "), [entry[2]]
        elif names:
            words.append(line.strip())
        inside = line.startswith("Fields") and line.endswith(":") or inside and line.startswith(" ")


def _without_fields(cls: type) -> list[str]:
    """The docstring but its section of fields."""
    kept, skipping = [], False
    for line in inspect.cleandoc(cls.__doc__).splitlines():
        skipping = line.startswith("Fields") and line.endswith(":") or skipping and line.startswith(" ")
        if not skipping:
            kept.append(line)
    return kept


def _prose(cls: type) -> list[str]:
    """The docstring as Markdown: formulas in code blocks, the section of fields left to the table, sections in bold."""
    lines, code = [], False
    for line in _without_fields(cls):
        heading = re.match(r"(Source|Degenerates to|Metrics):(.*)", line)
        in_section = bool(lines) and lines[-1].startswith("**")
        starts_code = line.startswith("    ") and not in_section
        if starts_code != code and (starts_code or line):
            lines += ["", "```text"] if starts_code else ["```", ""]
            code = starts_code
        if heading:
            lines += ["", f"**{heading[1]}.**{heading[2]}"]
        elif in_section and line:
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line[4:] if code else line)
    text = "\n".join(lines + ["```"] * code).strip("\n")
    return re.sub(r"\n+```\n\n+", "\n```\n\n", re.sub(r"\n{3,}", "\n\n", text)).splitlines()


def _option_table(cls: type) -> list[str]:
    rows = []
    for o in options(cls):
        values = o.values
        for kind, held in o.kinds.items():
            values = re.sub(rf"{{{kind}: \w+}}|\b{kind}\b", f"[`{kind}`](#{held.__name__.lower()})", values, count=1)
        default = o.default if o.default == _REQUIRED else f"`{o.default}`"
        rows.append((f"`{o.name}`", values, default, o.recommended, o.meaning))
    if not rows:
        return []
    columns = zip(("option", "values", "default", "recommended", "meaning"), *rows)
    table = list(zip(*(column for column in columns if any(column[1:]))))
    return ["", _row(table[0]), "|---" * len(table[0]) + "|", *map(_row, table[1:])]


def _uses() -> dict[type, list[str]]:
    """Every small object that an option may hold, and which options those are."""
    places: dict[type, dict[str, list[str]]] = {}

    def collect(cls: type, owner: str) -> None:
        for f in dataclasses.fields(cls):
            for kind, held in f.metadata.get("kinds", {}).items():
                owners = places.setdefault(held, {}).setdefault(f"`{kind}` in `{f.name}` of ", [])
                if owner not in owners:
                    owners.append(owner)
                    collect(held, f"`{held.__name__}`")

    for name in losses.names():
        collect(losses.loss_class(name), f"[`{name}`](#{name})")
    return {cls: [where + ", ".join(owners) for where, owners in found.items()] for cls, found in places.items()}


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 119, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()
