"""The errors a user is meant to read: the command line prints their message without a traceback."""

import difflib
from collections.abc import Iterable
from typing import Any


class BsvaeError(Exception):
    """Base of the errors whose message is written for the user.

    >>> from bsvae_jax import Config
    >>> try:
    ...     Config(beta=-1.0)
    ... except BsvaeError as error:
    ...     print(error)
    beta must be a finite number >= 0, got -1.0.
    """


class UserError(BsvaeError, ValueError):
    """Something the user gave is wrong; the message says what, what was expected and what to do.

    Raised before any computation starts, where it can be known by then (a disk may fill up later). It is a ValueError, as NumPy
    and JAX raise of a wrong argument, so that code written for them catches it.

    >>> from bsvae_jax import Config
    >>> Config(latent_size=0)
    Traceback (most recent call last):
        ...
    bsvae_jax.errors.UserError: latent_size must be a whole number >= 1, got 0.
    """


class DivergenceError(BsvaeError, FloatingPointError):
    """Training met a value that is not finite; the message names the step, the terms and the last good checkpoint.

    `failed_step` gives the step back; `FailedStep` has an example of a run that diverges.

    >>> issubclass(DivergenceError, FloatingPointError)
    True
    """


def check_kind(what: str, value: Any, kinds: type | tuple[type, ...], remedy: str = "") -> None:
    """Raise a UserError, which ends with `remedy`, unless `value` is of one of the `kinds`."""
    if isinstance(value, kinds):
        return
    names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
    shown = repr(value)
    if len(shown) > 80 or "\n" in shown:  # an array, say
        shown = f"a value of type {type(value).__name__}"
    raise UserError(f"{what} must be of type {names}, got {shown}{'; ' if remedy else ''}{remedy}.")


def check_count(name: str, value: Any, low: int = 1) -> None:
    """Raise a UserError unless `value` is a whole number of at least `low`.

    >>> check_count("epochs", 2.5)
    Traceback (most recent call last):
        ...
    bsvae_jax.errors.UserError: epochs must be a whole number >= 1, got 2.5.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UserError(f"{name} must be a whole number >= {low}, got {value!r}.")


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'beta'?)"`, or `""` when nothing in `known` is close to `name`."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
