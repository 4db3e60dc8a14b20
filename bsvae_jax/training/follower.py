"""What a process that is not the writer has in place of a `RunDirectory`: it keeps nothing and says nothing."""

from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bsvae_jax.evaluation.scores import Calibration

State = TypeVar("State")


class Follower:
    """The run of which process 0 has the folder; the same methods as `RunDirectory`, without effects."""

    def __init__(self, folder: Path):
        """`folder` is that of the writer, for messages."""
        self.folder = folder

    def __enter__(self) -> "Follower":
        """Nothing to open."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing to close."""

    def say(self, message: str) -> None:
        """The writer says it."""

    def warn_once(self, topic: str, message: str) -> None:
        """The writer warns."""

    def saved_steps(self) -> list[int]:
        """None that are known here."""
        return []

    def resume(self, state: State, at: int | None = None) -> State:
        """The state as it is: the writer's takes its place."""
        return state

    def log(self, row: dict[str, Any], **clocked: float) -> None:
        """The writer logs."""

    def save(self, step: int, arrays: Any, objective: float | None) -> bool:
        """The writer saves."""
        return True

    def settle(self) -> bool:
        """Nothing is being saved."""
        return True

    def save_row(self, step: int, values: np.ndarray) -> None:
        """The writer keeps it."""

    def read_row(self, step: int) -> np.ndarray | None:
        """None is kept here."""
        return None

    def fail(self, step: int, error: str) -> None:
        """The writer records it."""

    def last_checkpoint(self) -> str:
        """Where to look."""
        return f"Process 0 has the checkpoints, in {self.folder}."

    def write_calibration(self, calibration: Calibration) -> None:
        """The writer does."""
