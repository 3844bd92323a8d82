"""Bars with time left, for whatever takes longer than a person likes to wait without a sign."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

ROOMY = 120  # columns of a terminal in which the newest numbers have a place beside the bar


def first_of_ranks() -> bool:
    """Whether this process speaks for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def bars() -> "Progress":
    """Bars with time left and the newest numbers, on stderr, so that stdout holds results only."""
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
    return Progress(*columns, console=console, disable=not first_of_ranks())
