"""Ctrl-C as a wish instead of an accident: the loop ends its step, saves, and then stops."""

import signal
from types import FrameType
from typing import Self


class Stopped(Exception):
    """The user asked a run to stop. Everything is saved; the same command goes on from there."""


class StopRequest:
    """While active, the first SIGINT or SIGTERM sets `asked`; a second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
