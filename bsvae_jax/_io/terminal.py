"""What is said while work goes on: a logger, a handler that shows it above a progress bar, and the bar."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

log = logging.getLogger("bsvae_jax")
"""Everything the package says. A program that embeds it configures this logger as any other."""

SECONDS_BETWEEN_LINES = 30.0
"""How often progress is said where it is not shown as a bar: in a file or a pipe."""


class _AboveTheBar(logging.Handler):
    """Shows messages on standard error, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message; warnings and errors say that they are."""
        from tqdm.auto import tqdm  # here and below: a wrong option is answered without

        kind = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        tqdm.write(kind + record.getMessage(), file=sys.stderr)


def _is_of_others(record: logging.LogRecord) -> bool:
    return record.name != log.name


@contextlib.contextmanager
def messages_shown(enabled: bool = True) -> Iterator[None]:
    """Within the block, what is logged from level INFO is shown on standard error: once, however often blocks are nested.

    Handlers of the root logger that write to the same console (notebooks have one) do not repeat it; others receive it.
    """
    if not enabled or any(isinstance(handler, _AboveTheBar) for handler in log.handlers):
        yield
        return
    handler, level = _AboveTheBar(), log.level
    if log.getEffectiveLevel() > logging.INFO:
        log.setLevel(logging.INFO)
    consoles = [other for other in logging.getLogger().handlers if getattr(other, "stream", 0) in (sys.stderr, sys.stdout)]
    for console in consoles:
        console.addFilter(_is_of_others)
    propagate = log.propagate
    log.propagate = propagate and bool(logging.getLogger().handlers)  # one that a library adds later would repeat it
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
        for console in consoles:
            console.removeFilter(_is_of_others)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, each column as wide as its widest cell.

    >>> print(aligned([["run", "rate"], ["runs/digits", "8.5"]]))
    run          rate
    runs/digits  8.5
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)


class ProgressBar:
    """Images done, images per second and the terms of the objective, on one line.

    A bar on a terminal, a widget in a notebook; where standard error is a file or a pipe, a line every half minute.
    """

    def __init__(
        self, total: int | None, initial: int, enabled: bool, unit: str = "images", description: str = "", leave: bool = True
    ):
        """A bar from `initial` to `total` images, if that is known, or of another `unit`; left standing at the end or not."""
        from tqdm.auto import tqdm

        widget = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)
        self._as_lines = enabled and not widget and not sys.stderr.isatty()
        self._total, self._done, self._unit = total, initial, unit
        self._begun = self._last_line = time.monotonic()
        self._initial, self._description = initial, description
        self._bar: Any = tqdm(
            total=total,
            initial=initial,
            desc=description or None,
            leave=leave,
            unit=f" {unit}",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not enabled or self._as_lines,
            file=None if widget else sys.stderr,
        )
        self._shown: dict[str, str] = {}

    def __enter__(self) -> "ProgressBar":
        """Shown from its creation."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Show the last state of it."""
        self._bar.close()

    def update(self, images: int) -> None:
        """Advance by `images`."""
        self._bar.update(images)
        self._done += images
        now = time.monotonic()
        if self._as_lines and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            log.info(self._line(now - self._begun))

    def _line(self, seconds: float) -> str:
        share = "" if self._total is None else f" of {self._total:,}"
        percent = "" if self._total is None else f" ({100.0 * self._done / max(self._total, 1):.0f} %)"
        rate = (self._done - self._initial) / max(seconds, 1e-9)
        terms = "".join(f", {name} {value}" for name, value in self._shown.items())
        what = f"{self._description}: " if self._description else ""
        return f"{what}{self._done:,}{share} {self._unit}{percent}, {rate:,.0f} {self._unit}/s{terms}"

    def show(self, **values: str) -> None:
        """Show these beside the bar, until shown anew."""
        self._shown |= values
        self._bar.set_postfix(self._shown, refresh=False)

    def describe(self, description: str) -> None:
        """Name, before the bar, what is being trained."""
        self._description = description
        self._bar.set_description(description)
