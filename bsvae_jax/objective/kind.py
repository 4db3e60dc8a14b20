"""What the open kinds have in common: networks, priors, decoder variances and data sets are frozen dataclasses that anyone may
derive, in a file of their own. Nothing is registered.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from bsvae_jax.errors import UserError, as_number, shown

AnyKind = TypeVar("AnyKind", bound="Kind")


class Kind:
    """A frozen dataclass that says which of several models is meant, and with what settings."""

    @property
    def name(self) -> str:
        """What it is called in the name of a folder: the class in small letters, and the settings that are not the usual ones.

        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class PerChannel(Kind):
        ...     shrink: float = 0.0
        >>> PerChannel().name, PerChannel(0.5).name
        ('per_channel', 'per_channel-0.5')
        """
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__).lower()
        values = [getattr(self, f.name) for f in dataclasses.fields(self) if f.init and getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        shown = [f"{value:.10g}" if isinstance(value, float) else re.sub(r"[^\w.+-]+", "-", str(value)) for value in values]
        return "-".join([words, *(text.strip("-") for text in shown)])

    @property
    def label(self) -> str:
        """What it is called in tables and figures."""
        return self.name.replace("_", " ")


def check_kind_of(what: str, value: Any, base: type[Kind]) -> None:
    """Raise a UserError unless `value` is an instance of a frozen, hashable dataclass derived from `base`.

    Both are needed because a kind is a constant of the compiled program and a part of `config.json`.
    """
    if not isinstance(value, base):
        given = (
            f"the class {value.__name__}; give an instance, {value.__name__}(...)" if isinstance(value, type) else repr(value)
        )
        raise UserError(f"{what} must be an instance of a class derived from bsvae_jax.{base.__name__}, got {given}.")
    name, parameters = type(value).__name__, vars(type(value)).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise UserError(f"{what}: {name} must be a frozen dataclass; write @dataclass(frozen=True) above its class.")
    if any(field.name == "kind" for field in dataclasses.fields(value)):  # type: ignore[arg-type]
        raise UserError(f"{what}: a field of {name} is called kind, which is where config.json has the class; rename it.")
    try:
        hash(value)
    except TypeError as error:
        raise UserError(f"{what}: {name} must be hashable ({error}); a tuple can take the place of a list.") from error


def with_fields(kind: AnyKind, fields: Mapping[str, Any]) -> AnyKind:
    """A decoder variance or a schedule with other values of some fields, which may be traced.

    Raises:
      UserError: it has no such field.
    """
    unknown = fields.keys() - {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown:
        raise UserError(f"{type(kind).__name__} has no field {min(unknown)!r} to replace.")
    return dataclasses.replace(kind, **fields) if fields else kind  # type: ignore[type-var]


def check_saved(what: str, value: Any, base: type[Kind]) -> None:
    """Raise a UserError as `check_kind_of`, or where `config.json` cannot hold a field of the kind."""
    check_kind_of(what, value, base)
    for field in dataclasses.fields(value):
        if field.init and not _is_saved(content := getattr(value, field.name)):
            raise UserError(
                f"{what}: config.json cannot hold {field.name} of {type(value).__name__}, {shown(content)}. Fields may be "
                "numbers, text, None, tuples of these and frozen dataclasses; of a function or a path, give the name as text."
            )


def _is_saved(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_saved, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(_is_saved(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init)
    return value is None or type(value) in (bool, int, float, str)


def plain(value: Any) -> Any:
    """The value with Python's own numbers, which `config.json` can hold, in place of scalars of NumPy and JAX."""
    if isinstance(value, tuple):
        values = tuple(map(plain, value))
        return value if all(new is old for new, old in zip(values, value, strict=True)) else values
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return as_number(value)
    old = {own.name: getattr(value, own.name) for own in dataclasses.fields(value) if own.init}
    new = {name: changed for name, part in old.items() if (changed := plain(part)) is not part}
    return dataclasses.replace(value, **new) if new else value
