"""Shared objects that setup.py builds beside this file, where a compiler is there."""

from __future__ import annotations

import ctypes
import functools
import importlib.util


@functools.cache
def load(name: str) -> ctypes.CDLL | None:
    """The library built as prefkern.kernels.`name`; None where it was not built or cannot be loaded.

    It takes its threads from the OpenMP that torch has loaded, and is not linked with one of its own.
    """
    spec = importlib.util.find_spec(f"prefkern.kernels.{name}")
    try:
        return None if spec is None else ctypes.CDLL(spec.origin)
    except OSError:
        return None
