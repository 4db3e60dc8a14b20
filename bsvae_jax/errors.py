"""The errors a user is meant to read: the command line prints their message without a traceback."""

import difflib
import math
import os
import sys
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
    raise UserError(f"{what} must be of type {names}, got {shown(value)}{'; ' if remedy else ''}{remedy}.")


def shown(value: Any) -> str:
    """A value for a sentence: as Python writes it, or what it is, where that is long."""
    if isinstance(value, int) and abs(value) >= 10**30:  # Python refuses to write some thousands of digits
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return f"a value of type {type(value).__name__}" if len(text) > 80 or "\n" in text else text  # an array, say


def as_number(value: Any) -> Any:
    """Python's own number for a scalar of NumPy or JAX; whatever else there is, as it is."""
    scalar = getattr(value, "ndim", None) == 0 and hasattr(getattr(value, "dtype", None), "kind")
    return value.item() if scalar else value


LARGEST_COUNT = 2**31 - 1
"""What 32 bits count to: steps are counted so on the devices."""


def check_count(name: str, value: Any, low: int = 1, high: int = LARGEST_COUNT) -> None:
    """Raise a UserError unless `value` is a whole number, of Python, NumPy or JAX, from `low` to `high`.

    >>> check_count("epochs", 2.5)
    Traceback (most recent call last):
        ...
    bsvae_jax.errors.UserError: epochs must be a whole number >= 1, got 2.5.
    """
    number = as_number(value)
    if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
        upper = f" and <= {high}" if isinstance(number, int) and number > high else ""
        raise UserError(f"{name} must be a whole number >= {low}{upper}, got {shown(value)}.")


def closest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that is closest to `name`; None where nothing is close."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'beta'?)"`, or `""` when nothing in `known` is close to `name`."""
    match = closest(name, known)
    return f" (did you mean {match!r}?)" if match is not None else ""


def check_number(name: str, value: Any, *, low: float, high: float = math.inf, open_low: bool = False) -> None:
    """Raise a UserError unless `value` is a finite number, of Python, NumPy or JAX, in the interval.

    `open_low` leaves out its lower end. Integers beyond the largest float are not finite here.
    """
    number = as_number(value)
    wrong_type = isinstance(number, bool) or not isinstance(number, int | float)
    if wrong_type or not abs(number) <= sys.float_info.max or not low <= number <= high or (open_low and number == low):
        lower = f"{'>' if open_low else '>='} {low:g}"
        upper = "" if high == math.inf else f" and <= {high:g}"
        raise UserError(f"{name} must be a finite number {lower}{upper}, got {shown(value)}.")


def check_flag(name: str, value: Any) -> None:
    """Raise a UserError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise UserError(f"{name} must be True or False, got {shown(value)}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise a UserError unless `value` is one of the choices; the nearest one is offered."""
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}{nearest(shown(value), choices)}.")


def check_widths(name: str, widths: tuple[int, ...]) -> None:
    """Raise a UserError unless `widths` is a tuple of at least one whole number >= 1."""
    if not isinstance(widths, tuple) or not widths:
        raise UserError(f"{name} must be a tuple of at least one width, got {shown(widths)}.")
    for width in widths:
        check_count(name, width)


def check_path(owner: Any, name: str, optional: bool = False) -> None:
    """A path may be given as one, and is kept as text, which `config.json` can hold; `~` is the home folder."""
    value = getattr(owner, name)
    if isinstance(value, str | os.PathLike):
        object.__setattr__(owner, name, os.path.expanduser(os.fspath(value)))
    elif not (optional and value is None):
        raise UserError(f"data.{name} must be a path, got {shown(value)}.")
