"""Ctrl-C and SIGTERM: what a training has done is saved before they end it, within seconds and wherever it is."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ECHO_SECONDS = 1.0
"""A second Ctrl-C so soon is the first: torchrun passes on to its processes what the terminal told them already."""


class BrokenOff(BaseException):
    """A signal came while nothing was done that a checkpoint holds. Like KeyboardInterrupt, it is nobody's to catch."""


class Interruption:
    """Receives SIGINT and SIGTERM in a training's stead.

    While a step changes the training they are only noted: the loop looks at ``received`` behind each. What takes long
    and changes nothing, such as validation, runs inside `may_break_off` and ends at once. A second Ctrl-C ends the
    program without saving; a second SIGTERM says nothing new.

    Attributes:
        received: the number of the first signal that came; 0 before.
    """

    def __init__(self) -> None:
        self.received = 0
        self._received_at = 0.0
        self._may_break_off = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Receive signals inside this block; outside the main thread they stay as they are."""
        previous = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[number] = signal.signal(number, self._receive)
        except ValueError:  # not in the main thread
            pass
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def may_break_off(self) -> Iterator[None]:
        """Raise `BrokenOff` where a signal comes inside this block, or came before it."""
        self._may_break_off = True
        try:
            if self.received:
                raise BrokenOff
            yield
        finally:
            self._may_break_off = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._received_at = number, time.monotonic()
            if self._may_break_off:
                raise BrokenOff
        elif number == signal.SIGINT and time.monotonic() - self._received_at > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)  # a shell sees 130
            raise SystemExit(128 + number)  # as process 1 of a container: the kernel spares it
