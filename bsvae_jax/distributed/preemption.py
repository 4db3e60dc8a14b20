"""Stopping on a signal without losing work: training goes on to the next row of metrics and is saved, then the process ends.

After the last step there is nothing to continue from: the evaluation goes on to its end.

SIGINT (Ctrl-C, a notebook's stop button) and SIGTERM (a scheduler, a preemptible machine about to go) are answered alike. A
second SIGINT quits at once. The command line exits with 128 + the signal's number: 130 and 143.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TRAINING = "finishing this step and saving"
EVALUATING = "the last training step is done, and its evaluation goes on to the end"


class Interrupted(KeyboardInterrupt):
    """A run stopped because a signal asked for it; what was done so far is saved, unless the message says that it could not be.

    >>> import signal
    >>> try:
    ...     raise Interrupted("stopped after step 10 of 100", signal.SIGTERM)  # as `fit` does
    ... except Interrupted as stopped:
    ...     print(f"{stopped}; exit status {128 + stopped.number}")
    stopped after step 10 of 100; exit status 143
    """

    def __init__(self, message: str, number: int):
        """`message` is for the user, `number` the signal's."""
        super().__init__(message)
        self.number = number


class Stop:
    """Whether a signal has asked to stop, and what it is answered."""

    answer = TRAINING

    def __init__(self) -> None:
        """Nobody has."""
        self.number: int | None = None

    def check(self, message: str) -> None:
        """Raise `Interrupted` if a signal has asked to stop."""
        if self.number is not None:
            raise Interrupted(message, self.number)

    def expect(self, answer: str) -> None:
        """What a signal is answered from now on, `TRAINING` or `EVALUATING`; one that has come is told that it is another."""
        changed, self.answer = answer != self.answer, answer
        if changed and self.number is not None:
            self.say(self.number)

    def say(self, number: int) -> None:
        """Answer a signal."""
        name = signal.Signals(number).name
        # Not print: a handler may run in the middle of another write to the same buffer.
        os.write(2, f"\n{name}: {self.answer}; Ctrl-C quits at once, losing what is not saved\n".encode())


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Within the block, the first signal is noted and the second one acts as if it had not been caught.

    Outside of the main thread, where signals cannot be caught, nothing changes.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        stop.number = number
        restore()
        stop.say(number)

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()
