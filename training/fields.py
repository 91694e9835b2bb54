"""Losses from plain YAML values and back, by what their fields say of themselves.

A field may hold, beside plain values,
    one of a few small objects (`losses.base.variant`): {kind: {field: value}}, {kind: value of its first field}, or the
        kind's name alone for its defaults; where the field says so, a bare number stands for one kind;
    a loss: its name, or {name: ..., field: value};
    several weighted losses: a list of {weight: ..., name: ..., field: value}.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from prefkern import losses
from prefkern.training.errors import ConfigError, nearest
from prefkern.training.schema import check_names, check_value, is_number

# Annotations of fields that hold losses
ONE_LOSS = (losses.Loss, losses.Loss | None)
MANY_LOSSES = (tuple[tuple[float, losses.Loss], ...],)


def read_loss(given: Any, key: str, also: tuple[str, ...] = ()) -> losses.Loss:
    """The loss that a name, or a mapping with a name and fields, describes; `also` are keys to pass over.

    Raises:
        ConfigError: unknown name or field, or a value of the wrong type.
        ValueError: a value that the loss refuses.
    """
    if isinstance(given, losses.Loss):
        return given
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{key}={given!r} should be a loss: its name, or {{name: dpo, beta: 0.1}}")
    name = given.get("name")
    if name is None:
        raise ConfigError(f"{key}.name is missing: choose one of {', '.join(losses.names())}")
    if name not in losses.names():
        raise ConfigError(f"unknown {key}.name={name!r}: {nearest(str(name), losses.names())}")
    fields = {k: v for k, v in given.items() if k not in ("name", *also)}
    return losses.get(name, **_read_fields(losses.loss_class(name), fields, key, ("name", *also)))


def describe_loss(loss: losses.Loss) -> dict[str, Any]:
    """The mapping that `read_loss` turns into this loss, every field spelled out in plain values."""
    return {"name": loss.name, **_describe_fields(loss)}


def _read_fields(cls: type, given: Mapping[str, Any], key: str, also: tuple[str, ...] = ()) -> dict[str, Any]:
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    check_names(given, [*fields, *also], key)
    hints = typing.get_type_hints(cls)
    return {name: _read_field(fields[name], hints[name], value, f"{key}.{name}") for name, value in given.items()}


def _read_field(field: dataclasses.Field, hint: Any, value: Any, key: str) -> Any:
    if "kinds" in field.metadata:
        return _read_variant(field, value, key)
    if hint in ONE_LOSS and not (value is None and hint is not losses.Loss):
        return read_loss(value, key)
    if hint in MANY_LOSSES:
        return _read_losses(value, key)
    return check_value(key, value, hint)


def _read_variant(field: dataclasses.Field, value: Any, key: str) -> Any:
    kinds: dict[str, type] = field.metadata["kinds"]
    if value is None and field.metadata["optional"] or isinstance(value, tuple(kinds.values())):
        return value
    number = field.metadata.get("number")
    if number is not None and not isinstance(value, bool) and is_number(value):
        return number(float(value))
    if isinstance(value, str):
        value = {value: None}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ConfigError(f"{key}={value!r} should name exactly one of its kinds: write {variant_forms(field)}")
    [(kind, given)] = value.items()
    if kind not in kinds:
        raise ConfigError(f"unknown {key} {kind!r}: {nearest(str(kind), kinds)}")
    cls, fields = kinds[kind], dataclasses.fields(kinds[kind])
    if not isinstance(given, Mapping):
        if given is not None and not fields:
            raise ConfigError(f"{key}.{kind}={given!r} takes no value: write {key}={kind}")
        given = {} if given is None else {fields[0].name: given}
    read = _read_fields(cls, given, f"{key}.{kind}")
    for f in fields:
        if f.name not in read and f.default is f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{key}.{kind}.{f.name} is missing: write {variant_forms(field)}")
    return cls(**read)


def _read_losses(value: Any, key: str) -> tuple[tuple[float, losses.Loss], ...]:
    how = f"write {key}: [{{weight: 1, name: dpo}}, {{weight: 0.2, name: nll}}]"
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{key}={value!r} should be a list of losses: {how}")
    read = []
    for i, one in enumerate(value):
        here = f"{key}[{i}]"
        if not isinstance(one, Mapping) or "weight" not in one:
            raise ConfigError(f"{here}={one!r} should be a loss with a weight: {how}")
        weight = check_value(f"{here}.weight", one["weight"], float)
        read.append((weight, read_loss(one, here, also=("weight",))))
    return tuple(read)


def variant_forms(field: dataclasses.Field) -> str:
    """How the values of a field with kinds are written: "{static: k}, {adaptive: m}, boundaries or null"."""
    forms = ["a number"] if field.metadata.get("number") else []
    for kind, cls in field.metadata["kinds"].items():
        fields = dataclasses.fields(cls)
        needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
        forms.append(f"{{{kind}: {fields[0].name}}}" if needed or fields and fields[0].default is not None else kind)
    forms += ["null"] if field.metadata["optional"] else []
    return forms[0] if len(forms) == 1 else f"{', '.join(forms[:-1])} or {forms[-1]}"


def _describe_fields(value: Any) -> dict[str, Any]:
    return {f.name: describe_field(f, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}


def describe_field(field: dataclasses.Field, value: Any) -> Any:
    """A field's value in plain values."""
    for kind, cls in field.metadata.get("kinds", {}).items():
        if type(value) is cls:
            given = _describe_fields(value)
            if cls is field.metadata.get("number"):
                return given.popitem()[1]
            if given == {f.name: None for f in dataclasses.fields(cls) if f.default is None}:  # also: no fields at all
                return kind
            [main] = given.values() if len(given) == 1 else [given]
            return {kind: given if main is None else main}
    if isinstance(value, losses.Loss):
        return describe_loss(value)
    return _plain(value)


def _plain(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return value
    weighted = (isinstance(v, tuple) and len(v) == 2 and isinstance(v[1], losses.Loss) for v in value)
    return [{"weight": v[0], **describe_loss(v[1])} if w else _plain(v) for v, w in zip(value, weighted)]
