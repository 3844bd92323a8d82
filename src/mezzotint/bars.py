"""Bars with time left, for whatever takes longer than a person likes to wait without a sign."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Show = Callable[[int, int | None], None]  # so much is done, of so much

ROOMY = 120  # columns of a terminal in which the newest numbers have a place beside the bar


def first_of_ranks() -> bool:
    """Whether this process speaks for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def bars(passing: bool = False) -> "Progress":
    """Bars with time left and the newest numbers, on stderr, so that stdout holds results only. Nothing is drawn before the first bar.

    passing: whether they go when their work is done.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column
    from rich.text import Text

    class Note(ProgressColumn):
        """The newest numbers of a run."""

        def render(self, task: Task) -> Text:
            return Text(task.fields.get("note", ""))

    class Bars(Progress):
        """Drawn from the first bar on, so that an error before it is one line and no more."""

        def start(self) -> None:
            if self.tasks:
                super().start()

        def stop(self) -> None:
            if self.live.is_started:
                super().stop()

        def add_task(self, *words: Any, **settings: Any) -> "TaskID":
            task = super().add_task(*words, **settings)
            self.start()
            return task

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        *([Note(Column(no_wrap=True))] if console.width >= ROOMY else []),
    )
    return Bars(*columns, console=console, disable=not first_of_ranks(), transient=passing)


def shown(progress: "Progress", name: str) -> Show:
    """A bar for one part of the work, which appears when there is something to show of it."""
    tasks = list["TaskID"]()

    def show(done: int, total: int | None) -> None:
        if not tasks:
            tasks.append(progress.add_task(name, total=total))
        progress.update(tasks[0], completed=done, total=total)

    return show
