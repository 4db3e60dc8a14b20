"""What is shown to people while work goes on: progress bars and warnings, on standard error."""

import sys

from tqdm.auto import tqdm


def warn(message: str) -> None:
    """Show a warning on stderr, above any progress bar."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


class ProgressBar:
    """Images done, images per second and the terms of the objective, on one line."""

    def __init__(self, total: int, initial: int, enabled: bool, unit: str = "images"):
        """A bar from `initial` to `total` images, or of another `unit`."""
        self._bar = tqdm(
            total=total,
            initial=initial,
            unit=f" {unit}",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not enabled,
            file=sys.stderr,
        )
        self._shown: dict[str, str] = {}

    def __enter__(self) -> "ProgressBar":
        """Shown from its creation."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the last line standing."""
        self._bar.close()

    def update(self, images: int) -> None:
        """Advance by `images`."""
        self._bar.update(images)

    def show(self, **values: str) -> None:
        """Show these beside the bar, until shown anew."""
        self._shown |= values
        self._bar.set_postfix(self._shown, refresh=False)

    def describe(self, description: str) -> None:
        """Name, before the bar, what is being trained."""
        self._bar.set_description(description)
