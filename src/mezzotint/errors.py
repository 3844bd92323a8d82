"""What goes wrong through the user's hand or the outside world, as opposed to a defect of ours."""

from collections.abc import Iterable
from difflib import get_close_matches

SHOWN = 40  # names that an error lists


class UserError(Exception):
    """A mistake that its reader can mend: the message is one line that says what is wrong and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist; it names the nearest one that does."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.4)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names[:SHOWN])}{more}"
    return UserError(f"unknown {kind} {name!r}; {hint}")
