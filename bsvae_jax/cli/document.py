"""`--json`: one document on standard output, and every word on standard error."""

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def document(wanted: bool) -> Iterator[dict[str, Any]]:
    """What a command has found, filled in by the block; where it is `wanted`, all that the command prints on standard output.

    What the block prints goes to standard error then. Numbers that JSON does not have, NaN and infinities, are null.
    An error leaves standard output empty.
    """
    found: dict[str, Any] = {}
    if not wanted:
        yield found
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield found
    print(json.dumps(plain(found), indent=2, ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:
    """The value as JSON has it: named tuples by their fields, paths as text, arrays as lists, null for what is no number.

    >>> plain({"run": Path("runs/a"), "terms": (1.0, float("nan"))})
    {'run': 'runs/a', 'terms': [1.0, None]}
    """
    if isinstance(value, dict):
        return {str(name): plain(own) for name, own in value.items()}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, list | tuple):
        return [plain(own) for own in value]
    if hasattr(value, "tolist"):  # of NumPy
        return plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
