"""An end that somebody wants, instead of an accident: the loop ends its step, saves, and then stops."""

import signal
import time
from types import FrameType
from typing import Self

from mezzotint.errors import Ending


class Stopped(Ending):
    """A run was asked to stop. Everything is saved; the same command goes on from there.

    by_hand: whether a person asked, by Ctrl-C, and not the machine's scheduler or a deadline.
    """

    def __init__(self, message: str, by_hand: bool = True) -> None:
        super().__init__(message)
        self.by_hand, self.code = by_hand, 130 if by_hand else 0

    @property
    def told(self) -> str:
        return f"{self}; everything is saved, the same command goes on from there"


class StopRequest:
    """While active, `asked` is set by the first SIGINT or SIGTERM, or when `minutes` are over; a second SIGINT interrupts at once.

    minutes: from now on, 0 for no limit. A second SIGTERM is the first one again: launchers send it to whole groups of processes.
    """

    def __init__(self, minutes: float = 0.0) -> None:
        self.by_hand = self.signalled = False
        self.limit = time.monotonic() + 60 * minutes if minutes else float("inf")

    @property
    def asked(self) -> bool:
        return self.signalled or time.monotonic() >= self.limit

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.by_hand = self.by_hand or number == signal.SIGINT
        self.signalled = True

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
