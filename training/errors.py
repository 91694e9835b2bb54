"""Errors that are the user's to mend: one sentence that names the thing and says what to do about it."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something in the configuration, the data or the model that the user can mend.

    The message is one sentence; the command line prints it without a traceback and exits with status 2.
    """


class ConfigError(UserError):
    """A key is unknown, missing or of the wrong type, or two keys contradict each other."""


class DataError(UserError):
    """A dataset cannot be read, or one of its rows cannot be trained on."""


class ModelError(UserError):
    """A model or tokenizer cannot be loaded, or computes something that prefkern does not reproduce."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause for an error message about an unknown name: the nearest known one, or all of them if none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known)}" if len(known) <= 40 else f"there are {len(known)} known names, none like it"
