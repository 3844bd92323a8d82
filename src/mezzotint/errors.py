"""What goes wrong through the user's hand or the outside world, as opposed to a defect of ours."""

from collections.abc import Iterable
from difflib import get_close_matches

MOST_KNOWN, MOST_LISTED = 40, 12  # names that an error lists: all recipes, and not all weights of a network


class Ending(Exception):
    """An end that is no defect of ours. The command line says it in one line, without a traceback, and exits with its code."""

    code = 1

    @property
    def told(self) -> str:
        """The line."""
        return f"error: {self}"


class UserError(Ending):
    """A mistake that its reader can mend: the message is one line that says what is wrong and what to do."""

    code = 2


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist; it names the nearest one that does."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {listed(names, MOST_KNOWN)}"
    return UserError(f"unknown {kind} {name!r}; {hint}")


def listed(names: Iterable[str], most: int = MOST_LISTED) -> str:
    """Names as an error lists them: the first ones, and how many more there are."""
    shown = list(names)
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more


def is_memory(error: BaseException) -> bool:
    """Whether an error is the end of memory. torch has a class for that of a GPU, and for that of the CPU only words."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
