"""Checking of plain YAML values against type annotations, with messages a user can act on."""

from __future__ import annotations

import dataclasses
import enum
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from prefkern.training.errors import ConfigError, nearest

T = TypeVar("T")


def check_value(key: str, value: Any, hint: Any) -> Any:
    """The value as the annotation wants it, or a ConfigError naming key, value and expected type.

    Lossless conversions only: an int where a float is wanted, and a number that YAML reads as text ("1e-6").

    Args:
        key: dotted name, as the user writes it.
        value: what YAML gave.
        hint: a type annotation: plain types, unions, Literal, list, dict, enums, dataclasses.
    """
    if dataclasses.is_dataclass(hint):
        return build(hint, value, key)
    for option in _options(hint):
        if isinstance(value, str) and isinstance(option, type) and issubclass(option, enum.Enum):
            if value not in {member.value for member in option}:
                raise ConfigError(
                    f"{key}={value!r} is not one of its values: {nearest(value, [m.value for m in option])}"
                )
        ok, converted = _convert(key, value, option)
        if ok:
            return converted
    raise ConfigError(f"{key}={value!r} should be {describe_hint(hint)}, not {_kind(value)}")


def build(cls: type[T], given: Any, key: str) -> T:
    """A dataclass from a mapping; unknown and missing keys are errors.

    Args:
        cls: the dataclass; a field without default must be given.
        given: the mapping under `key`, or None for an empty one.
        key: dotted name of the mapping, "" at the top level.
    """
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise ConfigError(f"{key}={given!r} should be a mapping of keys to values, not {_kind(given)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    check_names(given, fields, key)
    prefix = f"{key}." if key else ""
    values = {name: check_value(prefix + str(name), value, hints[name]) for name, value in given.items()}
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{prefix}{name} is missing: it must be set")
    return cls(**values)


def check_names(given: Mapping, known: typing.Iterable[str], key: str) -> None:
    """Raise ConfigError for the first key of `given` that is not known, suggesting the nearest one."""
    prefix = f"{key}." if key else ""
    for name in given:
        if name not in known:
            raise ConfigError(f"unknown key '{prefix}{name}': {nearest(str(name), known)}")


def is_number(value: Any) -> bool:
    """Whether a value is a number, or text that YAML should have read as one."""
    return _number(value)[0]


def _options(hint: Any) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _convert(key: str, value: Any, hint: Any) -> tuple[bool, Any]:
    origin = typing.get_origin(hint)
    if hint is Any:
        return True, value
    if hint is None or hint is type(None):
        return value is None, None
    if dataclasses.is_dataclass(hint):
        return (True, build(hint, value, key)) if isinstance(value, Mapping) else (False, None)
    if origin is typing.Literal:
        return value in typing.get_args(hint), value
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return False, None
        inner = (typing.get_args(hint) or (Any,))[0]
        return True, origin(check_value(f"{key}[{i}]", v, inner) for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            return False, None
        inner = (typing.get_args(hint) or (Any, Any))[1]
        return True, {k: check_value(f"{key}.{k}", v, inner) for k, v in value.items()}
    if hint is float:
        return _number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return isinstance(value, str | hint), value
    return isinstance(hint, type) and isinstance(value, hint), value


def _number(value: Any) -> tuple[bool, float | None]:
    if isinstance(value, bool | int):
        return not isinstance(value, bool), value
    try:
        number = float(value)  # YAML 1.1 reads 1e-6 as text
    except (TypeError, ValueError):
        return False, None
    return not math.isnan(number), number


def describe_hint(hint: Any) -> str:
    """A type annotation in words: "a number or null"."""
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list",
             tuple: "a list", dict: "a mapping", type(None): "null", None: "null"}  # fmt: skip
    words = []
    for option in _options(hint):
        origin = typing.get_origin(option)
        if origin is typing.Literal:
            words += [repr(v) for v in typing.get_args(option)]
        elif dataclasses.is_dataclass(option):
            words.append("a mapping")
        else:
            words.append(names.get(origin or option) or getattr(option, "__name__", str(option)))
    return " or ".join(dict.fromkeys(words))


def _kind(value: Any) -> str:
    kinds = {str: "text", bool: "true or false", int: "a whole number", float: "a number", list: "a list",
             dict: "a mapping", type(None): "null"}  # fmt: skip
    return kinds.get(type(value), type(value).__name__)
