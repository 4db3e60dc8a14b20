"""The errors a user is meant to read: the command line prints their message without a traceback."""

import difflib
from collections.abc import Iterable


class BsvaeError(Exception):
    """Base of the errors whose message is written for the user."""


class UserError(BsvaeError):
    """Something the user gave is wrong; the message says what, what was expected and what to do.

    Raised before any computation starts.
    """


class DivergenceError(BsvaeError, FloatingPointError):
    """Training met a value that is not finite; the message names the step, the terms and the last good checkpoint."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'beta'?)"`, or `""` when nothing in `known` is close to `name`."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
